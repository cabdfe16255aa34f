"""Tables, JSON and CSV from the same rows, and times as people write them."""

from __future__ import annotations

import argparse
import csv
import fcntl
import io
import json
import os
import pty
import struct
import sys
import termios
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.cli import demo, main, output
from sidecar.cli.output import Format, Progress, counted, pairs, plain_terminals, render, shown, table, write_data
from sidecar.cli.shared import moment

ROWS: list[dict[str, object]] = [
    {"subscriber": "acme", "calls": 1234, "tokens": None, "late": True},
    {"subscriber": None, "calls": 5, "tokens": 0, "late": False},
]
COLUMNS = ("subscriber", "calls", "tokens", "late")
NOW = datetime(2026, 11, 20, 9, 30, tzinfo=UTC)


def test_a_table_has_numbers_to_the_right_and_tells_nothing_from_zero() -> None:
    assert table(ROWS, COLUMNS, total={"subscriber": "total", "calls": 1239}).splitlines() == [
        "subscriber  calls  tokens  late",
        "──────────  ─────  ──────  ────",
        "acme        1,234       –  yes",
        "–               5       0  no",
        "──────────  ─────  ──────  ────",
        "total       1,239",
    ]


def test_heads_may_differ_from_names_in_a_table_only() -> None:
    heads = {"calls": "n"}
    assert render(ROWS, COLUMNS, Format.TABLE, heads=heads).splitlines()[0].split() == [
        "subscriber",
        "n",
        "tokens",
        "late",
    ]
    assert "calls" in render(ROWS, COLUMNS, Format.JSON, heads=heads)


def test_a_wide_text_gives_way_to_a_narrow_terminal() -> None:
    rows = [{"name": "a", "text": "x" * 200}]
    assert max(len(line) for line in table(rows, ("name", "text"), width=40).splitlines()) == 40
    assert max(len(line) for line in table(rows, ("name", "text"), width=5).splitlines()) == len("name") + 2 + 12


