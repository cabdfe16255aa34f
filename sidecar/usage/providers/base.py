"""The contract of a reader: what a wire family states as data, and the few questions it answers in code.

A reader is made for one call, is fed by one framing, and keeps facts. It never sees a message cut in two, does no I/O,
and never raises: odd content means "not reported". The order of events, always:

    head(headers)                                   only where `header_names` has some
    can_skip(block) -> no -> message(document, event)    for each message of a stream, until one answers True
    done()                                          a `[DONE]` line among them
    document(document)                              instead of messages, of a plain response
    fill(usage, raw)                                once, at the end, if anything was reported

What is said as data:

    wanted        the members kept of a document or message too large to be parsed whole (see `json_scanner`). Whatever
                  `message`, `document` or `claims` looks at must be in it.
    keep, keep_pattern, skip_after
                  a message with none of the bytes of `keep` and no match of `keep_pattern` is skipped unparsed, once
                  the facts named in `skip_after` are known (`response_id`, say). `keep = None`: nothing is skipped.
                  Most messages of a stream are text and are skipped, so this is what a chunk costs.
                  `keep` is never empty.
    end_signs     bytes without which no message is the stream's end mark; `[DONE]` is among them, and in `keep`, where
                  `done` says that it ends the stream
    claim_signs   bytes without one of which no message can be claimed: they spare everybody's messages a parse
    first_token   what the first generated text looks like on the wire
    header_names  response headers (lower case) that `head` is to be given
    frame_events, skip_frames
                  of Amazon's binary frames: events of this family, and bytes of the heads that say "text"
    arrays_stream an array is a stream of its elements, and not the responses to several prompts

What is noted: `report` takes the vendor's usage object, and later ones overlay earlier ones (M1 to M3); `identify`
takes id and model; `finished` a finish reason; `fail` an error. `seen` says that the response was of this family at
all, `final` that the provider's own end mark for usage was seen (M5).

What is answered: `claims` is asked of every reader, about responses of unknown paths and those that the path's reader
does not recognise (`recognises`), so it must be true of nobody else's. `fill` alone knows what the vendor's numbers
mean: it makes inclusive totals (see `docs/usage-formats.md`, rules O1 to O5); whatever is not reported stays None.

A vendor whose response only names numbers needs none of this: see `declared`. One that speaks OpenAI's shape needs no
reader at all. docs/adding-a-provider.md has the steps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Final

from sidecar.model.exchange import USAGE_FIELDS, Usage, UsageState
from sidecar.usage.values import (
    count,
    error_word,
    keepable,
    name,
    overlay,
    part,
)

DONE: Final = b"[DONE]"  # how most of those that speak OpenAI's way end a stream, whatever their events are
Document = dict[str, Any]
Tree = dict[str, Any]
"""Wanted places: `{"id": True, "choices": [{"finish_reason": True}], "response": {"usage": True}}`."""

CHOICES_MAX = 1_024  # parallel answers of one call whose finish reasons are kept; OpenAI allows 128

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})
_ESCAPED_LETTER = b"\\u00"
_ESCAPED_KEY = re.compile(rb"\\u00[4-7]")


class Reader:
    """The base of all readers, and the one that finds nothing. The contract is the module's text."""

    # Data that a family states.

    wanted: ClassVar[Tree] = {"error": True}
    keep: ClassVar[tuple[bytes, ...] | None] = None
    keep_pattern: ClassVar[re.Pattern[bytes] | None] = None
    skip_after: ClassVar[tuple[str, ...]] = ()
    end_signs: ClassVar[tuple[bytes, ...]] = (DONE,)
    claim_signs: ClassVar[tuple[bytes, ...]] = (b"sage", b"oken")  # usage, message, tokens, Token
    first_token: ClassVar[re.Pattern[bytes] | None] = None
    header_names: ClassVar[tuple[str, ...]] = ()
    frame_events: ClassVar[tuple[str, ...]] = ()
    skip_frames: ClassVar[tuple[bytes, ...]] = ()
    arrays_stream: ClassVar[bool] = False

    # Facts that are noted while reading. Defaults stand on the class: a reader is made for every call, and most of
    # these are never set.

    seen: bool = False  # something of this family's shape was seen
    final: bool = False  # the provider's end mark for usage was seen (M5)
    raw: Document | None = None  # the vendor's usage object, all reports of it overlaid
    model: str | None = None
    response_id: str | None = None
    service_tier: str | None = None
    error: str | None = None
    reason: str | None = None
    provider: str | None = None  # only where the response gives it away
    operation: str | None = None  # only where the response gives it away, and the address does not
    headers: Mapping[str, str] = _NO_HEADERS
    choices: int = 1  # parallel completions that the request asked for; set before the first message

    # What a reader that stands before others (see `reader_choice`) says of itself.

    decided: bool = True  # whether it is known whose response it is
    settled: Reader | None = None  # who is to be asked in this one's place from now on
    counts_anomalies: bool = True  # whether what cannot be read is a loss: not where it may be nobody's

    def __init__(self, anomaly: Callable[[str], None]) -> None:
        self.anomaly = anomaly
        self.finish_reasons: dict[int, str] = {}

    # What a family overrides.

    @classmethod
    def claims(cls, document: Document) -> bool:
        """Whether a document or message of an unknown path is unmistakably of this family."""
        return False

    def recognises(self, document: Document, event: str) -> bool:
        """Whether a document or message is of this family, where the address already says so."""
        return self.claims(document)

    def message(self, document: Document, event: str) -> bool:
        """Take one message of a stream; True when it is the stream's end mark. `event`: its name, or empty."""
        self.document(document)
        return False

    def done(self) -> bool:
        """A `[DONE]` line; True when it ends the stream."""
        return True

    def document(self, document: Document) -> None:
        """Take the one document of a plain response."""

    def fill(self, usage: Usage, raw: Document) -> None:
        """Put the vendor's numbers into our vocabulary; the total is computed by the caller."""

    def head(self, headers: Mapping[str, str]) -> None:
        """Take the response headers named in `header_names`, before any byte of the body."""
        self.headers = headers

    def fill_from_headers(self, usage: Usage) -> bool:
        """Where the body said nothing: the numbers of the response headers. True when there were any."""
        return False

    def frame(self, headers: Mapping[str, str], payload: bytes) -> bool:
        """Take one binary frame (see `aws_eventstream`); True when it is the stream's end mark."""
        return False

    # What few families have a reason to override.

    def can_skip(self, block: bytes) -> bool:
        """Whether these messages, whole and unparsed, can hold nothing of interest. Must not change anything."""
        return self.may_skip and self.nothing_in(block)

    @property
    def may_skip(self) -> bool:
        """Whether messages may be skipped from now on: what each of them repeats is known."""
        return self.keep is not None and all(getattr(self, fact) for fact in self.skip_after)

    def nothing_in(self, block: bytes) -> bool:
        """What `can_skip` says once `may_skip` is true, which it then stays."""
        # Not `in`, which first tries to take the needle for a number (0.3 µs a search); and no loop of ours, since this
        # is done for every chunk of a stream. One pattern of them all takes as long as eight of these searches.
        if max(map(block.find, self.keep or ())) >= 0:
            return False
        pattern = self.keep_pattern
        if pattern is not None and pattern.search(block) is not None:
            return False
        return 92 not in block or not escaped_key(block)

    def can_skip_frame(self, head: bytes) -> bool:
        """Whether a binary frame with these header bytes can hold nothing of interest."""
        return b"exception" not in head and any(sign in head for sign in self.skip_frames)

    def worth_parsing(self, body: bytes) -> bool:
        """Whether a small plain response could be of interest."""
        return True

    # What families use.

    def number(self, raw: Document, key: str) -> int | None:
        """A count, or None; one that is there but is no count is an anomaly (V3) and hurts nothing else (V4)."""
        value = raw.get(key)
        if value is None or (type(value) is int and 0 <= value < 1 << 53):
            return value
        number = count(value)
        if number is None:
            self.anomaly("value_rejected")
        return number

    def report(self, raw: object) -> bool:
        """Note a usage object; later ones overlay earlier ones."""
        if type(raw) is not dict or not raw:
            return False
        self.raw = raw if self.raw is None else overlay(self.raw, raw)
        self.seen = True
        return True

    def identify(self, document: Document, id_key: str = "id", model_key: str = "model") -> None:
        """Note id and model; an empty one never replaces a known one (M4)."""
        if found := name(document.get(id_key)):
            self.response_id = found
        if found := name(document.get(model_key)):
            self.model = found

    def fail(self, error: object) -> bool:
        """Note an error object, if it is one."""
        if not error:
            return False
        self.error = error_word(error)
        return True

    def finished(self, index: object, reason: object) -> bool:
        found = name(reason)
        if found is None:
            return False
        place = index if type(index) is int and index >= 0 else 0
        if place in self.finish_reasons or len(self.finish_reasons) < CHOICES_MAX:
            self.finish_reasons[place] = found
        return True


