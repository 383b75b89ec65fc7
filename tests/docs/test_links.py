"""Links in README and docs lead to files and headings that exist, on GitHub as on the site; each page is in its menu.

Addresses outside are not asked; `grep -rhoE 'https?://[^ )>"]+' README.md docs | sort -u` lists them.
"""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
CODE = re.compile(r"^ *```.*?^ *```|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def find_anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them, and those that it sets itself."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+?)(?: +\{ *#.*)?$", text, re.MULTILINE)
    shown = (re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", heading) for heading in headings)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in shown}
    return slugs | set(re.findall(r'<a (?:id|name)="([^"]+)"', text))


def find_menu(entries: Any) -> Iterator[str]:
    """Yield the pages of a menu."""
    for entry in entries:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else find_menu(value)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = CODE.sub("", page.read_text())
    wrong = []
    for link in re.findall(r"\]\(<?([^)>\s]+)>?\)|(?:src|href)=\"([^\"]+)\"", text):
        link = link[0] or link[1]
        if re.match(r"https://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        exists = target.exists() and ((page.name == "README.md" and page.parent == ROOT) or target.is_relative_to(DOCS))
        if not exists or (anchor and anchor not in find_anchors(target)):
            wrong.append(link)
    assert wrong == []


def test_every_page_is_in_the_menu_once():
    menu = sorted(find_menu(tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]))
    assert len(menu) == len(set(menu))
    assert set(menu) ^ {str(page.relative_to(DOCS)) for page in PAGES} == set(), "zensical.toml has the menu"
