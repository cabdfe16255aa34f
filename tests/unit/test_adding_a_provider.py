"""The page for those who add a provider: its skeleton runs, and reads its own sample as the page says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.usage_samples import read_call, sliced

from sidecar.usage.providers.table import ROWS, Row
from sidecar.usage.readers import UsageTaps

PAGE = (Path(__file__).parents[2] / "docs" / "adding-a-provider.md").read_text()
JSON = [(b"Content-Type", b"application/json")]


def block(language: str, number: int = 0) -> str:
    """One of the page's code blocks, without its indentation."""
    found = re.findall(rf"^   ```{language}\n(.*?)^   ```$", PAGE, re.DOTALL | re.MULTILINE)[number]
    return re.sub(r"^ {3}", "", found, flags=re.MULTILINE)


def skeleton() -> tuple[Row, bytes, dict[str, Any]]:
    names: dict[str, Any] = {"__name__": "acme", "Row": Row}
    exec(compile(block("python"), "acme.py", "exec"), names)
    row = eval(block("python", 1), names)
    promised = re.search(r"that is `(.*?)`", PAGE, re.DOTALL)
    assert promised is not None
    return row, block("json").encode(), json.loads("{" + promised[1] + "}")


@pytest.mark.parametrize("path", ["/acme/write", "/behind/a/gateway"])
def test_the_skeleton_reads_the_sample_of_the_page(path: str) -> None:
    row, body, promised = skeleton()
    taps = UsageTaps(rows=(*ROWS, row))
    for pieces in ([body], sliced(body, 1)):
        usage = read_call(taps, "POST", path, JSON, b'{"engine":"quill"}', 200, JSON, pieces)
        assert usage is not None
        assert {name: getattr(usage, name) for name in promised} == promised
        assert (usage.provider, usage.model, usage.response_id) == ("acme", "quill-2", "c-17")
        assert usage.finish_reasons == ["done"]


def test_the_page_names_files_that_are_there() -> None:
    root = Path(__file__).parents[2]
    named = set(re.findall(r"`((?:sidecar|docs|tests)/[\w/.\-]+)`", PAGE))
    assert len(named) >= 5
    assert not [name for name in named if not (root / name).exists()]
