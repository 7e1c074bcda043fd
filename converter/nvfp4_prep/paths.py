"""File names that come from outside."""

from __future__ import annotations

__all__ = ["is_safe_name"]


def is_safe_name(name: str) -> bool:
    """Whether a relative name, with forward slashes, cannot lead out of the directory that it belongs to."""
    return not any(part in ("", ".", "..") for part in name.split("/")) and "\\" not in name and "\0" not in name
