"""Lays the pages of the site together, as they stand in the repository.

`python tests/site_pages.py` does it (a part of `make site`).

Nothing is rewritten. Pages keep their places to each other, files that they link to are copied beside them, so that a
link holds here, in the repository and on the site alike.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLACE = ROOT / "build" / "pages"
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


def pages() -> list[Path]:
    """Every page, those at the top first."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def files() -> set[Path]:
    """Pages, and what they link to, pictures included."""
    found = set(pages())
    for page in pages():
        for link in LINK.findall(page.read_text("utf-8")):
            target = (page.parent / link).resolve()
            found |= {each for each in target.rglob("*") if each.is_file()} if target.is_dir() else {target}
    return found


def main() -> None:
    shutil.rmtree(PLACE, ignore_errors=True)
    for file in files():
        to = PLACE / file.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, to)


if __name__ == "__main__":
    main()
