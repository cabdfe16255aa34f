"""What counts as delivered: for each interface the answer in which its vendor says "I have it", as one table.

What must always hold: `Delivered` needs the vendor's own yes, whole and in the vendor's form. HTML is nobody's answer
(a login page, a proxy's apology) and blocks; so does what has another form than the vendor's, and that may have been
taken all the same. Where an answer in the right form says no, an event that it names has that verdict, and for all
others nothing is known. What a contract leaves open stands in the table with `unverified` beside it, and is read
leniently: members that are not in the table are never looked at, but for the words that say no.

The table is printed in `docs/backends.md` (`python tests/readme_tables.py`). All of this is pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Protocol

import orjson

from sidecar.backends import denials
from sidecar.model.delivery import Blocked, Delivered, Duplicate, Sealed, Unknown, Verdict


class Answer(Protocol):
    """What came back, as far as a yes is looked for in it (`http.Answer`)."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    @property
    def body(self) -> bytes: ...

    @property
    def cut(self) -> str | None:
        """Why the body is not whole."""
        ...


UNEXPECTED: Final = "unexpected_answer"


class Body(StrEnum):
    """What the answer's body has to be, where there is one."""

    OBJECT = "a JSON object"
    ANY = "any but HTML"


@dataclass(frozen=True, slots=True, kw_only=True)
class Yes:
    """The positive answer of one interface. Names of members are the vendor's own."""

    contract: str  # in the contract's own words
    statuses: frozenset[int]
    empty: frozenset[int] = frozenset()  # the statuses that need no body
    body: Body = Body.OBJECT
    one_of: tuple[str, ...] = ()  # at least one of these members is there
    says: Mapping[str, frozenset[str]] = field(default_factory=dict)  # member, where there -> its words
    own: tuple[str, ...] = ()  # where there: our key, or the id of our event
    counts: tuple[str, ...] = ()  # where there: as many as were sent
    echoes: tuple[str, str] | None = None  # a list with one entry for each event, and the id in each entry
    duplicate: tuple[str, str] | None = None  # member and word that mean: it was there before
    repeats: str = "the same answer"  # what a repeat is answered with, for the page
    unverified: str = ""  # what of this row no primary source says


def _status(*numbers: int) -> frozenset[int]:
    return frozenset(numbers)


_MADE: Final = _status(200, 201, 202)  # the form decides; which of these a vendor uses has changed before

