"""What every backend file builds on: its surroundings, which calls it is owed, who pays, and the values it is sent.

A backend file knows one wire contract. Which calls may be billed at all, to whom and with which numbers is the
same for all of them and stands here; how events are cut into requests stands in `batches`. All of it is pure.
A record that is not handed on has been put where it belongs, with its reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN, Decimal
from decimal import Context as Arithmetic
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import orjson

from sidecar.ledger.postgres_schema import Line, Reported
from sidecar.meters.buckets import BatchSums
from sidecar.meters.definition import Kind, Meter, read_meters
from sidecar.meters.hourly import DIGITS_MAX, write_amount
from sidecar.meters.properties import answered
from sidecar.model.delivery import NO_CUSTOMER, Applied, Encoded, Event, Verdict, Withheld
from sidecar.model.exchange import Outcome
from sidecar.model.record import Record
from sidecar.settings import setting, types

TEXT_CHARS_MAX: Final = 255  # what vendors store of a text; Revenium's own package cuts here as well
DAY_S: Final = 86_400.0
NOT_COMPUTED: Final = "value_not_computed"  # a meter's expression gives no number for a record: parked

_ROUNDING: Final = Arithmetic(prec=DIGITS_MAX, rounding=ROUND_HALF_EVEN)
_HASHED: Final = re.compile(r"key_[0-9a-f]{32}")  # how `attribution` writes the keyed hash of a credential


class LedgerApply(Protocol):
    """The embedded store, as much as its backend needs. All calls block."""

    def apply(self, key: str, body: bytes) -> Verdict:
        """Add the effects of one sealed delivery, once; its own faults come back as a verdict."""
        ...

    def undo(self, key: str, body: bytes) -> tuple[Verdict, tuple[str, ...]]:
        """Add effects that take others back, once; and the meters that could not be taken back."""
        ...

    def applied(self, instance: str) -> Applied | Verdict | None:
        """How far the sums go in one spool; a verdict where that cannot be told just now."""
        ...

    def apply_sums(self, instance: str, batch: Applied, sums: Sequence[BatchSums]) -> Verdict:
        """Add the sums of a batch of that spool, once; faults come back as a verdict."""
        ...

    def close(self) -> None: ...


class SharedLedger(Protocol):
    """The ledger that many sidecars share: records go in once each, by their ids, and what they amount to with them.
    Blocks; faults come back as a verdict."""

    def write(
        self, lines: Sequence[Line], sums: Sequence[BatchSums] | None, again: Callable[[Sequence[bytes]], BatchSums]
    ) -> Verdict:
        """Put in those that are not there. `sums`: of all that are counted, where it is known; `again` works out what
        some lines amount to."""
        ...

    def take_back(self, record_id: str, sums: BatchSums) -> tuple[Verdict, tuple[str, ...]]:
        """Take a record out of the sums, once; and the meters that keep it."""
        ...

    def report(self, told: Reported) -> Verdict:
        """Say how this sidecar stands, also where nothing is written."""
        ...

    def look(self) -> str | None:
        """What keeps it from being used, in a line; changes nothing."""
        ...

    @property
    def where(self) -> str:
        """Host, port and database."""
        ...

    @property
    def copied(self) -> bool:
        """Whether another directory was found to go by our name."""
        ...

    def adopt(self, *, copy: bool) -> None:
        """Somebody has decided what this directory is."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a backend is given besides its own settings."""

    data_dir: Path
    subscribers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # our id -> backend -> id there
    meters: Sequence[Mapping[str, Any]] = ()  # as configured; none gives the three defaults
    open_ledger: Callable[[], LedgerApply] | None = None
    open_shared_ledger: Callable[[], SharedLedger] | None = None  # in its place, where one is set
    not_computed: Callable[[str], None] | None = None  # told the meter of each value that its expression cannot give

    def customers(self, backend: str) -> dict[str, str]:
        """Our subscriber id -> the backend's customer id, where one is mapped."""
        return {ours: theirs[backend] for ours, theirs in self.subscribers.items() if backend in theirs}

    def definitions(self) -> tuple[Meter, ...]:
        """The meters. Raises `MetersError` with every fault."""
        found, tell = read_meters(self.meters), self.not_computed
        return found if tell is None else tuple(meter.watched(partial(tell, meter.name)) for meter in found)


