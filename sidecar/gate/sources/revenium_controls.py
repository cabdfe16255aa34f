"""`revenium_controls`: Revenium's Cost Controls, a list of rules that is fetched each minute and judged here.

Whether a rule is breached is the vendor's word; which calls it is about is found here, as the vendor's own packages
(Python 0.12, Go) do: filters over the call's dimensions, and for a grouped rule the caller's own entry of its
breakdown. Only a rule with the action `BLOCK` that is not in shadow mode blocks, and never after the end of its
window: a cached breach would go on blocking into the new one. 204 says that there are no rules.

The two packages disagree about a rule without any scope: the Python one applies it to all, the Go one to nobody. It
is applied here (`UNSCOPED_APPLIES`). Not verified at the vendor either: that all filters of a rule must fit; the
spelling of dimensions beyond those in `_DIMENSIONS`. A filter whose operator nobody knows fits no call, and is
counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from time import time
from typing import Any, Final
from urllib.parse import quote

from sidecar.gate.sources.base import UNEXPECTED, Answer, Caller, Known, NoAnswer, Vendor, customer, moment, parsed
from sidecar.gate.sources.revenium import base_address

HOST: Final = "https://api.revenium.ai"
PATH: Final = "/v2/api/ai/enforcement-rules/"
POLL_S: Final = 60.0  # as the vendor's packages poll
RULES_MAX: Final = 1000  # of a team; each call looks at all of them
UNSCOPED_APPLIES: Final = True
EVERYBODY: Final = "*"

BLOCK: Final = "BLOCK"

# A rule's dimension -> what the call has of it: a field of `Caller`, or one of our dimensions by its name.
_DIMENSIONS: Final[Mapping[str, str]] = {
    "SUBSCRIBER": "subscriber",
    "CREDENTIAL": "subscriber",
    "MODEL": "model",
    "PROVIDER": "provider",
    "ORGANIZATION": "organization",
    "PRODUCT": "product",
    "AGENT": "agent",
    "TASK_TYPE": "task_type",
    "DEPARTMENT": "department",
    "ORG_UNIT": "department",
}

# What providers put around the name of a model: a route's or region's prefix, and a snapshot's date or version.
_PREFIX: Final = re.compile(r"^(?:[a-z0-9_.-]+/)*(?:(?:us|eu|apac|global)\.)?(?:(?:anthropic|amazon|meta|mistral)\.)?")
_SNAPSHOT: Final = re.compile(r"(?:[-@](?:\d{8}|\d{4}-\d{2}-\d{2}|\d{4}|latest|preview))?(?:-v\d+(?::\d+)?)?$")


@dataclass(frozen=True, slots=True)
class Filter:
    """One condition; `values` are folded already."""

    dimension: str
    operator: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule, as much of it as decides."""

    id: str
    name: str
    breached: bool
    blocks: bool
    shadow: bool
    until_s: float | None
    filters: tuple[Filter, ...]
    group_by: str | None
    groups: frozenset[str]  # whose own entry is breached
    message: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The rules in force. `unread`: how many of the list nobody here understands."""

    rules: tuple[Rule, ...] = ()
    people: frozenset[str] = frozenset()  # e-mail addresses over their department's budget
    customers: Mapping[str, str]
    unread: int = 0
    said: str = ""  # the vendor's own words, to be remembered
    at_s: float | None = None
    until_s: float | None = None

    def judge(self, caller: Caller, wall_s: float) -> Answer:
        """The first rule that blocks this call; else whether one in shadow mode would."""
        shadow: str | None = None
        who = customer(caller.subscriber, self.customers)
        if who is not None and who.casefold() in self.people:
            return Answer(allowed=False, reason="budget_exceeded", limit="department budget")
        for rule in self.rules:
            if not rule.blocks or (rule.until_s is not None and rule.until_s <= wall_s):
                continue
            if not applies(rule, caller, who):
                continue
            if rule.shadow:
                shadow = shadow or rule.name
                continue
            return Answer(
                allowed=False, reason="budget_exceeded", limit=rule.name, until_s=rule.until_s, message=rule.message
            )
        return Answer(allowed=True, shadow=shadow)


class ReveniumControls:
    """One list for all subscribers."""

    name = "revenium_controls"
    by_model = True  # rules may name one
    unit = None  # judged by the vendor: nothing is counted down
    lag_s = 0.0
    polled_s: float | None = POLL_S

    def __init__(
        self,
        *,
        api_key: str,
        team: str,
        url: str = HOST,
        customers: Mapping[str, str] | None = None,
        timeout_s: float = 10.0,
        clock: Callable[[], float] = time,
    ) -> None:
        self._path = PATH + quote(team, safe="")
        self._customers = customers or {}
        self._vendor = Vendor(base_address(url), {"x-api-key": api_key}, timeout_s=timeout_s, clock=clock)

    def subject(self, caller: Caller) -> str | None:
        return EVERYBODY

    async def ask(self, subject: str) -> Rules | NoAnswer:
        answer = await self._vendor.get(self._path)
        if isinstance(answer, NoAnswer):
            return answer
        if answer.status == 204:
            return Rules(customers=self._customers)
        if answer.status == 404:
            return NoAnswer("not_found")  # a team that is not there has no rules to be kept from
        said = parsed(answer.body)
        if isinstance(said, NoAnswer):
            return said
        rules = read_rules(said, self._customers)
        return rules if isinstance(rules, NoAnswer) else replace(rules, said=answer.body.decode("utf-8", "replace"))

    def kept(self, known: Known) -> Any:
        return known.said if isinstance(known, Rules) else None

    def recalled(self, said: Any) -> Rules | None:
        if not isinstance(said, str):
            return None
        if not said:
            return Rules(customers=self._customers)
        rules = read_rules(parsed(said.encode()), self._customers)
        return None if isinstance(rules, NoAnswer) else replace(rules, said=said)

    async def aclose(self) -> None:
        await self._vendor.aclose()


def read_rules(said: object, customers: Mapping[str, str]) -> Rules | NoAnswer:
    """The list, in an object or bare. A rule that cannot be read is left out and counted, the others hold."""
    rows = said.get("rules") if isinstance(said, dict) else said
    if not isinstance(rows, list) or len(rows) > RULES_MAX:
        return UNEXPECTED
    if rows and not any(isinstance(row, dict) for row in rows):
        return UNEXPECTED  # a list of something else must not pass for one of no rules
    found = [_rule(row) for row in rows]
    blocked = said.get("departmentBudgetBlocks") if isinstance(said, dict) else None
    people = frozenset(name.casefold() for name in blocked) if isinstance(blocked, dict) else frozenset[str]()
    rules = tuple(rule for rule in found if rule is not None)
    return Rules(rules=rules, people=people, customers=customers, unread=len(found) - len(rules))


def applies(rule: Rule, caller: Caller, who: str | None) -> bool:
    """Whether a breached rule is about this call."""
    if not all(_fits(each, caller, who) for each in rule.filters):
        return False
    if rule.group_by is not None:
        own = _value(rule.group_by, caller, who)
        return own is not None and own in rule.groups
    return rule.breached and (bool(rule.filters) or UNSCOPED_APPLIES)


def folded(dimension: str, value: str) -> str:
    """A value as it is compared: models without the date of their snapshot and what stands before their name."""
    text = value.strip().casefold()
    if dimension != "MODEL":
        return text
    return _SNAPSHOT.sub("", _PREFIX.sub("", text, count=1), count=1) or text


def _fits(condition: Filter, caller: Caller, who: str | None) -> bool:
    own = _value(condition.dimension, caller, who)
    if condition.operator == "IS_NOT":
        return own is None or own not in condition.values
    if own is None:
        return False
    match condition.operator:
        case "IS" | "IN":
            return own in condition.values
        case "CONTAINS":
            return any(value in own for value in condition.values)
        case "STARTS_WITH":
            return own.startswith(condition.values)
        case "ENDS_WITH":
            return own.endswith(condition.values)
    return False


def _value(dimension: str, caller: Caller, who: str | None) -> str | None:
    name = _DIMENSIONS.get(dimension)
    match name:
        case None:
            return None
        case "subscriber":
            own = who
        case "model":
            own = caller.model
        case "provider":
            own = caller.provider
        case _:
            own = caller.dimensions.get(name)
    return None if not own else folded(dimension, own)


_OPERATORS: Final = frozenset({"IS", "IS_NOT", "CONTAINS", "STARTS_WITH", "ENDS_WITH", "IN"})


def _rule(row: object) -> Rule | None:
    if not isinstance(row, dict):
        return None
    name, identity, breached, action = row.get("name"), row.get("ruleId"), row.get("breached"), row.get("action")
    if not isinstance(breached, bool) or not isinstance(action, str):
        return None
    filters = (
        [_filter(each) for each in row.get("filters") or ()] if isinstance(row.get("filters") or [], list) else [None]
    )
    group_by = row.get("groupBy")
    end = row.get("windowEnd") if row.get("windowEnd") is not None else row.get("resetsAt")
    until_s = moment(end)
    if None in filters or (end is not None and until_s is None):
        return None
    if group_by is not None and (not isinstance(group_by, str) or group_by.upper() not in _DIMENSIONS):
        return None
    message = row.get("denyMessage")
    shown = name if isinstance(name, str) and name else identity if isinstance(identity, str) else "rule"
    return Rule(
        id=identity if isinstance(identity, str) else "",
        name=shown,
        breached=breached,
        blocks=action.upper() == BLOCK,
        shadow=row.get("shadowMode") is True,
        until_s=until_s,
        filters=tuple(each for each in filters if each is not None),
        group_by=group_by.upper() if group_by else None,
        groups=_groups(row.get("groupBreakdown"), group_by.upper() if group_by else ""),
        message=_message(message, shown),
    )


def _filter(row: object) -> Filter | None:
    if not isinstance(row, dict):
        return None
    dimension, operator = row.get("dimension"), row.get("operator")
    values = row.get("values") if row.get("values") is not None else row.get("value")
    values = values if isinstance(values, list) else [values]
    if not isinstance(dimension, str) or not isinstance(operator, str) or operator.upper() not in _OPERATORS:
        return None
    if dimension.upper() not in _DIMENSIONS or not values or not all(isinstance(value, str) for value in values):
        return None
    dimension = dimension.upper()
    return Filter(dimension, operator.upper(), tuple(folded(dimension, value) for value in values))


def _groups(breakdown: object, dimension: str) -> frozenset[str]:
    rows: list[Any] = breakdown if isinstance(breakdown, list) else []
    return frozenset(
        folded(dimension, row["groupValue"])
        for row in rows
        if isinstance(row, dict) and row.get("breached") is True and isinstance(row.get("groupValue"), str)
    )


def _message(template: object, name: str) -> str | None:
    """The operator's text, where it needs no amounts: those are shown to clients only where we are told to."""
    if not isinstance(template, str) or not template:
        return None
    text = template.replace("{ruleName}", name)
    return None if "{" in text else text
