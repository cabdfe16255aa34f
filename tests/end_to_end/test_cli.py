"""The commands over a real data directory, with no instance running on it and with one."""

from __future__ import annotations

import asyncio
import csv
import errno
import io
import json
import os
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
import trustme
from aiohttp import web
from aiohttp.test_utils import TestServer
from support.backend_fixtures import record, usage
from support.filled import fill
from support.schema import faults
from support.spool_fixtures import flip
from support.whole import Whole, environment, running_receiver

from sidecar.backends import BACKENDS, Buildable, Context, Row
from sidecar.cli import main
from sidecar.cli.check import UNPRICED_SHOWN
from sidecar.cli.output import amount
from sidecar.dev.mock_llm import ScriptedLLM
from sidecar.ledger import LedgerStore
from sidecar.meters.hourly import body_of, deltas, grouped
from sidecar.runtime.instance_lock import DataLock
from sidecar.settings import setting, types
from sidecar.spool import SpoolReader
from sidecar.storage.sockets import CONTROL, listen_privately

CHAT = {"model": "gpt-5-mini", "messages": [{"role": "user", "content": "hi"}]}
SUBSCRIBERS = ("acme", "globex", "acme")


async def _make(data_dir: Path) -> None:
    """Three calls through the whole, delivered to the ledger and to a file, then a stop in good order."""
    upstream = ScriptedLLM()
    url = await upstream.start()
    whole = Whole(data_dir, url, SIDECAR_SUBSCRIBER="header:x-tenant", SIDECAR_BACKENDS="ledger,file")
    try:
        async with whole, aiohttp.ClientSession() as session:
            for subscriber in SUBSCRIBERS:
                headers = {"x-tenant": subscriber, "Authorization": "Bearer sk-test"}
                async with session.post(whole.proxy_url + "/v1/chat/completions", json=CHAT, headers=headers) as answer:
                    assert answer.status == 200
                    await answer.read()
            await whole.settled()
            assert await whole.stop() == 0
    finally:
        await upstream.aclose()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli") / "data"
    asyncio.run(_make(directory))
    return directory


@pytest.fixture(autouse=True)
def _environment(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SIDECAR_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SIDECAR_DATA_DIR", str(data_dir))
    monkeypatch.setenv("COLUMNS", "200")


def test_usage_sums_by_what_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["usage", "--by", "subscriber", "--format", "json"]) == 0
    rows = {row["subscriber"]: row for row in json.loads(capsys.readouterr().out)}
    assert {name: row["calls"] for name, row in rows.items()} == {"acme": 2, "globex": 1}
    assert rows["acme"]["input_tokens"] == 2 * rows["globex"]["input_tokens"] > 0


