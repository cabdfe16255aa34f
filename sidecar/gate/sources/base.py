"""What every source has in common: who calls, what an answer is, how an amount is read, how a vendor is asked.

A source knows one vendor's question and what its answer means. How long an answer is believed, when it is asked again
and what holds while there is none is the same for all, and stands in `sidecar.gate.answers` and `sidecar.gate.asking`.

What is no clear answer is none: a page of HTML, a number that cannot be, a body that breaks off. It comes back as a
`NoAnswer` with one fixed word, and the operator's `SIDECAR_GATE_ON_FAILURE` decides. No text of a vendor's answer gets
into a reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from time import time
from types import MappingProxyType
from typing import Any, Final, Protocol

from sidecar.storage.http_client import Answer as HttpAnswer
from sidecar.storage.http_client import HttpClient, NoAnswer

__all__ = ["Answer", "Caller", "Known", "NoAnswer", "Source", "Vendor"]

COST_USD: Final = "cost_usd"
METER: Final = "meter:"
PICO: Final = 10**12
MILLIONTHS: Final = 10**6
"""Amounts are whole numbers here as in the limits: money in pico-USD, meters in millionths, the rest as it is."""

NUMBER_CHARS_MAX: Final = 40  # of an amount as text: 18 digits before the point and 18 behind are the vendors' widest
NUMBER_DIGITS_MAX: Final = 24  # before the point; more would cost time to make whole, and is no amount of anything
ID_CHARS_MAX: Final = 255  # of a customer's id in an address, as vendors cut them

_HASHED: Final = re.compile(r"key_[0-9a-f]{32}")  # how a credential's keyed hash is written: no vendor knows it
_HTML: Final = re.compile(rb"\s*<(!doctype|html|head|body|title|!--)", re.IGNORECASE)
_WORDS: Final = {401: "unauthorized", 403: "forbidden", 404: "not_found", 429: "too_many_requests"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """What is known of a call before it is made."""

    subscriber: str | None
    model: str | None = None  # as the request names it
    provider: str | None = None
    dimensions: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a vendor says of one subject."""

    allowed: bool
    reason: str = ""  # why not, in a fixed word
    remaining: int | None = None  # in `unit`, as it is counted here; None: nothing to count down
    unit: str | None = None
    at_s: float | None = None  # up to when usage is in it, Unix seconds; None: up to the question
    until_s: float | None = None  # it says nothing of what is after this moment, Unix seconds
    limit: str | None = None  # what the vendor calls the limit that stops it
    message: str | None = None  # what the vendor's operator wants the client to be told
    shadow: str | None = None  # a limit that would stop it, were it in force

    def judge(self, caller: Caller, wall_s: float) -> Answer:
        """What it means for one call: the same for all calls of its subject."""
        return self


class Known(Protocol):
    """An answer, or what answers are made from for each call (a list of rules)."""

    @property
    def at_s(self) -> float | None: ...

    @property
    def until_s(self) -> float | None: ...

    def judge(self, caller: Caller, wall_s: float) -> Answer:
        """`wall_s`: now, Unix seconds."""
        ...


class Source(Protocol):
    """One vendor's question."""

    @property
    def name(self) -> str:
        """As `SIDECAR_GATE` has it."""
        ...

    @property
    def unit(self) -> str | None:
        """Of what its answers leave; None where nothing is counted down."""
        ...

    @property
    def by_model(self) -> bool:
        """Whether what it says of a call may depend on the model."""
        ...

    @property
    def lag_s(self) -> float:
        """How long it takes until what was consumed is in the vendor's answers."""
        ...

    @property
    def polled_s(self) -> float | None:
        """The one answer is for everybody, and asked for this often whether somebody calls or not."""
        ...

    def subject(self, caller: Caller) -> str | None:
        """Of whom the vendor is asked, in its ids; None where it knows nobody by that."""
        ...

    async def ask(self, subject: str) -> Known | NoAnswer:
        """Ask once. Never raises for what a vendor does."""
        ...

    def kept(self, known: Known) -> Any:
        """What is no `Answer`, as values of JSON, so that it can be remembered over a restart; None: it cannot."""
        ...

    def recalled(self, said: Any) -> Known | None:
        """The same back."""
        ...

    async def aclose(self) -> None: ...


