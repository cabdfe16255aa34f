"""Limits as their user meets them: real processes, real sockets, and exactly as many calls upstream as are allowed."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import signal
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from support.counted_api import LIMIT_S, call, client, upstream
from support.filled import fill
from support.whole import Whole, suspend

FILLED = 20_000  # records: a second or so until they are counted


def limited(tmp_path: Path, url: str, **settings: str) -> Whole:
    return Whole(tmp_path / "data", url, SIDECAR_SUBSCRIBER="header:x-tenant", **settings)


def limit_of(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (found,) = [row for row in rows if row["limit"] == name]
    return found


@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("durability", ["committed", "buffered"])
async def test_of_400_calls_at_once_exactly_as_many_as_allowed_reach_the_upstream(
    tmp_path: Path, workers: int, durability: str
) -> None:
    async with upstream() as (up, url), client() as session:
        whole = limited(
            tmp_path, url, SIDECAR_LIMITS="calls=100/day", SIDECAR_WORKERS=str(workers), SIDECAR_DURABILITY=durability
        )
        async with whole:
            answers = await asyncio.gather(*(call(session, whole) for _ in range(400)))
            statuses = sorted(status for status, _ in answers)
            assert statuses == [200] * 100 + [402] * 300, (statuses.count(200), statuses.count(402))
            assert up.calls == 100
            balance = await whole.settled()
            assert balance["holds"]
            assert balance["recorded"] == 400
            records = await whole.records()
            rows = (await whole.get("/limits"))["limits"]
            text = await whole.text("/metrics")
    assert sum(record["outcome"] == "denied" for record in records) == 300
    assert all(record["gate"]["limit"] == "calls-per-day" for record in records if record["outcome"] == "denied")
    row = limit_of(rows, "calls-per-day")
    assert (row["used"], row["reserved"], row["scope"]) == ("100", "0", {"subscriber": "acme"})
    assert 'sidecar_gate_decisions_total{decision="denied",limit="calls-per-day",source="limits"} 300.0' in text


@pytest.mark.timeout(120)
async def test_tokens_of_streams_are_set_aside_by_max_tokens_and_settled_by_what_they_took(tmp_path: Path) -> None:
    async with upstream() as (up, url), client() as session:
        up.gate.clear()
        async with limited(tmp_path, url, SIDECAR_LIMITS="output_tokens=1000/day", SIDECAR_WORKERS="2") as whole:
            streams = [asyncio.create_task(call(session, whole, stream=True, max_tokens=200)) for _ in range(12)]
            async with asyncio.timeout(LIMIT_S):
                while sum(task.done() for task in streams) < 7 or up.calls < 5:  # those let in are on their way
                    await asyncio.sleep(0.01)
            # Five of 200 are let in together; none beside them, until they have said what they took.
            assert up.calls == 5
            row = limit_of((await whole.get("/limits"))["limits"], "output_tokens-per-day")
            assert (row["used"], row["reserved"]) == ("0", "1000")
            up.gate.set()
            statuses = sorted(status for status, _ in await asyncio.gather(*streams))
            assert statuses == [200] * 5 + [402] * 7
            await whole.settled()
            row = limit_of((await whole.get("/limits"))["limits"], "output_tokens-per-day")
            assert (row["used"], row["reserved"]) == (str(5 * up.output_tokens), "0")
            status, _ = await call(session, whole, stream=True, max_tokens=200)
            assert status == 200


@pytest.mark.timeout(120)
async def test_a_client_that_hangs_up_is_charged_what_was_set_aside(tmp_path: Path) -> None:
    async with upstream() as (up, url), client() as session:
        up.gate.clear()
        settings = {"SIDECAR_LIMITS": "output_tokens=1000/day,concurrent=1", "SIDECAR_ON_DISCONNECT": "stop"}
        async with limited(tmp_path, url, **settings) as whole:
            task = asyncio.create_task(call(session, whole, stream=True, max_tokens=300))
            async with asyncio.timeout(LIMIT_S):
                while not up.calls:
                    await asyncio.sleep(0.01)
            denied, body = await call(session, whole, stream=True, max_tokens=300)
            assert denied == 429, body
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await until_used(whole, "output_tokens-per-day", "300", "0")
            up.gate.set()
            status, _ = await call(session, whole, stream=True, max_tokens=300)
            assert status == 200
            await until_used(whole, "output_tokens-per-day", str(300 + up.output_tokens), "0")


@pytest.mark.timeout(120)
async def test_a_length_that_was_claimed_and_never_sent_is_not_charged(tmp_path: Path) -> None:
    body = b'{"model": "gpt-5", "max_tokens": 50, "messages": "' + b"a" * 70_000
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nx-tenant: acme\r\nContent-Type: application/json\r\n"
        b"Content-Length: 60000000000000\r\n\r\n"
    )
    async with upstream() as (_, url), client() as session:
        async with limited(tmp_path, url, SIDECAR_LIMITS="total_tokens=900000/day,cost_usd=5/day") as whole:
            host, _, port = whole.proxy_url.removeprefix("http://").rpartition(":")
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(head + body)
            await writer.drain()
            reserved = 0
            async with asyncio.timeout(LIMIT_S):
                while not reserved:
                    rows = (await whole.get("/limits"))["limits"]
                    reserved = sum(int(row["reserved"]) for row in rows if row["unit"] == "total_tokens")
                    await asyncio.sleep(0.02)
            assert 100_000 < reserved < 900_000, "no more than the model takes"
            assert (await call(session, whole, max_tokens=10))[0] == 200
            writer.transport.abort()
            await whole.settled()
            (cut,) = [record for record in await whole.records() if record["outcome"] == "client_left"]
            sent = -(-cut["request_bytes"] // 4) + 50
            await until_used(whole, "total_tokens-per-day", str(sent + 15), "0")
            used = limit_of((await whole.get("/limits"))["limits"], "cost_usd-per-day")["used"]
            assert 0 < float(used) < 0.1
            await whole.kill()
            await whole.start()
            await until_used(whole, "total_tokens-per-day", str(sent + 15), "0")


@pytest.mark.timeout(120)
async def test_a_limit_of_a_model_holds_for_forms_coded_bodies_and_sockets(tmp_path: Path) -> None:
    reached: list[str] = []

    async def answers(request: web.Request) -> web.StreamResponse:
        reached.append(request.path_qs)
        if request.method == "POST":
            return web.json_response({"text": "x"})
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.close()
        return socket

    config = tmp_path / "limits.toml"
    table = '[[limits]]\nname = "{}"\nsubscriber = ""\nmodel = "{}"\nunit = "calls"\namount = {}\nwindow = "total"\n'
    config.write_text(table.format("off", "whisper-1", 0) + table.format("once", "gpt-realtime", 1))
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answers)
    server = TestServer(app)
    await server.start_server()
    form = aiohttp.FormData({"model": "whisper-1"})
    form.add_field("file", b"x" * 3000, filename="a.wav")
    coded = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    try:
        async with (
            client() as session,
            limited(tmp_path, str(server.make_url("")), SIDECAR_CONFIG=str(config)) as whole,
        ):
            posted = f"{whole.proxy_url}/v1/audio/transcriptions"
            async with session.post(posted, data=form) as response:
                assert (response.status, response.headers["X-Sidecar-Limit"]) == (402, "off")
            async with session.post(posted, data=gzip.compress(b'{"model": "whisper-1"}'), headers=coded) as response:
                assert (response.status, response.headers["X-Sidecar-Limit"]) == (402, "off")
            url = f"{whole.proxy_url}/v1/realtime?model=gpt-realtime"
            async with session.ws_connect(url) as socket:
                await socket.receive()
            await until_used(whole, "once", "1", "0")
            with pytest.raises(aiohttp.WSServerHandshakeError) as denied:
                await session.ws_connect(url)
            assert denied.value.status == 402
    finally:
        await server.close()
    assert reached == ["/v1/realtime?model=gpt-realtime"]


@pytest.mark.timeout(120)
async def test_what_the_messages_of_a_socket_take_counts_for_its_key(tmp_path: Path) -> None:
    """Their records have no key, and neither has one of a call that was let in without asking."""

    async def answers(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for _ in socket:
            usage = {"input_tokens": 30, "output_tokens": 20, "total_tokens": 50}
            await socket.send_json({"type": "response.done", "response": {"id": "r", "usage": usage}})
        return socket

    config = tmp_path / "limits.toml"
    config.write_text('[[limits]]\nname = "of-key"\nkey = "*"\nunit = "total_tokens"\namount = 100\nwindow = "day"\n')
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answers)
    server = TestServer(app)
    await server.start_server()
    try:
        async with (
            client() as session,
            limited(tmp_path, str(server.make_url("")), SIDECAR_CONFIG=str(config)) as whole,
        ):
            url = f"{whole.proxy_url}/v1/realtime?model=gpt-realtime"
            headers = {"x-tenant": "acme", "authorization": "Bearer one"}
            async with session.ws_connect(url, headers=headers) as socket:
                for used in ("50", "100"):
                    await socket.send_str("{}")
                    await socket.receive()
                    await until_used(whole, "of-key", used, "0")
                with pytest.raises(aiohttp.WSServerHandshakeError) as denied:
                    await session.ws_connect(url, headers=headers)
                assert denied.value.status == 402
            await whole.settled()
            assert 'decision="allowed",limit="",source="limits"} 1.0' in await whole.text("/metrics"), "a socket is one"
            await whole.kill()
            await whole.start()
            await until_used(whole, "of-key", "100", "0")
    finally:
        await server.close()


@pytest.mark.timeout(120)
async def test_what_is_let_in_without_asking_counts_for_its_key(tmp_path: Path) -> None:
    config = tmp_path / "limits.toml"
    config.write_text('[[limits]]\nname = "of-key"\nkey = "*"\nunit = "total_tokens"\namount = 100\nwindow = "day"\n')
    async with upstream() as (_, url), client() as session:
        async with limited(tmp_path, url, SIDECAR_CONFIG=str(config), SIDECAR_DURABILITY="buffered") as whole:
            meter = whole.children()["meter"][0]
            suspend(meter)
            try:
                assert (await call(session, whole))[0] == 200
            finally:
                os.kill(meter, signal.SIGCONT)
            await until_used(whole, "of-key", "15", "0")


async def until_used(whole: Whole, name: str, used: str, reserved: str) -> None:
    rows: list[dict[str, Any]] = []
    try:
        async with asyncio.timeout(LIMIT_S):
            while True:
                rows = (await whole.get("/limits"))["limits"]
                found = [(row["used"], row["reserved"]) for row in rows if row["limit"] == name]
                if found == [(used, reserved)]:
                    return
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"{name} is not at {used} and {reserved}: {rows}; {whole.log.read_text()}") from None


@pytest.mark.timeout(120)
async def test_what_consumed_nothing_is_given_back(tmp_path: Path) -> None:
    async with upstream() as (up, url), client() as session:
        up.status = 500
        async with limited(tmp_path, url, SIDECAR_LIMITS="calls=5/day,total_tokens=5000/day") as whole:
            answers = [await call(session, whole, max_tokens=100) for _ in range(12)]
            assert {status for status, _ in answers} == {500}
            await until_used(whole, "calls-per-day", "0", "0")
            up.status = 200
            statuses = [(await call(session, whole, max_tokens=100))[0] for _ in range(7)]
            assert statuses == [200] * 5 + [402] * 2
            await until_used(whole, "total_tokens-per-day", str(5 * 15), "0")
        unreachable = limited(tmp_path / "other", "http://127.0.0.1:9", SIDECAR_LIMITS="calls=2/day")
        unreachable.data_dir.parent.mkdir()
        async with unreachable:
            assert {(await call(session, unreachable))[0] for _ in range(6)} == {502}


@pytest.mark.timeout(120)
async def test_a_window_that_has_passed_lets_calls_in_again(tmp_path: Path) -> None:
    async with upstream() as (up, url), client() as session:
        async with limited(tmp_path, url, SIDECAR_LIMITS="calls=5/2s", SIDECAR_WORKERS="2") as whole:
            first = sorted([status for status, _ in await asyncio.gather(*(call(session, whole) for _ in range(9)))])
            assert first.count(200) == 5
            assert first.count(429) == 4
            async with asyncio.timeout(LIMIT_S):
                while (await call(session, whole))[0] != 200:
                    await asyncio.sleep(0.1)
            assert up.calls == 6


@pytest.mark.timeout(120)
async def test_calls_at_once_are_never_more_than_allowed(tmp_path: Path) -> None:
    async with upstream() as (up, url), client() as session:
        async with limited(tmp_path, url, SIDECAR_LIMITS="concurrent=7", SIDECAR_WORKERS="3") as whole:
            served = 0
            for _ in range(5):
                up.gate.clear()
                tasks = [asyncio.create_task(call(session, whole)) for _ in range(30)]
                async with asyncio.timeout(LIMIT_S):
                    # Who is denied may be told before the last of those let through has come to the upstream.
                    while sum(task.done() for task in tasks) < 23 or up.open < 7:
                        await asyncio.sleep(0.01)
                assert up.open == 7
                up.gate.set()
                served += sum(status == 200 for status, _ in await asyncio.gather(*tasks))
            assert served == 35
            assert up.open_max == 7
            # One after the other no client meets its own call before it.
            assert {(await call(session, whole))[0] for _ in range(40)} == {200}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("who", ["serve", "meter", "all"])
async def test_after_a_kill_settled_and_reserved_are_what_the_records_say(tmp_path: Path, who: str) -> None:
    """Between admission and settling: calls are open while a process is killed, with more on their way."""
    async with upstream() as (up, url), client() as session:
        whole = limited(
            tmp_path,
            url,
            SIDECAR_LIMITS="calls=400/day,output_tokens=100000/day",
            SIDECAR_WORKERS="2",
        )
        async with whole:
            done = [await call(session, whole, max_tokens=100) for _ in range(20)]
            assert {status for status, _ in done} == {200}
            up.gate.clear()
            tasks = [asyncio.create_task(tried(session, whole)) for _ in range(40)]
            async with asyncio.timeout(LIMIT_S):
                while up.calls < 60:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)  # their intents are on disk by then: 20 ms and a commit
            if who == "all":
                await whole.kill()
                up.gate.set()
                await asyncio.gather(*tasks)
                await whole.start()
            else:
                os.kill(whole.children()[who][0], signal.SIGKILL)
                up.gate.set()
                await asyncio.gather(*tasks)
                async with asyncio.timeout(LIMIT_S):
                    while len(whole.children()["meter"]) < 1 or len(whole.children()["serve"]) < 2:
                        await asyncio.sleep(0.02)
            more = await asyncio.gather(*(tried(session, whole) for _ in range(10)))
            assert 200 in more
            await whole.settled()
            records = await whole.records()
            calls, tokens = expected(records)
            await until_used(whole, "calls-per-day", str(calls), "0")
            await until_used(whole, "output_tokens-per-day", str(tokens), "0")
            assert calls >= 60
            # A restart derives the same from the records alone.
            assert await whole.stop() == 0, whole.log.read_text()
            await whole.start()
            await until_used(whole, "calls-per-day", str(calls), "0")
            await until_used(whole, "output_tokens-per-day", str(tokens), "0")


async def tried(session: aiohttp.ClientSession, whole: Whole) -> int:
    try:
        return (await call(session, whole, max_tokens=100))[0]
    except aiohttp.ClientError:
        return 0


def expected(records: list[dict[str, Any]]) -> tuple[int, int]:
    calls = tokens = 0
    for record in records:
        if record["outcome"] == "denied":
            continue
        usage, held = record["usage"], record.get("gate", {}).get("reserved", {})
        calls += 1
        if usage is not None and usage["usage_state"] == "final":
            tokens += usage["output_tokens"]
        else:
            tokens += next((amount for key, amount in held.items() if key.startswith("output_tokens")), 0)
    return calls, tokens


@pytest.mark.timeout(120)
async def test_the_command_says_who_is_at_what_while_it_runs_and_while_it_does_not(tmp_path: Path) -> None:
    config = tmp_path / "sidecar.toml"
    config.write_text(
        """
        [[limits]]
        name = "team-tokens"
        unit = "total_tokens"
        amount = 1000
        window = "month"
        timezone = "Europe/Berlin"
        "dimensions.team" = "*"

        [[limits]]
        name = "everybody"
        subscriber = ""
        unit = "calls"
        amount = 3
        window = "total"
        action = "warn"
        """
    )
    settings = {"SIDECAR_CONFIG": str(config), "SIDECAR_DIMENSIONS": "team=x-team"}
    async with upstream() as (_, url), client() as session:
        async with limited(tmp_path, url, **settings) as whole:
            for _ in range(4):
                assert (await call(session, whole))[0] == 200
            await whole.settled()
            code, out, err = await whole.command("limits")
            assert code == 0, err
            assert await whole.stop() == 0
            for text in (out, (await whole.command("limits"))[1]):
                assert [" ".join(line.split()) for line in text.splitlines() if "tokens" in line] == [
                    text_of_row(text, "team-tokens")
                ]
                assert "team-tokens dimensions.team (none) 60 0 1000 6.0" in text_of_row(text, "team-tokens")
                assert "everybody 4 0 3 133.3" in text_of_row(text, "everybody")
            code, out, _ = await whole.command("limits", "--format", "json", "--over", "100")
            assert [row["limit"] for row in json.loads(out)["limits"]] == ["everybody"]
            code, _, err = await whole.command("limits", "--limit", "team-token")
            assert (code, err) == (2, "no limit is called team-token; the limits are: team-tokens, everybody\n")
            assert "a limit is used up" in whole.log.read_text()


@pytest.mark.timeout(120)
async def test_who_looks_before_the_records_are_counted_is_not_told_that_nothing_was_used(tmp_path: Path) -> None:
    await fill(tmp_path / "data", FILLED)
    config = tmp_path / "sidecar.toml"
    config.write_text('[[limits]]\nname = "all"\nsubscriber = ""\nunit = "calls"\namount = 9\nwindow = "total"\n')
    async with upstream() as (_, url), limited(tmp_path, url, SIDECAR_CONFIG=str(config)) as whole:
        row = limit_of((await whole.get("/limits"))["limits"], "all")
        assert row["used"] == str(FILLED)


async def test_a_limit_that_nobody_defined_is_not_one_that_nobody_touched(tmp_path: Path) -> None:
    async with upstream() as (_, url), limited(tmp_path, url) as whole:
        for running in (True, False):
            for options in ((), ("--limit", "foo"), ("--limit", "foo", "--format", "json")):
                code, out, err = await whole.command("limits", *options)
                said = "no limit is defined: see SIDECAR_LIMITS and [[limits]]\n"
                assert (code, out, err) == (1, "", said), (running, options)
            if running:
                assert await whole.stop() == 0


def text_of_row(text: str, name: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(name)]
    return " ".join(line.split())


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("policy", "expected"), [("open", 200), ("closed", 429), ("last", 200)])
async def test_without_an_owner_the_setting_decides(tmp_path: Path, policy: str, expected: int) -> None:
    async with upstream() as (up, url), client() as session:
        settings = {"SIDECAR_LIMITS": "calls=10/day", "SIDECAR_GATE_ON_FAILURE": policy}
        async with limited(tmp_path, url, SIDECAR_DURABILITY="buffered", **settings) as whole:
            assert (await call(session, whole))[0] == 200
            meter = whole.children()["meter"][0]
            suspend(meter)
            try:
                status, body = await call(session, whole)
            finally:
                os.kill(meter, signal.SIGCONT)
            assert status == expected, body
            await whole.settled()
            records = await whole.records()
            assert records[-1]["gate"]["source"] == "on_failure"
            assert records[-1]["gate"]["decision"] == ("denied" if expected == 429 else "allowed")
            served = 1 + (expected == 200)
            assert up.calls == served
            # It was not reserved, and counts all the same.
            await until_used(whole, "calls-per-day", str(served), "0")


@pytest.mark.timeout(120)
async def test_a_dry_run_denies_nothing_and_says_what_it_would_have(tmp_path: Path) -> None:
    async with upstream() as (up, url), client() as session:
        settings = {"SIDECAR_LIMITS": "calls=2/day", "SIDECAR_GATE_DRY_RUN": "true"}
        async with limited(tmp_path, url, **settings) as whole:
            assert [(await call(session, whole))[0] for _ in range(4)] == [200] * 4
            await whole.settled()
            gates = [record["gate"] for record in await whole.records()]
            assert [gate["decision"] for gate in gates] == ["allowed", "allowed", "shadow", "shadow"]
            assert gates[-1]["limit"] == "calls-per-day"
            assert up.calls == 4
            await until_used(whole, "calls-per-day", "4", "0")


SCOPED = """
dimensions = "team=x-team"
[[limits]]
name = "fixed-subscriber"
subscriber = "a"
[[limits]]
name = "each-key"
subscriber = "b"
key = "*"
[[limits]]
name = "fixed-model"
subscriber = "c"
model = "gpt-5"
[[limits]]
name = "each-model"
subscriber = "d"
model = "*"
[[limits]]
name = "fixed-route"
subscriber = "e"
route = "/v1/chat/completions"
[[limits]]
name = "fixed-provider"
subscriber = "f"
provider = "openai"
[[limits]]
name = "each-provider"
subscriber = "g"
provider = "*"
[[limits]]
name = "fixed-dimension"
subscriber = "h"
dimensions.team = "red"
[[limits]]
name = "each-dimension"
subscriber = "i"
dimensions.team = "*"
""".replace("[[limits]]", '[[limits]]\nunit = "calls"\namount = 1\nwindow = "day"')
ANTHROPIC = "/v1/messages"
# Who calls, and how: each has one call under each of its limit's counters. An API at an unknown host is OpenAI's, as
# its records say, where the path is.
SCOPED_CALLS: list[tuple[str, dict[str, Any], int]] = [
    ("a", {}, 200), ("a", {"model": "o3"}, 402), ("z", {}, 200), ("z", {}, 200),
    ("b", {"key": "1"}, 200), ("b", {"key": "1"}, 402), ("b", {"key": "2"}, 200), ("b", {}, 200), ("b", {}, 402),
    ("c", {}, 200), ("c", {}, 402), ("c", {"model": "o3"}, 200), ("c", {"model": "o3"}, 200),
    ("d", {}, 200), ("d", {}, 402), ("d", {"model": "o3"}, 200), ("d", {"model": "o3"}, 402),
    ("e", {}, 200), ("e", {}, 402), ("e", {"path": "/v1/embeddings"}, 200), ("e", {"path": "/v1/embeddings"}, 200),
    ("f", {}, 200), ("f", {}, 402), ("f", {"path": ANTHROPIC}, 200), ("f", {"path": ANTHROPIC}, 200),
    ("g", {}, 200), ("g", {}, 402), ("g", {"path": ANTHROPIC}, 200), ("g", {"path": ANTHROPIC}, 402),
    ("h", {"team": "red"}, 200), ("h", {"team": "red"}, 402), ("h", {"team": "blue"}, 200), ("h", {}, 200),
    ("i", {"team": "red"}, 200), ("i", {"team": "red"}, 402), ("i", {"team": "blue"}, 200), ("i", {}, 200),
    ("i", {}, 402),
]  # fmt: skip


@pytest.mark.timeout(120)
async def test_each_scope_has_counters_of_its_own_fixed_and_for_each(tmp_path: Path) -> None:
    config = tmp_path / "sidecar.toml"
    config.write_text(SCOPED)
    async with upstream() as (_, url), client() as session:
        async with limited(tmp_path, url, SIDECAR_CONFIG=str(config), SIDECAR_WORKERS="2") as whole:
            for who, how, expected in SCOPED_CALLS:
                headers = {"x-tenant": who}
                headers |= {"authorization": f"Bearer {how['key']}"} if "key" in how else {}
                headers |= {"x-team": how["team"]} if "team" in how else {}
                body = {"model": how.get("model", "gpt-5"), "max_tokens": 9}
                address = whole.proxy_url + how.get("path", "/v1/chat/completions")
                async with session.post(address, json=body, headers=headers) as answer:
                    assert answer.status == expected, (who, how, await answer.text())
            await whole.settled()
            rows = (await whole.get("/limits"))["limits"]
    assert all(row["used"] == "1" for row in rows if not row["limit"].startswith("fixed-")), rows
    assert {row["scope"]["subscriber"] for row in rows} == set("abcdefghi")


@pytest.mark.timeout(120)
async def test_calls_at_once_of_a_worker_that_died_are_free_again(tmp_path: Path) -> None:
    async with upstream() as (up, url), client() as session:
        up.gate.clear()
        async with limited(tmp_path, url, SIDECAR_LIMITS="concurrent=2", SIDECAR_WORKERS="2") as whole:
            open_calls = [asyncio.create_task(tried(session, whole)) for _ in range(2)]
            async with asyncio.timeout(LIMIT_S):
                while up.open < 2:
                    await asyncio.sleep(0.01)
            assert (await call(session, whole))[0] == 429
            killed = whole.children()["serve"]
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
            await asyncio.gather(*open_calls)
            await until_used(whole, "concurrent", "0", "0")
            async with asyncio.timeout(LIMIT_S):
                while len(set(whole.children()["serve"]) - set(killed)) < 2:
                    await asyncio.sleep(0.02)
            up.gate.set()
            assert (await call(session, whole))[0] == 200


@pytest.mark.timeout(120)
async def test_who_pays_and_which_model_may_stand_in_the_body_and_a_denied_call_is_said_in_full(
    tmp_path: Path,
) -> None:
    config = tmp_path / "sidecar.toml"
    config.write_text(
        """
        [[limits]]
        name = "no-opus"
        model = "opus"
        unit = "calls"
        amount = 0
        window = "total"
        [[limits]]
        name = "two-a-day"
        unit = "calls"
        amount = 2
        window = "day"
        """
    )
    async with upstream() as (up, url), client() as session:
        whole = Whole(tmp_path / "data", url, SIDECAR_SUBSCRIBER="body:user", SIDECAR_CONFIG=str(config))
        async with whole:
            address = whole.proxy_url + "/v1/chat/completions"
            long = "x" * 300_000  # more than is waited for
            asked = [
                {"model": "opus", "user": "a"},
                {"model": "gpt-5", "user": "a"},
                {"model": "gpt-5", "user": "a"},
                {"model": "gpt-5", "user": "a"},
                {"model": "gpt-5", "user": "b"},
                {"model": "opus", "user": "b", "messages": long},
            ]
            found = []
            for body in asked:
                async with session.post(address, json=body) as answer:
                    found.append((answer.status, answer.headers.get("X-Sidecar-Limit")))
                    if answer.status == 402:
                        assert answer.headers["x-should-retry"] == "false"
                        assert "Retry-After" not in answer.headers
                        assert await answer.json(content_type=None)
            assert found == [
                (402, "no-opus"),
                (200, None),
                (200, None),
                (402, "two-a-day"),
                (200, None),
                (402, "no-opus"),
            ]
            assert up.calls == 3
            await whole.settled()
            records = await whole.records()
    assert [record["outcome"] for record in records].count("denied") == 3
    denied = records[0]
    assert (denied["status"], denied["usage"], denied["subscriber"]["id"]) == (402, None, "a")
    assert denied["gate"] == {"decision": "denied", "limit": "no-opus", "source": "limits", "age_s": 0.0}
    assert denied["error"] == "denied by the limit no-opus"
