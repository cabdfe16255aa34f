"""The man page, made from the parser: `python tests/man_page.py` writes it (`make man`)."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from argparse_manpage.manpage import Manpage

import sidecar
from sidecar.cli import parser
from sidecar.cli.help import NAME, PAGES, SHARED_PAGES, walk, whereabouts

PAGE = Path(__file__).parent.parent / "docs" / f"{NAME}.1"
PREFIX = "the prefix that the package is installed under"


def written() -> str:
    """The page. It has no date and no place of this machine, so that it is the same wherever it is made."""
    os.environ["COLUMNS"] = "80"
    top = parser()
    for path, each in walk(top):
        if each.epilog:
            each.epilog = each.epilog.replace(whereabouts(), f"in {SHARED_PAGES} below {PREFIX}")
            if path:  # the page has the epilog of the program alone: what a command's says beside its examples moves up
                own = each.epilog.partition("examples:\n")[0].strip()
                each.description = "\n\n".join(filter(None, (each.description, own)))
    page = Manpage(top, format="pretty", _data={"project_name": NAME, "version": sidecar.__version__})
    page.description, page.manual, page.date = "meter and bill every call of an HTTP API", NAME, ""
    every = dict.fromkeys(one for shown in PAGES.values() for one in shown.examples)
    page.add_section("examples", ">", "\n".join(f"  {NAME} {one}" for one in every))
    return re.sub(r"[ \t]+$", "", _as_typed(str(page)), flags=re.MULTILINE).rstrip() + "\n"


def _as_typed(page: str) -> str:
    """Examples and usages keep their lines: without this, a man page runs them together."""
    lines: list[str] = []
    kept = False
    for line in page.splitlines():
        indented = line.startswith((" ", "usage: "))
        if indented != kept:
            lines.append(".nf" if indented else ".fi")
            kept = indented
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(written())
    sys.stdout.write(f"{PAGE.name}: {len(written().splitlines())} lines\n")
