"""What the package's page says is the README, with links that lead somewhere from there.

In the repository the README links to files beside it. On the page of a package registry there are none, so a release
names the address under which the files can be read, and every link becomes an absolute one:

    METERING_SIDECAR_PAGES=https://git.example.com/metering-sidecar/blob/v1.2.3 python -m build

Without it no address is made up: a link becomes the name of the file, which the package has in `share/doc`. A ready
plug-in for such pages exists (hatch-fancy-pypi-readme); it takes an address from pyproject.toml only, and this project
has none that holds for every copy of it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

PAGES = "METERING_SIDECAR_PAGES"
PICTURE = re.compile(r'<a href="([^"]+)"><img src="[^"]+"[^>]* alt="([^"]+)"></a>')
LINK = re.compile(r"(!?)\[([^\]]+)\]\((?!https?://)([^)\s]+)\)")


def for_a_registry(text: str, pages: str) -> str:
    """The README's text with every relative link made absolute under `pages`; plain words where that is empty. Pictures
    become links to them: what is shown of a file's address is a page about it."""

    def instead(found: re.Match[str]) -> str:
        image, words, target = found.groups()
        path = f"README.md{target}" if target.startswith("#") else target
        if pages:
            return f"{image}[{words}]({pages.rstrip('/')}/{path})"
        return words if target.startswith("#") or words.strip("`") == target else f"{words} (`{target}`)"

    return LINK.sub(instead, PICTURE.sub(r"[\2](\1)", text))


class ReadmeHook(MetadataHookInterface):
    """Found by hatchling by its base class."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict[str, object]) -> None:
        text = Path(self.root, "README.md").read_text("utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": for_a_registry(text, os.environ.get(PAGES, "").strip()),
        }
