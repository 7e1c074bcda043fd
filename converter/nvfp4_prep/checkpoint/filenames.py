"""File names: those with a meaning, and the check of those that come from outside."""

from __future__ import annotations

__all__ = ["CONFIG", "HF_QUANT_CONFIG", "INDEX", "MANIFEST", "README", "is_safe_name", "quoted"]

CONFIG = "config.json"
HF_QUANT_CONFIG = "hf_quant_config.json"
INDEX = "model.safetensors.index.json"
MANIFEST = "nvfp4_prep.json"
README = "README.md"


def is_safe_name(name: str) -> bool:
    """Whether a relative name, with forward slashes, is valid text and cannot lead out of the directory that it belongs
    to."""
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        return False  # from a name that is not UTF-8: no JSON file could carry it
    return not any(part in ("", ".", "..") for part in name.split("/")) and "\\" not in name and "\0" not in name


def quoted(name: str, limit: int = 200) -> str:
    """Return a name from outside for an error: in quotes, escaped, of bounded length."""
    return repr(name) if len(name) <= limit else f"{name[:limit]!r}…"
