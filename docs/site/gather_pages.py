"""The site's pages from the tree's: README, docs/*.md, the notebook, and every file that they link to."""

from __future__ import annotations

import posixpath
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from notebook_page import notebook_as_markdown

NAMES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "examples/notebook.ipynb": "notebook.md",
}
"""Pages that stand outside docs/, and their names on the site."""

_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_FENCE = re.compile(r"^\s*(```|~~~)")
_ITEM = re.compile(r"^ *(?:[-*]|\d+\.) ")
_INNER_ITEM = re.compile(r"^ {2,3}(?=(?:[-*]|\d+\.) )")
_LANGUAGES = {".py": "python", ".json": "json", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".sh": "bash"}


def page_names(root: Path) -> dict[str, str]:
    """Return, for each page of the tree, its name on the site."""
    names = {f"docs/{path.name}": path.name for path in sorted((root / "docs").glob("*.md"))}
    return names | {path: name for path, name in NAMES.items() if (root / path).is_file()}


def write_pages(root: Path, pages: Path) -> None:
    """Write all pages and pictures.

    Raises:
        SystemExit: if a page links to something that the tree does not have.
    """
    names = page_names(root)
    linked: dict[str, str] = {}

    def site_path(page: str, target: str) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        if path in names:
            return names[path]
        if path.startswith("docs/pictures/") and path.endswith(".svg"):
            return path.removeprefix("docs/")
        if path.startswith("..") or not (root / path).exists():
            raise SystemExit(f"error: {page} links to {target}, which does not exist")
        linked[path] = f"files/{path}/index.md" if (root / path).is_dir() else f"files/{path}.md"
        return linked[path]

    for page, name in names.items():
        text = (root / page).read_text(encoding="utf-8")
        if page.endswith(".ipynb"):
            text = notebook_as_markdown(text)
        (pages / name).write_text(as_site_markdown(text, lambda target, page=page: site_path(page, target)), "utf-8")
    shutil.copytree(
        root / "docs" / "pictures", pages / "pictures", ignore=shutil.ignore_patterns("*.py", "__pycache__")
    )
    for path in list(linked):
        _write_linked(root, pages, path)


def as_site_markdown(text: str, site_path: Callable[[str], str]) -> str:
    """Return Markdown as GitHub has it for Python-Markdown: links through ``site_path``, lists set apart from the
    paragraph before them, and inner lists indented by four. Code stays as it is."""
    lines: list[str] = []
    in_code = False
    for line in text.split("\n"):
        if _FENCE.match(line):
            in_code = not in_code
        elif not in_code:
            before = lines[-1] if lines else ""
            line = _INNER_ITEM.sub("    ", line)
            if _ITEM.match(line) and before.strip() and not _ITEM.match(before) and not before.startswith(" "):
                lines.append("")
            line = _LINK.sub(lambda link: _rewritten(link, site_path), line)
        lines.append(line)
    return "\n".join(lines)


def _rewritten(link: re.Match[str], site_path: Callable[[str], str]) -> str:
    target = link[2] if re.match(r"[a-z]+:", link[2]) else site_path(link[2])
    return f"{link[1]}{target}{link[3] or ''}{link[4]}"


def _write_linked(root: Path, pages: Path, path: str) -> None:
    """Write a page with the text of a file, or with a list of a folder's files and their pages."""
    source = root / path
    if not source.is_dir():
        _write_page(pages / f"files/{path}.md", path, _fenced(source))
        return
    files = sorted(file for file in source.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    items = []
    for file in files:
        name = file.relative_to(source).as_posix()
        _write_page(pages / f"files/{path}/{name}.md", f"{path}/{name}", _fenced(file))
        items.append(f"- [{name}]({name}.md)")
    _write_page(pages / f"files/{path}/index.md", path, "\n".join(items))


def _write_page(page: Path, title: str, text: str) -> None:
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"---\nsearch:\n  exclude: true\n---\n# {title}\n\n{text}\n", encoding="utf-8")


def _fenced(file: Path) -> str:
    text = file.read_text(encoding="utf-8").rstrip("\n")
    marks = "`" * (1 + max([2, *(len(run) for run in re.findall("`+", text))]))
    return f"{marks}{_LANGUAGES.get(file.suffix, 'text')}\n{text}\n{marks}"