def test_usage_as_a_table_ends_with_the_total(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["usage", "--since", "1h"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["subscriber", "model", "calls"]
    assert lines[-1].split()[:2] == ["total", "3"]


def test_usage_as_csv_reads_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["usage", "--by", "subscriber,hour", "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out, newline="")))
    assert [(row["subscriber"], row["calls"]) for row in rows] == [("acme", "2"), ("globex", "1")]


def test_usage_of_another_time_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["usage", "--until", "2020-01-01"]) == 0
    assert capsys.readouterr().out == "no usage in that time\n"


def test_usage_by_an_unknown_name_says_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["usage", "--by", "colour"]) == 2
    assert "expected one of subscriber, model" in capsys.readouterr().err


def test_usage_of_a_meter_is_what_the_meter_gives_over_the_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["meters", "test", "input_tokens", "api_calls", "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    tried = {(row["meter"], row["subscriber"]): row["value"] for row in rows}
    assert tried["api_calls", "acme"] == "2"
    for meter in ("input_tokens", "api_calls"):
        assert main(["usage", "--meter", meter, "--format", "json"]) == 0
        billed = {row["subscriber"]: row["value"] for row in json.loads(capsys.readouterr().out)}
        assert billed == {who: value for (name, who), value in tried.items() if name == meter}
    assert main(["usage", "--meter", "api_calls"]) == 0
    head, _, *rows_shown = capsys.readouterr().out.splitlines()
    assert head.split() == ["subscriber", "from", "value"]
    assert all(row.split()[1].endswith(":00Z") for row in rows_shown), "as all times of UTC"
    assert main(["meters", "test", "--since", "2099-01-01"]) == 0
    assert capsys.readouterr().out == "no recorded call is measured by them\n"


def test_meters_are_listed_as_they_are_defined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["meters", "list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == [
        "api_calls",
        "input_tokens",
        "output_tokens",
    ]
    file = tmp_path / "sidecar.toml"
    aggregation = '{type = "SUM", field = "input_tokens", multiplier = "0.001"}'
    file.write_text(f'[[meters]]\nname = "thousands"\naggregation = {aggregation}\n')
    monkeypatch.setenv("SIDECAR_CONFIG", str(file))
    assert main(["meters", "list", "--format", "json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert listed["aggregation"] == {"type": "SUM", "field": "input_tokens", "multiplier": "0.001"}
    assert main(["meters", "list"]) == 0
    assert "0.001" in capsys.readouterr().out


def test_a_meter_that_is_not_there_is_refused_with_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["meters", "test", "calls"]) == 2
    assert "there is no meter 'calls'; the meters are: api_calls, input_tokens" in capsys.readouterr().err
    assert main(["usage", "--meter", "calls"]) == 2


def test_records_are_the_stored_lines(data_dir: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main(["records", "--format", "ndjson"]) == 0
    lines = capfdbinary.readouterr().out.splitlines()
    with SpoolReader(data_dir) as reader:
        assert lines == list(reader.lines())
    assert [faults(line) for line in lines] == [[]] * 3
    assert {json.loads(line)["version"] for line in lines} == {1}
    assert [json.loads(line)["subscriber"]["id"] for line in lines] == list(SUBSCRIBERS)


def test_records_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["records", "--limit", "1"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["started,", "UTC", "status", "outcome"]
    assert "complete" in row
    assert "POST /v1/chat/completions" in row


@pytest.mark.parametrize(("since", "count"), [("2099-01-01", 0), ("1h", 3)])
def test_records_since(since: str, count: int, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main(["records", "--format", "ndjson", "--since", since]) == 0
    out, err = capfdbinary.readouterr()
    assert len(out.splitlines()) == count
    assert err == (b"" if count else b"no records in that time\n")


ID = "0199c2a1-7c1e-7000-8000-5d6f0a1b2c3d"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("records --id nope", "--id nope: expected the id of a record, such as "),
        ("records --where foo", "--where foo: expected NAME=VALUE"),
        ("records --where modl=x", "--where modl; did you mean model?"),
        ("records --where outcome=foo", "--where outcome=foo: expected one of complete, client_left, "),
        ("records --where status=0xx", "--where status=0xx: expected a status (429), a class (4xx) or none"),
        ("records --where outcome=", "--where outcome=: expected one of complete, client_left, "),
        ("records --where status=", "--where status=: expected a status (429), a class (4xx) or none"),
        ("records --where method=get", "--where method=get: expected a method as requests have it"),
        (
            "records --id 0199c2a1-7c1e-7000-8000-5d6f0a1b2c3d --since 1h",
            "--id 0199c2a1-7c1e-7000-8000-5d6f0a1b2c3d: goes",
        ),
        ("records --limit 'a b'", "--limit 'a b': expected a whole number"),
        (
            "records --since yesterday",
            "--since yesterday is no time: expected an age such as 90m, 24h, 7d, today, or a date: ",
        ),
        ("usage --since 1h --until 2h", "--until 2h is not behind '1h'"),
        ("usage --where status=429", "--where status=429: expected a class (2xx, 4xx) or none"),
        ("usage --where status=", "--where status=: expected a class (2xx, 4xx) or none"),
        ("usage --meter api_calls --where model=x --top 3", "--where and --top cannot be asked with --meter: "),
        ("usage --meter api_calls --by model", "--by cannot be asked with --meter: "),
        ("usage --where 'model=\udcff'", "'model=\\udcff' is no UTF-8"),
        ("records --where 'model=\udcff'", "'model=\\udcff' is no UTF-8"),
        ("spool parked --reason '\udcff'", "'\\udcff' is no UTF-8"),
        ("spool redrive '\udcff'", "'\\udcff' is no UTF-8"),
        ("usage --by subscribr", "--by subscribr; did you mean subscriber?"),
        ("usage --sort foo", "--sort foo: expected one of cost, tokens, "),
        ("usage --top 0", "--top 0: expected a whole number, 1 to 10,000"),
        ("usage --timezone Europe/Berln", "--timezone Europe/Berln is no time zone: expected "),
        ("limits --over many", "--over many: expected a number of percent"),
        ("spool parked --backend ledgr", "--backend ledgr is not one of the backends of this instance (file"),
        ("meters provision --backend strpe", "--backend strpe is no backend; did you mean stripe?"),
    ],
)
def test_what_cannot_be_asked_begins_with_what_was_typed(
    typed: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(shlex.split(typed)) == 2
    assert capsys.readouterr().err.startswith(said)


def test_records_for_head_end_without_a_complaint(data_dir: Path) -> None:
    command = f"{sys.executable} -m sidecar records --format ndjson | head -c 1 >/dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_balance_of_the_files_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["balance", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "admitted": 3,
        "recorded": 3,
        "open": 0,
        "lost": {},
        "holds": True,
        "backends": {
            name: {"delivered": 3, "duplicate": 0, "parked": {}, "pending": 0, "skipped": {}}
            for name in ("file", "ledger")
        },
    }


def test_the_balance_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["balance"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "calls   admitted 3 = recorded 3 + open 0 + lost 0",
        "file    recorded 3 = delivered 3 + duplicate 0 + parked 0 + pending 0 + skipped 0",
        "ledger  recorded 3 = delivered 3 + duplicate 0 + parked 0 + pending 0 + skipped 0",
        "        the balance holds",
    ]


def test_spool_status_counts_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spool", "status", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["recorded"] for row in found["instances"]] == [3]
    assert found["instances"][0]["size_bytes"] > 0
    assert {row["backend"]: row["delivered"] for row in found["backends"]} == {"file": 3, "ledger": 3}
    assert main(["spool", "status"]) == 0
    assert "delivered" in capsys.readouterr().out


def test_spool_verify_reads_every_record(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spool", "verify"]) == 0
    assert capsys.readouterr().out == "3 records read, everything adds up\n"


def test_spool_verify_finds_what_was_changed(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(data_dir, copy)
    with closing(sqlite3.connect(copy / "delivery.db")) as db, db:
        db.execute("UPDATE counter SET n = n + 1 WHERE term = 'delivered'")
        db.execute("UPDATE cursor SET seq = seq + 1 WHERE backend = 'file'")
    assert main(["spool", "verify", "--data-dir", str(copy)]) == 1
    captured = capsys.readouterr()
    assert captured.out == f"3 records read, {amount(len(captured.err.splitlines()), 'problem')} found\n"
    assert "the counter of delivered says 4, the rows 3" in captured.err
    assert "delivered up to record 4, but the spool ends at 3" in captured.err
    assert main(["balance", "--data-dir", str(copy)]) == 1
    assert "does not hold: file: recorded 3 is not 4" in capsys.readouterr().err


def test_spool_verify_finds_a_damaged_page_that_no_sum_needs(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(data_dir, copy)
    with closing(sqlite3.connect(copy / "delivery.db")) as db:
        (page,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'meta'").fetchone()
        (size,) = db.execute("PRAGMA page_size").fetchone()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with (copy / "delivery.db").open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\x55" * size)
    assert main(["spool", "verify", "--data-dir", str(copy)]) == 1
    assert f"{copy / 'delivery.db'} is damaged (" in capsys.readouterr().err


def test_nothing_is_parked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spool", "parked"]) == 0
    assert capsys.readouterr().out == "nothing is parked\n"
    assert main(["spool", "parked", "--backend", "file", "--reason", "http_400"]) == 0
    assert capsys.readouterr().out == "nothing is parked at file with the reason 'http_400'\n"
    assert main(["spool", "parked", "--format", "json"]) == 0
    assert capsys.readouterr().out == "[]\n"


def test_an_export_replaces_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "all.ndjson"
    assert main(["spool", "export", "-o", str(out)]) == 0
    assert len(out.read_bytes().splitlines()) == 3
    assert main(["spool", "export", "-o", str(out)]) == 2
    assert "an export replaces nothing" in capsys.readouterr().err


def damaged_copy(data_dir: Path, tmp_path: Path) -> Path:
    """Of which the second record, and those of its commit, cannot be read."""
    copy = tmp_path / "copy"
    shutil.copytree(data_dir, copy)
    (segment,) = (copy / "spool").glob("*/*.seg")
    flip(segment, segment.read_bytes().index(b'"seq":2'))
    return copy


def test_an_export_that_lacks_records_says_so(
    data_dir: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    copy = damaged_copy(data_dir, tmp_path)
    for output in ([], ["-o", str(tmp_path / "all.ndjson")]):
        assert main(["spool", "export", "--data-dir", str(copy), *output]) == 1
        out, err = capfdbinary.readouterr()
        lines = ((tmp_path / "all.ndjson").read_bytes() if output else out).splitlines()
        assert len(lines) < 3
        gone = amount(3 - len(lines), "record is", "records are")
        assert f"{gone} not among them and cannot be read any more" in err.decode()


def test_a_listing_that_lacks_records_says_so(
    data_dir: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    copy = damaged_copy(data_dir, tmp_path)
    for form in ("table", "json", "ndjson", "csv"):
        assert main(["records", "--data-dir", str(copy), "--format", form]) == 0
        assert b" beside these cannot be read any more: see `spool verify`\n" in capfdbinary.readouterr().err
    assert main(["records", "--data-dir", str(data_dir)]) == 0
    assert b"cannot be read" not in capfdbinary.readouterr().err


def test_nothing_is_left_of_an_export_that_cannot_be_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sidecar.cli.spool.sync_file", full)
    out = tmp_path / "all.ndjson"
    assert main(["spool", "export", "-o", str(out)]) == 1
    assert "cannot be written: No space left on device" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("command", ["balance", "usage", "records", "spool status", "spool parked", "spool verify"])
def test_a_file_in_the_place_of_the_data_directory_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "file").write_text("")
    assert main([*command.split(), "--data-dir", str(tmp_path / "file")]) in (1, 2)
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "command", ["balance", "records", "records --since 1h", "spool status", "spool verify", "spool export"]
)
@pytest.mark.parametrize("what", ["a segment", "the spool"])
async def test_a_spool_that_the_system_does_not_read_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, what: str
) -> None:
    """As on a disk that fails; here a directory stands where a file should, and a file where a directory."""
    await fill(tmp_path, 3)
    if what == "a segment":
        segment = next((tmp_path / "spool").glob("*/*.seg"))
        segment.unlink()
        segment.mkdir()
    else:
        slot = next((tmp_path / "spool").iterdir())
        shutil.rmtree(slot)
        slot.symlink_to(slot)  # a circle: `ELOOP`
    code = await asyncio.to_thread(main, [*command.split(), "--data-dir", str(tmp_path)])
    said = capsys.readouterr()
    assert code == 1
    assert said.err.count("\n") == 1, said.err
    assert "cannot read" in said.err


def test_a_redrive_needs_a_running_instance(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spool", "redrive"]) == 2
    assert "no instance is running" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["usage"],
        ["records"],
        ["balance"],
        *(["spool", kind] for kind in ("status", "verify", "parked", "export")),
        ["spool", "cancel", "ID"],
        ["spool", "adopt", "--as", "copy"],
    ],
)
def test_an_empty_directory_is_a_clear_answer(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--data-dir", str(tmp_path / "none")]) == 1
    assert "SIDECAR_DATA_DIR" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


# Beside a running instance


async def test_records_are_followed_and_parked_ones_are_listed(tmp_path: Path) -> None:
    status = 422

    async def bill(_: web.Request) -> web.Response:
        return web.Response(status=status)

    vendor = TestServer(_application(bill))
    upstream = TestServer(_application(lambda _: _answer()))
    async with vendor, upstream:
        whole = Whole(
            tmp_path / "data",
            str(upstream.make_url("")),
            SIDECAR_BACKENDS="ledger,meter",
            SIDECAR_METER_URL=str(vendor.make_url("/meter")),
            SIDECAR_SUBSCRIBER="header:x-tenant",
        )
        async with whole, aiohttp.ClientSession() as session:
            follow = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "sidecar",
                "records",
                "--follow",
                "--format",
                "ndjson",
                env=environment(whole.env),
                stdout=asyncio.subprocess.PIPE,
            )
            assert follow.stdout is not None
            for number in range(2):
                async with session.get(f"{whole.proxy_url}/things/{number}") as answer:
                    assert answer.status == 200
                line = json.loads(await asyncio.wait_for(follow.stdout.readline(), 30))
                assert line["url"].endswith(f"/things/{number}")
            follow.send_signal(signal.SIGINT)
            assert await follow.wait() == 130

            balance = await whole.settled()
            assert sum(balance["backends"]["meter"]["parked"].values()) == 2
            code, out, _ = await whole.command("spool", "parked", "--format", "json")
            assert code == 0
            rows = json.loads(out)
            assert [(row["backend"], row["record"]["method"]) for row in rows] == [("meter", "GET")] * 2
            assert (await whole.command("spool", "parked", "--backend", "ledger"))[1] == "nothing is parked at ledger\n"
            assert "meter" in (await whole.command("spool", "parked"))[1]
            assert (await whole.command("balance"))[0] == 0

            status = 200
            assert await whole.command("spool", "redrive", "--backend", "meter") == (0, "2 events offered again\n", "")
            assert (await whole.settled())["backends"]["meter"]["delivered"] == 2
            assert (await whole.command("spool", "verify"))[0] == 0


def _application(handler: Callable[[web.Request], Awaitable[web.Response]]) -> web.Application:
    async def handle(request: web.Request) -> web.Response:
        return await handler(request)

    application = web.Application()
    application.router.add_route("*", "/{path:.*}", handle)
    return application


async def _answer() -> web.Response:
    return web.Response(text="a thing")


class _Admin(BaseHTTPRequestHandler):
    answers: dict[str, tuple[int, Any]] = {}  # noqa: RUF012 - filled by the fixture, for one server at a time

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        status, body = type(self).answers[f"{self.command} {self.path}"]
        content = json.dumps(body(json.loads(self.rfile.read(length))) if callable(body) else body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class calls it so
        pass


class _Control(HTTPServer):
    """The same over the control socket."""

    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        self.socket.close()
        self.socket = listen_privately(Path(str(self.server_address)))

    def server_activate(self) -> None:
        pass  # it listens already

    def get_request(self) -> tuple[socket.socket, Any]:
        return self.socket.accept()[0], ("control", 0)


@pytest.fixture
def admin(data_dir: Path) -> Iterator[dict[str, tuple[int, Any]]]:
    """Somebody who holds the data directory, and answers at the address in its lock and at its control socket."""
    _Admin.answers = {}
    path = data_dir / CONTROL
    with HTTPServer(("127.0.0.1", 0), _Admin) as server, DataLock.take(data_dir) as lock:
        control = _Control(str(path), _Admin)  # type: ignore[arg-type]
        lock.announce(admin=f"http://127.0.0.1:{server.server_port}")
        threads = [
            threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01}) for one in (server, control)
        ]
        for thread in threads:
            thread.start()
        yield _Admin.answers
        for one in (server, control):
            one.shutdown()
        for thread in threads:
            thread.join()
        control.server_close()
        path.unlink()


def test_a_running_instance_is_asked_and_a_broken_balance_exits_1(
    admin: dict[str, tuple[int, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    terms = {"delivered": 3, "duplicate": 0, "parked": {"refused": 2}, "pending": 0, "skipped": {}}
    found = {"admitted": 5, "recorded": 4, "open": 0, "lost": {"disk_full": 0}, "backends": {"x": terms}}
    admin["GET /balance"] = 200, {**found, "holds": False, "problems": ["admitted 5 is not recorded 4"]}
    assert main(["balance"]) == 1
    captured = capsys.readouterr()
    assert "parked 2 (refused 2)" in captured.out
    assert captured.out.endswith("THE BALANCE DOES NOT HOLD\n")
    assert captured.err == "does not hold: admitted 5 is not recorded 4\n"


def test_an_instance_that_says_no_is_quoted(
    admin: dict[str, tuple[int, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    admin["GET /balance"] = 500, {"error": "the spool is being mended"}
    assert main(["balance"]) == 1
    assert "answered 500: the spool is being mended" in capsys.readouterr().err


def test_a_wish_that_is_wrong_is_told_why_and_nothing_else(
    admin: dict[str, tuple[int, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    said = {"error": "nobody is not one of the backends of this instance (meter)"}
    admin["POST /redrive"] = 400, lambda wish: said
    assert main(["spool", "redrive", "--backend", "nobody"]) == 2
    assert capsys.readouterr().err == "nobody is not one of the backends of this instance (meter)\n"


def test_a_redrive_goes_through_the_running_instance(
    admin: dict[str, tuple[int, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def redrive(wish: Any) -> dict[str, Any]:
        seen.append(wish)
        counts = [{"became": "offered", "reason": "", "events": 1007}]
        return {"redriven": 1007, "unskipped": 0, "counts": counts, "each": [], "not_found": []}

    admin["POST /redrive"] = 200, redrive
    assert main(["spool", "redrive", "--backend", "meter", "--resend-unknown", "id-1"]) == 0
    assert capsys.readouterr().out == "1,007 events offered again\n"
    assert seen == [{"backend": "meter", "reason": None, "ids": ["id-1"], "since_s": None, "resend_unknown": True}]


def test_an_instance_that_does_not_answer_is_named(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as bound, DataLock.take(data_dir) as lock:
        bound.bind(("127.0.0.1", 0))  # bound, and nobody listens
        assert main(["balance"]) == 1
        assert "has no admin port yet" in capsys.readouterr().err
        lock.announce(admin=f"http://127.0.0.1:{bound.getsockname()[1]}")
        assert main(["balance"]) == 1
    assert f"process {os.getpid()} does not answer at http://127.0.0.1" in capsys.readouterr().err


def test_serving_a_directory_in_use_names_the_process(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("UPSTREAM_URL", "http://127.0.0.1:9"), ("STOP_S", "0")):
        monkeypatch.setenv(f"SIDECAR_{name}", value)
    with DataLock.take(data_dir):
        assert main(["serve"]) != 0
    assert f"in use by another instance (process {os.getpid()})" in capsys.readouterr().err


# Without any data


def test_no_command_serves_and_settings_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "SIDECAR_UPSTREAM_URL is not set: expected an http:// or https:// address" in capsys.readouterr().err


def test_check_shows_settings_without_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SIDECAR_UPSTREAM_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("SIDECAR_HASH_KEY", "very-secret-hash-key")
    assert main(["check", "--all"]) == 0
    out = capsys.readouterr().out
    assert "very-secret" not in out
    assert "(hidden)" in out
    assert "SIDECAR_STOP_S" in out
    assert "SQLite 3" in out


def test_check_as_json_says_where_each_value_is_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SIDECAR_UPSTREAM_URL", "http://127.0.0.1:9")
    assert main(["check", "--format", "json"]) == 0
    settings = {row["setting"]: row for row in json.loads(capsys.readouterr().out)["settings"]}
    assert settings["SIDECAR_UPSTREAM_URL"]["from"] == "environment"
    assert settings["SIDECAR_LISTEN"] == {"setting": "SIDECAR_LISTEN", "value": "0.0.0.0:8080", "from": "default"}


def test_check_reports_every_problem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SIDECAR_WORKERS", "none of your business")
    monkeypatch.setenv("SIDECAR_BACKEND", "ledger")
    assert main(["check"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "the configuration has 3 problems:",
        "  SIDECAR_WORKERS='none of your business': expected a whole number, 1 to 256",
        "  SIDECAR_BACKEND is not a setting; did you mean SIDECAR_BACKENDS?",
        "  SIDECAR_UPSTREAM_URL is not set: expected an http:// or https:// address",
    ]


def test_check_reports_a_meter_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sidecar.toml"
    file.write_text('upstream_url = "http://127.0.0.1:9"\n[[meters]]\nname = "Calls"\n')
    monkeypatch.setenv("SIDECAR_CONFIG", str(file))
    assert main(["check"]) == 2
    assert "meter number 1: name is wrong" in capsys.readouterr().err


def test_check_tells_the_faults_of_meters_backends_and_settings_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sidecar.toml"
    file.write_text('[[meters]]\nname = "longest"\naggregation = { type = "MAX", field = "duration_ms" }\n')
    for name, value in {
        "SIDECAR_CONFIG": str(file),
        "SIDECAR_DATA_DIR": str(tmp_path),
        "SIDECAR_WORKERS": "none",
        "SIDECAR_BACKENDS": "ledger,revenium,stripe,lago",
        "SIDECAR_REVENIUM_MODE": "rate",
        "SIDECAR_REVENIUM_API_KEY": "k",
        "SIDECAR_STRIPE_API_KEY": "k",
        "SIDECAR_LOG_FORMAT": "text",
    }.items():
        monkeypatch.setenv(name, value)
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as ledger:
        ledger.execute("PRAGMA user_version = 99")
    for command in ("check", "serve"):
        assert main([command]) == 2
        problems = capsys.readouterr().err.splitlines()[1:]
        assert len(problems) == 6, problems
        for word in (
            "SIDECAR_WORKERS",
            "SIDECAR_UPSTREAM_URL is not set",
            "SIDECAR_LAGO_API_KEY",
            "SIDECAR_REVENIUM_SOURCE_ID is not set",
            "stripe: the meter longest is a MAX",
            "was written by a newer version",
        ):
            assert [word in problem for problem in problems].count(True) == 1, word
    (tmp_path / "ledger.db").write_bytes(b"no database" * 100)
    assert main(["check"]) == 2
    assert "ledger.db is damaged (file is not a database)" in capsys.readouterr().err


async def test_check_connect_says_what_is_wrong_at_a_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running_receiver() as (_, url):
        for name, value in {
            "SIDECAR_UPSTREAM_URL": url,
            "SIDECAR_BACKENDS": "stripe,ledgerbee",
            "SIDECAR_STRIPE_URL": url,
            "SIDECAR_STRIPE_API_KEY": "k",
            "SIDECAR_LEDGERBEE_URL": url,
            "SIDECAR_LEDGERBEE_API_KEY": "k",
        }.items():
            monkeypatch.setenv(name, value)
        assert await asyncio.to_thread(main, ["check", "--connect", "--format", "json"]) == 1
        rows = json.loads(capsys.readouterr().out)["connect"]
        wrong = [row["detail"] for row in rows if row["result"] == "wrong"]
        assert [row["what"] for row in rows if row["result"] == "reached"] == ["upstream", "stripe", "ledgerbee"]
        assert len(wrong) == 3
        assert all("meters provision --backend stripe" in text for text in wrong)
        order = {
            "display_name": "t",
            "event_name": "windowed",
            "default_aggregation[formula]": "sum",
            "event_time_window": "day",
        }
        async with aiohttp.ClientSession(headers={"Authorization": "Bearer k"}) as session:
            async with session.post(f"{url}/v1/billing/meters", data=order) as made:
                assert made.status == 200
        file = tmp_path / "sidecar.toml"
        file.write_text('[[meters]]\nname = "windowed"\naggregation = { type = "SUM", field = "input_tokens" }\n')
        monkeypatch.setenv("SIDECAR_CONFIG", str(file))
        assert await asyncio.to_thread(main, ["check", "--connect"]) == 1
        assert "overwrite each other: make one without event_time_window" in capsys.readouterr().out


async def test_meters_are_provisioned_once_and_never_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def provision(*arguments: str) -> tuple[int, str, str]:
        code = main(["meters", "provision", *arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    file = tmp_path / "sidecar.toml"
    table = '[[meters]]\nname = "{}"\naggregation = {{ type = "{}", field = "duration_ms" }}\n'
    monkeypatch.setenv("SIDECAR_CONFIG", str(file))
    async with running_receiver() as (receiver, url):
        for name in ("STRIPE", "FLEXPRICE"):
            monkeypatch.setenv(f"SIDECAR_{name}_URL", url)
            backend = name.lower()
            file.write_text(table.format("took", "SUM") + table.format("longest", "MAX"))
            code, _, err = await asyncio.to_thread(provision, "--backend", backend)
            assert (code, err) == (2, f"SIDECAR_{name}_API_KEY is not set: {backend} is asked with it\n")
            monkeypatch.setenv(f"SIDECAR_{name}_API_KEY", "k")
            code, out, err = await asyncio.to_thread(provision, "--backend", backend)
            assert f"{backend}: created the meter took" in out
            if backend == "stripe":
                assert (code, err) == (1, "stripe has no MAX: longest is left out; it has COUNT, SUM, LATEST\n")
            assert "and it fits" in (await asyncio.to_thread(provision, "--backend", backend, "took"))[1]
            file.write_text(table.format("took", "LATEST"))
            code, out, err = await asyncio.to_thread(provision, "--backend", backend)
            assert (code, out) == (1, "")
            assert "left as it is" in err
        meters = [row for row in receiver.received if row.path in ("/v1/billing/meters", "/v1/meters")]
        assert [row.verdict for row in meters] == ["delivered"] * len(meters)
        assert len(meters) == 3
    assert provision("--backend", "webhook")[0] == 2
    assert "is no backend" in provision("--backend", "nope")[2]


@dataclass(frozen=True, kw_only=True)
class _VendorSettings:
    url: str | None = setting(types.http_url, None, "")


class _Vendor:
    """A backend whose address is the vendor's own where none is set."""

    settings_type = _VendorSettings

    def __init__(self, settings: _VendorSettings, context: Context) -> None:
        pass

    async def aclose(self) -> None:
        pass


def test_check_connect_tries_upstream_and_backends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        reachable, refusing = (f"http://127.0.0.1:{s.getsockname()[1]}" for s in (listening, closed))
        vendor = type("_Reachable", (_Vendor,), {"address": reachable})
        monkeypatch.setitem(BACKENDS, "vendor", Row(cast(Buildable, vendor), ""))
        monkeypatch.setitem(BACKENDS, "nowhere", Row(cast(Buildable, _Vendor), ""))
        monkeypatch.setenv("SIDECAR_UPSTREAM_URL", reachable)
        monkeypatch.setenv("SIDECAR_BACKENDS", "ledger,meter,vendor,nowhere")
        monkeypatch.setenv("SIDECAR_METER_URL", f"{refusing}/meter")
        assert main(["check", "--connect", "--format", "json"]) == 1
        tried = {row["what"]: row for row in json.loads(capsys.readouterr().out)["connect"]}
        assert main(["check", "--connect"]) == 1
        lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["what", "result", "detail"], "what was found comes before what was given"
    assert lines[2].split()[:2] == ["upstream", "reached"]
    assert any(line.startswith("SIDECAR_UPSTREAM_URL") for line in lines[7:])
    assert {name: row["result"] for name, row in tried.items()} == {
        "upstream": "reached",
        "ledger": "reached",
        "meter": "failed",
        "vendor": "reached",
        "nowhere": "failed",
    }
    assert tried["meter"]["detail"] == "refused: Connection refused"
    assert tried["nowhere"]["detail"] == "it has no address: set SIDECAR_NOWHERE_URL"


def test_check_connect_tries_every_upstream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each by its name and with its own certificates, also where none gets the rest."""
    ca = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(ca)
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        up, down = (f"127.0.0.1:{s.getsockname()[1]}" for s in (listening, closed))
        config = tmp_path / "sidecar.toml"
        config.write_text(
            f'''
            [[upstreams]]
            name = "up"
            prefix = "/up"
            url = "http://{up}/base"

            [[upstreams]]
            name = "down"
            host = "down.internal"
            url = "https://{down}"
            ca_file = "{ca}"
            '''
        )
        monkeypatch.setenv("SIDECAR_CONFIG", str(config))
        assert main(["check", "--connect", "--format", "json"]) == 1
        tried = {row["what"]: row for row in json.loads(capsys.readouterr().out)["connect"]}
        assert {name: row["result"] for name, row in tried.items()} == {
            "upstream up": "reached",
            "upstream down": "failed",
            "ledger": "reached",
        }
        assert tried["upstream down"]["detail"] == "refused: Connection refused"
        monkeypatch.setenv("SIDECAR_UPSTREAM_URL", f"http://{up}")
        main(["check", "--connect", "--format", "json"])
        tried = {row["what"]: row for row in json.loads(capsys.readouterr().out)["connect"]}
        assert tried["upstream"]["result"] == "reached"


def test_check_connect_verifies_the_upstreams_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)

    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async def tried() -> dict[str, str]:
        server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context)
        async with server:
            monkeypatch.setenv("SIDECAR_UPSTREAM_URL", f"https://localhost:{server.sockets[0].getsockname()[1]}")
            await asyncio.to_thread(main, ["check", "--connect", "--format", "json"])
        found: dict[str, str] = json.loads(capsys.readouterr().out)["connect"][0]
        return found

    assert "its certificate is not accepted" in asyncio.run(tried())["detail"]
    monkeypatch.setenv("SIDECAR_UPSTREAM_CA_FILE", str(tmp_path / "ca.pem"))
    found = asyncio.run(tried())
    assert found["result"] == "reached"
    assert found["detail"].endswith("TLSv1.3")


@pytest.mark.parametrize("listen", ["9700", "unix:/x", "127.0.0.1:x"])
def test_the_receiver_refuses_a_bad_address(listen: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["receiver", "--listen", listen]) == 2
    assert "--listen" in capsys.readouterr().err


def test_a_report_that_is_none_is_named_as_it_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"nonsense")))
    assert main(["spool", "complain", "-"]) == 2
    assert capsys.readouterr().err.startswith("standard input, report 1: ")


def test_the_receiver_says_that_its_port_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert main(["receiver", "--listen", address]) == 1
    assert capsys.readouterr().err == f"{address} is in use by another program; set --listen\n"


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    from sidecar.cli import COMMANDS

    for name in COMMANDS:
        with pytest.raises(SystemExit) as left:
            main([name, "--help"])
        assert left.value.code == 0
        assert "usage: metering-sidecar" in capsys.readouterr().out


def _with_unpriced_calls(data_dir: Path, models: dict[str, int]) -> None:
    """A ledger of calls of today: one that is priced, and so many unpriced ones of each model."""
    names = [name for name, calls in models.items() for _ in range(calls)]
    priced = record(1, started_ns=time.time_ns(), cost={"currency": "USD", "total": "0.5", "parts": {}})
    unpriced = [
        record(number, started_ns=time.time_ns(), usage=usage(model=name), cost={"currency": None, "total": None})
        for number, name in enumerate(names, 2)
    ]
    data_dir.mkdir()
    with closing(LedgerStore(data_dir / "ledger.db")) as store:
        store.apply("k", body_of(deltas(grouped([priced, *unpriced]))))


def test_usage_and_check_say_which_calls_the_cost_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, directory = tmp_path / "sidecar.toml", tmp_path / "data"
    # gpt-5 has a price by now, and its calls of before stay what they were.
    _with_unpriced_calls(directory, {"own-model-1": 3, "own-model-2": 1, "gpt-5": 2})
    monkeypatch.setenv("SIDECAR_DATA_DIR", str(directory))
    monkeypatch.setenv("SIDECAR_UPSTREAM_URL", "http://127.0.0.1:9")
    assert main(["usage", "--by", "model"]) == 0
    out = capsys.readouterr().out
    assert "unpriced" in out.splitlines()[0]
    assert "note: 6 calls are not in the cost" in out
    assert main(["usage", "--by", "", "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["cost_usd"], row["unpriced"]) == ("0.5", 6)
    assert main(["check"]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "no price is known" in line]
    assert [line.partition(": [[")[0].partition(" days")[0] for line in notes] == [
        "note: no price is known for own-model-1 of openai: 3 calls of the last 30",
        "note: no price is known for own-model-2 of openai: 1 call of the last 30",
    ]
    file.write_text('[[prices]]\nprovider = "*"\nmodel = "own-*"\ninput = "1"\noutput = "1"\n')
    monkeypatch.setenv("SIDECAR_CONFIG", str(file))
    assert main(["check"]) == 0
    assert "no price is known" not in capsys.readouterr().out


def test_check_names_a_bounded_number_of_models_without_a_price(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _with_unpriced_calls(tmp_path / "data", {f"invented-{number}": 1 for number in range(UNPRICED_SHOWN + 7)})
    monkeypatch.setenv("SIDECAR_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("SIDECAR_UPSTREAM_URL", "http://127.0.0.1:9")
    assert main(["check"]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert [("no price is known" in line) for line in notes].count(True) == UNPRICED_SHOWN
    assert "note: and 7 more models without a price, with 7 calls" in notes
