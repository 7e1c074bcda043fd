"""What the built site must hold beyond zensical's own check: links of its HTML, and nothing from another host."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    """The anchors of a page, what it links to, and what a browser fetches to show it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.assets: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") in ("stylesheet", "icon", "preload"):
            self.assets.append(found["href"])
        elif tag in ("img", "script", "iframe", "source") and "src" in found:
            self.assets.append(found["src"])


def problems_of(site: Path) -> list[str]:
    """Return a line for each broken link, missing asset, and asset of another host."""
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    problems = []
    for path, page in pages.items():
        name = path.relative_to(site).as_posix()
        for target in page.assets:
            if urlsplit(target).netloc:
                problems.append(f"{name}: fetches {target} from another host")
        for target in (*page.assets, *page.links):
            if not _leads_somewhere(site, path, target, pages):
                problems.append(f"{name}: {target} leads nowhere")
    return problems


def _leads_somewhere(site: Path, path: Path, target: str, pages: dict[Path, _Page]) -> bool:
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        return True
    place = unquote(parts.path)
    file = path if not place else (site / place[1:] if place.startswith("/") else path.parent / place).resolve()
    if file.is_dir():
        file /= "index.html"
    if not file.is_file():
        return False
    fragment = unquote(parts.fragment)
    return not fragment or file not in pages or fragment in pages[file].anchors