def escaped_key(block: bytes) -> bool:
    """Whether a member's name may be spelled with escapes (`"\\u0075sage"`), so that no byte search finds it."""
    return _ESCAPED_LETTER in block and _ESCAPED_KEY.search(block) is not None


def build(reader: Reader, *, streamed: bool, ended: bool) -> Usage:
    """The reader's facts as a `Usage`. `ended`: a plain answer was read to its end."""
    usage = Usage(
        usage_state=UsageState.ABSENT,
        streamed=streamed,
        model=reader.model,
        response_id=reader.response_id,
        service_tier=reader.service_tier,
        error=reader.error,
        reason=reader.reason,
    )
    reasons = reader.finish_reasons
    if reasons:
        usage.finish_reasons = list(reasons.values()) if len(reasons) == 1 else [reasons[i] for i in sorted(reasons)]
    raw = reader.raw
    if raw is not None:
        reader.fill(usage, raw)
        if keepable(raw):
            usage.raw_usage = raw
        else:
            reader.anomaly("raw_usage_dropped")
    if raw is None or not known(usage):
        clear(usage)  # a part without its whole is no report
        if not reader.fill_from_headers(usage):
            clear(usage)
            return usage
        ended = ended or not streamed
    usage.usage_state = UsageState.FINAL if reader.final or (ended and not streamed) else UsageState.PARTIAL
    if usage.usage_state is UsageState.PARTIAL and usage.reason is None:
        usage.reason = "the end of the answer was not seen: the numbers are lower bounds"
    if usage.total_tokens is None and usage.input_tokens is not None:
        usage.total_tokens = usage.input_tokens + (usage.output_tokens or 0)
    return usage


_COUNTED = (*(field for field in USAGE_FIELDS if field.endswith("_tokens")), "cost_usd")


def clear(usage: Usage) -> None:
    """Take all numbers back: whoever sums up what was not counted must not find any."""
    for field in _COUNTED:
        setattr(usage, field, None)
    usage.units = {}


def known(usage: Usage) -> bool:
    """Whether anything at all was counted."""
    return (
        usage.input_tokens is not None
        or usage.output_tokens is not None
        or usage.total_tokens is not None
        or bool(usage.units)
        or usage.cost_usd is not None
    )


MODALITIES = ("text", "image", "audio")


def fill_modalities(usage: Usage, direction: str, details: object, *, amount: str = "tokenCount") -> None:
    """Google's lists of `{modality, tokenCount}`; VIDEO and DOCUMENT have no field of their own."""
    if not isinstance(details, Sequence):
        return
    for entry in details:
        entry = part(entry)
        modality = entry.get("modality")
        number = count(entry.get(amount))
        if type(modality) is str and modality.lower() in MODALITIES and number is not None:
            field = f"{modality.lower()}_{direction}_tokens"
            setattr(usage, field, (getattr(usage, field) or 0) + number)  # one entry a piece of the prompt, or a kind
