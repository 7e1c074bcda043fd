"""Errors of the official client, told apart: those that pass by themselves, and those that need the user."""

from __future__ import annotations

import errno
import importlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

from nvfp4_prep._util.printable import mask_passwords
from nvfp4_prep.errors import HubError, NoSpaceError, NvfpPrepError, UsageError

__all__ = [
    "AGAIN",
    "Patience",
    "hub_errors",
    "is_conflict",
    "is_transient",
    "limit_waiting",
    "malformed",
    "persist",
    "translate",
    "well_formed",
]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})
_FIRST_CONTACT_S = 60.0
_READ_S = 300.0
"""Seconds without a byte after which a request has failed."""
_UNRESOLVED_S = 2.0
_CHECK_ADDRESS = "Check HF_ENDPOINT, proxies and firewalls."
_BAD_ADDRESS = frozenset({"InvalidURL", "UnsupportedProtocol"})
_BAD_HEADER = frozenset({"LocalProtocolError", "UnicodeEncodeError"})
AGAIN = "Run the same command again: it continues where it stopped."
_ONCE_MORE = "Run the same command again."


@dataclass(frozen=True)
class Patience:
    """The time for which a failing network is endured.

    Waits double from ``first_wait_s`` to ``longest_wait_s``; without any progress for ``give_up_after_s`` the last
    failure is reported. The official client's own retries (seconds) come on top, inside each attempt.
    """

    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0
    give_up_after_s: float = 1800.0
    is_first_contact: bool = False

    def at_first_contact(self) -> Patience:
        """Return a shorter patience for the first request: a wrong name or no network is likelier than an outage."""
        return replace(self, give_up_after_s=min(self.give_up_after_s, _FIRST_CONTACT_S), is_first_contact=True)


@cache
def _transport_error() -> type[Exception]:
    """Return ``TransportError`` of the HTTP library of the installed client (httpx in 1.x, httpx2 in 2.x)."""
    from huggingface_hub.errors import HfHubHTTPError

    for base in HfHubHTTPError.__mro__:
        package = base.__module__.split(".")[0]
        if package.startswith("httpx"):
            kind = importlib.import_module(package).TransportError
            return kind if isinstance(kind, type) and issubclass(kind, Exception) else ConnectionError
    return ConnectionError


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Return the error and its causes: the client wraps upload failures in RuntimeError and metadata failures in
    LocalEntryNotFoundError.
    """
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__


def is_transient(error: BaseException) -> bool:
    """Return whether the same request may well succeed later."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    for item in _chain(error):
        if isinstance(item, OfflineModeIsEnabled) or type(item).__name__ in _BAD_ADDRESS | _BAD_HEADER:
            return False
        if isinstance(item, HfHubHTTPError):
            return item.response.status_code in _TRANSIENT_STATUS
        if isinstance(item, (_transport_error(), ConnectionError, TimeoutError)):
            return True
        if isinstance(item, OSError) and "Consistency check failed" in str(item):
            return True  # the client: fewer or more bytes than announced
        if isinstance(item, RuntimeError) and "client has been closed" in str(item):
            return True  # the client closes its shared session when one of its threads cannot connect
    return False


def _is_unresolved(error: BaseException) -> bool:
    """Return whether a host name has no address: where nothing ever worked, waiting does not help."""
    current: BaseException | None = error
    for _ in range(10):
        if current is None or isinstance(current, socket.gaierror):
            break
        current = current.__cause__ or current.__context__  # the HTTP library chains by context only
    return isinstance(current, socket.gaierror)


def is_conflict(error: BaseException) -> bool:
    """Return whether a commit was refused because the branch is not where it was expected."""
    from huggingface_hub.errors import HfHubHTTPError

    return any(isinstance(item, HfHubHTTPError) and item.response.status_code == 412 for item in _chain(error))


def persist(
    action: Callable[[], _T],
    *,
    what: str,
    patience: Patience,
    progress: Callable[[], int] = lambda: 0,
    stop: threading.Event | None = None,
) -> _T:
    """Run ``action`` until it succeeds, fails for good, or has failed without progress for too long.

    Args:
        action: may be repeated.
        what: names it in log lines and in the final error.
        patience: see :class:`Patience`.
        progress: any counter; a change resets waits and the limit.
        stop: set to end the waiting.

    Raises:
        HubError: after the last attempt, or if ``stop`` was set.
    """
    wait_s, mark, since = patience.first_wait_s, progress(), time.monotonic()
    while True:
        try:
            return action()
        except Exception as error:
            if not is_transient(error):
                raise
            if (now := progress()) != mark:
                wait_s, mark, since = patience.first_wait_s, now, time.monotonic()
            waited_s = time.monotonic() - since
            first = patience.is_first_contact
            limit_s = _UNRESOLVED_S if first and _is_unresolved(error) else patience.give_up_after_s
            if waited_s + wait_s > limit_s:
                raise HubError(
                    f"{what} failed for {waited_s:.0f} s without progress ({_brief(error)})",
                    next_step=f"{_CHECK_ADDRESS} {_ONCE_MORE}" if first else AGAIN,
                ) from error
            _log.warning("%s: %s; next attempt in %.0f s", what, _brief(error), wait_s)
            if (stop or threading.Event()).wait(wait_s):
                raise HubError(f"{what} was stopped", next_step=AGAIN) from error
            wait_s = min(2 * wait_s, patience.longest_wait_s)


