"""``python -m nvfp4_prep``: the command line where its script is not on the PATH."""

from __future__ import annotations

from nvfp4_prep.cli import main

if __name__ == "__main__":
    main()
