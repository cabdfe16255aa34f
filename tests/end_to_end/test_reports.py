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
    whole = Whole(
        directory / "data", await upstream.start(), SIDECAR_SUBSCRIBER="header:x-tenant", SIDECAR_CONFIG=str(config),
        SIDECAR_DIMENSIONS="feature=x-feature", SIDECAR_LIMITS="calls=10/hour", **settings,
    )  # fmt: skip
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
            ("/limits", "limits"),
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
        table = list(csv.DictReader(io.StringIO((await get(whole, "/records?format=csv"))[2], newline="")))
        assert [row["subscriber"] for row in table][:3] == ["acme", "acme", "globex"]


BAD = (
    ("/usage?sincee=7d", "'sincee' is no parameter of /usage; did you mean since?"),
    ("/usage?by=subscribr", "usage cannot be grouped by 'subscribr'; did you mean subscriber?"),
    ("/usage?by=subscriber&by=model", "by is given more than once"),
    ("/usage?since=yesterday", "'yesterday' is no time: expected an age such as"),
    ("/usage?since=1h&until=2h", "until='2h' is not behind since='1h'"),
    ("/usage?format=jsn", "format='jsn' is none; did you mean json?"),
    ("/usage?where=colour", "where='colour': expected NAME=VALUE"),
    ("/usage?where=modl=x", "where cannot ask for 'modl'; did you mean model?"),
    ("/usage?sort=cots", "sort='cots': none of the sums; did you mean cost?"),
    ("/usage?top=0", "top='0': expected a whole number, 1 to 10,000"),
    ("/usage?timezone=Europe/Berln", "'Europe/Berln' is no time zone"),
    ("/usage?timezone=../../etc/passwd", "is no time zone"),
    ("/records?limit=10001", "limit='10001': expected a whole number, 1 to 10,000"),
    ("/records?id=7", "id='7': expected the id of a record"),
    ("/parked?reasn=x", "'reasn' is no parameter of /parked; did you mean reason?"),
    ("/limits?over=many", "over='many': expected a number of percent"),
    ("/usage?by=" + "a" * 2000, "usage cannot be grouped by 'aaaa"),
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
