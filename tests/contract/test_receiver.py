"""The receiver itself: what every vendor in it has in common, its own pages, its faults, its journal."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from support.scripted import running_receiver

from sidecar.dev.mock_backends import Do, Fault, FaultError, Lie, Receiver, StoreError, Terms, backends
from sidecar.dev.mock_backends.faults import DELAY_S_MAX, RULES_MAX, Faults, parse

PAYLOAD = {
    "method": "POST",
    "responseCode": 200,
    "requestHeaders": ["Content-Type"],
    "responseHeaders": ["Content-Type"],
    "elements": [{"name": "input-tokens", "value": "43"}],
    "monetized": True,
    "correlationId": "r1",
}
KEY = {"x-api-key": "rev_a_key_of_some_length"}


async def post(
    session: aiohttp.ClientSession, path: str, body: Any, **headers: str
) -> tuple[int, Any, Mapping[str, str]]:
    named = {**KEY, **{name.replace("_", "-"): value for name, value in headers.items()}}
    async with session.post(path, json=body, headers=named) as answer:
        return answer.status, await answer.json(content_type=None), answer.headers


async def listed(session: aiohttp.ClientSession, path: str = "/_received") -> list[dict[str, Any]]:
    async with session.get(path) as answer:
        assert answer.content_type == "application/x-ndjson"
        return [json.loads(line) for line in (await answer.text()).splitlines()]


# -- its own pages


async def test_lists_what_it_took_in_order_and_forgets() -> None:
    async with running_receiver() as (receiver, session):
        await post(session, "/meter", [PAYLOAD, PAYLOAD], Idempotency_Key="k1")
        await post(session, "/meter/v1/api/meter", PAYLOAD)
        await post(session, "/meter", [{}], Idempotency_Key="k2")
        rows = await listed(session)
        assert [list(row) for row in rows] == [["backend", "path", "key", "body", "verdict", "at"]] * 3
        assert [(r["backend"], r["path"], r["key"], r["verdict"]) for r in rows] == [
            ("meter", "/meter", "k1", "delivered"),
            ("revenium", "/meter/v1/api/meter", "r1", "delivered"),
            ("meter", "/meter", "k2", "refused"),
        ]
        assert rows[0]["body"] == [PAYLOAD, PAYLOAD]
        assert rows[0]["at"] <= rows[1]["at"] <= rows[2]["at"]
        assert rows[0]["at"].endswith("Z")
        assert [r["backend"] for r in await listed(session, "/_received?backend=revenium")] == ["revenium"]
        assert receiver.billed("meter") == [PAYLOAD, PAYLOAD]
        async with session.delete("/_received") as answer:
            assert answer.status == 204
        assert await listed(session) == []
        status, _, headers = await post(session, "/meter", [PAYLOAD], Idempotency_Key="k1")
        assert status == 200, "forgetting includes what was remembered for de-duplication"
        assert "Idempotent-Replayed" not in headers


async def test_unknown_paths_and_methods_say_what_is_known() -> None:
    async with running_receiver() as (receiver, session):
        async with session.post("/nowhere") as answer:
            assert answer.status == 404
            assert "POST /meter" in (await answer.json())["known"]
        async with session.get("/meter") as answer:
            assert answer.status == 405
            assert answer.headers["Allow"] == "POST"
        async with session.post("/meter", data=b"[]", headers={"Content-Encoding": "gzip"}) as answer:
            assert answer.status in (400, 415)
        assert receiver.received == []


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b'"text"', b"null", b"[1]", b"[" * 2000])
@pytest.mark.parametrize("path", ["/meter", "/meter/v1/api/meter"])
async def test_garbage_is_refused_and_listed_as_refused(path: str, body: bytes) -> None:
    async with running_receiver() as (receiver, session):
        headers = {**KEY, "Content-Type": "application/json"}
        async with session.post(path, data=body, headers=headers) as answer:
            assert answer.status == 400
        assert [row.verdict for row in receiver.received] == ["refused"]


async def test_no_credential_is_ever_listed() -> None:
    secret = KEY["x-api-key"]
    async with running_receiver() as (receiver, session):
        body = {**PAYLOAD, "platformAPIKey": "another-key", "url": f"https://u/{secret}/x", "application": secret}
        await post(session, "/meter/v1/api/meter", body)
        await post(session, "/meter", [{**body, "correlationId": "\u00e9" + secret}], Idempotency_Key=secret)
        await post(session, f"/meter/v1/api/meter/ingest?sourceId={secret}", {secret: "1"})
        await post(session, "/meter/v1/api/meter", {"bad": secret})
        text = json.dumps(await listed(session))
        assert len(receiver.received) == 4
        assert secret not in text
        assert "another-key" not in text
        assert "https://u/[key]/x" in text


async def test_only_the_key_it_was_given_is_good() -> None:
    terms = {"meter": Terms(key="right"), "revenium": Terms(key="right")}
    async with running_receiver(terms=terms) as (receiver, session):
        for path, body in (("/meter", [PAYLOAD]), ("/meter/v1/api/meter", PAYLOAD)):
            assert (await post(session, path, body))[0] == 403
            assert (await post(session, path, body, x_api_key="right"))[0] == 200
        assert [row.verdict for row in receiver.received] == ["blocked", "delivered"] * 2


def test_terms_for_an_unknown_backend_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="'strype' is no backend of the receiver; known are meter"):
        Receiver(terms={"strype": Terms()})
    assert "revenium" in backends()


# -- faults


async def test_a_status_fault_takes_nothing_and_says_when_to_come_back() -> None:
    async with running_receiver() as (receiver, session):
        rule = {"do": "status", "status": 429, "retry_after_s": 7, "times": 1, "backend": "meter"}
        assert (await post(session, "/_faults", rule))[0] == 200
        status, _, headers = await post(session, "/meter", [PAYLOAD], Idempotency_Key="k")
        assert status == 429
        assert headers["Retry-After"] == "7"
        assert receiver.received == []
        assert (await post(session, "/meter/v1/api/meter", PAYLOAD))[0] == 200
        assert (await post(session, "/meter", [PAYLOAD], Idempotency_Key="k"))[0] == 200
        async with session.get("/_faults") as answer:
            [state] = await answer.json()
        assert (state["asked"], state["hits"]) == (1, 1)


async def test_cut_before_takes_nothing_and_cut_after_takes_it() -> None:
    async with running_receiver() as (receiver, session):
        receiver.faults.set(Fault(do=Do.CUT_BEFORE, times=1), Fault(do=Do.CUT_AFTER, times=1))
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await post(session, "/meter", [PAYLOAD], Idempotency_Key="k")
        assert receiver.received == []
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await post(session, "/meter", [PAYLOAD], Idempotency_Key="k")
        assert [row.verdict for row in receiver.received] == ["delivered"]
        status, _, headers = await post(session, "/meter", [PAYLOAD], Idempotency_Key="k")
        assert (status, headers["Idempotent-Replayed"]) == (200, "true")
        assert [row.verdict for row in receiver.received] == ["delivered", "duplicate"]
        assert receiver.billed("meter") == [PAYLOAD]


@pytest.mark.parametrize("lie", list(Lie))
async def test_a_lie_is_a_2xx_that_takes_nothing(lie: Lie) -> None:
    async with running_receiver() as (receiver, session):
        rule = {"do": "lie", "lie": lie, "times": 1}
        assert (await post(session, "/_faults", rule))[0] == 200
        async with session.post("/meter", json=[PAYLOAD], headers=KEY) as reply:
            assert 200 <= reply.status < 300
            assert await reply.read() != b'{"accepted":1}'
        assert receiver.received == []
        assert (await post(session, "/meter", [PAYLOAD]))[:2] == (200, {"accepted": 1})


async def test_status_after_takes_it_and_complains() -> None:
    async with running_receiver() as (receiver, session):
        receiver.faults.set(Fault(do=Do.STATUS_AFTER, status=500, times=1))
        assert (await post(session, "/meter", [PAYLOAD], Idempotency_Key="k"))[0] == 500
        assert (await post(session, "/meter", [PAYLOAD], Idempotency_Key="k"))[0] == 200
        assert receiver.billed("meter") == [PAYLOAD]


async def test_the_same_key_under_way_is_refused_until_the_first_is_done() -> None:
    async with running_receiver() as (receiver, session):
        receiver.faults.set(Fault(do=Do.DELAY, delay_s=0.3, times=1))
        first = asyncio.create_task(post(session, "/meter", [PAYLOAD], Idempotency_Key="k"))
        while not receiver.faults.status()[0]["hits"]:
            await asyncio.sleep(0.005)
        status, body, headers = await post(session, "/meter", [PAYLOAD], Idempotency_Key="k")
        assert (status, body["code"], headers["Retry-After"]) == (409, "idempotency_key_in_progress", "1")
        assert (await first)[0] == 200
        assert (await post(session, "/meter", [PAYLOAD], Idempotency_Key="k"))[0] == 200
        assert [row.verdict for row in receiver.received] == ["retry", "delivered", "duplicate"]


async def test_closing_does_not_wait_for_calls_that_are_held_back() -> None:
    async with running_receiver() as (receiver, session):
        receiver.faults.set(Fault(do=Do.DELAY, delay_s=600))
        held = asyncio.create_task(post(session, "/meter", [PAYLOAD]))
        while not receiver.faults.status()[0]["hits"]:
            await asyncio.sleep(0.005)
        async with asyncio.timeout(10):
            await receiver.aclose()
        with pytest.raises(aiohttp.ClientError):
            await held
        assert receiver.received == []


def test_the_same_seed_hits_the_same_calls_and_the_share_is_kept() -> None:
    def hits(seed: int) -> list[bool]:
        faults = Faults()
        faults.set(Fault(do=Do.STATUS, share=0.3, seed=seed))
        return [faults.decide("meter", "/meter").fault is not None for _ in range(2000)]

    assert hits(1) == hits(1)
    assert hits(1) != hits(2)
    assert 500 < sum(hits(1)) < 700


def test_rules_are_asked_in_order_and_delays_add_up() -> None:
    faults = Faults()
    faults.set(
        Fault(do=Do.DELAY, delay_s=1),
        Fault(do=Do.DELAY, delay_s=2, path="/meter/v1"),
        Fault(do=Do.CUT_AFTER, backend="revenium"),
        Fault(do=Do.STATUS),
    )
    fate = faults.decide("revenium", "/meter/v1/api/meter")
    assert (fate.delay_s, fate.fault and fate.fault.do) == (3, Do.CUT_AFTER)
    fate = faults.decide("meter", "/meter")
    assert (fate.delay_s, fate.fault and fate.fault.do) == (1, Do.STATUS)


@pytest.mark.parametrize(
    ("order", "says"),
    [
        ("cut", "expected a rule"),
        ({}, "do=None: expected one of delay, status"),
        ({"do": "explode"}, "do='explode': expected one of"),
        ({"do": "status", "share": 1.1}, "share=1.1: expected a number from 0 to 1"),
        ({"do": "status", "share": True}, "share=True: expected float"),
        ({"do": "status", "status": 200}, "status=200: expected an error status"),
        ({"do": "lie", "lie": "white"}, "lie='white': expected one of html, login"),
        ({"do": "delay", "delay_s": DELAY_S_MAX + 1}, "expected seconds, 0 to 3600"),
        ({"do": "status", "times": 0}, "times=0: expected a whole number from 1"),
        ({"do": "status", "sead": 1}, "'sead' is no part of a rule; known are do, share"),
        ({"do": "status", "seed": "1"}, "seed='1': expected int"),
        ([{"do": "status"}] * (RULES_MAX + 1), "101 rules: at most 100"),
    ],
)
async def test_an_order_that_cannot_be_read_changes_nothing_and_says_why(order: Any, says: str) -> None:
    with pytest.raises(FaultError, match=re.escape(says)):
        parse(order)
    async with running_receiver() as (receiver, session):
        receiver.faults.set(Fault(do=Do.STATUS, backend="nobody"))
        status, body, _ = await post(session, "/_faults", order)
        assert status == 400
        assert says in body["error"]
        assert len(receiver.faults.status()) == 1
        async with session.delete("/_faults") as answer:
            assert await answer.json() == []


async def test_a_full_receiver_refuses_instead_of_forgetting() -> None:
    async with running_receiver(taken_bytes_max=1_000) as (receiver, session):
        while (await post(session, "/meter", [PAYLOAD]))[0] == 200:
            assert len(receiver.received) < 10
        status, body, _ = await post(session, "/meter", [PAYLOAD])
        assert status == 507
        assert "DELETE /_received makes room" in body["error"]
        receiver.forget()
        assert (await post(session, "/meter", [PAYLOAD]))[0] == 200


# -- the journal


async def test_a_restart_remembers_rows_and_keys(tmp_path: Path) -> None:
    store = tmp_path / "journal"
    async with running_receiver(store=store) as (receiver, session):
        await post(session, "/meter", [PAYLOAD], Idempotency_Key="k")
        before = receiver.received
    async with running_receiver(store=store) as (receiver, session):
        assert receiver.received == before
        _, _, headers = await post(session, "/meter", [PAYLOAD], Idempotency_Key="k")
        assert headers["Idempotent-Replayed"] == "true"
        receiver.forget()
        assert store.read_bytes() == b""
        assert (await post(session, "/meter", [PAYLOAD], Idempotency_Key="k"))[0] == 200
    async with running_receiver(store=store) as (receiver, _):
        assert [row.verdict for row in receiver.received] == ["delivered"]


async def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    store = tmp_path / "journal"
    async with running_receiver(store=store) as (_, session):
        await post(session, "/meter", [PAYLOAD], Idempotency_Key="k")
    whole = store.read_bytes()
    store.write_bytes(whole + whole[:-10])
    async with running_receiver(store=store) as (receiver, session):
        assert len(receiver.received) == 1
        await post(session, "/meter", [PAYLOAD], Idempotency_Key="k2")
    async with running_receiver(store=store) as (receiver, _):
        assert [row.key for row in receiver.received] == ["k", "k2"]


@pytest.mark.parametrize("content", [b"hello\n", b"[]\n", b'{"taken": [{"x": 1}], "kept": {}}\n', b"\n"])
async def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path, content: bytes) -> None:
    store = tmp_path / "notes.txt"
    store.write_bytes(content)
    with pytest.raises(StoreError, match="is no receiver's journal"):
        await Receiver(store=store).start()
    assert store.read_bytes() == content


async def test_a_store_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be opened"):
        await Receiver(store=tmp_path).start()


async def test_it_starts_again_on_the_port_it_had(tmp_path: Path) -> None:
    receiver = Receiver(store=tmp_path / "journal")
    url = await receiver.start()
    port = int(url.rpartition(":")[2])
    other = Receiver()
    with pytest.raises(OSError, match="in use"):
        await other.start(port=port)
    await receiver.aclose()
    await receiver.aclose()
    again = Receiver(store=tmp_path / "journal")
    assert await again.start(port=port) == url
    await again.aclose()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_command_runs_until_it_is_told_to_stop(tmp_path: Path, number: signal.Signals) -> None:
    program = (
        "import asyncio, sys, pathlib, sidecar.dev.mock_backends as r\n"
        "asyncio.run(r.serve(port=0, store=pathlib.Path(sys.argv[1]), ready=lambda url: print(url, flush=True)))"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(tmp_path / "journal"), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            url = (await process.stdout.readline()).decode().strip()
            async with aiohttp.ClientSession(url) as session:
                assert (await post(session, "/meter", [PAYLOAD], Idempotency_Key="k"))[0] == 200
            process.send_signal(number)
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    async with running_receiver(store=tmp_path / "journal") as (receiver, _):
        assert [row.key for row in receiver.received] == ["k"]
