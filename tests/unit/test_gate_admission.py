"""What a request says of how much it may take, and what the hop is told without an owner."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.gate.admission import Admission, Meant, Models, Policy, Verdict
from sidecar.gate.allowance import measure_of
from sidecar.gate.denials import Denials
from sidecar.gate.estimate import (
    ANSWERS_KEPT,
    CHOICES_MAX,
    INPUT_TOKENS_MAX,
    OUTPUT_TOKENS_DEFAULT,
    OUTPUT_TOKENS_MAX,
    Outputs,
    read_request,
)
from sidecar.gate.limits import bounded, read_limits
from sidecar.gate.protocol import Ruling
from sidecar.gate.windows import SECOND_NS
from sidecar.meters.definition import read_meters
from sidecar.model.exchange import Gate, RawHeaders, Subscriber
from sidecar.settings import AskedSettings
from sidecar.usage.readers import RequestReadingTap, UsageTaps

AT_NS = 1_795_000_000 * SECOND_NS
DENY = Denials(UsageTaps().endpoints, AskedSettings())


@pytest.mark.parametrize(
    ("body", "output"),
    [
        ({"max_tokens": 100}, 100),
        ({"max_tokens": None, "max_completion_tokens": 100}, 100),
        ({"max_output_tokens": 100}, 100),
        ({"max_tokens": 100, "n": 3}, 300),
        ({"max_tokens": 100, "n": 10**9}, 100 * CHOICES_MAX),
        ({"max_tokens": 100, "n": -1}, 100),
        ({"max_tokens": 100, "n": True}, 100),
        ({"max_tokens": 999_999_999_999}, OUTPUT_TOKENS_MAX),
        ({"max_tokens": -5}, None),
        ({"max_tokens": "100"}, None),
        ({"max_tokens": True}, None),
        ({"max_tokens": 1.5}, None),
        ({"generationConfig": {"maxOutputTokens": 100, "candidateCount": 2}}, 200),
        ({"inferenceConfig": {"maxTokens": 100}}, 100),
        ({"generationConfig": [1]}, None),
        ({}, None),
    ],
)
def test_how_much_a_request_allows(body: dict[str, Any], output: int | None) -> None:
    text = json.dumps({"model": "m", "messages": [{"content": '"max_tokens": 7'}], **body}).encode()
    asked = read_request(text, len(text))
    assert (asked.model, asked.output_tokens) == ("m", output)
    assert asked.input_tokens == -(-len(text) // 4)


def test_the_beginning_of_a_long_request_is_read_as_far_as_it_is_there() -> None:
    text = json.dumps({"model": "m", "max_tokens": 9, "messages": "x" * 200_000}).encode()
    asked = read_request(text[:65_536], len(text))
    assert (asked.model, asked.output_tokens, asked.input_tokens) == ("m", 9, -(-len(text) // 4))


@given(st.binary(max_size=300))
def test_no_request_is_too_odd(body: bytes) -> None:
    asked = read_request(body, None)
    assert asked.input_tokens == -(-len(body) // 4)


def test_of_a_models_long_name_no_more_is_kept_than_counters_have() -> None:
    names = ["m" * 60_000, "m" * 60_001]
    found = {read_request(json.dumps({"model": name}).encode()).model for name in names}
    assert found == {bounded(name) for name in names}
    assert len(found) == 2
    gate, _, _ = admission("calls=9/day")
    gate.renew(
        Policy(
            limits=read_limits((), ["calls=9/day"]),
            meant=lambda method, target, upstream: Meant("openai", names[0]),
            key_of=lambda fields: None,
            deny=DENY,
        )
    )
    assert weigh(gate).facts.model == bounded(names[0])


def form(**members: str) -> bytes:
    parts = [
        f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n' for name, text in members.items()
    ]
    return ("".join(parts) + "--b--\r\n").encode()


FORM = ((b"Content-Type", b"multipart/form-data; boundary=b"),)
CODED = ((b"content-type", b"application/json"), (b"Content-Encoding", b"gzip"))
ASKED = json.dumps({"model": "m", "max_tokens": 9, "user": "bob", "messages": "é" * 50}, ensure_ascii=False)


@pytest.mark.parametrize(
    ("body", "fields", "tokens"),
    [
        (ASKED.encode(), (), 9),
        (b" \r\n" + ASKED.encode(), (), 9),
        (gzip.compress(ASKED.encode()), CODED, 9),
        (b"\xef\xbb\xbf" + ASKED.encode(), (), 9),
        (ASKED.encode("utf-16"), (), 9),
        (ASKED.encode("utf-16-le"), (), 9),
        (ASKED.encode("utf-32"), (), 9),
        (ASKED.encode()[:-3], (), 9),
        (form(model="m", user="bob", file="x" * 300), FORM, None),
        (b"\r\n" + form(model="m", user="bob"), FORM, None),
    ],
    ids=[
        "plain",
        "space",
        "gzip",
        "bom",
        "utf-16",
        "utf-16-le",
        "utf-32",
        "beginning",
        "form",
        "form behind a line end",
    ],
)
def test_a_body_says_the_gate_what_it_says_its_record(body: bytes, fields: RawHeaders, tokens: int | None) -> None:
    along = UsageTaps(body_fields=["user"]).request("POST", "/v1/chat/completions", fields)
    assert isinstance(along, RequestReadingTap)
    along.feed(body)
    asked = read_request(body, fields=fields, members=("user",))
    assert (asked.model, asked.members.get("user")) == ("m", "bob")
    assert (along.body.model, along.member("user")) in (("m", "bob"), (None, None)), "records know no UTF-16"
    assert asked.output_tokens == tokens
    assert asked.input_tokens == -(-len(body) // 4)


@given(st.binary(max_size=300), st.sampled_from([FORM, CODED, ()]))
def test_no_request_is_too_odd_whatever_its_head_says(body: bytes, fields: RawHeaders) -> None:
    assert read_request(body, fields=fields).input_tokens == -(-len(body) // 4)


@pytest.mark.parametrize(
    ("body", "fields"),
    [(form(model="m"), FORM), (gzip.compress(b'{"model": "m"}'), CODED), ('{"model": "m"}'.encode("utf-16"), ())],
    ids=["form", "gzip", "utf-16"],
)
def test_a_limit_of_a_model_holds_however_the_body_is_written(body: bytes, fields: RawHeaders) -> None:
    asked: list[tuple[Any, ...]] = []
    table = {"name": "off", "subscriber": "", "model": "m", "unit": "calls", "amount": 0, "window": "total"}
    policy = Policy(
        limits=read_limits([table]),
        meant=lambda method, target, upstream: Meant("openai", None, True),
        key_of=lambda fields: None,
        deny=DENY,
    )
    gate = Admission(policy, clock_ns=lambda: AT_NS, call_later=lambda after, do: Timer(do))
    gate.send = asked.append
    prepared = gate.prepare("POST", "/v1/x", fields, subscriber=None, dimensions={}, route=None)
    assert gate.quickly(prepared, body) is None
    gate.ask(gate.weigh(prepared, body, len(body)), "1", lambda verdict: None)
    assert asked[0][3] == [("off", "m", 1)]


def test_what_a_model_usually_takes() -> None:
    outputs = Outputs()
    assert outputs.usual("m") is None
    for tokens in range(1, 1001):
        outputs.seen("m", tokens)
    assert outputs.usual("m") == 995
    assert outputs.usual(None) is None


def test_what_was_seen_before_a_restart_comes_before_what_was_seen_since() -> None:
    before, since = Outputs(), Outputs()
    for _ in range(ANSWERS_KEPT):
        before.seen("m", 10)
    since.seen("m", 500)
    since.seen("n", 7)
    before.follow(since)
    assert (before.usual("m"), before.usual("n")) == (10, 7)
    for _ in range(ANSWERS_KEPT):
        before.seen("m", 500)
    assert before.usual("m") == 500


class Timer:
    def __init__(self, do: Callable[[], None]) -> None:
        self.do = do
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


def admission(*short: str, **given: Any) -> tuple[Admission, list[tuple[Any, ...]], list[Timer]]:
    asked: list[tuple[Any, ...]] = []
    timers: list[Timer] = []

    def later(after_s: float, do: Callable[[], None]) -> Timer:
        timers.append(Timer(do))
        return timers[-1]

    options: dict[str, Any] = {
        "meant": lambda method, target, upstream: Meant("openai", None, True),
        "key_of": lambda fields: None,
        "deny": DENY,
    }
    clock_ns = given.pop("clock_ns", lambda: AT_NS)
    policy = Policy(limits=read_limits((), short), **(options | given))
    gate = Admission(policy, clock_ns=clock_ns, call_later=later)
    gate.send = asked.append
    return gate, asked, timers


def weigh(gate: Admission, body: bytes = b"{}", method: str = "POST") -> Any:
    prepared = gate.prepare(method, "/v1/x", (), subscriber=Subscriber("acme", "test"), dimensions={}, route=None)
    return gate.weigh(prepared, body, len(body))


def asking(calls: int, output: int, total: int) -> list[tuple[str, str, int]]:
    names = ("calls-per-day", "output_tokens-per-day", "total_tokens-per-day")
    return [(name, "acme", amount) for name, amount in zip(names, (calls, output, total), strict=True)]


def test_what_is_asked_of_the_owner() -> None:
    gate, asked, _ = admission("calls=9/day", "output_tokens=9/day", "total_tokens=9/day")
    gate.ask(weigh(gate, b'{"model": "m", "max_tokens": 50}'), "1", lambda verdict: None)
    gate.ask(weigh(gate), "1", lambda verdict: None)
    gate.ask(weigh(gate, b"", "GET"), "1", lambda verdict: None)
    assert [question[2:4] for question in asked] == [
        ("m", asking(1, 50, 58)),
        (None, asking(1, OUTPUT_TOKENS_DEFAULT, OUTPUT_TOKENS_DEFAULT + 1)),
        (None, asking(1, 0, 0)),
    ]


def test_no_more_is_set_aside_than_the_model_can_give() -> None:
    gate, asked, _ = admission(
        "output_tokens=9999999/day", models=Models(None, lambda provider, model: {"m": 400}.get(model))
    )
    for body in (
        b'{"model": "m", "max_tokens": 999999999}',
        b'{"model": "m", "max_tokens": 999999999, "n": 3}',
        b'{"model": "m", "max_tokens": 50}',
        b'{"model": "nobody knows it", "max_tokens": 999999999}',
    ):
        gate.ask(weigh(gate, body), "1", lambda verdict: None)
    amounts = [question[3][0][2] for question in asked]
    assert amounts == [400, 1200, 50, OUTPUT_TOKENS_MAX]


def test_a_claimed_length_sets_no_more_aside_than_a_model_takes() -> None:
    gate, asked, _ = admission(
        "input_tokens=999999999999/day",
        models=Models(None, lambda provider, model: None, lambda provider, model: {"m": 400_000}.get(model)),
    )
    prepared = gate.prepare("POST", "/v1/x", (), subscriber=Subscriber("acme", "t"), dimensions={}, route=None)
    for body, length in (
        (b'{"model": "m"', 60 * 10**12),
        (b'{"model": "m"', 4 * 400_000),
        (b'{"model": "m"', 4 * 300_000),
        (b'{"model": "nobody knows it"', 60 * 10**12),
        (b"none", 60 * 10**12),
    ):
        gate.ask(gate.weigh(prepared, body, length), "1", lambda verdict: None)
    amounts = [question[3][0][2] for question in asked]
    assert amounts == [400_000, 400_000, 300_000, INPUT_TOKENS_MAX, INPUT_TOKENS_MAX]


def test_of_a_body_that_never_ended_no_more_is_charged_than_what_came_can_cost() -> None:
    short = ("calls=9/day", "input_tokens=9/day", "output_tokens=9/day", "total_tokens=9/day", "cost_usd=9/day")
    gate, _, _ = admission(*short, models=Models(lambda _, model, ins, outs, at: 10 * ins + outs, lambda *_: None))
    prepared = gate.prepare("POST", "/v1/x", (), subscriber=Subscriber("acme", "t"), dimensions={}, route=None)
    weighed = gate.weigh(prepared, b'{"model": "m", "max_tokens": 50, ', 4_000_000)
    keys = [slot.limit.key("acme", AT_NS) for slot in weighed.plan.slots]
    held = dict(zip(keys, (1, 1_000_000, 50, 7, 10_000_050), strict=True))  # of one only the rest was left
    given = Gate("allowed", None, "limits", 0.0, held)
    less = gate.unfinished(weighed, given, 70_001)
    assert less.reserved is held, "by which the gate knows the call"
    assert less.at_most == {keys[1]: 17_501, keys[4]: 175_060}
    assert gate.unfinished(weighed, given, 4_000_000) is given
    assert gate.unfinished(weighed, Gate("allowed"), 1) == Gate("allowed")


def test_money_is_set_aside_by_the_price() -> None:
    prices = {"m": 3}
    gate, asked, _ = admission(
        "cost_usd=9/day",
        models=Models(
            lambda provider, model, tokens_in, tokens_out, at: (
                None if model not in prices else prices[model] * (tokens_in + tokens_out)
            ),
            lambda provider, model: None,
        ),
    )
    gate.ask(weigh(gate, b'{"model": "m", "max_tokens": 92}'), "1", lambda verdict: None)
    gate.ask(weigh(gate, b'{"model": "unpriced", "max_tokens": 92}'), "1", lambda verdict: None)
    assert [question[3] for question in asked] == [
        [("cost_usd-per-day", "acme", 300)],
        [("cost_usd-per-day", "acme", 0)],
    ]


@pytest.mark.parametrize(("multiplier", "expected"), [(None, 2), ("0.001", 1), ("1000", 1201)])
@pytest.mark.parametrize("beside", [(), ("cost_usd=9/day",)])
def test_for_a_meter_of_money_the_price_is_set_aside_in_its_own_unit(
    multiplier: str | None, expected: int, beside: tuple[str, ...]
) -> None:
    weighing = {} if multiplier is None else {"multiplier": multiplier}
    meters = read_meters([{"name": "spend", "aggregation": {"type": "SUM", "field": "cost_usd", **weighing}}])
    asked: list[tuple[Any, ...]] = []
    policy = Policy(
        limits=read_limits((), ["meter:spend=100/day", *beside], meters=meters),
        meant=lambda method, target, upstream: Meant("openai", None, True),
        key_of=lambda fields: None,
        deny=DENY,
        models=Models(lambda *_: 1_200_001, lambda provider, model: None),
    )
    gate = Admission(policy, clock_ns=lambda: AT_NS, call_later=lambda after, do: Timer(do))
    gate.send = asked.append
    weighed = weigh(gate, b'{"model": "m", "max_tokens": 92}')
    gate.ask(weighed, "1", lambda verdict: None)
    assert asked[0][3][0] == ("meter-spend-per-day", "acme", expected)
    # and so it is where this process decides
    key = weighed.plan.slots[0].limit.key("acme", AT_NS)
    gate.answered(answer(1, 1, held={}, more={slot.limit.key("acme", AT_NS): 10**9 for slot in weighed.plan.slots}))
    verdict = gate.at_once(weighed)
    assert verdict is not None
    assert verdict.gate.reserved[key] == expected
    assert measure_of("meter:spend", meters[0]).of(weighed.needs) == expected


@pytest.mark.parametrize(("limit", "denied"), [("cost_usd=9/day", True), ("total_tokens=9/day", False)])
def test_a_model_without_a_price_is_denied_where_it_is_wanted_and_a_limit_is_of_money(limit: str, denied: bool) -> None:
    prices = Models(lambda provider, model, *_: 3 if model == "m" else None, lambda provider, model: None)
    for wanted in (True, False):
        gate, asked, _ = admission("calls=9/day", limit, models=prices, deny_unpriced=wanted)
        assert gate.at_once(weigh(gate, b'{"model": "m"}')) is None, "the owner is asked"
        verdict = gate.at_once(weigh(gate, b'{"model": "new"}'))
        assert (verdict is not None) == (wanted and denied)
        if verdict is not None:
            assert verdict.gate == Gate("denied", "cost_usd-per-day")
            assert verdict.denial is not None
            assert verdict.denial.status == 402
            assert b"what this model costs is not known" in verdict.denial.body
        prepared = gate.prepare("POST", "/v1/x", (), subscriber=None, dimensions={}, route=None)
        assert gate.quickly(prepared, b'{"model": "new"}') is None
        assert not asked


def test_a_dry_run_denies_no_model_without_a_price() -> None:
    prices = Models(lambda *_: None, lambda provider, model: None)
    gate, _, _ = admission("cost_usd=9/day", models=prices, deny_unpriced=True, dry_run=True)
    assert gate.at_once(weigh(gate, b'{"model": "new"}')) is None


def answer(number: int, reply: int, decision: str = "allowed", **given: Any) -> tuple[Any, ...]:
    return Ruling(reply, number, None, decision, **given).plain()


KEY = "calls-per-day|acme|2026-11-18"


def test_a_lease_is_used_without_a_question_until_the_process_tells() -> None:
    gate, asked, _ = admission("calls=9/day")
    verdicts: list[Verdict] = []
    weighed = weigh(gate)
    assert gate.at_once(weighed) is None
    gate.ask(weighed, "1", verdicts.append)
    gate.answered(answer(1, 1, held={KEY: 1}, more={KEY: 2}))
    here = [gate.at_once(weighed) for _ in range(3)]
    assert [verdict is not None for verdict in here] == [True, True, False]
    assert here[0] is not None
    gate.cancelled(here[0].gate)
    again = gate.at_once(weighed)
    assert again is not None
    assert here[1] is not None
    gate.ended(here[1].gate)
    gate.ended(here[1].gate)
    before = gate.has_to_tell
    assert gate.tell() == (1, {KEY: 2})
    assert (before, gate.has_to_tell) == (True, False)
    assert len(asked) == 1


def test_a_lease_ends_with_the_policy_that_it_was_given_under() -> None:
    gate, _, _ = admission("calls=9/day")
    weighed = weigh(gate)
    gate.ask(weighed, "1", lambda verdict: None)
    gate.answered(answer(1, 1, held={KEY: 1}, more={KEY: 5}))
    assert gate.at_once(weighed) is not None
    limits = read_limits((), ["calls=9/day"])
    gate.renew(
        Policy(
            limits=limits, meant=lambda method, target, upstream: Meant("openai"), key_of=lambda fields: None, deny=DENY
        )
    )
    assert gate.at_once(weighed) is None, "a call that was waiting for its body asks the owner"
    assert gate.tell()[1] == {KEY: 2}, "what open calls hold is still told"


def test_what_stays_used_up_is_denied_without_a_question() -> None:
    gate, _, _ = admission("calls=9/day")
    verdicts: list[Verdict] = []
    gate.ask(weigh(gate), "1", verdicts.append)
    gate.answered(answer(1, 1, "denied", limit="calls-per-day", full=[KEY]))
    again = gate.at_once(weigh(gate))
    assert again is not None, "it asks again"
    verdicts.append(again)
    for verdict in verdicts:
        assert verdict.denial is not None
        assert (verdict.denial.status, verdict.gate.limit) == (402, "calls-per-day")


def test_an_answer_that_comes_too_late_changes_nothing() -> None:
    gate, _, timers = admission("calls=9/day", on_failure="closed")
    verdicts: list[Verdict] = []
    gate.ask(weigh(gate), "1", verdicts.append)
    timers[0].do()
    gate.answered(answer(1, 1, held={KEY: 1}))
    assert [verdict.gate.source for verdict in verdicts] == ["on_failure"]
    assert gate.tell() == (1, {})


def test_without_an_owner_the_last_answer_counts_for_a_while() -> None:
    now = [AT_NS]
    gate, _, timers = admission("calls=9/day", on_failure="last", clock_ns=lambda: now[0])
    verdicts: list[Verdict] = []
    gate.ask(weigh(gate), "1", verdicts.append)
    gate.answered(answer(1, 1, "denied", limit="calls-per-day"))
    for after_s in (30, 100, -30):
        now[0] = AT_NS + after_s * SECOND_NS
        gate.ask(weigh(gate), "1", verdicts.append)
        timers[-1].do()
    assert [(verdict.gate.decision, verdict.gate.age_s) for verdict in verdicts] == [
        ("denied", 0.0),
        ("denied", 30.0),
        ("allowed", 0.0),
        ("allowed", 0.0),
    ]


@pytest.mark.parametrize("on_failure", ["open", "closed", "last"])
def test_what_a_fault_keeps_from_being_decided_is_decided_by_the_setting(on_failure: str) -> None:
    gate, _, _ = admission("calls=9/day", on_failure=on_failure)
    verdict = gate.undecided("POST", "/v1/x", None)
    decision = "denied" if on_failure == "closed" else "allowed"
    assert (verdict.gate.decision, verdict.gate.source) == (decision, "on_failure")
    assert (verdict.denial is not None) is (on_failure == "closed")


def test_a_question_is_asked_again_of_an_owner_that_has_just_come() -> None:
    gate, asked, _ = admission("calls=9/day")
    gate.ask(weigh(gate), "1", lambda verdict: None)
    assert gate.questions() == asked


@pytest.mark.parametrize(
    ("kind", "retry_after_s", "status", "says", "silent"),
    [
        ("quota", None, 402, ("x-should-retry", "false"), "Retry-After"),
        ("quota", 3600.0, 402, ("x-should-retry", "false"), "Retry-After"),
        ("rate", 12.2, 429, ("Retry-After", "13"), "x-should-retry"),
        ("rate", 3600.0, 429, ("x-should-retry", "false"), "Retry-After"),
    ],
)
def test_a_denial_never_asks_for_a_long_wait(
    kind: str, retry_after_s: float | None, status: int, says: tuple[str, str], silent: str
) -> None:
    made = DENY("POST", "/x", limit="one", kind=kind, retry_after_s=retry_after_s, message=None)
    assert made.status == status
    assert says in made.headers
    assert ("X-Sidecar-Limit", "one") in made.headers
    assert silent not in dict(made.headers)
    assert json.loads(made.body)["violated-policies"] == ["one"]
