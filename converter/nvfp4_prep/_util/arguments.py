"""The one check of what the Python API is given: arguments of its functions, and fields of its option classes.

Every argument has a :class:`Kind`. It takes a value for what it means (a name for the enum's member, a text for the
path), or the call ends with one typed error that names the argument, before any work.
"""

from __future__ import annotations

import enum
import errno
import functools
import inspect
import numbers
import os
from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from nvfp4_prep.errors import UsageError

__all__ = [
    "ADDRESS",
    "ANYTHING",
    "CALLABLE",
    "COUNT",
    "DEVICE",
    "DEVICES",
    "FLAG",
    "MAX_THREADS",
    "PATH",
    "PROGRESS",
    "RUNNING",
    "SOURCE",
    "TEXT",
    "THREADS",
    "Kind",
    "check_fields",
    "checked",
    "either",
    "instance",
    "integer",
    "member",
    "offering",
    "one_of",
    "optional",
    "sequence",
]

MAX_THREADS = 1024
"""More is a mistake: each worker takes memory, and a process has a few thousand threads."""
_P = ParamSpec("_P")
_R = TypeVar("_R")
_NO_PATH = (errno.ENAMETOOLONG, errno.ELOOP)
"""What the system says of a path that nothing can be read from or written to."""


class _UnfitError(ValueError):
    """A value that is not taken, with the reason."""


@dataclass(frozen=True)
class Kind:
    """Rule for one argument: the values it takes and how an error names them.

    Attributes:
        expected: for the error.
        take: returns what a value means; raises ``TypeError`` or ``ValueError`` for one of another kind.
    """

    expected: str
    take: Callable[[Any], Any]

    def read(self, name: str, value: object) -> Any:
        """Return what a value means.

        Args:
            name: what the error calls it: ``argument threads``, ``option --report``.
            value: as it was given.

        Raises:
            UsageError: if it is of another kind.
        """
        try:
            return self.take(value)
        except _UnfitError as error:
            what = f"{name} is wrong ({error})"
        except (TypeError, ValueError):
            what = f"{name} is wrong"
        raise UsageError(what, expected=self.expected, actual=_shown(value))


def checked(**kinds: Kind) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorate a public function: its arguments are checked, and taken for what they mean, before it is called.

    Args:
        kinds: of all arguments, by name.

    Raises:
        TypeError: when the function is defined, unless every argument has a kind.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        signature = inspect.signature(function)
        if kinds.keys() != signature.parameters.keys():
            raise TypeError(f"{function.__name__}: kinds of other arguments: {kinds.keys() ^ signature.parameters}")

        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            bound = signature.bind(*args, **kwargs)
            for name, value in bound.arguments.items():
                bound.arguments[name] = kinds[name].read(f"argument {name}", value)
            return function(*bound.args, **bound.kwargs)

        return call

    return decorate


def check_fields(made: object, /, **kinds: Kind) -> None:
    """Check fields of a frozen dataclass when it is made; each becomes what its value means."""
    for name, kind in kinds.items():
        # a frozen dataclass lets only object.__setattr__ replace what was given
        object.__setattr__(made, name, kind.read(f"option {name}", getattr(made, name)))


def optional(kind: Kind) -> Kind:
    """Return a kind that takes None too."""
    return Kind(f"{kind.expected}, or None", lambda value: None if value is None else kind.take(value))


def either(*kinds: Kind) -> Kind:
    """Return a kind that takes what one of several takes; the first one that does decides what it means."""

    def take(value: Any) -> Any:
        reason: ValueError | None = None
        for kind in kinds:
            try:
                return kind.take(value)
            except _UnfitError as error:
                reason = error
            except (TypeError, ValueError):
                continue
        raise reason or ValueError

    return Kind(" or ".join(kind.expected for kind in kinds), take)


def instance(kind: type[object]) -> Kind:
    """Return the kind of a class's instances."""
    return Kind(kind.__name__, lambda value: _require(isinstance(value, kind), value))


