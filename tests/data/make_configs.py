"""Makes tests/data/configs from published config files: copies, and MiniMax-M3's two of 3 MB trimmed to four experts.

    python tests/data/make_configs.py CONFIGS

Trimming drops the entries of ``quantized_layers`` for experts 4 and above, nothing else, and keeps the order of keys.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "configs"
_DROPPED = re.compile(r"\.experts\.(?:[4-9]|[0-9]{2,})\.")


def trimmed(value: Any) -> Any:
    """The value without the dropped entries, at any depth."""
    if isinstance(value, dict):
        return {key: trimmed(item) for key, item in value.items() if not _DROPPED.search(key)}
    return value


def main() -> None:
    """Copies or trims every file."""
    HERE.mkdir(exist_ok=True)
    for path in sorted(Path(sys.argv[1]).glob("*.json")):
        raw = path.read_bytes()
        if len(raw) > 1_000_000:
            raw = (json.dumps(trimmed(json.loads(raw)), indent=2) + "\n").encode()
        (HERE / path.name).write_bytes(raw)


if __name__ == "__main__":
    main()
