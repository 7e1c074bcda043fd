"""Builds the documentation site from README.md and docs/*.md, strictly, without a network.

    make docs                                    build/docs/site, in an environment of its own
    .venv-docs/bin/python docs/site/build.py     the same, once that environment is there

The pages are the ones that a clone has: they are copied, their links are turned into links of the site, and what they
link to outside the documentation becomes a page with its text. A link or an anchor that leads nowhere fails the build.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

SITE = Path(__file__).resolve().parent
ROOT = SITE.parent.parent
sys.path[:0] = [str(SITE), str(ROOT / "converter")]

from check_site import problems_of  # noqa: E402
from gather_pages import write_pages  # noqa: E402
from reference_pages import api_page, command_line_page  # noqa: E402


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "build" / "docs", help="written anew")
    sys.exit(build(parser.parse_args().folder))


def build(folder: Path) -> int:
    """Write ``folder/pages`` and ``folder/site``, and return the exit code."""
    shutil.rmtree(folder, ignore_errors=True)
    pages = folder / "pages"
    pages.mkdir(parents=True)
    config = (SITE / "zensical.toml").read_text(encoding="utf-8").replace("@ROOT@", ROOT.as_posix())
    (folder / "zensical.toml").write_text(config, encoding="utf-8")
    shutil.copy(SITE / "style.css", pages / "style.css")
    write_pages(ROOT, pages)
    (pages / "api.md").write_text(api_page(ROOT), encoding="utf-8")
    (pages / "cli.md").write_text(command_line_page(ROOT), encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(folder / "zensical.toml")]
    done = subprocess.run(command, check=False)
    if done.returncode:
        return done.returncode
    problems = problems_of(folder / "site")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    print(f"{folder / 'site'}: {sum(1 for _ in (folder / 'site').rglob('*.html'))} pages, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    main()
