"""How an answer under a 2xx says no: with an error, with a count of what failed, with fewer than were sent.

Vendors, proxies and collectors word it alike, so the words stand here once for all of them, spelled without case,
`_` and `-`. Two questions: what does it say of each event, where it tells them apart by index or id
(`each_verdict`), and does it say no at all (`says_no`). A number that says more than was sent is another's answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Final

from sidecar.model.delivery import Delivered, Duplicate, Refused, Retry, Sealed, Unknown, Verdict

# Members that are there only when something went wrong; false, 0, empty, "none" and the like are no error.
_ERRORS: Final = frozenset({
    "error", "errors", "errorcode", "errormessage", "errordetails", "exception", "fault", "faults", "failure",
    "failures", "validationerrors", "validationfailed",
})  # fmt: skip
_FAILED: Final = frozenset({
    "failed", "failedcount", "failurecount", "rejected", "rejectedcount", "errorcount", "errorscount", "invalid",
    "invalidcount", "dropped", "discarded", "refused", "unprocessed", "notaccepted",
})  # fmt: skip
_TAKEN: Final = frozenset({
    "accepted", "acceptedcount", "inserted", "ingested", "succeeded", "successful", "successcount", "processed",
    "received", "stored", "written", "saved", "delivered",
})  # fmt: skip
_EXACT: Final = frozenset(
    {"accepted", "acceptedcount", "inserted", "ingested"}
)  # more than was sent is no answer to it
_KNOWN: Final = frozenset({"duplicate", "duplicates", "duplicatecount", "duplicated", "deduplicated", "alreadyexists"})
_FLAGS: Final = frozenset({"success", "ok", "accepted", "succeeded", "successful", "received", "stored", "delivered"})
_STATES: Final = frozenset({"status", "state", "result", "outcome"})
_NUMBERS: Final = frozenset({"status", "statuscode", "code", "httpstatus", "httpstatuscode", "httpcode"})
_INSIDE: Final = frozenset({"data", "result", "results", "response", "body", "summary", "meta", "batch", "report"})
_RESULTS: Final = frozenset({"results", "items", "responses", "records"})
_REFUSALS: Final = frozenset({"errors", "failures", "failed", "rejected", "invalid", "errordetails", "failedrecords"})
_INDEX: Final = frozenset({"index", "i", "idx"})
_IDS: Final = frozenset({
    "id", "eventid", "recordid", "transactionid", "identifier", "idempotencykey", "correlationid", "key",
})  # fmt: skip

INDEX_DIGITS_MAX: Final = 9  # of an event's place in a request; from 4301 on `int` refuses

_NOTHING: Final = frozenset({"", "0", "false", "none", "null", "no", "ok", "success"})
_NO_WORD: Final = re.compile(
    r"\W*(err(or)?|fail(ed|ure)?|denied|invalid|unauthori[sz]ed|forbidden|reject(ed)?|refused|not[ _-]?found|partial"
    r"(ly)?|ko|nok|nack|false|no|exception|timeout|unavailable)\b",
    re.IGNORECASE,
)
_KNOWN_WORD: Final = re.compile(r"(already[_ -]?(exists|there)|duplicate(d)?|deduplicated|exists)", re.IGNORECASE)
_YES_WORD: Final = re.compile(
    r"(ok|success(ful)?|succeeded|accepted|created|queued|delivered|stored|ingested)", re.IGNORECASE
)
_CODE: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


def says_no(said: Any, sent: int) -> str | None:
    """Why an answer to `sent` events is no yes, in one fixed word; None where it does not say no."""
    if isinstance(said, str):
        return "said_error" if _NO_WORD.match(said) else None
    if said is False:
        return "said_no"
    if isinstance(said, list):
        return next((no for row in said if isinstance(row, dict) and (no := _no_of(row, 1)) is not None), None)
    if not isinstance(said, dict):
        return None
    return next((no for part in _parts(said) if (no := _no_of(part, sent)) is not None), None)


def all_known(said: Mapping[str, Any]) -> bool:
    """Whether it says that everything was there before: none taken now, and so many repeats."""
    taken = [number_of(value) for name, value in said.items() if _plain(name) in _TAKEN]
    return repeats_of(said) > 0 and taken != [] and set(taken) == {0}


def repeats_of(said: Mapping[str, Any]) -> int:
    """How many it says were there before."""
    return max((number_of(value) or 0 for name, value in said.items() if _plain(name) in _KNOWN), default=0)


def is_index(name: str) -> bool:
    """Whether the name of a member is an event's place, written as a number."""
    return len(name) <= INDEX_DIGITS_MAX and name.isascii() and name.isdigit()


def number_of(value: Any) -> int | None:
    """A count: a number, or a list of so many."""
    if isinstance(value, list):
        return len(value)
    return value if type(value) is int else None


def each_verdict(said: Any, sealed: Sealed) -> list[Verdict] | None:
    """What it says of each event, where it refuses some of them by index or id; None where it does not."""
    reading = _Reading(sealed)
    if isinstance(said, list):
        return reading.results(said)
    for part in _parts(said) if isinstance(said, dict) else ():
        for name, rows in part.items():
            plain = _plain(name)
            each = reading.results(rows) if plain in _RESULTS and isinstance(rows, list) else None
            if each is None and plain in _REFUSALS:
                each = reading.refusals(rows, part)
            if each is not None:
                return each
    return None


