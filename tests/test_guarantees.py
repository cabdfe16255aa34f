"""What docs/guarantees.md says can be looked up: every test that it names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
TEXT = (TESTS.parent / "docs" / "guarantees.md").read_text()
NAMED = re.compile(r"`(?:tests/)?([\w/]+\.py)::(\w+)`")


def test_every_test_that_is_named_exists() -> None:
    named = NAMED.findall(TEXT)
    assert len(named) > 40
    missing = [f"{path}::{name}" for path, name in named if name not in functions(TESTS / path)]
    assert not missing


def test_nothing_is_named_in_a_form_that_is_not_checked() -> None:
    assert len(re.findall(r"\btest_\w+(?!\w*\.py)\b(?!\.py)", TEXT)) == len(NAMED.findall(TEXT))


def functions(path: Path) -> set[str]:
    if not path.exists():
        return set()
    tree = ast.parse(path.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