def test_what_no_terminal_shows_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Into a pipe or a file, unless somebody says how wide it is."""
    rows = [{"name": "n" * 90, "text": "x" * 200, "more": "y" * 200}]
    columns = ("name", "text", "more")
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert "…" not in table(rows, columns, spare=("more",))
    assert "y" * 200 in table(rows, columns, spare=("more",))
    assert max(map(len, pairs([("a", "word " * 100)]).splitlines())) <= 120, "running text is no table"
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, table(rows, columns, spare=("more",)).splitlines())) == 80


def test_columns_that_may_be_spared_are_left_out_and_named() -> None:
    rows = [{"who": "w" * 30, "what": "x" * 50, "a": 10**9, "b": 10**9, "c": 10**9}]
    for width in (120, 80, 60, 50, 45):
        text = table(rows, ("who", "what", "a", "b", "c"), width=width, spare=("b", "c"), total={"who": "total"})
        assert max(map(len, text.splitlines())) <= width, width
        head = text.splitlines()[0].split()
        assert "a" in head
        assert ("not shown for want of room: b" in text) is ("b" not in head)
    wide = table(rows, ("who", "what", "a", "b", "c"), width=80, spare=("b",)).splitlines()[2]
    assert wide.split()[0].endswith("…"), "of two texts that are too wide both give way, and no column of numbers"
    assert wide.count("1,000,000,000") == 3


def test_what_is_too_long_for_its_line_goes_on_below() -> None:
    assert pairs([("a", "one two three four"), ("bc", "")], width=14).splitlines() == [
        "a   one two",
        "    three four",
        "bc",
    ]


@pytest.mark.parametrize(("encoding", "dash"), [("ascii", "-"), ("latin-1", "-"), ("utf-8", "–")])
def test_a_terminal_without_our_characters_gets_its_own(
    encoding: str, dash: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding=encoding))
    plain_terminals()
    print(table([{"a": None, "b": "Müller 東京 …"}], ("a", "b"), width=40), end="")
    write_data(["Müller 東京\n"])
    out = raw.getvalue()
    assert out.decode(encoding, "replace").splitlines()[2].startswith(dash)
    assert out.endswith("Müller 東京\n".encode())


def test_a_long_command_counts_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.cli.output.PROGRESS_S", 0.0)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown_there, piped = Terminal(), io.StringIO()
    assert list(counted(range(3), Progress("records", 3, stream=shown_there))) == [0, 1, 2]
    assert list(counted(range(3), Progress("records", stream=piped))) == [0, 1, 2]
    assert "\r3 of 3 (100 %) records" in shown_there.getvalue()
    assert shown_there.getvalue().endswith("\r"), "and leaves nothing behind"
    assert piped.getvalue() == ""


@pytest.mark.parametrize("columns", [30, 80])
def test_a_line_that_counts_fits_the_terminal_that_it_is_on(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "PROGRESS_S", 0)
    ours, theirs = pty.openpty()
    try:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        with open(theirs, "w", encoding="latin-1", closefd=False) as stream:
            what = "records of one instance measured by each of all the meters that are defined here"
            assert list(counted(range(3), Progress(what, 3, stream=stream))) == [0, 1, 2]
        said = ""
        while said.count("\r") < 5:  # three lines, and the last one taken away
            said += os.read(ours, 4096).decode("latin-1")
    finally:
        os.close(ours)
        os.close(theirs)
    pieces = said.split("\r")
    assert pieces[1].startswith("1 of 3 (33 %) records")
    assert max(map(len, pieces)) == columns - 1, "one more and the terminal goes on in the next line"
    assert pieces[-2:] == [" " * (columns - 1), ""]


def test_json_and_ndjson_keep_null() -> None:
    assert json.loads(render(ROWS, COLUMNS, Format.JSON)) == ROWS
    lines = render(iter(ROWS), COLUMNS, Format.NDJSON).splitlines()
    assert [json.loads(line) for line in lines] == ROWS


@pytest.mark.parametrize("form", [Format.CSV, Format.TABLE])
def test_no_control_character_gets_out(form: Format) -> None:
    """A terminal would obey it, a spreadsheet or a parser stop at it."""
    odd = "".join(map(chr, [*range(32), *range(127, 160)])).replace("\n", "") + "\u202e\u2066\ufeff\udc00"
    out = render([{"who": f"a{odd}b", "tags": [f"x{odd}"]}], ("who", "tags"), form)
    assert all(line.isprintable() for line in out.replace("\r\n", "\n").split("\n"))
    assert "a" + "�" * len(odd) + "b" in out or form is Format.TABLE


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "\t=1", "\r=1", "＝1+1", "＠SUM(A1)"])
def test_no_formula_gets_into_a_spreadsheet(text: str) -> None:
    ((cell,),) = list(csv.reader(io.StringIO(render([{"a": text}], ("a",), Format.CSV), newline="")))[1:]
    assert cell.lstrip("'� ")[:1] in "=+-@＝＠"
    assert cell[0] in "'�"


def test_csv_reads_back_and_runs_no_formula() -> None:
    rows: list[dict[str, object]] = [{"who": '=HYPERLINK("http://x")', "n": -5}, {"who": 'a,"b"\nc', "n": None}]
    back = list(csv.reader(io.StringIO(render(rows, ("who", "n"), Format.CSV), newline="")))
    assert back == [["who", "n"], ['\'=HYPERLINK("http://x")', "-5"], ['a,"b"\nc', ""]]


def test_an_empty_table_is_a_head() -> None:
    assert table([], ("a", "b")) == "a  b\n─  ─\n"
    assert render([], ("a",), Format.JSON) == "[]\n"
    assert pairs([]) == ""


@given(st.text())
def test_what_came_over_the_wire_cannot_move_the_cursor(text: str) -> None:
    assert shown(text).isprintable()
    assert len(table([{"a": text, "b": 1}], ("a", "b")).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90m", datetime(2026, 11, 20, 8, 0, tzinfo=UTC)),
        ("24h", datetime(2026, 11, 19, 9, 30, tzinfo=UTC)),
        ("2w", datetime(2026, 11, 6, 9, 30, tzinfo=UTC)),
        ("today", datetime(2026, 11, 20, tzinfo=UTC)),
        ("2026-11-01", datetime(2026, 11, 1, tzinfo=UTC)),
        ("2026-11-01T10:00", datetime(2026, 11, 1, 10, tzinfo=UTC)),
        ("2026-11-01T10:00+02:00", datetime(2026, 11, 1, 8, tzinfo=UTC)),
        ("2026-11-01T10:00:00Z", datetime(2026, 11, 1, 10, tzinfo=UTC)),
    ],
)
def test_a_moment_is_an_age_or_a_date(text: str, expected: datetime) -> None:
    assert moment(text, NOW) == expected


@pytest.mark.parametrize("text", ["", "yesterday", "7", "-1d", "9999999999w", "2026-13-01", "1e3d"])
def test_what_is_no_moment_is_refused_in_words(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no time: expected an age such as"):
        moment(text, NOW)


@pytest.mark.parametrize(
    "ended", [BrokenPipeError(), BaseExceptionGroup("a task group", [ExceptionGroup("another", [BrokenPipeError()])])]
)
def test_a_reader_that_has_enough_ends_any_command_without_a_complaint(
    ended: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(_: argparse.Namespace) -> int:
        raise ended

    given_up: list[int] = []
    monkeypatch.setattr(demo, "run", run)
    monkeypatch.setattr(os, "dup2", lambda _, fileno: given_up.append(fileno))
    assert main(["demo"]) == 0
    assert given_up == [sys.stdout.fileno()]


def test_of_several_faults_none_is_taken_for_a_reader_that_has_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: argparse.Namespace) -> int:
        raise ExceptionGroup("a task group", [BrokenPipeError(), ValueError("told")])

    monkeypatch.setattr(demo, "run", run)
    with pytest.raises(ExceptionGroup):
        main(["demo"])