class Vendor:
    """Somebody who is asked by GET and answers in JSON."""

    def __init__(
        self, url: str, headers: Mapping[str, str], *, timeout_s: float, clock: Callable[[], float] = time
    ) -> None:
        self.url = url
        self.clock = clock
        self._headers = {"accept": "application/json", **headers}
        self._client = HttpClient(timeout_s=timeout_s, connect_timeout_s=timeout_s, clock=clock)

    async def get(self, path: str) -> HttpAnswer | NoAnswer:
        """A whole answer that is a 2xx or a 404 of the vendor's own; else why there is none."""
        answer = await self._client.ask("GET", self.url + path, None, self._headers)
        if isinstance(answer, NoAnswer):
            return answer
        if answer.cut is not None:
            return NoAnswer(answer.cut)
        if _HTML.match(answer.body[:200]):
            return NoAnswer("html")  # also with a 404: a wrong address is no word about a subscriber
        if answer.ok or answer.status == 404:
            return answer
        return NoAnswer(_WORDS.get(answer.status, f"http_{answer.status}"))

    async def json(self, path: str) -> Any:
        """What the body says, with every digit; `Missing` for a 404, `NoAnswer` where there is nothing to read."""
        answer = await self.get(path)
        if isinstance(answer, NoAnswer):
            return answer
        return MISSING if answer.status == 404 else parsed(answer.body)

    async def aclose(self) -> None:
        await self._client.aclose()


class OfEach:
    """A source that says an `Answer` of each subject."""

    def kept(self, known: Known) -> Any:
        return None

    def recalled(self, said: Any) -> Known | None:
        return None


class Missing:
    """The vendor knows no such thing."""


MISSING: Final = Missing()
UNEXPECTED: Final = NoAnswer("unexpected_answer")


def parsed(body: bytes) -> Any:
    """JSON with its fractions as decimals; `NoAnswer` for anything else."""
    try:
        return json.loads(body, parse_float=Decimal, parse_int=_whole, parse_constant=_refuse)
    except (ValueError, RecursionError, InvalidOperation):
        return UNEXPECTED


def amount(value: object) -> Decimal | None:
    """A number, or a text of one; None for what is no amount of anything."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        if len(value) > NUMBER_CHARS_MAX:
            return None
        try:
            value = Decimal(value)
        except InvalidOperation:
            return None
    if isinstance(value, int):
        value = Decimal(value)
    if not isinstance(value, Decimal) or not value.is_finite() or (value and value.adjusted() >= NUMBER_DIGITS_MAX):
        return None
    return value


def whole_units(value: Decimal, unit: str | None) -> int:
    """What is left as it is counted here, never more than there is."""
    scale = PICO if unit == COST_USD else MILLIONTHS if unit is not None and unit.startswith(METER) else 1
    return int((value * scale).to_integral_value(rounding="ROUND_FLOOR"))


def moment(value: object) -> float | None:
    """A time as vendors write it, in Unix seconds: RFC 3339, or a whole number of milliseconds."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value / 1000 if 0 < value < 253_402_300_800_000 else None  # the year 10000
    if not isinstance(value, str) or len(value) > NUMBER_CHARS_MAX:
        return None
    try:
        found = datetime.fromisoformat(value)
    except ValueError:
        return None
    return (found if found.tzinfo is not None else found.replace(tzinfo=UTC)).timestamp()


def customer(subscriber: str | None, customers: Mapping[str, str]) -> str | None:
    """The vendor's id of a subscriber: as mapped, else our own unless that is a hash, which no vendor knows."""
    if not subscriber:
        return None
    found = customers.get(subscriber)
    if found is None and not _HASHED.fullmatch(subscriber):
        found = subscriber
    # One of dots alone would make another address of the path that it stands in.
    return None if found is None or len(found) > ID_CHARS_MAX or not found.strip(".") else found


def rows_of(said: object, *names: str) -> list[dict[str, Any]] | None:
    """The objects of a list, bare or under one of these names; None where there is no list of objects."""
    found = said
    if isinstance(said, dict):
        found = next((said[name] for name in names if name in said), None)
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        return None
    return found


def _whole(text: str) -> int:
    if len(text) > NUMBER_CHARS_MAX:
        raise ValueError
    return int(text)


def _refuse(text: str) -> Any:
    raise ValueError(text)