SEND: Final = "send"
SKIP: Final = "skip"
PARK: Final = "park"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Which calls a backend is given: one of `send`, `skip`, `park` for each kind that is not plainly billable."""

    denied: str = SKIP  # turned away by the gate
    refused: str = SKIP  # turned away by us: a bad request
    unsettled: str = PARK  # found open after a crash: nobody knows what was consumed
    partial: str = SEND  # usage is a lower bound, because the end of the answer was not seen
    no_customer: str = PARK  # nobody is known to pay; of one that bills customers

    def place(self, record: Record, encoded: Encoded) -> bool:
        """True: the record is to be sent. Otherwise it has been put where it belongs."""
        kind = _kind(record)
        do = SEND if kind is None else getattr(self, kind)
        if do == SKIP:
            encoded.skipped[record.id] = str(kind)
        elif do == PARK:
            encoded.parked[record.id] = str(kind)
        return bool(do == SEND)


BILLING: Final = Policy()
EVERYTHING: Final = Policy(denied=SEND, refused=SEND, unsettled=SEND)


_DO: Final = types.word_of(SEND, SKIP, PARK)
_DENIED: Final = "calls that the gate turned away: `send`, `skip` or `park`"
_REFUSED: Final = "calls that were refused as bad requests"
_UNSETTLED: Final = "calls found open after a crash"


@dataclass(frozen=True, kw_only=True)
class BillingSettings:
    """The settings of every backend that bills: which calls it is given beside the plainly billable ones."""

    denied: str = setting(_DO, BILLING.denied, _DENIED)
    refused: str = setting(_DO, BILLING.refused, _REFUSED)
    unsettled: str = setting(_DO, BILLING.unsettled, _UNSETTLED)
    partial: str = setting(_DO, BILLING.partial, "calls whose usage is only a lower bound")

    @property
    def policy(self) -> Policy:
        return Policy(denied=self.denied, refused=self.refused, unsettled=self.unsettled, partial=self.partial)


@dataclass(frozen=True, kw_only=True)
class CustomerSettings(BillingSettings):
    """The same for one that bills customers by their ids there."""

    no_customer: str = setting(
        _DO, BILLING.no_customer,
        "calls of nobody who is a customer there: `send` (under our own id; parked without one), `skip` or `park`",
    )  # fmt: skip

    @property
    def policy(self) -> Policy:
        return replace(super().policy, no_customer=self.no_customer)


@dataclass(frozen=True, kw_only=True)
class RecordSettings(BillingSettings):
    """The same for one that keeps records and is given all of them."""

    denied: str = setting(_DO, EVERYTHING.denied, _DENIED)
    refused: str = setting(_DO, EVERYTHING.refused, _REFUSED)
    unsettled: str = setting(_DO, EVERYTHING.unsettled, _UNSETTLED)


@runtime_checkable
class Examined(Protocol):
    """A backend that can be asked whether it is set up as we are: what `check --connect` calls."""

    async def examine(self) -> list[str]:
        """What is wrong, each with what to do; nothing when all is well. Bills nothing."""
        ...


@runtime_checkable
class Reached(Protocol):
    """A backend that is not asked over HTTP, and connects by itself: what `check --connect` calls before `examine`."""

    async def reach(self) -> tuple[bool, str]:
        """Whether it can be connected to and knows us; where it is, or why not and what to do. Changes nothing."""
        ...


@dataclass(frozen=True, slots=True)
class Provision:
    """What became of one meter at a backend. `fits`: it is there now, as we define it."""

    fits: bool
    text: str


@runtime_checkable
class Provisioned(Protocol):
    """A backend at which meters can be created: what `meters provision` calls."""

    async def provision(self, meter: Meter) -> Provision:
        """Create the meter where it is missing, compare where it is there, change nothing; says what was done."""
        ...


def chosen_meters(
    backend: str, definitions: Sequence[Meter], names: Sequence[str], takes: frozenset[Kind]
) -> tuple[Meter, ...]:
    """The meters that a backend is sent: those named, else all. Raises `ValueError` for what it cannot take."""
    known = {meter.name: meter for meter in definitions}
    unknown = [name for name in names if name not in known]
    if unknown:
        setting = f"SIDECAR_{backend.upper()}_METERS"
        raise ValueError(f"{setting}: {', '.join(unknown)} is no meter; the meters are: {', '.join(known)}")
    chosen = tuple(known[name] for name in names) if names else tuple(definitions)
    for meter in chosen:
        if meter.kind not in takes:
            raise ValueError(
                f"{backend}: the meter {meter.name} is a {meter.kind}, and {backend} takes one number an event "
                f"({', '.join(sorted(takes))}): name the meters to send in SIDECAR_{backend.upper()}_METERS"
            )
    return chosen


def quantities(record: Record, meters: Sequence[Meter]) -> list[tuple[Meter, int | Decimal]]:
    """The meters that this record adds to, with what it adds; none where it has no value for any."""
    measured = ((meter, meter.quantity(record)) for meter in meters)
    return [(meter, quantity) for meter, quantity in measured if quantity is not None]


def answered_calls(
    records: Iterable[Record], policy: Policy, customers: Mapping[str, str], encoded: Encoded
) -> Iterator[tuple[Record, str]]:
    """For a vendor whose meters work on all that is known of a call: each call to bill, and who pays."""
    for record in records:
        if policy.place(record, encoded):
            if not answered(record):
                encoded.skipped[record.id] = "unanswered"
            elif customer := _payer(record, policy, customers, encoded):
                yield record, customer


def metered_calls(
    records: Iterable[Record], policy: Policy, customers: Mapping[str, str], meters: Sequence[Meter], encoded: Encoded
) -> Iterator[tuple[Record, str, list[tuple[Meter, int | Decimal]]]]:
    """For a vendor that takes one number an event: each call to bill, who pays, and its numbers. What a meter cannot
    compute is withheld, and the record's other meters go."""
    for record in records:
        if policy.place(record, encoded):
            amounts = quantities(record, meters)
            failed = failures(record, meters) if len(amounts) < len(meters) else {}
            if not amounts and not failed:
                encoded.skipped[record.id] = "no_value"
            elif customer := _payer(record, policy, customers, encoded):
                encoded.withheld.update(failed)
                if amounts:
                    yield record, customer, amounts