def offering(what: str, *members: str) -> Kind:
    """Return the kind of objects that have these members, whatever their class: a protocol."""
    return Kind(what, lambda value: _require(all(hasattr(value, member) for member in members), value))


def integer(least: int, most: int | None = None) -> Kind:
    """Return the kind of whole numbers within bounds, numpy's too, which become ``int``; True is not one of them."""

    def take(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError
        number = int(value)
        _require(number >= least and (most is None or number <= most), value)
        return number

    return Kind(f"a whole number from {least} {'on' if most is None else f'to {most}'}", take)


def one_number_of(*choices: int) -> Kind:
    """Return the kind of some whole numbers."""
    inner = integer(min(choices), max(choices))
    return Kind(" or ".join(map(str, choices)), lambda value: _require(inner.take(value) in choices, int(value)))


def member(kind: type[enum.StrEnum]) -> Kind:
    """Return the kind of an enum's members and their values."""
    return Kind(" or ".join(repr(choice.value) for choice in kind), kind)


def one_of(*choices: str) -> Kind:
    """Return the kind of some texts."""
    expected = " or ".join(map(repr, choices))
    return Kind(expected, lambda value: _require(isinstance(value, str) and value in choices, value))


def sequence(kind: Kind, what: str, *, least: int = 1) -> Kind:
    """Return the kind of collections of at least so many, which become tuples; sets in ascending order."""

    def take(value: Any) -> tuple[Any, ...]:
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, Collection) or len(value) < least:
            raise TypeError
        items = tuple(kind.take(item) for item in value)
        return tuple(sorted(items)) if isinstance(value, Set) else items

    return Kind(what, take)


def _require(fits: bool, value: Any) -> Any:
    if not fits:
        raise TypeError
    return value


def _path(value: Any) -> Path:
    text = os.fspath(value)
    if not isinstance(text, str):
        raise TypeError
    _check_text(text)
    try:
        Path(text).stat()
    except UnicodeEncodeError as error:
        raise _UnfitError("the file system cannot have this name") from error
    except OSError as error:
        if error.errno in _NO_PATH:
            raise _UnfitError(error.strerror) from error
    return value if isinstance(value, Path) else Path(text)


def _address(value: Any) -> str | Path:
    """Return a text as it is, because it may be a Hub id, and anything else as a path."""
    path = _path(value)
    return value if isinstance(value, str) else path


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    _check_text(value)
    return value


def _check_text(text: str) -> None:
    if not text or "\0" in text:
        raise _UnfitError("it holds a NUL character" if text else "it is empty")


def _shown(value: object) -> str:
    try:
        return repr(value)[:80]
    except Exception:  # a number of more digits than Python prints, or an object whose own code fails
        return f"a value of type {type(value).__name__} that cannot be printed"


ANYTHING = Kind("anything", lambda value: value)
"""Of arguments that the function itself checks, because it takes more than a kind can say."""
TEXT = Kind("a text", _text)
PATH = Kind("a path", _path)
"""A text or a path; becomes a :class:`~pathlib.Path`, which may not exist, but could."""
ADDRESS = Kind("a path or a Hub id", _address)
"""As :data:`PATH`, but texts stay texts: where nothing has that name, ``ORG/NAME`` is on the Hub."""
SOURCE = either(
    ADDRESS, offering("an opened source", "label", "revision", "files", "header", "peek", "read_into", "close")
)
DEVICES = ("cpu", "cuda")
"""Devices on which a conversion can apply the layout."""
DEVICE = one_of(*DEVICES)
FLAG = Kind("True or False", lambda value: _require(isinstance(value, bool), value))
COUNT = integer(1)
THREADS = integer(1, MAX_THREADS)
CALLABLE = Kind("a function", lambda value: _require(callable(value), value))
PROGRESS = offering("an object with start, advance and close", "start", "advance", "close")
RUNNING = {"threads": optional(THREADS), "memory_nbytes": optional(COUNT), "progress": optional(PROGRESS)}
"""Kinds of the arguments that every function has which goes through all bytes."""
