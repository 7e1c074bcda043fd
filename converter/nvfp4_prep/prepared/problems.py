"""Problems that a verification found."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field

from nvfp4_prep._util.text import bounded, count
from nvfp4_prep.checkpoint.filenames import CONFIG, MANIFEST
from nvfp4_prep.errors import NvfpPrepError, OpenFilesError

__all__ = ["FOREIGN", "Problem", "Problems", "renewal", "steps_for"]

FOREIGN = "Move away what is not part of the checkpoint."
"""Next step for a file that conversion did not write."""
_OTHER_SOURCE = (
    "Give the source that it was made from. If this is it, do not serve this checkpoint: remove it and convert again."
)
_NAMED = 4
"""Files that a next step names."""


def renewal(*names: str) -> str:
    """Return the next step for files of a prepared checkpoint that are not what its manifest says."""
    shown = [*names[:_NAMED], *([count(len(names) - _NAMED, "more file")] if names[_NAMED:] else [])]
    listed = " and ".join([*filter(None, [", ".join(shown[:-1])]), *shown[-1:]])
    return (
        f"Copy or download {listed} again; if that does not help, or this is the original, remove the directory and"
        " convert again."
    )


@dataclass(frozen=True)
class Problem:
    """One disagreement: where, what, the two values where there are two, and what helps where converting again would
    be the wrong advice; and the check that found it, as reports name it."""

    where: str
    what: str
    expected: str | None = None
    actual: str | None = None
    next_step: str | None = None
    check: str = field(default="", compare=False)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}"
        if self.expected is not None:
            text += f"; expected {self.expected}"
        if self.actual is not None:
            text += f", found {self.actual}"
        return text

    def to_dict(self) -> dict[str, str | None]:
        """Return the JSON value."""
        return asdict(self)


def steps_for(problems: Sequence[Problem], files: Collection[str], directory: str) -> str | None:
    """Return what helps against problems: the next step of each, and a renewal of the files that are damaged.

    Args:
        problems: what is wrong.
        files: names of the files that the manifest lists.
        directory: of the checkpoint, with which the problems' absolute paths begin.
    """
    if not problems:
        return None
    steps = [problem.next_step for problem in problems if problem.next_step is not None]
    unexplained = [problem for problem in problems if problem.next_step is None]
    here = [problem.where.removeprefix(f"{directory}/") for problem in unexplained if problem.check != "source"]
    own = {*files, MANIFEST, CONFIG}
    damaged = sorted({where for where in here if where in own})
    explained = {problem.where.removeprefix(f"{directory}/") for problem in problems if problem.next_step is not None}
    if damaged:  # all else may follow from it
        steps.insert(0, f"Do not serve this checkpoint. {renewal(*damaged)}")
    elif explained & own:  # all else may follow from that, too
        pass
    elif here:  # every file is what the manifest says: it describes a wrong conversion
        steps.insert(0, "Do not serve this checkpoint: remove it and convert again.")
    elif unexplained:
        steps.insert(0, _OTHER_SOURCE)
    return " ".join(dict.fromkeys(steps))


class Problems:
    """Collector of problems from several threads, for one check or for several that share what they found."""

    def __init__(self, check: str = "") -> None:
        self._check = check
        self._found: set[Problem] = set()
        self._lock = threading.Lock()

    def of(self, check: str) -> Problems:
        """Return the collector of another check, whose problems are found here too."""
        shared = Problems(check)
        shared._found, shared._lock = self._found, self._lock
        return shared

    def add(
        self, where: str, what: str, expected: object = None, actual: object = None, next_step: str | None = None
    ) -> None:
        """Note one problem, once."""
        where, what = bounded(where, 5_000), bounded(what, 2_000)
        problem = Problem(where, what, _text(expected), _text(actual), next_step, self._check)
        with self._lock:
            self._found.add(problem)

    def add_error(self, where: str, error: NvfpPrepError) -> None:
        """Note an error that stopped a check; one of this process and not of the checkpoint is raised."""
        if isinstance(error, OpenFilesError):
            raise error
        self.add(error.where or where, error.what, error.expected, error.actual)

    @property
    def found(self) -> tuple[Problem, ...]:
        """All problems, in a stable order."""
        with self._lock:
            return tuple(sorted(self._found, key=lambda problem: (problem.where, problem.what)))


def _text(value: object) -> str | None:
    return None if value is None else bounded(str(value), 1_000)