def _brief(error: BaseException) -> str:
    lines = [line.strip() for line in mask_passwords(str(error)).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def translate(error: BaseException, where: str, again: str = AGAIN) -> NvfpPrepError | None:
    """Return the typed error for what the client raised about ``where``; None where it is not the client's.

    Args:
        error: what it raised.
        where: repository or file.
        again: the sentence about running the command again.
    """
    from huggingface_hub import errors as hub

    for item in _chain(error):
        if isinstance(item, NvfpPrepError):
            return item
        if type(item).__name__ in _BAD_HEADER:  # the message would quote the token
            return HubError(
                "the access token has characters that no token has",
                where=where,
                next_step="Set HF_TOKEN anew, or log in with: hf auth login.",
            )
        if type(item).__name__ in _BAD_ADDRESS:
            return HubError(f"has no usable address ({_brief(item)})", where=where, next_step=_CHECK_ADDRESS)
        if isinstance(item, hub.HFValidationError):
            return UsageError("is not a valid repository id", where=where, expected="ORG/NAME", actual=_brief(item))
        if isinstance(item, hub.OfflineModeIsEnabled):
            return HubError(
                "HF_HUB_OFFLINE is set, and this needs the Hub",
                where=where,
                next_step="Unset it, or give the directory of a downloaded snapshot.",
            )
        if isinstance(item, hub.HfHubHTTPError):
            return _translate_http(item, where, again)
        if isinstance(item, OSError) and item.errno == errno.ENOSPC:
            return NoSpaceError("no space left while downloading", where=where, next_step=f"Free disk space. {AGAIN}")
        if isinstance(item, hub.FileMetadataError):
            return HubError(
                f"the answer did not come from a Hub ({_brief(item)})",
                where=where,
                next_step=_CHECK_ADDRESS,
            )
    if is_transient(error):
        return HubError(f"the Hub could not be reached ({_brief(error)})", where=where, next_step=again)
    return None


def _translate_http(error: Exception, where: str, again: str) -> HubError:
    from huggingface_hub import errors as hub

    status = error.response.status_code if isinstance(error, hub.HfHubHTTPError) else 0
    if isinstance(error, hub.GatedRepoError):
        what, step = "is gated and your token has no access", "Ask for access on the model's page, then: hf auth login"
    elif isinstance(error, hub.DisabledRepoError):
        what, step = "is disabled on the Hub", "Choose another repository."
    elif status == 401 and "Invalid" in str(error) + (error.response.text if hasattr(error, "response") else ""):
        what, step = "your token is invalid or has expired", f"Log in with: hf auth login. {again}"
    elif isinstance(error, hub.RepositoryNotFoundError):
        what = "does not exist on the Hub, or is private and your token cannot see it"
        step = (
            "Check the spelling (a directory of that name is not here either); for a private repository: hf auth login,"
            " or set HF_TOKEN."
        )
    elif isinstance(error, hub.RevisionNotFoundError):
        what, step = "has no such revision", "Give a branch, a tag or a full commit hash that the repository has."
    elif isinstance(error, hub.EntryNotFoundError):
        what, step = "lacks a file that it listed before", "Run the same command again with a fixed commit."
    elif status in (401, 403):
        what, step = (
            f"the Hub refused access ({status}: {_brief(error)})",
            "Use a token that may do this: hf auth login.",
        )
    else:
        what, step = f"the Hub answered {status} ({_brief(error)})", again
    return HubError(what, where=where, next_step=step)


@contextmanager
def hub_errors(where: str, *, begun: bool = True) -> Iterator[None]:
    """Turn the client's exceptions into ours; everything else passes. Only what has ``begun`` can continue."""
    try:
        yield
    except NvfpPrepError:
        raise
    except Exception as error:
        translated = translate(error, where, AGAIN if begun else _ONCE_MORE)
        if translated is None:
            raise
        raise translated from error


@contextmanager
def well_formed(repo_id: str) -> Iterator[None]:
    """Turn what the client raises about an answer of other types than the Hub's into a :class:`HubError`."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (NvfpPrepError, HFValidationError, UnicodeEncodeError):
        raise
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise malformed(repo_id, "the answer", f"{type(error).__name__}: {error}") from error


def malformed(where: str, what: str, actual: object) -> HubError:
    """Return the error for a value of an answer that is not what a Hub gives."""
    return HubError(
        f"{what} in the Hub's listing is malformed",
        where=where,
        actual=mask_passwords(repr(actual))[:200],
        next_step=_CHECK_ADDRESS,
    )


def limit_waiting() -> None:
    """Give the client's shared session timeouts: its default is to wait for ever, which no unattended run may.

    For programs (the command line), not for libraries: the session belongs to the whole process.
    """
    from huggingface_hub import get_session, set_client_factory

    current = get_session()
    kind, hooks = type(current), current.event_hooks
    set_client_factory(lambda: kind(event_hooks=hooks, follow_redirects=True, timeout=_READ_S))
