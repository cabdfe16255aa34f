"""`prices show` and `prices diff`: what they print, and when they say no."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sidecar.cli import main
from sidecar.prices.table import builtin

SOURCE = builtin().source


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "sidecar.toml"
    config.write_text("")
    monkeypatch.setenv("SIDECAR_CONFIG", str(config))
    monkeypatch.setenv("COLUMNS", "200")


def rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert main(["prices", *arguments, "--format", "json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_show_tells_every_price_that_is_in_force(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, "show", "gpt-5", "--provider", "openai", "--at", "2026-11-20")
    assert {(row["unit"], row["price"], row["per"]) for row in found if row["terms"] == "standard"} == {
        ("input", "1.25", 1_000_000),
        ("output", "10", 1_000_000),
        ("cache_read", "0.125", 1_000_000),
        ("web_searches", "10", 1000),
        ("storage_searches", "2.5", 1000),
    }
    assert {row["price"] for row in found if row["terms"] == "processing=batch" and row["unit"] == "input"} == {"0.625"}
    assert {(row["provider"], row["model"], row["match"], row["source"]) for row in found} == {
        ("openai", "gpt-5", "exact", SOURCE)
    }


def test_show_at_a_date_has_the_price_of_then(capsys: pytest.CaptureFixture[str]) -> None:
    for day, dollars in (("2025-06-01", "10"), ("2026-06-01", "2")):
        found = rows(capsys, "show", "o3", "--provider", "openai", "--at", day)
        assert [row["price"] for row in found if row["unit"] == "input" and row["terms"] == "standard"] == [dollars]


def test_show_has_tiers_with_where_they_begin_and_says_of_a_near_match(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prices", "show", "claude-sonnet-4-5-fancy", "--provider", "anthropic", "--at", "2026-01-01"]
    assert main(command) == 0
    out = capsys.readouterr().out
    heads, _, *lines = out.splitlines()
    assert heads.split() == ["provider", "model", "unit", "price", "per", "above", "terms", "match", "source"]
    assert ["anthropic", "claude-sonnet-4-5", "input", "6", "1,000,000", "200,000", "standard", "near", SOURCE] in [
        line.split() for line in lines
    ]


def test_show_of_all_providers_and_through_a_gateway(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"openai", "github-copilot"} <= {row["provider"] for row in rows(capsys, "show", "gpt-5-mini")}
    found = rows(capsys, "show", "anthropic/claude-opus-5")
    assert {"gateway"} == {row["match"] for row in found if row["provider"] == "anthropic"}


def test_show_puts_one_s_own_prices_first(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "sidecar.toml").write_text(
        '[[prices]]\nprovider = "openai"\nmodel = "gpt-5*"\ninput = "1.10"\n'
        '[[prices]]\nfor = "customer"\nprovider = "*"\nmodel = "*"\nmarkup = "1.2"\n'
    )
    first, second, *_ = rows(capsys, "show", "gpt-5", "--provider", "openai")
    assert (first["unit"], first["price"], first["match"], first["source"]) == ("input", "1.1", "own", "[[prices]] USD")
    assert (second["unit"], second["terms"]) == ("times 1.2 of the cost", "customer")


def test_show_tells_all_that_one_s_own_price_is_made_of(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "sidecar.toml").write_text(
        '[[prices]]\nprovider = "google"\nmodel = "gemini-*"\ninput = "1"\nminimum = "0.01"\n'
        'tiers = [{ above = 200, input = "3" }]\nmultipliers = { batch = "0.5" }\n'
    )
    for provider in ("gcp.vertex_ai", "google"):  # the record's word, and the table's
        found = rows(capsys, "show", "gemini-2.5-pro", "--provider", provider)
        own = [row for row in found if row["match"] == "own"]
        assert [(row["unit"], row["price"], row.get("above"), row["terms"]) for row in own] == [
            ("input", "1", None, "standard"),
            ("input", "3", 200, "standard"),
            ("input", "0.5", None, "batch"),
            ("input", "1.5", 200, "batch"),
            ("minimum", "0.01", None, "standard"),
        ]


def test_show_does_not_take_a_multiple_of_nothing_for_a_price(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "sidecar.toml").write_text(
        '[[prices]]\nfor = "customer"\nprovider = "*"\nmodel = "*"\nmarkup = "1.2"\n'
    )
    for command in (["no-such-model"], ["gpt-5", "--provider", "nobody"]):
        assert main(["prices", "show", *command]) == 1
        assert f"no price for {command[0]}" in capsys.readouterr().out


def test_show_of_what_has_no_price_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prices", "show", "no-such-model"]) == 1
    assert "no price for no-such-model: its calls are unpriced" in capsys.readouterr().out
    assert main(["prices", "show", "gpt-5", "--provider", "nobody"]) == 2
    assert "nobody is no provider" in capsys.readouterr().err
    assert main(["prices", "show", "no\nmodel\x1b[2J"]) == 1
    assert capsys.readouterr().out.startswith("no price for no\ufffdmodel\ufffd[2J: its calls")


def test_show_with_prices_that_cannot_be_used_names_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "sidecar.toml").write_text('[[prices]]\nmodel = "m"\ninput = 0.5\n')
    assert main(["prices", "show", "gpt-5"]) == 2
    said = capsys.readouterr().err
    assert "provider is missing" in said
    assert 'put it in quotes, "0.5"' in said


def test_diff_tells_what_a_file_has_otherwise(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, then = tmp_path / "now.json", tmp_path / "then.json"
    form = '[{"id":"p","api_pattern":"x","models":[{"id":"m","match":{"equals":"m"},"prices":%s}]}]'
    now.write_text(form % '{"input_mtok":1,"output_mtok":2}')
    then.write_text(form % '{"input_mtok":{"base":1,"tiers":[{"start":200000,"price":1.5}]},"output_mtok":2.0}')
    monkeypatch.setenv("SIDECAR_PRICES", str(now))
    assert rows(capsys, "diff", str(then)) == [
        {"provider": "p", "model": "m", "unit": "input", "now": "1", "then": "1 1.5>200000"}
    ]
    assert main(["prices", "diff", str(then)]) == 0
    assert "1 price differs between genai-prices/file-" in capsys.readouterr().out
    assert main(["prices", "diff", str(now)]) == 0
    assert capsys.readouterr().out.startswith("0 prices differ")


def test_diff_with_a_file_that_is_no_table_says_why(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("<html>")
    assert main(["prices", "diff", str(tmp_path / "x.json")]) == 2
    assert "is no JSON" in capsys.readouterr().err
    assert main(["prices", "diff", str(tmp_path / "nowhere.json")]) == 2
    assert "cannot be read: No such file" in capsys.readouterr().err


def test_check_tells_of_prices_with_the_rest(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sidecar.toml").write_text('[[prices]]\nmodel = "m"\ninput = "-1"\n')
    monkeypatch.setenv("SIDECAR_PRICES", str(tmp_path / "nowhere.json"))
    assert main(["check"]) == 2
    said = capsys.readouterr().err
    for part in ("SIDECAR_UPSTREAM_URL is not set", "provider is missing", "-1 is no amount", "nowhere.json"):
        assert part in said