ANSWERS: Final[Mapping[str, Yes]] = {
    "meter": Yes(
        contract='ours: an empty 2xx, or an object; `{"accepted": n}` with n as sent',
        statuses=_MADE | {204},
        empty=_MADE | {204},
        counts=("accepted",),
        repeats="the first answer again; other bytes under the key: 409 or 422",
    ),
    "revenium v1 /meter": Yes(
        contract="200, the body an empty object (“Unit”)",
        statuses=_MADE,
        repeats="counted again",
        unverified="201 and 202; members in the object",
    ),
    "revenium v1 /event, /meter/rate, /meter/ingest": Yes(
        contract="201 for `/event`, “200: successful” for the others",
        statuses=_MADE,
        empty=_MADE | {204},
        repeats="counted again",
        unverified="any body: an object or nothing is taken",
    ),
    "revenium v2": Yes(
        contract="2xx with the resource: `id`, `label`, `resourceType` “metering”, `signature`",
        statuses=_MADE,
        one_of=("id", "label", "resourceType", "signature"),
        says={"resourceType": frozenset({"metering"})},
        repeats="the first answer again; other bytes under the key: 409 `idempotency_key_mismatch`",
        unverified="which 2xx; which of the members are always there: one is enough",
    ),
    "ledgerbee": Yes(
        contract='202 `{"status": "queued", "requestId": …}`',
        statuses=_MADE,
        one_of=("status",),
        says={"status": frozenset({"queued", "duplicate"})},
        own=("idempotencyKey",),
        duplicate=("status", "duplicate"),
        repeats='200 `{"status": "duplicate", "idempotencyKey": …}`, which must be ours',
        unverified="`queued` with a 200",
    ),
    "stripe v1": Yes(
        contract="200 with the event: `object` “billing.meter_event”, `identifier`",
        statuses=_MADE,
        one_of=("object", "identifier"),
        says={"object": frozenset({"billing.meter_event"})},
        own=("identifier",),
        repeats="400 “An event already exists with identifier …”",
        unverified="the repeat's wording (seen in the field): another id than ours in it is no repeat of ours",
    ),
    "stripe v2": Yes(
        contract="200 with the event: `object` “v2.billing.meter_event”, `identifier`",
        statuses=_MADE,
        one_of=("object", "identifier"),
        says={"object": frozenset({"v2.billing.meter_event"})},
        own=("identifier",),
        repeats="400 `duplicate_meter_event`, or as v1",
        unverified="the repeat's code",
    ),
    "stripe stream": Yes(
        contract="200 `{}`, no result for a single event",
        statuses=_MADE,
        repeats="the same answer",
        unverified="how a repeat inside a batch is answered",
    ),
    "stripe adjustments": Yes(
        contract="200 with the adjustment: `object` “billing.meter_event_adjustment”",
        statuses=_MADE,
        one_of=("object", "cancel", "id"),
        says={"object": frozenset({"billing.meter_event_adjustment", "v2.billing.meter_event_adjustment"})},
        repeats="the same answer",
    ),
    "flexprice": Yes(
        contract='202 `{"message": …}`',
        statuses=_MADE,
        one_of=("message", "event_id", "event_ids"),
        counts=("event_ids",),
        repeats="the same answer",
        unverified="`event_ids` (in the documents, not in the server): where it is there, as many as sent",
    ),
    "openmeter": Yes(
        contract="204 without a body; 202 at v3",
        statuses=_status(202, 204),
        empty=_status(202, 204),
        repeats="the same answer",
        unverified="a body with the 202: nothing or an object is taken",
    ),
    "lago": Yes(
        contract='200 with the created events: `{"events": [{"transaction_id": …}, …]}`',
        statuses=_MADE,
        one_of=("events",),
        echoes=("events", "transaction_id"),
        repeats="422 `value_already_exist` on `transaction_id`, by index",
        unverified="`transaction_id` in each entry: without it their number counts",
    ),
    "webhook": Yes(
        contract="Standard Webhooks: a 2xx; a body is not part of it",
        statuses=_MADE | {204},
        empty=_MADE | {204},
        body=Body.ANY,
        repeats="the same answer, where the receiver remembers `webhook-id`",
    ),
}


def said_yes(answer: Answer, sealed: Sealed, yes: Yes) -> Verdict | list[Verdict]:
    """What a 2xx says of a request: one verdict for all its events, or one for each."""
    text = answer.body.removeprefix(b"\xef\xbb\xbf").strip()
    if _is_html(answer.headers.get("content-type", ""), text):
        return Blocked(UNEXPECTED)
    if answer.cut is not None:
        begins = not text or text[:1] == b"{" or yes.body is Body.ANY
        return Unknown(answer.cut) if begins else _FOREIGN
    if not text:
        at_all = answer.status in yes.statuses
        return Delivered() if answer.status in yes.empty else Unknown("empty_answer" if at_all else _http(answer))
    said, problem = _read(text, sealed, yes)
    if problem is not None:
        return problem
    if answer.status not in yes.statuses:
        return Unknown(_http(answer))  # its form is right; a proxy that changed it says so with 203
    if not isinstance(said, dict):
        return Delivered()
    return Duplicate() if _is_duplicate(said, yes) else _echoed(said, sealed, yes)


def _read(text: bytes, sealed: Sealed, yes: Yes) -> tuple[Any, Verdict | list[Verdict] | None]:
    """A body that is there: what it says, and why that is no yes."""
    try:
        said = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None, _no_json(text, yes)
    each = denials.each_verdict(said, sealed)
    if each is not None:
        return said, each
    no = denials.says_no(said, len(sealed.events))
    return said, Unknown(no) if no is not None else _misfit(said, sealed, yes)


_FOREIGN: Final = Blocked(UNEXPECTED, maybe_taken=True)
_HTML: Final = re.compile(
    rb"<(!--|(!doctype\s+html|html|head|body|title|script|meta|link|style|center|h[1-6]|div|p|br|form|iframe|pre|b)\b)",
    re.IGNORECASE,
)
_TAG: Final = re.compile(rb"<[a-z!/]", re.IGNORECASE)
_LOOKED_BYTES: Final = 2048


