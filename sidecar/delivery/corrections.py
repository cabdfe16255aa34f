"""What an operator learns after the fact: a call that shall not be billed, an event that was taken and not billed.

`cancel` takes delivered events back where their backend can and passes their records over; parked ones, which nobody
has, it merely passes over. `complain` takes a backend's late report: what it names was never billed, so it is parked
under the reason `complained:<code>`, to be seen, mended and redriven like any other refusal. Both keep the balance: an
event leaves `delivered` for `skipped` or `parked` in one transaction.

The backend is asked before the books are changed. A crash in between leaves the books as they were, and asking again
does no harm, because whoever `Cancels` recognises it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from sidecar.delivery.queries import PAGE, Found
from sidecar.delivery.rows import Amendment, Member, Parked, Redrive
from sidecar.delivery.store import DeliveryStore
from sidecar.delivery.types import Metrics, Now, Parking, SpoolReader
from sidecar.model.delivery import Backend, Cancels, Delivered, Duplicate, Event, Verdict
from sidecar.model.record import Record

CANCELLED: Final = "cancelled"  # skipped: an operator took it back
COMPLAINED: Final = "complained"  # parked: taken, and reported later as not billed
_CODE: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")  # a code becomes a metric's label
GONE: Final = frozenset({"parked", "moved"})  # listed, or carried on, elsewhere


class Files(Protocol):
    """What is needed of delivery, at work or not."""

    @property
    def reader(self) -> SpoolReader: ...
    @property
    def store(self) -> DeliveryStore: ...
    @property
    def metrics(self) -> Metrics: ...
    def now(self) -> Now: ...
    def find(self, one: str) -> list[Found]: ...
    def parked(self, *, backend: str | None, ids: Sequence[str] | None, after: int, limit: int) -> list[Parked]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one event. `done`: it is as was asked for."""

    backend: str
    event_id: str
    done: bool
    text: str


@dataclass(frozen=True, slots=True)
class Named:
    """An event that a backend names in a report, and the code that it gives."""

    event_id: str
    code: str


async def cancel(
    one: str, files: Files, backends: Mapping[str, Backend], *, backend: str | None = None
) -> list[Outcome]:
    """Take back what was made of a record or event; nothing is known of it when the answer is empty."""
    outcomes = []
    for found in await _found(one, files, backend):
        if found.fate == "open":
            outcomes.append(_not(found, "is not delivered yet: cancel it when it is"))
        elif found.fate not in GONE:
            outcomes.append(await _take_back(found, files, backends))
    outcomes += [await _pass_over(row, files, backends) for row in await _parked(one, files, backend)]
    return sorted(outcomes, key=lambda outcome: (outcome.backend, outcome.event_id))


async def complain(
    backend: str, named: Sequence[Named], files: Files, backends: Mapping[str, Backend]
) -> list[Outcome]:
    """Park what a backend says it did not bill after all; an outcome for each that it names."""
    return [await _complained(one, files, backends.get(backend), backend) for one in named]


async def _take_back(found: Found, files: Files, backends: Mapping[str, Backend]) -> Outcome:
    line = await asyncio.to_thread(_line_of, files.reader, found.instance, found.seq)
    done, text = await _ask(Event(found.record_id, found.event_id), found.backend, line, backends)
    if not done:
        return _not(found, text)
    amendment = Amendment(request=found.request, cursor=found.cursor, member=_member(found), skip=CANCELLED)
    if not await _amend(amendment, files):
        return _not(found, f"{text}, but its place has changed meanwhile: run it again")
    files.metrics.skipped(found.backend, CANCELLED, 1)
    return Outcome(backend=found.backend, event_id=found.event_id, done=True, text=text)


async def _pass_over(row: Parked, files: Files, backends: Mapping[str, Backend]) -> Outcome:
    """Nobody has a parked event, unless it may have been taken: then it is taken back first."""
    done, text = True, "was parked, and is passed over now"
    if row.maybe_taken:
        done, text = await _ask(Event(row.record_id, row.event_id), row.backend, row.line, backends)
    if done:
        step = Redrive(cursor=row.cursor, parked=[row], requests=[], skipped={row.seq: CANCELLED})
        await files.store.run(files.store.redrive, step, files.now().wall_s)
        files.metrics.skipped(row.backend, CANCELLED, 1)
    return Outcome(backend=row.backend, event_id=row.event_id, done=done, text=text)


async def _ask(event: Event, name: str, line: bytes | None, backends: Mapping[str, Backend]) -> tuple[bool, str]:
    backend = backends.get(name)
    if backend is None:
        return False, f"{name} is not configured: set SIDECAR_BACKENDS with it"
    if not isinstance(backend, Cancels):
        return False, f"{name} cannot take back what it has: correct it there"
    undone = await backend.cancel(event, _record(line))
    if not isinstance(undone.verdict, (Delivered, Duplicate)):
        return False, f"{name} did not take it back ({_reason(undone.verdict)})"
    return True, "; ".join(["taken back", *undone.left])


async def _complained(one: Named, files: Files, backend: Backend | None, name: str) -> Outcome:
    reason = f"{COMPLAINED}:{one.code if _CODE.fullmatch(one.code) else 'other'}"
    found = [each for each in await _found(one.event_id, files, name) if each.event_id == one.event_id]
    known = [each for each in found if each.fate not in GONE]
    if not known:
        text = "is parked already" if found else "is not remembered: it was never sent, or is older than the retention"
        return Outcome(backend=name, event_id=one.event_id, done=bool(found), text=text)
    last = known[-1]
    if last.fate == "open":
        return _not(last, "is not settled yet: complain again when it is")
    line = await asyncio.to_thread(_line_of, files.reader, last.instance, last.seq)
    if line is None:
        return _not(last, "cannot be read in the spool any more: bill it by hand")
    amendment = Amendment(
        request=last.request,
        cursor=last.cursor,
        member=_member(last),
        parking=Parking(reason),
        line=line,
        note=f"reported as {one.code}",
    )
    if not await _amend(amendment, files):
        return _not(last, "has changed its place meanwhile: run it again")
    files.metrics.parked(name, reason, 1)
    return Outcome(backend=name, event_id=one.event_id, done=True, text=f"parked as {reason}")


async def _found(one: str, files: Files, backend: str | None) -> list[Found]:
    return [found for found in await asyncio.to_thread(files.find, one) if backend in (None, found.backend)]


async def _parked(one: str, files: Files, backend: str | None) -> list[Parked]:
    rows: list[Parked] = []
    after = 0
    while True:
        page = await asyncio.to_thread(files.parked, backend=backend, ids=[one], after=after, limit=PAGE)
        rows += page
        if len(page) < PAGE:
            return rows
        after = page[-1].id


async def _amend(amendment: Amendment, files: Files) -> bool:
    return await files.store.run(files.store.amend, amendment, files.now().wall_s)


def _line_of(reader: SpoolReader, instance: str, seq: int) -> bytes | None:
    """The stored record, while the spool has it."""
    for group in reader.read(instance, seq - 1, bytes_max=1):
        if group.first_seq <= seq < group.first_seq + len(group.lines):
            return group.lines[seq - group.first_seq]
    return None


def _record(line: bytes | None) -> Record | None:
    try:
        return None if line is None else Record.from_json(line)
    except ValueError:
        return None


def _member(found: Found) -> Member:
    return Member(found.seq, found.record_id, found.event_id)


def _not(found: Found, text: str) -> Outcome:
    return Outcome(backend=found.backend, event_id=found.event_id, done=False, text=text)


def _reason(verdict: Verdict) -> str:
    return getattr(verdict, "reason", type(verdict).__name__.lower())
