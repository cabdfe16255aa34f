"""What each vendor answers to the gate, over real sockets at the receiver: yes, no, and no answer at all."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

import aiohttp
import orjson
import pytest
from support.backend_fixtures import ScriptedServer, answer
from support.scripted import running_receiver

from sidecar.backends import backend_settings
from sidecar.dev.mock_backends import Do, Fault, GateLie, Lie, Receiver, Terms
from sidecar.dev.mock_backends.asked import PUBLIC_KEY
from sidecar.gate.sources import SOURCES, Caller, NoAnswer, Source, problems, sources
from sidecar.gate.sources.base import COST_USD, PICO, Answer
from sidecar.gate.sources.flexprice import FlexpriceWallets
from sidecar.gate.sources.lago import LagoWallets
from sidecar.gate.sources.openmeter import OpenmeterAccess
from sidecar.gate.sources.revenium import ReveniumProductKey
from sidecar.gate.sources.revenium_controls import ReveniumControls
from sidecar.gate.sources.signed_claim import PublicKey
from sidecar.settings import load

NOW_S = 1_795_000_000.0
KEY = "rev_mk_1234567890"
HOSTILE = "a/../b?x=1&productKey=other#\r\nX: y"

Make = Callable[[str], Source]

SUBJECTS: dict[str, tuple[Make, str]] = {
    "revenium": (
        lambda url: ReveniumProductKey(
            api_key=KEY, url=url, public_key=PublicKey.parse(PUBLIC_KEY), clock=now, timeout_s=2.0
        ),
        "acme-quota-3",
    ),
    "revenium_controls": (lambda url: ReveniumControls(api_key=KEY, team="team-limit-9", url=url, clock=now), "*"),
    "openmeter": (
        lambda url: OpenmeterAccess(api_key=KEY, feature="api_calls", unit="calls", url=url, clock=now),
        "acme-quota-3",
    ),
    "flexprice": (lambda url: FlexpriceWallets(api_key=KEY, url=url, clock=now), "acme-balance-3"),
    "lago": (lambda url: LagoWallets(api_key=KEY, url=url, clock=now), "sub_acme-balance-3"),
}
every_source = pytest.mark.parametrize("name", list(SUBJECTS))


def now() -> float:
    return NOW_S


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    terms = {name: Terms(key=KEY) for name in ("revenium", "openmeter", "flexprice", "lago")}
    async with running_receiver(terms=terms, now=now) as (running, _):
        yield running


@pytest.fixture
async def made() -> AsyncIterator[Callable[[Source], Source]]:
    async with AsyncExitStack() as stack:

        def keep(source: Source) -> Source:
            stack.push_async_callback(source.aclose)
            return source

        yield keep


Keep = Callable[[Source], Source]


async def verdict(source: Source, subject: str, caller: Caller | None = None) -> Answer | NoAnswer:
    found = await source.ask(subject)
    if isinstance(found, NoAnswer):
        return found
    return found.judge(caller or Caller(subscriber=subject), NOW_S)


def test_every_source_of_the_table_is_tried_here() -> None:
    assert set(SUBJECTS) == set(SOURCES)


@every_source
async def test_the_names_and_the_yes_of_a_source(name: str, receiver: Receiver, made: Keep) -> None:
    make, subject = SUBJECTS[name]
    source = made(make(receiver.url))
    assert source.name == name
    found = await verdict(source, subject)
    assert isinstance(found, Answer)
    assert found.allowed


@every_source
@pytest.mark.parametrize("lie", [Lie.HTML, Lie.LOGIN, Lie.WRONG_SHAPE, Lie.PACKED, Lie.CUT])
async def test_what_is_no_answer_of_the_vendors_is_none(name: str, lie: Lie, receiver: Receiver, made: Keep) -> None:
    make, subject = SUBJECTS[name]
    source = made(make(receiver.url))
    receiver.faults.set(Fault(do=Do.LIE, lie=lie))
    found = await verdict(source, subject)
    assert isinstance(found, NoAnswer), found
    assert found.reason in ("html", "unexpected_answer")


@every_source
@pytest.mark.parametrize(
    ("status", "reason"),
    [(500, "http_500"), (503, "http_503"), (401, "unauthorized"), (403, "forbidden"), (429, "too_many_requests")],
)
async def test_a_refusal_says_nothing_about_a_subscriber(
    name: str, status: int, reason: str, receiver: Receiver, made: Keep
) -> None:
    make, subject = SUBJECTS[name]
    source = made(make(receiver.url))
    receiver.faults.set(Fault(do=Do.STATUS, status=status))
    assert await verdict(source, subject) == NoAnswer(reason)


@every_source
async def test_a_cut_and_a_dead_address_are_no_answers(name: str, receiver: Receiver, made: Keep) -> None:
    make, subject = SUBJECTS[name]
    source = made(make(receiver.url))
    receiver.faults.set(Fault(do=Do.CUT_BEFORE))
    assert await verdict(source, subject) == NoAnswer("reset", maybe_read=True)
    receiver.faults.set()
    await receiver.aclose()
    assert await verdict(made(make(receiver.url)), subject) == NoAnswer("refused")


@every_source
async def test_a_wrong_key_is_the_operators_matter_and_nobodys_denial(name: str, made: Keep) -> None:
    make, subject = SUBJECTS[name]
    terms = {backend: Terms(key="another") for backend in ("revenium", "openmeter", "flexprice", "lago")}
    async with running_receiver(terms=terms, now=now) as (running, _):
        found = await verdict(made(make(running.url)), subject)
    assert found in (NoAnswer("unauthorized"), NoAnswer("forbidden"))


@every_source
async def test_a_subscribers_name_stays_inside_of_its_place(name: str, made: Keep) -> None:
    make, _ = SUBJECTS[name]
    async with ScriptedServer(script=lambda _: answer(200, b"{}")).running() as server:
        source = made(make(server.url))
        assert isinstance(await source.ask(HOSTILE), NoAnswer) or name == "revenium_controls"
        (request, *_) = server.requests
        assert not {"\r", "\n", "#"} & set(request.target)
        path, _, query = request.target.partition("?")
        values = [value for _, value in parse_qsl(query)]
        assert (
            unquote(path.split("/")[4]) == HOSTILE
            if name in ("openmeter", "lago")
            else "team" in path or HOSTILE in values
        )
        assert "x" not in request.headers


@every_source
async def test_a_page_under_404_is_no_word_about_a_subscriber(name: str, made: Keep) -> None:
    make, subject = SUBJECTS[name]
    async with ScriptedServer(script=lambda _: answer(404, b"<html>nginx</html>")).running() as server:
        assert await verdict(made(make(server.url)), subject) == NoAnswer("html")


@every_source
async def test_an_answer_without_an_end_is_cut(name: str, made: Keep) -> None:
    make, subject = SUBJECTS[name]
    endless = b'{"claim": "' + b"x" * 400_000 + b'"}'
    async with ScriptedServer(script=lambda _: answer(200, endless)).running() as server:
        assert await verdict(made(make(server.url)), subject) == NoAnswer("answer_too_long")


UNKNOWN = {
    "revenium": ("unknown-1", "no_subscription"),
    "openmeter": ("unknown-1", "no_customer"),
    "flexprice": ("unknown-1", "no_customer"),
    "lago": ("unknown-1", "no_subscription"),
}


@pytest.mark.parametrize("name", list(UNKNOWN))
async def test_whom_a_vendor_does_not_know_it_does_not_allow(name: str, receiver: Receiver, made: Keep) -> None:
    make, _ = SUBJECTS[name]
    subject, reason = UNKNOWN[name]
    assert await verdict(made(make(receiver.url)), subject) == Answer(allowed=False, reason=reason)


async def test_a_team_that_is_not_there_has_no_rules_to_go_by(receiver: Receiver, made: Keep) -> None:
    source = made(ReveniumControls(api_key=KEY, team="unknown-team", url=receiver.url))
    assert await verdict(source, "*") == NoAnswer("not_found")


@pytest.mark.parametrize("name", ["openmeter", "flexprice", "lago", "revenium"])
async def test_a_number_that_cannot_be_is_no_answer(name: str, receiver: Receiver, made: Keep) -> None:
    make, subject = SUBJECTS[name]
    receiver.faults.set(Fault(do=Do.LIE, lie=GateLie.NEGATIVE))
    found = await verdict(made(make(receiver.url)), subject)
    assert found == NoAnswer("claim_numbers" if name == "revenium" else "numbers")


# Revenium, product key


async def test_a_quota_runs_down_with_what_was_reported(receiver: Receiver, made: Keep) -> None:
    make, _ = SUBJECTS["revenium"]
    source = made(make(receiver.url + "/meter/v1/api"))
    found: Answer | NoAnswer | None = None
    call = {"method": "GET", "responseCode": 200, "requestHeaders": [], "responseHeaders": [], "elements": []}
    async with aiohttp.ClientSession(receiver.url, headers={"x-api-key": KEY}) as session:
        for left in (2, 1, 0):
            found = await verdict(source, "acme-quota-2")
            assert isinstance(found, Answer)
            assert (found.remaining, found.unit, found.allowed) == (left, "calls", left > 0)
            assert found.at_s == NOW_S
            assert found.until_s is not None
            assert found.until_s > NOW_S
            async with session.post("/meter/v1/api/meter", json={**call, "application": "acme-quota-2"}) as sent:
                assert sent.status == 200
    assert isinstance(found, Answer)
    assert found.reason == "quota_used_up"
    free = await verdict(source, "acme")
    assert isinstance(free, Answer)
    assert (free.allowed, free.remaining) == (True, None), "a quota of 0 is none"


async def test_a_subscription_key_may_be_asked_for_instead(receiver: Receiver) -> None:
    with pytest.raises(ValueError, match="application"):
        ReveniumProductKey(api_key=KEY, field="platformAPIKey")
    async with ScriptedServer(script=lambda _: answer(404)).running() as server:
        source = ReveniumProductKey(api_key=KEY, url=server.url, field="productKey")
        assert await verdict(source, "k") == Answer(allowed=False, reason="no_subscription")
        assert server.requests[0].target == "/meter/v1/api/meter/product-key?productKey=k"
        assert server.requests[0].headers["x-api-key"] == KEY
        await source.aclose()


@pytest.mark.parametrize(
    ("lie", "with_key", "without"),
    [
        (GateLie.CLAIM_EXPIRED, "claim_expired", "claim_expired"),
        (GateLie.CLAIM_UNSIGNED, "claim_algorithm", "claim_algorithm"),
        (GateLie.CLAIM_SHARED_KEY, "claim_algorithm", "claim_algorithm"),
        (GateLie.CLAIM_FORGED, "claim_signature", None),
    ],
)
async def test_a_claim_that_nobody_should_believe_is_not_believed(
    lie: GateLie, with_key: str, without: str | None, receiver: Receiver, made: Keep
) -> None:
    receiver.faults.set(Fault(do=Do.LIE, lie=lie))
    make, subject = SUBJECTS["revenium"]
    assert await verdict(made(make(receiver.url)), subject) == NoAnswer(with_key)
    trusting = made(ReveniumProductKey(api_key=KEY, url=receiver.url, clock=now))
    found = await verdict(trusting, subject)
    if without is None:
        assert isinstance(found, Answer), "without a key the signature is not looked at, and TLS is trusted"
    else:
        assert found == NoAnswer(without)


async def test_the_receiver_hands_out_the_key_that_its_claims_are_signed_with(receiver: Receiver) -> None:
    async with aiohttp.ClientSession(receiver.url) as session, session.get("/_claim_key") as got:
        assert await got.text() == PUBLIC_KEY


def claim_of(**claims: Any) -> bytes:
    parts = ({"alg": "RS256"}, claims)
    text = ".".join(base64.urlsafe_b64encode(orjson.dumps(part)).decode().rstrip("=") for part in parts)
    return answer(200, orjson.dumps({"claim": text + ".AA"}))


MS = int(NOW_S * 1000)
QUOTA = {"totalQuota": 10, "consumedQuota": 4, "consumedSubscriptionQuota": 7, "timestamp": MS}


@pytest.mark.parametrize(
    ("claims", "found"),
    [
        (QUOTA, Answer(allowed=True, remaining=3, unit="calls", at_s=NOW_S)),
        (
            QUOTA | {"consumedQuota": 12},
            Answer(allowed=False, reason="quota_used_up", remaining=0, unit="calls", at_s=NOW_S),
        ),
        (QUOTA | {"expiration": MS - 1000}, Answer(allowed=False, reason="subscription_ended")),
        (QUOTA | {"subscriptionPeriodEnd": MS - 1}, Answer(allowed=False, reason="subscription_ended")),
        (
            QUOTA | {"timestamp": MS - 60_000, "expiration": MS - 30_000},
            Answer(allowed=True, remaining=3, unit="calls", at_s=NOW_S - 60, until_s=NOW_S - 30),
        ),
        (
            QUOTA | {"expiration": MS + 9_000, "subscriptionPeriodEnd": MS + 5_000},
            Answer(allowed=True, remaining=3, unit="calls", at_s=NOW_S, until_s=NOW_S + 5),
        ),
        ({"timestamp": MS}, Answer(allowed=True, at_s=NOW_S)),
        (QUOTA | {"exp": int(NOW_S) + 9}, Answer(allowed=True, remaining=3, unit="calls", at_s=NOW_S)),
        (QUOTA | {"exp": int(NOW_S) - 9}, NoAnswer("claim_expired")),
        (QUOTA | {"exp": "tomorrow"}, NoAnswer("claim_expired")),
        (QUOTA | {"timestamp": MS - 3_601_000}, NoAnswer("claim_expired")),
        (QUOTA | {"timestamp": MS + 301_000}, NoAnswer("claim_expired")),
        (QUOTA | {"timestamp": None}, NoAnswer("claim_without_time")),
        (QUOTA | {"timestamp": "soon"}, NoAnswer("claim_without_time")),
        (QUOTA | {"totalQuota": "10"}, NoAnswer("claim_numbers")),
        (QUOTA | {"totalQuota": 10.5}, NoAnswer("claim_numbers")),
        (QUOTA | {"totalQuota": True}, NoAnswer("claim_numbers")),
        (QUOTA | {"consumedQuota": -1}, NoAnswer("claim_numbers")),
        (QUOTA | {"expiration": "never"}, NoAnswer("claim_numbers")),
    ],
)
async def test_what_a_claim_says(claims: dict[str, Any], found: Answer | NoAnswer, made: Keep) -> None:
    async with ScriptedServer(script=lambda _: claim_of(**claims)).running() as server:
        source = made(ReveniumProductKey(api_key=KEY, url=server.url, clock=now))
        assert await verdict(source, "acme") == found


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"null", b"{}", b'{"claim": 7}', b'{"claim": "a.b"}', b'{"claim": "a.!.c"}', b'{"claim": "a.W10.c"}',
     b'{"claim": "e30.e30.c"}', b'{"claim": "' + b"a" * 20_000 + b'"}', b"\xff"],
)  # fmt: skip
async def test_what_holds_no_claim_is_no_answer(body: bytes, made: Keep) -> None:
    async with ScriptedServer(script=lambda _: answer(200, body)).running() as server:
        found = await verdict(made(ReveniumProductKey(api_key=KEY, url=server.url, clock=now)), "acme")
    assert isinstance(found, NoAnswer)
    assert found.reason in ("no_claim", "unexpected_answer", "claim_algorithm")


async def test_a_slow_vendor_is_given_its_time_and_no_more(receiver: Receiver, made: Keep) -> None:
    receiver.faults.set(Fault(do=Do.DELAY, delay_s=30.0))
    source = made(ReveniumProductKey(api_key=KEY, url=receiver.url, timeout_s=0.1))
    assert await verdict(source, "acme") == NoAnswer("timeout", maybe_read=True)


# Revenium, Cost Controls


async def test_a_budget_stops_who_is_over_it_and_nobody_else(receiver: Receiver, made: Keep) -> None:
    source = made(ReveniumControls(api_key=KEY, team="team-limit-50", url=receiver.url, customers={"ours": "acme"}))
    moment = "2026-11-20T09:00:00Z"
    completion = {
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
        "subscriber": {"id": "acme"},
    }
    before = await verdict(source, "*", Caller(subscriber="ours"))
    assert before == Answer(allowed=True)
    async with aiohttp.ClientSession(receiver.url, headers={"x-api-key": KEY}) as session:
        async with session.post("/meter/v2/ai/completions", json=completion) as sent:
            assert sent.status == 200
    after = await verdict(source, "*", Caller(subscriber="ours"))
    assert isinstance(after, Answer)
    assert (after.allowed, after.limit, after.reason) == (False, "tokens a day", "budget_exceeded")
    assert await verdict(source, "*", Caller(subscriber="globex")) == Answer(allowed=True)


@pytest.mark.parametrize("team", ["none", "team"])
async def test_no_rules_stop_nobody(team: str, receiver: Receiver, made: Keep) -> None:
    source = made(ReveniumControls(api_key=KEY, team=team, url=receiver.url))
    assert await verdict(source, "*", Caller(subscriber="acme")) == Answer(allowed=True)


# OpenMeter


async def test_an_entitlement_runs_down_with_what_was_reported(receiver: Receiver, made: Keep) -> None:
    make, _ = SUBJECTS["openmeter"]
    source = made(make(receiver.url))
    kind = {"Content-Type": "application/cloudevents-batch+json", "Authorization": f"Bearer {KEY}"}
    async with aiohttp.ClientSession(receiver.url, headers=kind) as session:
        for number in range(2):
            assert await verdict(source, "acme-quota-2") == Answer(
                allowed=True, remaining=2 - number, unit="calls", limit="api_calls"
            )
            event = {"specversion": "1.0", "id": f"{number}", "source": "s", "type": "t", "subject": "acme-quota-2"}
            async with session.post("/api/v1/events", data=orjson.dumps([event])) as sent:
                assert sent.status == 204
        path = "/api/v2/customers/acme-quota-2/entitlements/api_calls/value"
        async with session.get(path) as value:
            assert await value.json() == {"hasAccess": False, "balance": 0, "usage": 2, "overage": 0}
    over = await verdict(source, "acme-quota-2")
    assert over == Answer(allowed=False, reason="no_access", remaining=0, unit="calls", limit="api_calls")
    assert await verdict(source, "acme") == Answer(allowed=True, limit="api_calls")


@pytest.mark.parametrize(
    ("value", "unit", "found"),
    [
        (b'{"hasAccess": true, "balance": 12.75}', "calls",
         Answer(allowed=True, remaining=12, unit="calls", limit="f")),
        (b'{"hasAccess": true, "balance": 12.75}', None, Answer(allowed=True, limit="f")),
        (b'{"hasAccess": true, "balance": 0, "overage": 9}', "calls", Answer(allowed=True, limit="f")),
        (b'{"hasAccess": true, "balance": 0.1}', COST_USD,
         Answer(allowed=True, remaining=PICO // 10, unit=COST_USD, limit="f")),
        (b'{"hasAccess": true, "balance": 2.5}', "meter:pages",
         Answer(allowed=True, remaining=2_500_000, unit="meter:pages", limit="f")),
        (b'{"hasAccess": true, "balance": 1e30}', "calls", NoAnswer("numbers")),
        (b'{"hasAccess": true, "balance": 1e999999999}', "calls", NoAnswer("numbers")),
        (b'{"hasAccess": true, "balance": NaN}', "calls", NoAnswer("unexpected_answer")),
        (b'{"hasAccess": true, "balance": true}', "calls", NoAnswer("numbers")),
        (b'{"hasAccess": "yes"}', "calls", NoAnswer("unexpected_answer")),
        (b"[]", "calls", NoAnswer("unexpected_answer")),
        (b"null", "calls", Answer(allowed=False, reason="no_entitlement", limit="f")),
    ],
)  # fmt: skip
async def test_what_an_entitlement_says(value: bytes, unit: str | None, found: Answer | NoAnswer, made: Keep) -> None:
    body = b'{"entitlements": {"f": %b}}' % value
    async with ScriptedServer(script=lambda _: answer(200, body)).running() as server:
        source = made(OpenmeterAccess(feature="f", url=server.url, unit=unit))
        assert await verdict(source, "acme") == found
        assert "authorization" not in server.requests[0].headers


# Wallets


async def test_a_flexprice_wallet_runs_down(receiver: Receiver, made: Keep) -> None:
    make, _ = SUBJECTS["flexprice"]
    source = made(make(receiver.url + "/v1"))
    first = await verdict(source, "acme-balance-3")
    assert first == Answer(allowed=True, remaining=3 * PICO, unit=COST_USD, at_s=NOW_S - 10)
    event = {"event_name": "e", "external_customer_id": "acme-balance-3", "event_id": "1"}
    async with aiohttp.ClientSession(receiver.url, headers={"x-api-key": KEY}) as session:
        async with session.post("/v1/events", json=event) as sent:
            assert sent.status == 202
    second = await verdict(source, "acme-balance-3")
    assert isinstance(second, Answer)
    assert second.remaining == 3 * PICO - PICO // 100
    empty = await verdict(source, "acme-balance-0")
    assert isinstance(empty, Answer)
    assert (empty.allowed, empty.reason) == (False, "balance_used_up")


@pytest.mark.parametrize(
    ("wallets", "found"),
    [
        ([], Answer(allowed=False, reason="no_wallet")),
        ([{"wallet_status": "closed", "real_time_balance": "5"}], Answer(allowed=False, reason="no_wallet")),
        (
            [{"currency": "usd", "real_time_balance": "1.5", "is_cached_fallback": False},
             {"currency": "USD", "real_time_balance": "-0.25", "is_cached_fallback": False}],
            Answer(allowed=True, remaining=PICO * 5 // 4, unit=COST_USD, at_s=NOW_S - 10),
        ),
        (
            [{"currency": "usd", "real_time_balance": "1", "balance_updated_at": "2026-11-18T04:00:00Z"}],
            Answer(allowed=True, remaining=PICO, unit=COST_USD, at_s=1_794_974_400.0),
        ),
        ([{"currency": "usd", "real_time_balance": "1"}], Answer(allowed=True, remaining=PICO, unit=COST_USD)),
        ([{"currency": "eur", "real_time_balance": "1", "is_cached_fallback": False}],
         Answer(allowed=True, at_s=NOW_S - 10)),
        ([{"currency": "eur", "real_time_balance": "-1", "is_cached_fallback": False}],
         Answer(allowed=False, reason="balance_used_up", at_s=NOW_S - 10)),
        ([{"currency": "usd", "real_time_balance": "much"}], NoAnswer("numbers")),
        ([{"currency": "usd"}], NoAnswer("numbers")),
        ([7], NoAnswer("unexpected_answer")),
        ({"items": "none"}, NoAnswer("unexpected_answer")),
    ],
)  # fmt: skip
async def test_what_flexprice_wallets_say(wallets: Any, found: Answer | NoAnswer, made: Keep) -> None:
    async with ScriptedServer(script=lambda _: answer(200, orjson.dumps(wallets))).running() as server:
        source = made(FlexpriceWallets(api_key="k", url=server.url, environment_id="env", clock=now))
        assert await verdict(source, "acme") == found
        (request,) = server.requests
        assert request.target == "/v1/customers/wallets?lookup_key=acme&include_real_time_balance=true"
        assert request.headers["x-environment-id"] == "env"
        assert request.headers["x-max-live"] == "60"


async def test_a_lago_wallet_runs_down_and_is_found_by_its_subscription(receiver: Receiver, made: Keep) -> None:
    make, _ = SUBJECTS["lago"]
    source = made(make(receiver.url + "/api/v1"))
    assert await verdict(source, "sub_acme-balance-3") == Answer(allowed=True, remaining=3 * PICO, unit=COST_USD)
    event = {"transaction_id": "t", "external_subscription_id": "sub_acme-balance-3", "code": "c"}
    async with aiohttp.ClientSession(receiver.url, headers={"Authorization": f"Bearer {KEY}"}) as session:
        async with session.post("/api/v1/events", json={"event": event}) as sent:
            assert sent.status == 200
    found = await verdict(source, "sub_acme-balance-3")
    assert isinstance(found, Answer)
    assert found.remaining == 3 * PICO - PICO // 100
    direct = made(LagoWallets(api_key=KEY, url=receiver.url, by_subscription=False, clock=now))
    assert await verdict(direct, "acme-balance-3") == found
    assert await verdict(direct, "unknown") == Answer(allowed=False, reason="no_customer")


WALLET = {"currency": "USD", "status": "active", "ongoing_balance_cents": 150}


@pytest.mark.parametrize(
    ("wallets", "found"),
    [
        ([], Answer(allowed=False, reason="no_wallet")),
        ([WALLET | {"status": "terminated"}], Answer(allowed=False, reason="no_wallet")),
        ([WALLET | {"expiration_at": "2020-01-01T00:00:00Z"}], Answer(allowed=False, reason="no_wallet")),
        ([WALLET], Answer(allowed=True, remaining=PICO * 3 // 2, unit=COST_USD)),
        (
            [WALLET | {"ongoing_balance_cents": -20}],
            Answer(allowed=False, reason="balance_used_up", remaining=-PICO // 5, unit=COST_USD),
        ),
        (
            [
                WALLET
                | {"last_ongoing_balance_sync_at": "2026-11-18T04:00:00Z", "expiration_at": "2026-12-01T00:00:00Z"}
            ],
            Answer(allowed=True, remaining=PICO * 3 // 2, unit=COST_USD, at_s=1_794_974_400.0, until_s=1_796_083_200.0),
        ),
        ([WALLET | {"currency": "EUR"}], Answer(allowed=True)),
        ([WALLET | {"currency": "JPY", "ongoing_balance_cents": 0}], Answer(allowed=False, reason="balance_used_up")),
        ([WALLET | {"ongoing_balance_cents": None}], NoAnswer("numbers")),
        ("none", NoAnswer("unexpected_answer")),
    ],
)
async def test_what_lago_wallets_say(wallets: Any, found: Answer | NoAnswer, made: Keep) -> None:
    async with ScriptedServer(script=lambda _: answer(200, orjson.dumps({"wallets": wallets}))).running() as server:
        source = made(LagoWallets(api_key="k", url=server.url, by_subscription=False, clock=now))
        assert await verdict(source, "acme") == found
        assert server.requests[0].headers["authorization"] == "Bearer k"


async def test_a_subscription_without_an_owner_is_no_answer(made: Keep) -> None:
    async with ScriptedServer(script=lambda _: answer(200, b'{"subscription": {}}')).running() as server:
        assert await verdict(made(LagoWallets(api_key="k", url=server.url)), "sub") == NoAnswer("unexpected_answer")


# Who is asked about


@pytest.mark.parametrize("name", ["revenium", "openmeter", "flexprice", "lago"])
def test_a_hash_is_nobody_whom_a_vendor_knows(name: str) -> None:
    make, _ = SUBJECTS[name]
    source = make("http://127.0.0.1:1")
    assert source.subject(Caller(subscriber="acme")) == "acme"
    assert source.subject(Caller(subscriber=None)) is None
    assert source.subject(Caller(subscriber="key_" + "0" * 32)) is None
    assert source.subject(Caller(subscriber="x" * 300)) is None
    assert source.subject(Caller(subscriber="..")) is None, "as a part of a path it would be another address"


# From the settings


def environ(tmp_path: Path, **more: str) -> dict[str, str]:
    config = tmp_path / "sidecar.toml"
    config.write_text('[subscribers.acme]\nrevenium = "acme-quota-1"\nlago = "sub_acme-balance-0"\n')
    return {"SIDECAR_UPSTREAM_URL": "http://127.0.0.1:1", "SIDECAR_CONFIG": str(config), **more}


ALL = tuple(SOURCES)
KEYS = {f"SIDECAR_{vendor}_API_KEY": KEY for vendor in ("REVENIUM", "OPENMETER", "FLEXPRICE", "LAGO")}


async def test_the_settings_make_the_sources(tmp_path: Path, receiver: Receiver) -> None:
    key_file = tmp_path / "key.pem"
    key_file.write_text(PUBLIC_KEY)
    urls = {f"SIDECAR_{vendor}_URL": receiver.url for vendor in ("REVENIUM", "OPENMETER", "FLEXPRICE", "LAGO")}
    own = {
        "SIDECAR_GATE_REVENIUM_TEAM": "team-limit-5",
        "SIDECAR_GATE_REVENIUM_PUBLIC_KEY_FILE": str(key_file),
        "SIDECAR_GATE_OPENMETER_FEATURE": "total_tokens",
        "SIDECAR_GATE_OPENMETER_UNIT": "total_tokens",
    }
    settings = load(environ(tmp_path, **KEYS, **urls, **own), backend_settings=backend_settings())
    key_file.write_text("half of a key")  # what held when the settings were read holds for whoever is started by them
    assert problems(settings, ALL) == []
    made = sources(settings, ("limits", *ALL, "revenium"))
    assert [source.name for source in made] == list(ALL)
    acme = Caller(subscriber="acme")
    assert [source.subject(acme) for source in made] == [
        "acme-quota-1",
        "*",
        "acme",
        "acme",
        "sub_acme-balance-0",
    ]
    for source in made:
        found = await source.ask(source.subject(acme) or "")
        assert not isinstance(found, NoAnswer) or source.name == "revenium", found  # its claim is of the test's clock
        await source.aclose()


def test_everything_that_is_missing_is_said_at_once(tmp_path: Path) -> None:
    wrong = tmp_path / "key.pem"
    wrong.write_text("no key")
    settings = load(
        environ(tmp_path, SIDECAR_GATE_REVENIUM_PUBLIC_KEY_FILE=str(wrong)), backend_settings=backend_settings()
    )
    assert problems(settings, ALL) == [
        "SIDECAR_GATE_REVENIUM_PUBLIC_KEY_FILE: expected an RSA public key (PEM) of 2048 to 8192 bits",
        "SIDECAR_REVENIUM_API_KEY is not set: SIDECAR_GATE=revenium_controls needs it: expected the vendor's API key",
        "SIDECAR_GATE_OPENMETER_FEATURE is not set: SIDECAR_GATE=openmeter needs it: expected the feature's key",
        "SIDECAR_FLEXPRICE_API_KEY is not set: SIDECAR_GATE=flexprice needs it: expected the vendor's API key",
        "SIDECAR_LAGO_API_KEY is not set: SIDECAR_GATE=lago needs it: expected the vendor's API key",
    ]
    with pytest.raises(ValueError, match="SIDECAR_LAGO_API_KEY"):
        sources(settings, ["lago"])
    assert problems(settings, ["limits"]) == []


async def test_many_questions_at_once_are_many_answers(receiver: Receiver, made: Keep) -> None:
    make, _ = SUBJECTS["openmeter"]
    source = made(make(receiver.url))
    found = await asyncio.gather(*(source.ask(f"c{number}-quota-{number}") for number in range(20)))
    assert [one.allowed for one in found if isinstance(one, Answer)] == [number > 0 for number in range(20)]