def _is_html(content_type: str, text: bytes) -> bool:
    """By the body: many a server calls plain text and JSON `text/html`, and a login page may have no type at all."""
    if text[:1] in (b"{", b"["):
        return False
    if "html" in content_type.lower():
        return _TAG.search(text[:_LOOKED_BYTES]) is not None
    return _HTML.match(text) is not None


def _http(answer: Answer) -> str:
    return f"http_{answer.status}"


def _no_json(text: bytes, yes: Yes) -> Verdict | None:
    """A body that is no JSON: a broken object, a word at a webhook, or something else altogether."""
    if text[:1] == b"{" or (text[:1] == b"[" and yes.body is Body.ANY):
        return Unknown("cut_answer")
    if yes.body is Body.OBJECT:
        return _FOREIGN
    try:
        words = text.decode()
    except UnicodeDecodeError:
        return _FOREIGN  # compressed, and not said so
    no = denials.says_no(words, 1)
    return None if no is None else Unknown(no)


def _misfit(said: Any, sealed: Sealed, yes: Yes) -> Verdict | None:
    """How an answer that does not say no differs from the vendor's yes; None where it does not."""
    if not isinstance(said, dict):
        return _FOREIGN if yes.body is Body.OBJECT else None
    if yes.one_of and all(said.get(name) is None for name in yes.one_of):
        return _FOREIGN
    for name, words in yes.says.items():
        value = said.get(name)
        if value is not None and str(value).lower() not in words:
            return _FOREIGN
    named = [said[name] for name in yes.own if isinstance(said.get(name), str)]
    if named and not {sealed.key, *(event.event_id for event in sealed.events)}.issuperset(named):
        return Unknown("others_answer")
    count = len(sealed.events)
    as_sent = (None, count, count - denials.repeats_of(said))
    if any(denials.number_of(said.get(name)) not in as_sent for name in yes.counts):
        return Unknown("counts_differ")
    if yes.echoes is not None and not isinstance(said.get(yes.echoes[0]), list):
        return _FOREIGN
    return None


def _is_duplicate(said: Mapping[str, Any], yes: Yes) -> bool:
    if yes.duplicate is not None:
        name, word = yes.duplicate
        return str(said.get(name)).lower() == word
    return denials.all_known(said)


def _echoed(said: Mapping[str, Any], sealed: Sealed, yes: Yes) -> Verdict | list[Verdict]:
    """Where the vendor gives back what it took: an event that is not among it may or may not be there."""
    if yes.echoes is None:
        return Delivered()
    name, member = yes.echoes
    rows = said[name]
    found = [row.get(member) if isinstance(row, dict) else None for row in rows]
    ours = {event.event_id for event in sealed.events}
    if any(isinstance(one, str) and one not in ours for one in found):
        return Unknown("others_answer")
    if rows and all(isinstance(one, str) for one in found):
        there = set(found)
        return [Delivered() if event.event_id in there else Unknown("said_fewer") for event in sealed.events]
    if len(rows) != len(sealed.events):
        return Unknown("said_fewer" if len(rows) < len(sealed.events) else "counts_differ")
    return Delivered()


def table() -> str:
    """The table as `docs/backends.md` has it."""
    rows = [
        "| | its yes | status | body | a repeat gets | not verified, so read leniently |",
        "|---|---|---|---|---|---|",
    ]
    for name, yes in ANSWERS.items():
        rows.append(
            f"| `{name}` | {yes.contract} | {_numbers(yes.statuses)} | {_form(yes)} | {yes.repeats}"
            f" | {yes.unverified or '–'} |"
        )
    return "\n".join(rows)


def _numbers(statuses: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(statuses)))


def _form(yes: Yes) -> str:
    parts = [str(yes.body)]
    if yes.one_of:
        parts.append("with " + " or ".join(f"`{name}`" for name in yes.one_of))
    parts += [f"`{name}` {' or '.join(sorted(words))}" for name, words in yes.says.items()]
    parts += [f"`{name}` ours" for name in yes.own]
    parts += [f"`{name}` as many as sent" for name in yes.counts]
    if yes.echoes is not None:
        parts.append(f"each event in `{yes.echoes[0]}`, by `{yes.echoes[1]}`")
    if yes.empty:
        parts.append("or none" if yes.empty >= yes.statuses else f"or none with {_numbers(yes.empty)}")
    return ", ".join(parts)
