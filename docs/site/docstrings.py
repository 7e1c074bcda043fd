"""A griffe extension: docstrings written for editors, as mkdocstrings wants them."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":[a-z]+:`(~?)([^`]+)`")
_SHARED = re.compile(r"^([ ]*)(\w+(?:, \w+)+)(: .*\n?(?:\1[ ]+.*\n?)*)", re.MULTILINE)


def plain(text: str) -> str:
    """Return a docstring with ``:class:`~a.b.C` `` as `C` in code marks, and a line of its own for each of the
    arguments or errors that share one."""
    text = _ROLE.sub(lambda role: f"`{role[2].rsplit('.', 1)[-1] if role[1] else role[2]}`", text)
    start = re.search(r"^(Args|Raises|Attributes):$", text, re.MULTILINE)
    if start is None:
        return text
    return text[: start.start()] + _SHARED.sub(_one_each, text[start.start() :])


def _one_each(entry: re.Match[str]) -> str:
    rest = entry[3] if entry[3].endswith("\n") else f"{entry[3]}\n"
    return "".join(f"{entry[1]}{name}{rest}" for name in entry[2].split(", "))


class EditorDocstrings(griffe.Extension):
    """The rewriting, at every object that griffe has read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object in place."""
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)
