"""Check that a built site needs no network: no page may load a script, style, font, image or frame from elsewhere.

    python docs/check_site.py site

Links that a reader may click are allowed to lead outside.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

LOADS = {
    "script": ("src",),
    "link": ("href",),
    "img": ("src", "srcset"),
    "iframe": ("src",),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
    "audio": ("src",),
    "object": ("data",),
    "embed": ("src",),
}
NOT_LOADED = {"canonical", "prev", "next", "alternate"}  # rel= of links that a browser only notes
_ELSEWHERE = re.compile(r"^\s*(https?:)?//", re.IGNORECASE)
_IN_STYLE = re.compile(r"""(?:url\(|@import)\s*["']?\s*((?:https?:)?//[^"')\s]+)""", re.IGNORECASE)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "link" and given.get("rel") in NOT_LOADED:
            return
        for name in LOADS.get(tag, ()):
            if _ELSEWHERE.match(given.get(name, "")):
                self.found.append(f"<{tag} {name}={given[name]}>")
        self.found += _IN_STYLE.findall(given.get("style", ""))
        if "mermaid" in given.get("class", "").split() or given.get("data-md-component") == "source":
            self.found.append(f"<{tag}>: the theme asks another host for diagrams and repositories")


def external(site: Path) -> Iterator[str]:
    """What the pages and style sheets of a site would load from another host, each with its file."""
    for path in sorted(site.rglob("*.html")):
        page, text = _Page(), path.read_text("utf-8")
        page.feed(text)
        styles = "".join(re.findall(r"<style[^>]*>(.*?)</style>", text, re.DOTALL))
        yield from (f"{path.relative_to(site)}: {found}" for found in [*page.found, *_IN_STYLE.findall(styles)])
    for path in sorted(site.rglob("*.css")):
        yield from (f"{path.relative_to(site)}: {found}" for found in _IN_STYLE.findall(path.read_text("utf-8")))


def main(folder: str) -> int:
    site = Path(folder)
    pages = len(list(site.rglob("*.html")))
    found = list(external(site))
    for line in found:
        print(line, file=sys.stderr)
    if not pages or found:
        print(f"{folder}: {pages} pages, {len(found)} resources from elsewhere", file=sys.stderr)
        return 1
    print(f"{folder}: {pages} pages, nothing is loaded from elsewhere")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
