"""Which calls a rule of Revenium's Cost Controls is about, and when it holds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.gate.sources.base import Answer, Caller, NoAnswer
from sidecar.gate.sources.revenium_controls import RULES_MAX, Rules, folded, read_rules

NOW_S = 1_795_000_000.0
LATER, EARLIER = "2026-11-19T00:00:00Z", "2026-11-17T00:00:00Z"
RULE: dict[str, Any] = {
    "ruleId": "r1", "name": "monthly", "threshold": 100, "currentValue": 120, "percentUsed": 120.0, "action": "BLOCK",
    "periodType": "MONTHLY", "breached": True, "shadowMode": False, "windowEnd": LATER,
    "filters": [{"dimension": "MODEL", "operator": "IS", "value": "gpt-5-mini"}],
}  # fmt: skip
CALLER = Caller(
    subscriber="ours", model="gpt-5-mini", provider="openai",
    dimensions={"organization": "ACME", "agent": "writer", "task_type": "draft"},
)  # fmt: skip


def read(*rules: Any, **more: Any) -> Rules:
    found = read_rules({"rules": list(rules), **more}, {"ours": "acme"})
    assert isinstance(found, Rules)
    return found


def blocked(rule: dict[str, Any], caller: Caller = CALLER, now_s: float = NOW_S) -> bool:
    rules = read(rule)
    assert rules.unread == 0
    return not rules.judge(caller, now_s).allowed


def on(dimension: str, operator: str, *values: str) -> dict[str, Any]:
    return RULE | {"filters": [{"dimension": dimension, "operator": operator, "values": list(values)}]}


def test_a_breached_rule_that_blocks_is_named() -> None:
    found = read(RULE | {"denyMessage": "{ruleName}: ask finance"}).judge(CALLER, NOW_S)
    assert found == Answer(
        allowed=False,
        reason="budget_exceeded",
        limit="monthly",
        until_s=1_795_046_400.0,
        message="monthly: ask finance",
    )


@pytest.mark.parametrize(
    "other",
    [
        {"breached": False},
        {"action": "WARN_ONLY"},
        {"action": "THROTTLE"},
        {"action": "NOTIFY"},
        {"shadowMode": True},
        {"windowEnd": EARLIER},
        {"windowEnd": None, "resetsAt": EARLIER},
        {"windowEnd": int(NOW_S * 1000) - 1},
    ],
)
def test_what_is_not_in_force_blocks_nobody(other: dict[str, Any]) -> None:
    assert blocked(RULE)
    assert not blocked(RULE | other)


def test_a_cached_breach_ends_with_its_window() -> None:
    assert blocked(RULE, now_s=1_795_046_399.9)
    assert not blocked(RULE, now_s=1_795_046_400.0)


def test_a_rule_in_shadow_mode_says_what_it_would_do() -> None:
    shadow = RULE | {"shadowMode": True, "name": "trial"}
    assert read(shadow).judge(CALLER, NOW_S) == Answer(allowed=True, shadow="trial")
    assert read(shadow, RULE).judge(CALLER, NOW_S).limit == "monthly"


@pytest.mark.parametrize(
    ("rule", "fits"),
    [
        (on("MODEL", "IS", "GPT-5-mini"), True),
        (on("MODEL", "IS", "openai/gpt-5-mini-2026-08-07"), True),
        (on("MODEL", "IS", "gpt-5"), False),
        (on("MODEL", "IS_NOT", "gpt-5"), True),
        (on("MODEL", "IS_NOT", "gpt-5-mini"), False),
        (on("MODEL", "CONTAINS", "5-mi"), True),
        (on("MODEL", "STARTS_WITH", "gpt-5"), True),
        (on("MODEL", "ENDS_WITH", "nano"), False),
        (on("MODEL", "IN", "gpt-4o", "gpt-5-mini"), True),
        (on("PROVIDER", "IS", "OpenAI"), True),
        (on("SUBSCRIBER", "IS", "acme"), True),
        (on("SUBSCRIBER", "IS", "ours"), False),
        (on("CREDENTIAL", "IN", "acme", "x"), True),
        (on("ORGANIZATION", "IS", "acme"), True),
        (on("AGENT", "IS", "reader"), False),
        (on("TASK_TYPE", "STARTS_WITH", "dr"), True),
        (on("PRODUCT", "IS", "any"), False),
        (on("PRODUCT", "IS_NOT", "any"), True),
        (on("DEPARTMENT", "CONTAINS", "x"), False),
        (RULE | {"filters": on("PROVIDER", "IS", "openai")["filters"] + on("MODEL", "IS", "x")["filters"]}, False),
        (RULE | {"filters": []}, True),
        (RULE | {"filters": None}, True),
    ],
)  # fmt: skip
def test_filters_say_which_calls_a_rule_is_about(rule: dict[str, Any], fits: bool) -> None:
    assert blocked(rule) is fits


def test_who_is_not_known_by_a_dimension_is_met_by_no_filter_on_it() -> None:
    nobody = Caller(subscriber="key_" + "0" * 32)
    assert not blocked(on("SUBSCRIBER", "CONTAINS", "key"), nobody)
    assert not blocked(on("MODEL", "STARTS_WITH", ""), nobody)


def test_a_grouped_rule_blocks_only_whose_own_group_is_breached() -> None:
    groups = [
        {"groupValue": "acme", "currentValue": 120, "breached": True},
        {"groupValue": "globex", "currentValue": 3, "breached": False},
        {"groupValue": None, "breached": True},
        "odd",
    ]
    rule = RULE | {"filters": [], "groupBy": "SUBSCRIBER", "groupBreakdown": groups}
    assert blocked(rule)
    assert not blocked(rule, Caller(subscriber="globex"))
    assert not blocked(rule, Caller(subscriber=None))
    assert not blocked(RULE | {"groupBy": "SUBSCRIBER", "groupBreakdown": None})
    assert blocked(rule | {"breached": False}), "the group's own entry counts"


def test_a_department_over_its_budget_stops_its_people() -> None:
    rules = read_rules({"rules": [], "departmentBudgetBlocks": {"Ann@acme.com": "r9"}}, {})
    assert isinstance(rules, Rules)
    assert not rules.judge(Caller(subscriber="ann@acme.com"), NOW_S).allowed
    assert rules.judge(Caller(subscriber="bob@acme.com"), NOW_S).allowed


def test_amounts_of_a_text_are_not_told_by_the_way() -> None:
    found = read(RULE | {"denyMessage": "you spent {spent} of {limit}"}).judge(CALLER, NOW_S)
    assert found.message is None


@pytest.mark.parametrize(
    "odd",
    [
        7, None, {}, RULE | {"breached": "yes"}, RULE | {"action": None}, RULE | {"windowEnd": "soon"},
        RULE | {"groupBy": "MOON"}, RULE | {"groupBy": 7}, RULE | {"filters": "all"}, RULE | {"filters": [7]},
        on("MOON", "IS", "full"), on("MODEL", "SOUNDS_LIKE", "x"), on("MODEL", "IN"),
        RULE | {"filters": [{"dimension": "MODEL", "operator": "IS", "value": 7}]},
    ],
)  # fmt: skip
def test_a_rule_that_cannot_be_read_is_left_out_and_counted(odd: Any) -> None:
    found = read(odd, RULE)
    assert found.unread == 1
    assert [rule.id for rule in found.rules] == ["r1"]


@pytest.mark.parametrize(
    "said", [None, 7, "rules", {}, ["thank you"], {"rules": {}}, {"rules": [RULE] * (RULES_MAX + 1)}]
)
def test_what_is_no_list_of_rules_is_no_answer(said: Any) -> None:
    assert read_rules(said, {}) == NoAnswer("unexpected_answer")


def test_a_bare_list_is_taken_too() -> None:
    found = read_rules([RULE], {})
    assert isinstance(found, Rules)
    assert len(found.rules) == 1


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("gpt-5-mini-2026-08-07", "gpt-5-mini"),
        ("openai/gpt-5-mini", "gpt-5-mini"),
        ("claude-sonnet-4-6-20260101", "claude-sonnet-4-6"),
        ("us.anthropic.claude-sonnet-4-6-20260101-v1:0", "claude-sonnet-4-6"),
        ("claude-sonnet-4-6@20260101", "claude-sonnet-4-6"),
        ("claude-sonnet-4-6-latest", "claude-sonnet-4-6"),
        ("publishers/google/models/gemini-3-pro", "gemini-3-pro"),
        ("GPT-4o", "gpt-4o"),
    ],
)
def test_models_are_compared_without_their_snapshot_and_prefix(name: str, same: str) -> None:
    assert folded("MODEL", name) == folded("MODEL", same) == same


def test_models_of_a_family_are_not_folded_into_one() -> None:
    names = [
        "gpt-4",
        "gpt-4o",
        "gpt-4o-mini",
        "gpt-4.1",
        "claude-opus-4",
        "claude-opus-4-1",
        "o3",
        "o3-mini",
        "gemini-3-pro",
    ]
    assert len({folded("MODEL", name) for name in names}) == len(names)


NAMES = st.sampled_from([*RULE, "groupBy", "groupBreakdown"])
json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner),
    max_leaves=12,
)  # fmt: skip


@given(st.dictionaries(NAMES, json, max_size=8))
def test_no_rule_whatever_it_is_made_of_breaks_the_others(odd: dict[str, Any]) -> None:
    found = read(RULE | odd, RULE)
    assert isinstance(found.judge(CALLER, NOW_S), Answer)
