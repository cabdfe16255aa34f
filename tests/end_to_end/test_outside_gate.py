"""Others are asked whether a call may be made: the vendors' stand-ins, real processes, what reaches the upstream."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from support.counted_api import LIMIT_S, call, client, upstream
from support.scripted import running_receiver
from support.whole import Whole

from sidecar.dev.mock_backends import Do, Fault, GateLie, Lie, Receiver, Terms
from sidecar.dev.mock_backends.asked import PUBLIC_KEY

KEY = "rev_mk_1234567890"
TERMS = {"revenium": Terms(key=KEY)}
VENDORS: dict[str, dict[str, str]] = {
    "revenium": {"SIDECAR_REVENIUM_API_KEY": KEY, "SIDECAR_REVENIUM_URL": "{url}"},
    "revenium_controls": {
        "SIDECAR_REVENIUM_API_KEY": KEY,
        "SIDECAR_REVENIUM_URL": "{url}",
        "SIDECAR_GATE_REVENIUM_TEAM": "team-limit-1",
    },
    "openmeter": {
        "SIDECAR_OPENMETER_API_KEY": "om_test",
        "SIDECAR_OPENMETER_URL": "{url}",
        "SIDECAR_GATE_OPENMETER_FEATURE": "api_calls",
        "SIDECAR_GATE_OPENMETER_UNIT": "calls",
    },
    "flexprice": {"SIDECAR_FLEXPRICE_API_KEY": "sk_test", "SIDECAR_FLEXPRICE_URL": "{url}"},
    "lago": {"SIDECAR_LAGO_API_KEY": "lago_test", "SIDECAR_LAGO_URL": "{url}", "SIDECAR_GATE_LAGO_ID": "customer"},
}


# What a vendor says at once is not to be taken for late on a machine that is slow for a moment: only who is slow by
# design is waited for briefly.
SOON, IN_TIME = "300ms", "20s"


def gated(tmp_path: Path, upstream_url: str, receiver: Receiver, vendor: str, **settings: str) -> Whole:
    own = {name: value.format(url=receiver.url) for name, value in VENDORS[vendor].items()}
    base = {"SIDECAR_SUBSCRIBER": "header:x-tenant", "SIDECAR_GATE": vendor}
    return Whole(tmp_path / "data", upstream_url, **(base | own | settings))


def completion(who: str) -> dict[str, Any]:
    """Of 60 tokens, as it is reported to Revenium."""
    moment = "2026-11-20T09:00:00Z"
    return {
        "model": "m",
        "provider": "p",
        "inputTokenCount": 40,
        "outputTokenCount": 20,
        "totalTokenCount": 60,
        "stopReason": "END",
        "requestTime": moment,
        "completionStartTime": moment,
        "responseTime": moment,
        "requestDuration": 1,
        "subscriber": {"id": who},
    }


async def gates(whole: Whole) -> list[dict[str, Any]]:
    await whole.settled()
    return [{"outcome": record["outcome"], **record["gate"]} for record in await whole.records()]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("vendor", ["revenium", "openmeter"])
async def test_of_calls_at_once_as_many_as_the_vendor_leaves_reach_the_upstream_and_it_is_asked_once(
    tmp_path: Path, vendor: str, workers: int
) -> None:
    async with upstream() as (up, url), client() as session, running_receiver(terms=TERMS) as (receiver, _):
        # Who is denied is asked for by a timer of its own: not within this test.
        settings = {"SIDECAR_WORKERS": str(workers), "SIDECAR_GATE_DENIED_AGE": "1h"}
        async with gated(tmp_path, url, receiver, vendor, **settings) as whole:
            answers = await asyncio.gather(*(call(session, whole, "acme-quota-10") for _ in range(60)))
            assert sorted(status for status, _ in answers) == [200] * 10 + [402] * 50
            assert up.calls == 10
            assert (await call(session, whole, "other-quota-1"))[0] == 200
            found = await gates(whole)
            text = await whole.text("/metrics")
    denied = [gate for gate in found if gate["decision"] == "denied"]
    assert len(denied) == 50
    assert {(gate["source"], gate["outcome"]) for gate in denied} == {(vendor, "denied")}
    assert {gate["source"] for gate in found} == {vendor}
    assert f'sidecar_gate_questions_total{{result="answered",source="{vendor}"}} 2.0' in text
    assert f'sidecar_gate_source_down{{source="{vendor}"}} 0.0' in text


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("vendor", "who", "status"),
    [
        ("revenium", "unknown-acme", 402),
        ("openmeter", "unknown-acme", 402),
        ("flexprice", "unknown-acme", 402),
        ("flexprice", "acme-balance-0", 402),
        ("flexprice", "acme-balance-3", 200),
        ("lago", "unknown-acme", 402),
        ("lago", "acme-balance-0", 402),
        ("lago", "acme-balance-3", 200),
        ("revenium_controls", "acme", 402),
    ],
)
async def test_each_vendor_is_asked_in_its_own_way(tmp_path: Path, vendor: str, who: str, status: int) -> None:
    async with upstream() as (up, url), client() as session, running_receiver(terms=TERMS) as (receiver, told):
        if vendor == "revenium_controls":
            async with told.post("/meter/v2/ai/completions", json=completion(who), headers={"x-api-key": KEY}) as sent:
                assert sent.status < 300, await sent.text()
        async with gated(tmp_path, url, receiver, vendor) as whole:
            if vendor == "revenium_controls":  # its rules are polled, and no call waits for them
                await whole.until_metric('sidecar_gate_questions_total{result="answered"')
            answer = await call(session, whole, who)
            assert answer[0] == status, answer
            assert up.calls == (status == 200)
            (gate,) = await gates(whole)
    assert gate["source"] == vendor
    assert gate["decision"] == ("allowed" if status == 200 else "denied")
    if status == 402:
        assert json.loads(answer[1])["error"]["code"] == "insufficient_quota"


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("fault", "reason", "on_failure"),
    [
        (Fault(do=Do.DELAY, delay_s=30), "timeout", "open"),
        (Fault(do=Do.STATUS, status=503), "http_503", "closed"),
        (Fault(do=Do.LIE, lie=Lie.HTML), "html", "open"),
        (Fault(do=Do.LIE, lie=GateLie.CLAIM_UNSIGNED), "claim_algorithm", "open"),
        (Fault(do=Do.LIE, lie=GateLie.CLAIM_EXPIRED), "claim_expired", "open"),
        (Fault(do=Do.LIE, lie=GateLie.CLAIM_FORGED), "claim_signature", "closed"),
    ],
)
async def test_a_vendor_that_is_slow_or_lies_is_the_operators_word_said_and_counted(
    tmp_path: Path, fault: Fault, reason: str, on_failure: str
) -> None:
    key = tmp_path / "key.pem"
    key.write_text(PUBLIC_KEY)
    async with upstream() as (up, url), client() as session, running_receiver(terms=TERMS) as (receiver, _):
        receiver.faults.set(fault)
        settings = {
            "SIDECAR_GATE_ON_FAILURE": on_failure,
            "SIDECAR_GATE_TIMEOUT": SOON if reason == "timeout" else IN_TIME,
            "SIDECAR_GATE_REVENIUM_PUBLIC_KEY_FILE": str(key),
        }
        async with gated(tmp_path, url, receiver, "revenium", **settings) as whole:
            status, body = await call(session, whole)
            assert status == (200 if on_failure == "open" else 429), body
            assert up.calls == (on_failure == "open")
            (gate,) = await gates(whole)
            text = await whole.text("/metrics")
            ready = await whole.get("/readyz")
    word = "allowed" if on_failure == "open" else "denied"
    assert (gate["decision"], gate["source"]) == (word, "on_failure")
    assert f'sidecar_gate_unanswered_total{{decision="{word}",reason="{reason}",source="revenium"}} 1.0' in text
    assert any("revenium does not answer" in note and reason in note for note in ready["notes"]), ready


SAYS_NOTHING = {
    "slow": (Fault(do=Do.DELAY, delay_s=30), "timeout"),
    "down": (None, "refused"),
    "html": (Fault(do=Do.LIE, lie=Lie.HTML), "html"),
    "other": (Fault(do=Do.LIE, lie=Lie.WRONG_SHAPE), "unexpected_answer"),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("wrong", SAYS_NOTHING)
@pytest.mark.parametrize("vendor", VENDORS)
async def test_no_vendor_that_says_nothing_of_a_subscriber_decides_about_it(
    tmp_path: Path, vendor: str, wrong: str
) -> None:
    fault, reason = SAYS_NOTHING[wrong]
    async with upstream() as (up, url), client() as session, running_receiver(terms=TERMS) as (receiver, _):
        settings = {"SIDECAR_GATE_ON_FAILURE": "closed", "SIDECAR_GATE_TIMEOUT": SOON if wrong == "slow" else IN_TIME}
        if fault is None:
            backend = vendor.partition("_")[0].upper()
            settings[f"SIDECAR_{backend}_URL"] = "http://127.0.0.1:9"
        else:
            receiver.faults.set(fault)
        async with gated(tmp_path, url, receiver, vendor, **settings) as whole:
            if vendor == "revenium_controls":  # its rules are polled, and no call waits for them
                await whole.until_metric(f'sidecar_gate_questions_total{{result="{reason}"')
            status, body = await call(session, whole)
            assert status == 429, body
            assert up.calls == 0
            (gate,) = await gates(whole)
            text = await whole.text("/metrics")
            ready = await whole.get("/readyz")
    assert (gate["decision"], gate["source"], gate["limit"]) == ("denied", "on_failure", vendor)
    assert f'sidecar_gate_unanswered_total{{decision="denied",reason="{reason}",source="{vendor}"}} 1.0' in text
    assert any(f"{vendor} does not answer ({reason})" in note for note in ready["notes"]), ready


@pytest.mark.timeout(120)
async def test_last_goes_on_with_what_was_said_before_the_vendor_went(tmp_path: Path) -> None:
    async with upstream() as (up, url), client() as session, running_receiver(terms=TERMS) as (receiver, _):
        settings = {"SIDECAR_GATE_ON_FAILURE": "last", "SIDECAR_GATE_AGE": "1s", "SIDECAR_GATE_TIMEOUT": IN_TIME}
        async with gated(tmp_path, url, receiver, "revenium", **settings) as whole:
            assert (await call(session, whole, "acme-quota-4"))[0] == 200
            receiver.faults.set(Fault(do=Do.STATUS, status=500))
            statuses = []
            async with asyncio.timeout(LIMIT_S):
                while 402 not in statuses:
                    statuses.append((await call(session, whole, "acme-quota-4"))[0])
                    await asyncio.sleep(0.3)
            found = await gates(whole)
    assert statuses == [200] * 3 + [402], "the old answer, less what was used since"
    assert up.calls == 4
    assert {gate["source"] for gate in found} == {"revenium"}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("vendor", ["revenium", "revenium_controls"])
async def test_last_denies_over_a_restart_whom_the_vendor_denied_before_it_went(tmp_path: Path, vendor: str) -> None:
    async with upstream() as (up, url), client() as session, running_receiver(terms=TERMS) as (receiver, told):
        async with told.post("/meter/v2/ai/completions", json=completion("acme"), headers={"x-api-key": KEY}) as sent:
            assert sent.status < 300, await sent.text()
        settings = {
            "SIDECAR_GATE_ON_FAILURE": "last",
            "SIDECAR_GATE_TIMEOUT": IN_TIME,
            "SIDECAR_REVENIUM_URL": receiver.url,
        }
        who = "acme" if vendor == "revenium_controls" else "unknown-acme"
        async with gated(tmp_path, url, receiver, vendor, **settings) as whole:
            await whole.until_metric('sidecar_gate_questions_total{result="answered"') if who == "acme" else None
            assert (await call(session, whole, who))[0] == 402
            assert await whole.stop() == 0, whole.log.read_text()
            receiver.faults.set(Fault(do=Do.STATUS, status=503))
            await whole.start()
            await whole.until_metric('sidecar_gate_questions_total{result="http_503"') if who == "acme" else None
            assert (await call(session, whole, who))[0] == 402
            text = await whole.text("/metrics")
            receiver.faults.set()
    assert up.calls == 0
    assert f'sidecar_gate_unanswered_total{{decision="denied",reason="last",source="{vendor}"}} 1.0' in text


@pytest.mark.timeout(120)
async def test_tokens_of_streams_are_held_off_the_answer_until_it_is_known_what_they_took(tmp_path: Path) -> None:
    async with upstream() as (up, url), client() as session, running_receiver(terms=TERMS) as (receiver, _):
        up.gate.clear()
        settings = {"SIDECAR_GATE_REVENIUM_UNIT": "output_tokens", "SIDECAR_WORKERS": "2"}
        async with gated(tmp_path, url, receiver, "revenium", **settings) as whole:

            def stream() -> asyncio.Task[tuple[int, bytes]]:
                return asyncio.create_task(call(session, whole, "acme-quota-1000", stream=True, max_tokens=200))

            streams = [stream() for _ in range(12)]
            async with asyncio.timeout(LIMIT_S):
                while sum(task.done() for task in streams) < 7 or up.calls < 5:
                    await asyncio.sleep(0.01)
            assert up.calls == 5, "five of 200 are let in together"
            up.gate.set()
            assert sorted(status for status, _ in await asyncio.gather(*streams)) == [200] * 5 + [402] * 7
            await whole.settled()
            # Each took five: nearly all of it is there again, once what was denied meanwhile is asked for anew.
            again = [stream() for _ in range(4)]
            assert [status for status, _ in await asyncio.gather(*again)] == [200] * 4


@pytest.mark.timeout(120)
async def test_a_client_that_leaves_while_somebody_is_asked_holds_nothing(tmp_path: Path) -> None:
    async with upstream() as (up, url), client() as session, running_receiver(terms=TERMS) as (receiver, _):
        receiver.faults.set(Fault(do=Do.DELAY, delay_s=1.0, times=1))
        async with gated(tmp_path, url, receiver, "revenium") as whole:
            async with client() as impatient:
                calls = [asyncio.create_task(call(impatient, whole, "acme-quota-5")) for _ in range(5)]
                async with asyncio.timeout(LIMIT_S):
                    while (await whole.get("/balance"))["open"] < 5:
                        await asyncio.sleep(0.01)
                for task in calls:
                    task.cancel()
                await asyncio.wait(calls)
            answers = await asyncio.gather(*(call(session, whole, "acme-quota-5") for _ in range(6)))
            assert sorted(status for status, _ in answers) == [200] * 5 + [402]
            assert up.calls == 5


@pytest.mark.timeout(120)
async def test_a_dry_run_denies_nobody_and_waits_for_nobody(tmp_path: Path) -> None:
    async with upstream() as (_, url), client() as session, running_receiver(terms=TERMS) as (receiver, _):
        settings = {"SIDECAR_GATE_DRY_RUN": "true", "SIDECAR_GATE_TIMEOUT": "5s"}
        async with gated(tmp_path, url, receiver, "revenium", **settings) as whole:
            assert (await call(session, whole, "unknown-acme"))[0] == 200
            await whole.until_metric('sidecar_gate_questions_total{result="answered"')
            assert (await call(session, whole, "unknown-acme"))[0] == 200
            first, second = await gates(whole)
    assert (first["decision"], first["source"]) == ("allowed", "on_failure")
    assert (second["decision"], second["source"], second["limit"]) == ("shadow", "revenium", "revenium")


@pytest.mark.timeout(120)
async def test_limits_and_others_are_decided_together(tmp_path: Path) -> None:
    async with upstream() as (up, url), client() as session, running_receiver(terms=TERMS) as (receiver, _):
        settings = {"SIDECAR_GATE": "limits,revenium", "SIDECAR_LIMITS": "calls=3/day", "SIDECAR_GATE_AMOUNTS": "true"}
        async with gated(tmp_path, url, receiver, "revenium", **settings) as whole:
            many = await asyncio.gather(*(call(session, whole, "acme-quota-100") for _ in range(5)))
            few = await asyncio.gather(*(call(session, whole, "other-quota-2") for _ in range(5)))
            rows = (await whole.get("/limits"))["limits"]
            found = await gates(whole)
    assert sorted(status for status, _ in many) == [200] * 3 + [402] * 2
    assert sorted(status for status, _ in few) == [200] * 2 + [402] * 3
    assert up.calls == 5
    assert {row["scope"]["subscriber"]: (row["used"], row["reserved"]) for row in rows} == {
        "acme-quota-100": ("3", "0"),
        "other-quota-2": ("2", "0"),
    }
    denied = [(gate["source"], gate["limit"]) for gate in found if gate["decision"] == "denied"]
    assert sorted(denied) == [("limits", "calls-per-day")] * 2 + [("revenium", "revenium")] * 3
    texts = {json.loads(body)["error"]["message"] for status, body in many if status == 402}
    assert len(texts) == 1
    assert "3 of 3 calls are used until 20" in texts.pop()


@pytest.mark.timeout(120)
async def test_a_killed_metering_process_asks_anew_and_calls_go_on(tmp_path: Path) -> None:
    async with upstream() as (up, url), client() as session, running_receiver(terms=TERMS) as (receiver, _):
        async with gated(tmp_path, url, receiver, "revenium", SIDECAR_GATE_TIMEOUT="10s") as whole:
            assert (await call(session, whole, "acme-quota-9"))[0] == 200
            (meter,) = whole.children()["meter"]
            os.kill(meter, signal.SIGKILL)
            assert (await call(session, whole, "acme-quota-9"))[0] == 200
            found = await gates(whole)
            text = await whole.text("/metrics")
    assert [gate["source"] for gate in found] == ["revenium"] * 2
    assert 'sidecar_gate_questions_total{result="answered",source="revenium"} 1.0' in text, "of the new process"
    assert up.calls == 2


async def test_what_keeps_others_from_being_asked_is_told_at_once(tmp_path: Path) -> None:
    whole = Whole(
        tmp_path / "data",
        "http://127.0.0.1:9",
        SIDECAR_GATE="limits,openmeter,reveniun,flexprice",
        SIDECAR_GATE_OPENMETER_UNIT="meter:pages",
        SIDECAR_LIMITS="calls=0x/day",
    )
    with pytest.raises(AssertionError) as told:
        await whole.start()
    text = str(told.value)
    for part in (
        "SIDECAR_GATE: reveniun is nobody who can be asked",
        "did you mean revenium?",
        "SIDECAR_GATE_OPENMETER_FEATURE is not set: SIDECAR_GATE=openmeter needs it",
        "SIDECAR_GATE_OPENMETER_UNIT=meter:pages: there is no such meter",
        "SIDECAR_FLEXPRICE_API_KEY is not set: SIDECAR_GATE=flexprice needs it",
        "calls=0x/day",
    ):
        assert part in text, part


@pytest.mark.timeout(120)
async def test_a_call_without_a_body_and_one_that_is_no_model_call_are_asked_for_too(tmp_path: Path) -> None:
    async with upstream() as (up, url), client() as session, running_receiver(terms=TERMS) as (receiver, _):
        async with gated(tmp_path, url, receiver, "openmeter") as whole:
            for who, status in (("unknown-acme", 402), ("acme", 200)):
                async with session.get(whole.proxy_url + "/things", headers={"x-tenant": who}) as answer:
                    assert answer.status == status
                    said = await answer.read()
                if status == 402:
                    assert answer.content_type == "application/problem+json"
                    assert json.loads(said)["violated-policies"] == ["openmeter"]
                    assert answer.headers["X-Sidecar-Limit"] == "openmeter"
            assert up.calls == 1


@pytest.mark.timeout(120)
async def test_who_pays_may_stand_in_the_body(tmp_path: Path) -> None:
    async with upstream() as (up, url), client() as session, running_receiver(terms=TERMS) as (receiver, _):
        async with gated(tmp_path, url, receiver, "openmeter", SIDECAR_SUBSCRIBER="body:user") as whole:
            for who, status in (("unknown-acme", 402), ("acme", 200)):
                assert (await call(session, whole, user=who))[0] == status
            found = await gates(whole)
    assert up.calls == 1
    assert [gate["source"] for gate in found] == ["openmeter"] * 2


async def test_the_upstream_is_never_told_of_a_gate(tmp_path: Path) -> None:
    async with upstream() as (_, url), running_receiver(terms=TERMS) as (receiver, _):
        async with gated(tmp_path, url, receiver, "openmeter") as whole:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(whole.proxy_url.rpartition(":")[2]))
            writer.write(b"GET /x HTTP/1.1\r\nHost: a\r\nx-tenant: acme\r\nConnection: close\r\n\r\n")
            said = await reader.read()
            writer.close()
    assert b"200 OK" in said
    assert b"sidecar" not in said.lower()
