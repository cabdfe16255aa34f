"""What vendors said is the same after it was kept, less what was used since; what is damaged is as good as none."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.gate.answers import Entry
from sidecar.gate.remembered import read, recalled, written
from sidecar.gate.sources.base import Answer, Caller
from sidecar.gate.sources.openmeter import OpenmeterAccess
from sidecar.gate.sources.revenium_controls import ReveniumControls, Rules, read_rules

NOW_S = 1_000.0
WALL_S = 1_795_000_000.0
SOURCE = OpenmeterAccess(feature="f", unit="calls")
RULES = b'{"rules": [{"ruleId": "r1", "name": "budget", "breached": true, "action": "BLOCK"}], "more": 0.25}'

texts = st.none() | st.text(max_size=20)
moments = st.none() | st.floats(0, 4e9)
answers = st.builds(
    Answer, allowed=st.booleans(), reason=st.text(max_size=20), remaining=st.none() | st.integers(-10**36, 10**36),
    unit=st.just("tokens"), at_s=moments, until_s=moments, limit=texts, message=texts, shadow=texts,
)  # fmt: skip


@given(answers)
def test_an_answer_comes_back_as_it_was(answer: Answer) -> None:
    entry = Entry("acme", answer, answered_s=NOW_S - 30)
    (one,) = read(written([(SOURCE, [entry, Entry("nobody")])], now_s=NOW_S, wall_s=WALL_S))["openmeter"]
    assert (one.subject, one.answered_s) == ("acme", WALL_S - 30)
    assert recalled(one.said) == answer


def test_what_was_used_and_set_aside_is_taken_off() -> None:
    entry = Entry("acme", Answer(allowed=True, remaining=10, unit="calls"), reserved=2)
    entry.since.add(3, NOW_S)
    (one,) = read(written([(SOURCE, [entry])], now_s=NOW_S, wall_s=WALL_S))["openmeter"]
    assert recalled(one.said) == Answer(allowed=True, remaining=5, unit="calls")
    entry.reserved = 20
    (one,) = read(written([(SOURCE, [entry])], now_s=NOW_S, wall_s=WALL_S))["openmeter"]
    assert recalled(one.said) == Answer(allowed=True, remaining=0, unit="calls"), (
        "which is nothing, and no number below"
    )


def test_rules_come_back_as_the_vendor_said_them() -> None:
    source = ReveniumControls(api_key="k", team="t")
    found = read_rules(orjson.loads(RULES), {})
    assert isinstance(found, Rules)
    for rules, denied in (
        (Rules(rules=found.rules, customers={}, said=RULES.decode()), True),
        (Rules(customers={}), False),
    ):
        (one,) = read(written([(source, [Entry("*", rules)])], now_s=NOW_S, wall_s=WALL_S))["revenium_controls"]
        assert recalled(one.said) is None
        back = source.recalled(one.said)
        assert back is not None
        assert back.judge(Caller(subscriber="acme"), WALL_S).allowed is not denied


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{}", b"[]", b"null", b"\xff", b'{"version": 2, "sources": {}}', b'{"version": 1, "sources": 7}',
        b'{"version": 1, "sources": {"lago": [["acme"]]}}', b'{"version": 1, "sources": {"lago": [["acme", "x", {}]]}}',
    ],
)  # fmt: skip
def test_a_file_of_something_else_is_none(data: bytes) -> None:
    assert read(data) == {}


@pytest.mark.parametrize(
    "said",
    [
        None, 7, "yes", [], {}, {"allowed": 1}, {"allowed": True, "remaining": 5}, {"allowed": True, "remaining": "x"},
        {"allowed": True, "other": 1}, {"allowed": True, "limit": 7},
    ],
)  # fmt: skip
def test_what_is_no_answer_is_not_taken_for_one(said: Any) -> None:
    assert recalled(said) is None
    assert SOURCE.recalled(said) is None


@pytest.mark.parametrize("said", [None, 7, {}, "no JSON", '["thank you"]'])
def test_what_are_no_rules_are_not_taken_for_some(said: Any) -> None:
    assert ReveniumControls(api_key="k", team="t").recalled(said) is None