class _Reading:
    """One answer's rows against the events of one request."""

    def __init__(self, sealed: Sealed) -> None:
        self._sealed = sealed
        self._count = len(sealed.events)

    @cached_property
    def _places(self) -> Mapping[str, int]:
        """Event by its id, or by its record's where that has only one. Seldom asked for: most answers name none."""
        events = self._sealed.events
        of_record = Counter(event.record_id for event in events)
        places = {event.record_id: place for place, event in enumerate(events) if of_record[event.record_id] == 1}
        return places | {event.event_id: place for place, event in enumerate(events)}

    def results(self, rows: Sequence[Any]) -> list[Verdict] | None:
        """A row for each event, good and bad, by index, id or order."""
        if len(rows) != self._count or not all(isinstance(row, dict) for row in rows):
            return None
        found: dict[int, Verdict] = {}
        for order, row in enumerate(rows):
            verdict, place = _of_row(row), self._place(row)
            if verdict is None or place is False:
                return None
            found[order if place is None else place] = verdict
        if len(found) != self._count or all(type(verdict) is Delivered for verdict in found.values()):
            return None  # a yes is for the vendor's own form to say
        return [found[place] for place in range(self._count)]

    def refusals(self, rows: Any, part: Mapping[str, Any]) -> list[Verdict] | None:
        """A row for each event that was not taken. The others were, where a count says so."""
        pairs: list[tuple[Any, Any]] = [(row, row) for row in rows] if isinstance(rows, list) else []
        if isinstance(rows, dict):
            pairs = [({"index": int(name)}, row) for name, row in rows.items() if is_index(name)]
            if len(pairs) != len(rows):
                return None
        found: dict[int, Verdict] = {}
        for where, row in pairs:
            place = self._place(where) if isinstance(where, dict) else None
            verdict = (_of_row(row) if isinstance(row, dict) else None) or Refused(_code_of(row) or "rejected")
            if place is None or place is False or type(verdict) is Delivered:
                return None
            found.setdefault(place, verdict)
        if not found:
            return None
        others = self._count - len(found)
        counts = {_plain(name): number_of(value) for name, value in part.items() if type(value) is int}
        taken = next((count for name in (*_TAKEN, "success") if (count := counts.get(name)) is not None), None)
        failed = next((count for name in _FAILED if (count := counts.get(name)) is not None), None)
        sure = taken == others if taken is not None else failed == len(found)
        rest: Verdict = Delivered() if sure else Unknown("said_failed")
        return [found.get(place, rest) for place in range(self._count)]

    def _place(self, row: Mapping[str, Any]) -> int | bool | None:
        """Which event a row is about; None where it does not say, False where it is none of ours."""
        for name, value in row.items():
            plain = _plain(name)
            if plain in _INDEX and type(value) is int:
                return value if 0 <= value < self._count else False
            if plain in _IDS and isinstance(value, str):
                return self._places.get(value, False)
        return None


def _of_row(row: Mapping[str, Any]) -> Verdict | None:
    """What one row says; None where it says nothing that we know."""
    plain = {_plain(name): value for name, value in row.items()}
    inner, code = _inner(plain), _code_of(row)
    words = [value for name in (*_STATES, "code", "error") if isinstance(value := plain.get(name), str)]
    if any(_KNOWN_WORD.fullmatch(word.strip()) for word in [*words, str(inner.get("code", ""))]):
        return Duplicate()
    number = next((n for part in (plain, inner) for name in _NUMBERS if (n := _http_status(part.get(name)))), None)
    if number is not None and number >= 400:
        return Retry(f"http_{number}") if number == 429 or number >= 500 else Refused(code or f"http_{number}")
    if _no_of(row, 1) is not None:
        return Refused(code or "rejected")
    good = number is not None or any(_YES_WORD.fullmatch(word.strip()) for word in words)
    return Delivered() if good or any(plain.get(name) is True for name in _FLAGS) else None


def _inner(plain: Mapping[str, Any]) -> dict[str, Any]:
    error = plain.get("error")
    return {_plain(name): value for name, value in error.items()} if isinstance(error, dict) else {}


def _code_of(row: Any) -> str | None:
    """The vendor's code in a row, if it looks like one: never free text."""
    if not isinstance(row, dict):
        return None
    plain = {_plain(name): value for name, value in row.items()}
    inner = _inner(plain)
    places = (plain.get("code"), inner.get("code"), inner.get("type"), plain.get("error"))
    return next((code for code in places if isinstance(code, str) and _CODE.fullmatch(code)), None)


def _no_of(part: Mapping[str, Any], sent: int) -> str | None:
    """Why one object is no yes."""
    known = repeats_of(part)
    for name, value in part.items():
        plain, count = _plain(name), number_of(value)
        if plain in _ERRORS and not _is_nothing(value):
            return "said_error"
        if plain in _FAILED and value is not False and not _is_nothing(value):
            return "said_failed"
        if plain in _NUMBERS and (_http_status(value) or 0) >= 400:
            return "said_error"
        if plain in _STATES and isinstance(value, str) and _NO_WORD.match(value):
            return "said_failed"
        if plain in _FLAGS and (value is False or (isinstance(value, str) and _NO_WORD.match(value))):
            return "said_no"
        if plain in ("success", "ok") and count is not None and (count == 0 or 1 < count < sent):
            return "said_fewer"
        if plain in _TAKEN and count is not None and count + known < sent:
            return "said_fewer"
        if plain in _EXACT and type(value) is int and value > sent:
            return "counts_differ"
    return None


def _parts(said: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The object itself, and what stands one level inside of it under a name that only wraps."""
    yield said
    for name, value in said.items():
        if isinstance(value, dict) and _plain(name) in _INSIDE:
            yield value


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _is_nothing(value: Any) -> bool:
    return not value or (isinstance(value, str) and value.strip().lower() in _NOTHING)


def _http_status(value: Any) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) == 3:
        value = int(value)
    return value if type(value) is int and 100 <= value <= 599 else None