def failures(record: Record, meters: Sequence[Meter]) -> dict[Event, Withheld]:
    """The meters whose expression gives no number although the record knows all that it reads, with the reason."""
    found = ((meter, meter.failure(record)) for meter in meters if meter.expression is not None)
    return {
        meter_event(record, meter): Withheld(NOT_COMPUTED, f"meter {meter.name}: {reason}")
        for meter, reason in found
        if reason is not None
    }


def meter_event(record: Record, meter: Meter) -> Event:
    """What one record adds to one meter. Both are read back from the id, by `cancel` and by a vendor's complaints."""
    return Event(record.id, f"{record.id}:{meter.name}")


def _payer(record: Record, policy: Policy, customers: Mapping[str, str], encoded: Encoded) -> str | None:
    """Who pays. While nobody is known to, the record is parked, unless the policy says otherwise: a mapping can still
    say who."""
    return customer_id(record, customers) or without_customer(record, policy, encoded)


def without_customer(record: Record, policy: Policy, encoded: Encoded) -> str | None:
    """The id that a call is sent under while no customer is known for it; None: it has been put where it belongs."""
    own = subscriber_id(record)
    if policy.no_customer == SEND and own:
        return own
    place = encoded.skipped if policy.no_customer == SKIP else encoded.parked
    place[record.id] = NO_CUSTOMER
    return None


def json_number(quantity: int | Decimal) -> orjson.Fragment:
    """A number with all its digits: a float would lose some."""
    return orjson.Fragment(plain_number(quantity).encode())


def plain_number(quantity: int | Decimal) -> str:
    return str(quantity) if isinstance(quantity, int) else write_amount(quantity)


def rounded(amount: Decimal, places: int) -> Decimal:
    """With so many decimals at most, half to even: for a vendor that takes no more. Done while a call's event is made,
    never on sums, so a repeat of the event says the same."""
    there = amount.as_tuple().exponent
    if isinstance(there, int) and there >= -places:
        return amount
    return amount.quantize(Decimal(1).scaleb(-places), context=_ROUNDING)


def rfc3339(moment: datetime) -> str:
    """UTC with microseconds and Z: the same text for the same moment, always."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _kind(record: Record) -> str | None:
    if record.outcome is Outcome.DENIED:
        return "denied"
    if record.outcome is Outcome.REFUSED:
        return "refused"
    if record.outcome is Outcome.UNKNOWN:
        return "unsettled"
    if record.usage is not None and record.usage.usage_state == "partial":
        return "partial"
    return None


def subscriber_id(record: Record) -> str | None:
    return None if record.subscriber is None else record.subscriber.id


def customer_id(record: Record, customers: Mapping[str, str]) -> str | None:
    """Who pays, in the backend's own ids: as mapped, else the subscriber's id unless that is a hash.

    A hashed key is nobody's customer id: a vendor would take it and drop the event later.
    """
    own = subscriber_id(record)
    if not own:
        return None
    if own in customers:
        return customers[own]
    return None if _HASHED.fullmatch(own) else own


def label_id(record: Record, customers: Mapping[str, str]) -> str | None:
    """Who pays, for a field that takes any text: as mapped, else our own id, hashed or not."""
    own = subscriber_id(record)
    return None if own is None else customers.get(own, own)


def clip(text: str, chars: int = TEXT_CHARS_MAX) -> str:
    """Cut as the vendors' own packages do, on a character border."""
    return text if len(text) <= chars else text[:chars]
