"""Text from outside (file names, configs, manifests, answers of the Hub), made safe to print on a terminal."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterable

__all__ = ["PrintableFormatter", "escape_logs", "join_lines", "mask_passwords", "printable", "printable_text"]

_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Control, format (bidirectional overrides, invisible characters), surrogates, line and paragraph separators."""
_JOINERS = frozenset("\u200c\u200d")
"""Zero-width joiners, which scripts and emoji need and which cannot reorder or hide anything."""
_USER_INFO = re.compile(r"(?<=://)[^/\s@]*@")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def printable(text: str) -> str:
    """Return ``text`` as one line without any character that a terminal obeys: each becomes a visible escape.

    Bytes of a file name that is not UTF-8 become ``\\xNN``. Printable characters stay, backslashes too, so the result
    is for reading; applying it twice changes nothing.
    """
    return _escaped(text, kept="")


def printable_text(text: str) -> str:
    """Return a text of several lines made by :func:`join_lines`, escaped but for its line breaks and tabs."""
    return _escaped(text, kept="\n\t")


def join_lines(lines: Iterable[str]) -> str:
    """Return one text of these lines, each made :func:`printable`: a line break in a name begins no line."""
    return "\n".join(map(printable, lines))


def mask_passwords(text: str) -> str:
    """Return ``text`` without user names and passwords of the addresses in it."""
    return _USER_INFO.sub("***@", text)


def _escaped(text: str, kept: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char in kept or _is_safe(char) else _escape(char) for char in text)


def _is_safe(char: str) -> bool:
    return char in _JOINERS or unicodedata.category(char) not in _UNSAFE


def _escape(char: str) -> str:
    code = ord(char)
    if char in _SHORT:
        return _SHORT[char]
    if 0xDC80 <= code <= 0xDCFF:  # a byte that os.fsdecode could not decode
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class PrintableFormatter(logging.Formatter):
    """Formatter of log lines, ours and those of the Hub's client, which quote what a server said.

    A record is one line, and a traceback below it: a line break in a message cannot begin a line that looks like
    another record.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        return printable_text(mask_passwords(super().format(record)))


def escape_logs(handlers: list[logging.Handler] | None = None) -> None:
    """Make printable what these log handlers, and the one that takes what nobody else does, write on stderr."""
    for handler in [*(handlers or []), *([logging.lastResort] if logging.lastResort else [])]:
        handler.setFormatter(PrintableFormatter())
