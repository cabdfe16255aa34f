"""The words of delivery: what was sealed, what a backend can do, and what it said of each event.

A backend is data plus two calls. What is generic (splitting, windows, resending, parking) is
written once in `delivery` from `Abilities`; a backend file only knows its own wire contract.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from sidecar.model.call_group import CallGroup
from sidecar.model.record import Record


@dataclass(slots=True, frozen=True)
class Delivered:
    """The backend has it."""


@dataclass(slots=True, frozen=True)
class Duplicate:
    """The backend had it already: as good as delivered, counted apart."""


@dataclass(slots=True, frozen=True)
class Retry:
    """Definitely not taken, and worth trying again (429, 5xx with an answer, connect failed)."""

    reason: str
    after_s: float | None = None  # the backend's own Retry-After


@dataclass(slots=True, frozen=True)
class Refused:
    """Definitely not taken, and never will be as it is: park it."""

    reason: str  # a short fixed word or the backend's code; no body text


NO_CUSTOMER: Final = "no_customer"
"""The reason of what is parked because a backend knows nobody by the record's subscriber."""

KEY_MISMATCH: Final = "key_mismatch"
"""The reason of a refusal that is about the request's key: something came under it before, with other bytes. So the
events may be there already, and nothing of them is sent under another key unless an operator accepts doubles."""


@dataclass(slots=True, frozen=True)
class Blocked:
    """Nothing of ours will be taken until an operator acts (401, 403, licence, wrong URL): keep all."""

    reason: str
    maybe_taken: bool = field(default=False, compare=False)  # a 2xx in a foreign form: this one may be there


@dataclass(slots=True, frozen=True)
class Unknown:
    """A byte may have left and no answer came: it may or may not have been taken."""

    reason: str


Verdict = Delivered | Duplicate | Retry | Refused | Blocked | Unknown


class Atomicity(StrEnum):
    """What a refusal of a whole request says about its members."""

    SINGLE = "single"  # one event a request
    PREFIX = "prefix"  # some leading events may have been taken
    ALL_OR_NOTHING = "all_or_nothing"
    PER_ITEM = "per_item"  # the answer tells each apart


class Dedup(StrEnum):
    """What makes a repeat harmless at the backend."""

    NONE = "none"
    REQUEST_KEY = "request_key"  # the same key with the same bytes
    EVENT_ID = "event_id"  # an id in each event


@dataclass(slots=True, frozen=True, kw_only=True)
class Abilities:
    """A backend's contract as data. Sizes in bytes, times in seconds; None means "no limit"."""

    events_max: int = 1  # events in one request
    bytes_max: int | None = None  # body bytes of one request
    atomicity: Atomicity = Atomicity.SINGLE
    dedup: Dedup = Dedup.NONE
    dedup_window_s: float | None = None  # None with a dedup kind: without end
    age_max_s: float | None = None  # oldest event time taken
    future_max_s: float | None = None
    concurrency: int = 8  # requests under way at once
    one_per_subject: bool = False  # one call at a time for each Sealed.subject
    knows_duplicates: bool = False
    bills: bool = True  # False: also takes denied, refused and unsettled calls (ledger, file, webhook)
    knows_records: bool = False  # recognises each record again, whatever request it comes in
    resend_unknown: bool = False  # the operator's word that doubles are acceptable


class Event(NamedTuple):
    """One wire event inside a sealed request."""

    record_id: str
    event_id: str  # the id the backend sees: the record's, or `<record id>:<meter>`


@dataclass(slots=True, frozen=True, kw_only=True)
class Sealed:
    """One request, fixed for ever: the same bytes and key at every attempt, also after an update.

    Holds no secret; the backend adds its credentials when it sends.
    """

    key: str  # idempotency key: 1-100 printable ASCII characters without spaces
    events: tuple[Event, ...]
    body: bytes
    path: str = ""  # appended to the backend's base, with query
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()  # fixed and not secret
    subject: str = ""  # for `one_per_subject`
    version: int = 1  # of the encoder that made the bytes
    attempt: int = 1  # which try this is; the one field that delivery changes


@dataclass(slots=True, frozen=True)
class Withheld:
    """Why one event cannot be sent as it is: parked, while the other events of its record go."""

    reason: str
    detail: str = ""  # for the operator: a meter and its value; nothing of a body


@dataclass(slots=True, kw_only=True)
class Encoded:
    """What became of the records offered to `Backend.encode`. Each record is in exactly one place,
    except that one record may have events in several sealed requests, and others withheld."""

    sealed: list[Sealed] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # record id -> reason: no wire event
    parked: dict[str, str] = field(default_factory=dict)  # record id -> reason: cannot be encoded
    withheld: dict[Event, Withheld] = field(default_factory=dict)  # these are not to be sent


class Backend(Protocol):
    """One billing system. `encode` is pure and deterministic; `send` offers a request once."""

    @property
    def name(self) -> str: ...

    @property
    def abilities(self) -> Abilities: ...

    def encode(self, records: Sequence[Record]) -> Encoded:
        """Fix bytes and keys; the same records always give the same answer. Never raises for content."""
        ...

    async def send(self, sealed: Sealed) -> list[Verdict]:
        """Offer it once; one verdict per `sealed.events`, in the same order."""
        ...

    async def aclose(self) -> None: ...


@dataclass(slots=True, frozen=True)
class Applied:
    """How far a backend that adds up has come in one spool: the last batch that is in its sums."""

    first_seq: int
    last_seq: int
    left_out: frozenset[int] = frozenset()  # numbers inside it that are not


@runtime_checkable
class AddsUp(Protocol):
    """A backend that keeps sums beside us: a batch of records goes in at once, known by its numbers alone.

    What must always hold there: the sums of a batch and the note of how far they go are committed together, and what is
    noted already is never added again. One that `keeps_lines` knows each record again by its id instead, and needs no
    note: `applied` is None there.
    """

    @property
    def keeps_lines(self) -> bool:
        """Whether the records themselves go there too: what is added comes with their lines."""
        ...

    def add_up(self, records: Sequence[Record], groups: Sequence[CallGroup] = ()) -> tuple[object, Encoded]:
        """What these records and these groups of calls amount to, and those that stay out of it (`skipped`, `parked`).
        Pure.

        Raises `ArithmeticError` where that cannot be kept exact.
        """
        ...

    def applied(self, instance: str) -> Applied | Verdict | None:
        """How far the sums go in this spool; None: nothing of it is in them. Blocks; where that cannot be told just
        now it is a verdict that says why."""
        ...

    def apply_sums(
        self, instance: str, batch: Applied, sums: Sequence[object], lines: Sequence[tuple[int, bytes]] = ()
    ) -> Verdict:
        """Add what `add_up` made of the records of this batch. `lines`: number and stored line of each, those that
        were left out included, where it `keeps_lines`. Blocks; faults come back as a verdict."""
        ...


@dataclass(slots=True, frozen=True)
class Undone:
    """What became of taking one event back. `left`: what still has it, in words."""

    verdict: Verdict  # Delivered: it counts no more; Duplicate: it had been taken back before
    left: tuple[str, ...] = ()


@runtime_checkable
class Cancels(Protocol):
    """A backend that can take back what it has. What it is asked twice must do no harm."""

    async def cancel(self, event: Event, record: Record | None) -> Undone:
        """Take one event back. `record`: what it was made of, while the spool has it."""
        ...
