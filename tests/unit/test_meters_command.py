"""`meters`: the vocabulary, and what each backend would be sent of recorded calls, without sending anything."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.backend_fixtures import usage

from sidecar.backends import BACKENDS
from sidecar.cli import main
from sidecar.meters.properties import FIXED
from sidecar.model.exchange import Exchange, Outcome, Subscriber
from sidecar.model.record import encode
from sidecar.runtime import backend_factory
from sidecar.spool import Batch, Spool

CONFIG = """
[dimensions]
plan = "x-plan"

[elements]
rows = "header:x-rows"
pages = "json:meta.pages"

[subscribers.acme]
stripe = "cus_acme"
lago = "sub_acme"

[[meters]]
name = "report_rows"
aggregation = { type = "SUM", field = "unit_rows" }

[[meters]]
name = "pages"
aggregation = { type = "SUM", field = "unit_pages" }

[[meters]]
name = "rows_a_page"
aggregation = { type = "SUM", expression = "int(unit_rows) / int(unit_pages)" }
"""


async def store(data_dir: Path, exchanges: Sequence[Exchange]) -> None:
    async with Spool.open(data_dir) as spool:
        lines = [
            encode(exchange, seq=spool.next_seq + number, instance=spool.instance)
            for number, exchange in enumerate(exchanges)
        ]
        spool.tally.admitted += len(lines)
        done = asyncio.Event()
        loop = asyncio.get_running_loop()
        batch = Batch(
            first_seq=spool.next_seq,
            lines=lines,
            size_bytes=sum(map(len, lines)),
            admitted=spool.tally.admitted,
            done=lambda _: (loop.call_soon_threadsafe(done.set), None)[1],
        )
        spool.submit(batch)
        await asyncio.wait_for(done.wait(), 20)


def call(number: int, **changes: Any) -> Exchange:
    known: dict[str, Any] = {
        "id": f"0199aaaa-0000-7000-8000-{number:012d}",
        "method": "POST",
        "url": "https://api.example.com/reports",
        "started_ns": time.time_ns() + number,
        "first_byte_ms": 1.0,
        "duration_ms": 2.0,
        "status": 200,
        "outcome": Outcome.COMPLETE,
        "subscriber": Subscriber("acme", "header:x-tenant"),
        "usage": usage(units={"rows": 10, "pages": 2}),
    }
    return Exchange(**{**known, **changes})


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in list(os.environ):
        if name.startswith("SIDECAR_"):
            monkeypatch.delenv(name)
    file = tmp_path / "sidecar.toml"
    file.write_text(CONFIG)
    monkeypatch.setenv("SIDECAR_CONFIG", str(file))
    monkeypatch.setenv("SIDECAR_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "250")
    calls = [
        call(1),
        call(2, usage=usage(units={"rows": 10, "pages": 2.5})),
        call(3, usage=usage(units={"rows": 10, "pages": 0})),
        call(4, usage=usage(units={})),
        call(5, subscriber=Subscriber("key_" + "0" * 32, "header:authorization")),
        call(6, outcome=Outcome.DENIED, status=429, first_byte_ms=None),
        call(7, started_ns=time.time_ns() - 40 * 86_400 * 10**9),
    ]
    asyncio.run(store(tmp_path / "data", calls))
    return tmp_path / "data"


def tried(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    code = main(["meters", "test", *arguments, "--format", "json"])
    return code, json.loads(capsys.readouterr().out)


def test_what_stripe_would_be_sent_and_would_refuse(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = tried(capsys, "--backend", "stripe")
    assert code == 1, "something would be refused"
    found = [(int(row["record"][-1]), row["event"], row["result"], row["reason"], row["detail"]) for row in rows]
    assert found == [
        (1, "report_rows", "sent", None, None),
        (1, "pages", "sent", None, None),
        (1, "rows_a_page", "sent", None, None),
        (2, "report_rows", "sent", None, None),
        (2, "rows_a_page", "sent", None, None),
        (2, "pages", "refused", "value_not_taken", "meter pages = 2.5"),
        (3, "report_rows", "sent", None, None),
        (3, "pages", "sent", None, None),
        (3, "rows_a_page", "refused", "value_not_computed", "meter rows_a_page: division by zero"),
        (4, "record", "skipped", "no_value", None),
        (5, "record", "parked", "no_customer", None),
        (6, "record", "skipped", "denied", None),
        (7, "report_rows", "parked", "too_old", None),
        (7, "pages", "parked", "too_old", None),
        (7, "rows_a_page", "parked", "too_old", None),
    ]
    first = rows[0]
    assert (first["subscriber"], first["customer"]) == ("acme", "cus_acme")
    assert "payload[value]=10" in first["body"]
    assert "payload[stripe_customer_id]=cus_acme" in first["body"]
    assert rows[10]["customer"] is None


def test_it_is_said_in_one_line_what_becomes_of_all(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["meters", "test", "--backend", "stripe", "--limit", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 3 + 1, "one call is shown"
    assert lines[-1] == (
        "of 7 recorded calls stripe would get: 7 sent, 2 refused (value_not_computed 1, value_not_taken 1), "
        "4 parked (no_customer 1, too_old 3), 2 skipped (denied 1, no_value 1); nothing was sent"
    )
    assert main(["meters", "test", "report_rows", "--backend", "stripe", "--since", "1d"]) == 1
    assert "would get: 3 sent, 2 parked" in capsys.readouterr().out


@pytest.mark.parametrize("name", list(BACKENDS))
def test_every_backend_can_be_tried_without_its_keys(
    name: str, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in data_dir.iterdir())
    code, rows = tried(capsys, "--backend", name, "--limit", "1000")
    assert code in (0, 1)
    assert {int(row["record"][-1]) for row in rows} == set(range(1, 8)), "nothing is left out"
    sent = [row for row in rows if row["result"] == "sent"]
    assert sent
    assert all(row["body"] for row in sent)
    assert sorted(path.name for path in data_dir.iterdir()) == before, "nothing is opened or made"


def test_what_sums_cannot_have_is_said_too(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = tried(capsys, "--backend", "ledger")
    assert (code, [row["detail"] for row in rows if row["result"] == "refused"]) == (
        1,
        ["meter rows_a_page: division by zero"],
    )


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--backend", "strpe"], "--backend strpe is no backend; did you mean stripe?"),
        (["nothing", "--backend", "stripe"], "there is no meter 'nothing'"),
        (["pages", "--backend", "webhook"], "webhook is given whole records"),
        (["--backend", "stripe", "--limit", "0"], "no number above 0"),
    ],
)
def test_what_cannot_be_tried_is_said(
    arguments: list[str], word: str, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--limit" in arguments:
        with pytest.raises(SystemExit, match="2"):
            main(["meters", "test", *arguments])
    else:
        assert main(["meters", "test", *arguments]) == 2
    assert word in capsys.readouterr().err


def test_the_vocabulary_is_printed_with_the_own_words(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["meters", "properties", "--format", "json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(FIXED) <= set(rows)
    assert rows["dimension_plan"] == {"name": "dimension_plan", "type": "text", "about": "own: the header x-plan"}
    assert rows["unit_rows"]["about"] == "own: the header x-rows"
    assert rows["unit_pages"] == {"name": "unit_pages", "type": "decimal", "about": "own: the member meta.pages"}
    assert rows["unit_audio_seconds"]["type"] == "decimal"
    assert all(row["about"] for row in rows.values())


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("rows", "unit_rows"),
        ("units.rows", "unit_rows"),
        ('units[\\"rows\\"]', "unit_rows"),
        ("unit_rowz", "unit_rows"),
        ("dimension_plam", "dimension_plan"),
        ("plan", "dimension_plan"),
        ("statuss", "status"),
    ],
)
def test_a_word_that_is_none_is_told_with_its_neighbour(
    wrong: str, right: str, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = data_dir.parent / "sidecar.toml"
    file.write_text(CONFIG.replace('field = "unit_rows"', f'field = "{wrong}"'))
    for command in (["meters", "list"], ["check"]):
        os.environ["SIDECAR_UPSTREAM_URL"] = "https://api.example.com"
        try:
            assert main(command) == 2, command
        finally:
            del os.environ["SIDECAR_UPSTREAM_URL"]
        said = capsys.readouterr()
        assert f"did you mean {right}" in said.out + said.err, command


def test_provision_says_that_there_is_nothing_to_create_before_it_asks_for_a_key(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["meters", "provision", "--backend", "lago"]) == 2
    said = capsys.readouterr().err
    assert said == "lago has no meters that could be created from here; stripe, flexprice have\n"
    assert main(["meters", "provision", "--backend", "stripe"]) == 2
    assert "SIDECAR_STRIPE_API_KEY is not set" in capsys.readouterr().err


def test_the_default_meters_are_explained(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIDECAR_CONFIG", raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["meters", "list"]) == 0
    said = capsys.readouterr()
    assert "status_class = 1xx or 2xx or 3xx" in said.out
    assert "api_calls counts what was answered below 400" in said.err


def test_no_filter_is_cut_however_narrow_the_terminal(
    data_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = data_dir.parent / "sidecar.toml"
    routes = [f"/a/rather/long/route/{number}" for number in range(4)]
    file.write_text(
        f'[[meters]]\nname = "some"\naggregation = {{ type = "COUNT" }}\n'
        f'filters = [{{ key = "route", values = {routes} }}]\n'
    )
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["meters", "list"]) == 0
    assert f"route = {' or '.join(routes)}" in capsys.readouterr().out


# What is told at the start


class Examining:
    """A backend that says what it is told to."""

    def __init__(self, name: str, *said: list[str] | Exception) -> None:
        self.name = name
        self._said = list(said)
        self.asked = 0

    async def examine(self) -> list[str]:
        self.asked += 1
        said = self._said.pop(0)
        if isinstance(said, Exception):
            raise said
        return said


async def test_a_backend_that_lacks_the_meters_is_told_once_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    broken, lacking = Examining("broken", OSError("no way")), Examining("lacking", ["has no meter pages: make one"])
    fine, plain = Examining("fine", []), object()
    given: Any = [broken, lacking, fine, plain]
    await backend_factory.examine(given, after_s=0)
    warned = [entry.__dict__["facts"] for entry in caplog.records if entry.levelname == "WARNING"]
    assert warned == [{"backend": "lacking", "problem": "has no meter pages: make one"}]
    assert (broken.asked, lacking.asked, fine.asked) == (1, 1, 1)
    assert [entry.__dict__["facts"]["error"] for entry in caplog.records if entry.levelname == "INFO"] == ["OSError"]


async def test_a_backend_that_never_answers_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        name = "silent"

        async def examine(self) -> list[str]:
            await asyncio.sleep(3600)
            return []

    monkeypatch.setattr(backend_factory, "EXAMINE_LIMIT_S", 0.05)
    after = Examining("after", ["is wrong"])
    given: Any = [Silent(), after]
    await asyncio.wait_for(backend_factory.examine(given, after_s=0), 20)
    assert after.asked == 1
