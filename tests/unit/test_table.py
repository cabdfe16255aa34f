"""Aligned text."""

from __future__ import annotations

from sidecar.table import table


def test_aligns_groups_digits_and_shows_what_is_not_known() -> None:
    text = table(("who", "tokens", "model"), [("acme", 1234567, "gpt"), ("a", 0, None), (None, None, "claude")])
    assert text.splitlines() == [
        "who      tokens  model",
        "────  ─────────  ──────",
        "acme  1 234 567  gpt",
        "a             0  –",
        "–             –  claude",
    ]


def test_without_rows_there_is_still_a_head() -> None:
    assert table(("a", "bc"), []) == "a  bc\n─  ──"
