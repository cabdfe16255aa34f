"""The numbers over HTTP: what the commands answer, from a sidecar that runs."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from support.whole import Whole

from sidecar.cli import main
from sidecar.dev.mock_llm import ScriptedLLM

CHAT = {"model": "gpt-5-mini", "messages": [{"role": "user", "content": "hi"}]}
KEY = {"Authorization": "Bearer sk-test"}
CALLS = (("acme", "search"), ("acme", "chat"), ("globex", "search"), ("<b>\u202eevil", "=1+1"))
CONFIG = """
[subscribers.acme]
name = "Acme <script>alert(1)</script> \\u202eInc."
[subscribers.globex]
name = "Globex"
"""


@asynccontextmanager
async def called(directory: Path, **settings: str) -> AsyncIterator[Whole]:
    """A sidecar through which a few calls went, all of them in the ledger."""
    config = directory / "sidecar.toml"
    config.write_text(CONFIG)
    upstream = ScriptedLLM()
    vendor = TestServer(refusing())
    await vendor.start_server()
    whole = Whole(
        directory / "data",
        await upstream.start(),
        SIDECAR_SUBSCRIBER="header:x-tenant",
        SIDECAR_CONFIG=str(config),
        SIDECAR_DIMENSIONS="feature=x-feature",
        SIDECAR_LIMITS="calls=10/hour",
        SIDECAR_BACKENDS="ledger,meter",
        SIDECAR_METER_URL=str(vendor.make_url("/meter")),
        **settings,
    )
    try:
        async with whole, aiohttp.ClientSession() as session:
            for who, feature in CALLS:
                headers = {"x-tenant": who.encode().decode("latin-1"), "x-feature": feature, **KEY}
                async with session.post(whole.proxy_url + "/v1/chat/completions", json=CHAT, headers=headers) as answer:
                    assert answer.status == 200
                    await answer.read()
            await whole.settled()
            yield whole
    finally:
        await upstream.aclose()
        await vendor.close()


def refusing() -> web.Application:
    """A vendor that takes nothing, so that all is parked."""

    async def no(_: web.Request) -> web.Response:
        return web.Response(status=422)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", no)
    return app


async def get(whole: Whole, path: str, **more: Any) -> tuple[int, Mapping[str, str], str]:
    async with aiohttp.ClientSession() as session, session.get(whole.admin_url + path, **more) as answer:
        return answer.status, answer.headers, await answer.text()


async def test_the_port_answers_what_the_commands_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    async with called(tmp_path) as whole:
        for name, value in whole.env.items():
            monkeypatch.setenv(name, value)
        # In this process: a command takes a second to start, and this is about what it says.
        for path, command in (
            ("/usage", "usage"),
            ("/usage?by=subscriber,status&since=7d&sort=calls", "usage --by subscriber,status --since 7d --sort calls"),
            ("/usage?by=day&timezone=UTC&where=subscriber=acme", "usage --by day --where subscriber=acme"),
            ("/usage?by=subscriber&top=1", "usage --by subscriber --top 1"),
            ("/records", "records"),
            ("/records?where=subscriber=Globex&limit=5", "records --where subscriber=Globex --limit 5"),
            ("/parked", "spool parked"),
            ("/parked?backend=meter&limit=1000", "spool parked --backend meter"),
            ("/limits", "limits"),
            ("/limits?over=15", "limits --over 15"),
            ("/usage?by=feature", "usage --by feature"),
            ("/usage?by=month,subscriber&where=feature=search", "usage --by month,subscriber --where feature=search"),
        ):
            joined = "&" if "?" in path else "?"
            for form in ("json", "csv", "ndjson") if "?" not in path else ("json",):
                status, headers, text = await get(whole, f"{path}{joined}format={form}")
                code = await asyncio.to_thread(main, [*command.split(), "--format", form])
                sys.stdout.flush()
                out = capfdbinary.readouterr().out.decode()
                assert (status, code) == (200, 0), (path, text)
                if form == "json":
                    assert headers["Content-Type"].startswith("application/json")
                    assert json.loads(text) == json.loads(out), path
                else:
                    assert text.encode() == out.encode(), path
        rows = json.loads((await get(whole, "/usage?by=subscriber"))[2])
        assert {row["subscriber"]: (row["name"], row["calls"]) for row in rows}["globex"] == ("Globex", 1)
        (record,) = json.loads((await get(whole, "/records?where=subscriber=globex"))[2])
        assert record["subscriber"] == {"id": "globex", "source": "header:x-tenant", "name": "Globex"}
        (same,) = json.loads((await get(whole, f"/records?id={record['id']}"))[2])
        assert same == record
        rows = json.loads((await get(whole, "/parked"))[2])
        assert ("meter", "globex", "Globex") in [(row["backend"], row["subscriber"], row["name"]) for row in rows]
        rows = json.loads((await get(whole, "/limits?over=15"))[2])["limits"]
        assert [(row["subscriber"], row["used"]) for row in rows] == [("acme", "2")]
        table = list(csv.DictReader(io.StringIO((await get(whole, "/records?format=csv"))[2], newline="")))
        assert [row["subscriber"] for row in table][:3] == ["acme", "acme", "globex"]


BAD = (
    ("/usage?sincee=7d", "'sincee' is no parameter of /usage; did you mean since?"),
    ("/usage?by=subscribr", "by='subscribr'; did you mean subscriber?"),
    ("/usage?by=subscriber&by=model", "by is given more than once"),
    ("/usage?since=yesterday", "'yesterday' is no time: expected an age such as"),
    ("/usage?since=1h&until=2h", "until='2h' is not behind '1h'"),
    ("/usage?format=jsn", "format='jsn' is none; did you mean json?"),
    ("/usage?where=colour", "where='colour': expected NAME=VALUE"),
    ("/usage?where=modl=x", "where='modl'; did you mean model?"),
    ("/usage?sort=cots", "sort='cots'; did you mean cost?"),
    ("/usage?top=0", "top='0': expected a whole number, 1 to 10,000"),
    ("/usage?timezone=Europe/Berln", "'Europe/Berln' is no time zone"),
    ("/usage?timezone=../../etc/passwd", "is no time zone"),
    ("/records?limit=10001", "limit='10001': expected a whole number, 1 to 10,000"),
    ("/records?id=7", "id='7': expected the id of a record"),
    ("/parked?backend=mter", "is not one of the backends of this instance (ledger, meter); did you mean meter?"),
    ("/parked?reasn=x", "'reasn' is no parameter of /parked; did you mean reason?"),
    ("/limits?over=many", "over='many': expected a number of percent"),
    ("/usage?by=" + "a" * 2000, "by='aaaa"),
)


async def test_what_cannot_be_read_is_told_in_one_line(tmp_path: Path) -> None:
    async with called(tmp_path) as whole:
        for path, said in BAD:
            status, headers, text = await get(whole, path)
            assert (status, headers["Cache-Control"]) == (400, "no-store"), text
            (error,) = json.loads(text).values()
            assert said in error, path
            assert len(error) < 400
            assert "\n" not in error


async def test_what_is_not_there_and_what_cannot_be_done_are_said_too(tmp_path: Path) -> None:
    async with called(tmp_path) as whole, aiohttp.ClientSession() as session:
        for path, said in (("/usages", "did you mean /usage?"), ("/nothing-of-ours", "expected one of /, /balance")):
            status, _, text = await get(whole, path)
            assert (status, said in json.loads(text)["error"]) == (404, True), text
        async with session.post(whole.admin_url + "/usage") as answer:
            assert (answer.status, answer.headers["Allow"]) == (405, "GET,HEAD")
            assert "only reads" in (await answer.json())["error"]
        code, _, err = await whole.command("spool", "parked", "--backend", "mter")
        assert (code, "did you mean meter?" in err) == (2, True)


async def test_what_has_not_changed_is_not_sent_again(tmp_path: Path) -> None:
    async with called(tmp_path) as whole:
        for path in ("/usage?since=1h", "/records?since=1h", "/parked", "/limits"):
            status, headers, _ = await get(whole, path)
            assert (status, headers["Cache-Control"]) == (200, "private, no-cache")
            assert headers["X-Content-Type-Options"] == "nosniff"
            same = {"If-None-Match": headers["ETag"]}
            status, again, text = await get(whole, path, headers=same)
            assert (status, again["ETag"], text) == (304, headers["ETag"], ""), path
            other = path + ("&" if "?" in path else "?") + "format=csv"
            assert (await get(whole, other, headers=same))[0] == 200
        (_, usage, _), (_, records, _) = await get(whole, "/usage"), await get(whole, "/records")
        async with aiohttp.ClientSession() as session:
            async with session.post(whole.proxy_url + "/v1/chat/completions", json=CHAT, headers=KEY) as answer:
                await answer.read()
        await whole.settled()
        for path, before in (("/usage", usage), ("/records", records)):
            status, after, _ = await get(whole, path, headers={"If-None-Match": before["ETag"]})
            assert (status, after["ETag"] != before["ETag"]) == (200, True), path


async def test_a_key_is_asked_for_its_id_and_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "sk-a-key-of-the-test-0123456789"

    def ask(text: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        code = main(["subscriber", *arguments])
        return code, *capsys.readouterr()

    upstream = ScriptedLLM()
    whole = Whole(tmp_path / "data", await upstream.start())
    for name, value in whole.env.items():
        monkeypatch.setenv(name, value)
    code, out, err = ask(key)
    assert (code, out) == (2, "")
    assert "there is no hash key in" in err
    async with whole, aiohttp.ClientSession() as session:
        headers = {"Authorization": f"Bearer {key}"}
        async with session.post(whole.proxy_url + "/v1/chat/completions", json=CHAT, headers=headers) as answer:
            await answer.read()
        await whole.settled()
        (record,) = json.loads((await get(whole, "/records"))[2])
    await upstream.aclose()
    for text in (key, f"{key}\n", f"Bearer {key}\n", f"  bearer  {key} \r\n"):
        assert ask(text) == (0, record["subscriber"]["id"] + "\n", "")
    monkeypatch.setenv("SIDECAR_SUBSCRIBER", "header:x-tenant,credential,query:who,path:2,body:user")
    for source, text, wanted in (
        ("header:x-tenant", "acme", "acme"),
        ("credential", key, record["subscriber"]["id"]),
        ("query:who", "a&b=c %", "a&b=c %"),
        ("path:2", "a/b", None),
        ("body:user", "me", "me"),
    ):
        code, out, _ = ask(text, "--source", source)
        assert code == 0
        assert wanted is None or out == wanted + "\n", source
    code, out, err = ask("acme")
    assert (code, out) == (0, "acme\n")
    assert "--source names another of" in err
    for text, said in (("", "is empty"), ("a\nb", "expected one key, one line"), ("x" * 70_000, "one line of at most")):
        code, out, err = ask(text)
        assert (code, out) == (2, "")
        assert said in err
    for arguments in (("--source", "header:x-other"), ("--source", "colour")):
        code, out, err = ask(key, *arguments)
        assert (code, out) == (2, "")
        assert key not in err


async def test_many_who_ask_at_once_are_answered_or_told_to_come_again(tmp_path: Path) -> None:
    async with called(tmp_path) as whole, aiohttp.ClientSession() as session:

        async def ask(number: int) -> int:
            async with session.get(f"{whole.admin_url}/usage?by=hour,subscriber&where=subscriber=s{number}") as answer:
                await answer.read()
                if answer.status == 503:
                    assert answer.headers["Retry-After"]
                return answer.status

        statuses = await asyncio.gather(*map(ask, range(80)))
        assert set(statuses) <= {200, 503}
        assert statuses.count(200) >= 30
        assert (await get(whole, "/healthz"))[0] == 200


async def test_a_ledger_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    async with called(tmp_path) as whole:
        path = whole.data_dir / "ledger.db"
        for kept in whole.data_dir.glob("ledger.db*"):  # the log as well, which may have all of it
            kept.rename(tmp_path / kept.name)
        status, headers, text = await get(whole, "/usage")
        assert status == 404
        assert "ledger.db does not exist yet" in json.loads(text)["error"]
        path.write_bytes(b"no database" * 1000)
        status, headers, text = await get(whole, "/usage")
        assert (status, "Retry-After" in headers) == (503, False)
        assert "is damaged" in json.loads(text)["error"]
        code, _, err = await whole.command("usage")
        assert (code, "is damaged" in err) == (1, True)
        assert (await get(whole, "/records"))[0] == 200


async def test_an_empty_instance_has_empty_answers(tmp_path: Path) -> None:
    upstream = ScriptedLLM()
    async with Whole(tmp_path / "data", await upstream.start(), SIDECAR_ADMIN_TOKEN="a-token-of-the-test") as whole:
        bearer = {"Authorization": "Bearer a-token-of-the-test"}
        for path in ("/usage", "/records", "/parked", "/limits"):
            assert (await get(whole, path))[0] == 401
            assert (await get(whole, path, headers=bearer | {"Host": "evil.example"}))[0] == 421
            status, _, text = await get(whole, path, headers=bearer)
            assert (status, json.loads(text)) == (200, {"limits": []} if path == "/limits" else [])
            status, _, text = await get(whole, path + "?format=csv", headers=bearer)
            assert (status, len(text.splitlines())) == (200, 1)
            async with aiohttp.ClientSession() as session, session.post(whole.admin_url + path, headers=bearer) as no:
                assert no.status == 405
        code, out, err = await whole.command("limits", "--format", "json")
        assert (code, json.loads(out)) == (0, {"limits": []}), err
    await upstream.aclose()
