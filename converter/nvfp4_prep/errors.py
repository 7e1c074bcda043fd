"""Every failure that a user can cause, as a type, and the exit code that the command line gives it.

An error says what happened, where, what was expected, what was found and what to do next. The command line prints
it as it stands, so these texts are the user interface.
"""

from __future__ import annotations

from nvfp4_prep._util.text import bounded

__all__ = [
    "EXIT_CODES",
    "BusyError",
    "CheckpointError",
    "ConversionInterrupted",
    "HubError",
    "LoadError",
    "NoSpaceError",
    "NvfpPrepError",
    "OpenFilesError",
    "PartsMissingError",
    "ResumeConflictError",
    "ServingError",
    "SourceError",
    "TargetError",
    "UnsupportedCheckpointError",
    "UsageError",
    "VerificationError",
]


_WHAT_LIMIT, _VALUE_LIMIT = 2_000, 1_000
"""Characters of a sentence and of a value: both may quote what a config, an index or a server says."""
_PLACE_LIMIT = 10_000
"""Characters of a place or a command, which may have two paths of 4,096 bytes."""


class NvfpPrepError(Exception):
    """Base of all errors that are raised on purpose. Its texts are bounded, whatever was quoted in them.

    Attributes:
        what: one sentence.
        where: file, tensor or layer, where there is one.
        expected, actual: the two values that disagree, where there are two.
        next_step: what the user can do.
    """

    exit_code = 1
    meaning = "unexpected failure"

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: object | None = None,
        actual: object | None = None,
        next_step: str | None = None,
    ) -> None:
        self.what = bounded(what, _WHAT_LIMIT)
        self.where = None if where is None else bounded(where, _PLACE_LIMIT)
        self.expected = None if expected is None else bounded(str(expected), _VALUE_LIMIT)
        self.actual = None if actual is None else bounded(str(actual), _VALUE_LIMIT)
        self.next_step = None if next_step is None else bounded(next_step, _PLACE_LIMIT)
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        if self.expected is not None:
            text += f"; expected {self.expected}"
        if self.actual is not None:
            text += f"{',' if self.expected is not None else ';'} found {self.actual}"
        return text + (f". {self.next_step}" if self.next_step else "")

    def to_dict(self) -> dict[str, object]:
        """Return the error for ``--json``."""
        return {
            "error": type(self).__name__,
            "what": self.what,
            "where": self.where,
            "expected": self.expected,
            "actual": self.actual,
            "next_step": self.next_step,
            "exit_code": self.exit_code,
        }


class UsageError(NvfpPrepError):
    """Options that do not fit together or name something that does not exist."""

    exit_code = 2
    meaning = "wrong usage"


class SourceError(NvfpPrepError):
    """The source cannot be read: missing, truncated, malformed or unsafe files."""

    exit_code = 3
    meaning = "source unreadable or malformed"


class UnsupportedCheckpointError(NvfpPrepError):
    """The source is readable, but holds nothing that this layout can represent, or something that it must not."""

    exit_code = 4
    meaning = "checkpoint not supported"


class NoSpaceError(NvfpPrepError):
    """The target's file system has too little room."""

    exit_code = 5
    meaning = "not enough disk space"


class VerificationError(NvfpPrepError):
    """The prepared checkpoint is not what it claims to be."""

    exit_code = 6
    meaning = "verification failed"


class CheckpointError(VerificationError):
    """The directory given as prepared checkpoint is not one, or is incomplete."""


class ResumeConflictError(NvfpPrepError):
    """The target holds an unfinished conversion of something else or with other options."""

    exit_code = 7
    meaning = "resume conflict"


class TargetError(NvfpPrepError):
    """The target cannot be written: not empty, not writable, inside the source."""

    exit_code = 8
    meaning = "target not usable"


class BusyError(NvfpPrepError):
    """Another run works on the same target."""

    exit_code = 9
    meaning = "target busy"


class HubError(NvfpPrepError):
    """The Hugging Face Hub refused or could not be reached."""

    exit_code = 10
    meaning = "Hub access failed"


class LoadError(NvfpPrepError):
    """A prepared tensor could not be read into its parameter: the load is void, whatever was filled before."""

    exit_code = 12
    meaning = "loading failed"


class OpenFilesError(LoadError):
    """This process, or the system, may open no more files, which says nothing about any file.

    Whoever loads tensors catches it as :class:`LoadError`; a command ends as with all that the system refuses.
    """

    exit_code = NvfpPrepError.exit_code
    meaning = NvfpPrepError.meaning


class ServingError(NvfpPrepError):
    """A prepared checkpoint cannot be served as asked: by this server, backend, parallel size or from these files."""

    exit_code = 11
    meaning = "cannot be served like this"


class PartsMissingError(NvfpPrepError):
    """Parts of a conversion are to be joined, but layers are missing."""

    exit_code = 13
    meaning = "parts missing"


class ConversionInterrupted(NvfpPrepError):
    """Ctrl-C or SIGTERM; what is finished stays."""

    exit_code = 130
    meaning = "interrupted"


EXIT_CODES: dict[int, str] = {
    0: "success",
    **{
        kind.exit_code: kind.meaning
        for kind in (
            NvfpPrepError,
            UsageError,
            SourceError,
            UnsupportedCheckpointError,
            NoSpaceError,
            VerificationError,
            ResumeConflictError,
            TargetError,
            BusyError,
            HubError,
            LoadError,
            ServingError,
            PartsMissingError,
            ConversionInterrupted,
        )
    },
}
"""Exit code to meaning, as ``nvfp4-prep --help`` and the documentation list them."""
