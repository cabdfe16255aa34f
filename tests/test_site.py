"""The site has every page, and its links lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import site_pages
import yaml

ROOT = Path(__file__).parent.parent
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
PAGES = site_pages.pages()


def named(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        for below in nav.values():
            yield from named(below)
    else:
        for below in nav:
            yield from named(below)


def test_the_navigation_names_every_page_once() -> None:
    found = list(named(CONFIG["nav"]))
    assert sorted(found) == sorted(str(page.relative_to(ROOT)) for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_is_on_the_site(page: Path) -> None:
    """A link may lead to a page, or to a file that is copied beside it; a folder would have no address of its own."""
    brought = site_pages.files()
    for link in site_pages.LINK.findall(page.read_text()):
        target = (page.parent / link).resolve()
        assert target.is_relative_to(ROOT), f"{link} leaves the repository"
        assert target in brought or (target.is_dir() and any(each.is_relative_to(target) for each in brought)), link


def test_no_page_asks_anybody_elses_server() -> None:
    assert CONFIG["theme"]["font"] is False
    assert not re.search(r"https?://", (ROOT / "mkdocs.yml").read_text())
