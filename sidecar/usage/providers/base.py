"""What every reader of a wire family shares: the facts seen so far, and how they become a `Usage`.

A reader is made for one call. It is handed parsed messages (of a stream) or one document (of a plain answer) and
notes where the answer says what it used. It never sees bytes that its `dull` has waved through, and never more of a
large document than its `wanted` places. Counting is left to `fill`: what stands in the vendor's own object becomes
inclusive totals in our vocabulary there, once, at the end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from sidecar.model.exchange import USAGE_FIELDS, Usage, UsageState
from sidecar.usage.formats.json_scanner import Tree
from sidecar.usage.values import (
    count,
    error_word,
    keepable,
    name,
    overlay,
    part,
)

Document = dict[str, Any]

CHOICES_MAX = 1_024  # parallel answers of one call whose finish reasons are kept; OpenAI allows 128

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})
_ESCAPED_LETTER = b"\\u00"
_ESCAPED_KEY = re.compile(rb"\\u00[4-7]")


class Reader:
    """The base of all readers; also the one that finds nothing."""

    wanted: ClassVar[Tree] = {"error": True}
    """What is kept of a document too large to be parsed."""
    end_signs: ClassVar[tuple[bytes, ...]] = ()
    """Bytes without which no message can be the stream's end mark."""
    first_token: ClassVar[re.Pattern[bytes] | None] = None
    """What the first generated text looks like on the wire, for the time to the first token."""
    claim_signs: ClassVar[tuple[bytes, ...]] = (b"sage", b"oken")
    """Bytes without one of which no message can be claimed: usage, message, tokens, Token."""
    frame_events: ClassVar[tuple[str, ...]] = ()
    """The events of Amazon's binary frames that are of this family."""
    arrays_stream: ClassVar[bool] = False
    """Whether an array is a stream of its elements, and not the answers to several prompts."""
    counts_each: ClassVar[bool] = False
    """Every message counts for itself, so none may be passed over for its cost; else the last ones say it all."""
    header_names: ClassVar[tuple[str, ...]] = ()
    """Response headers (lower case) that this reader wants to see."""

    # Defaults stand on the class: a reader is made for every call, and most of these are never set.
    decided: bool = True  # whether it is known whose answer it is
    settled: Reader | None = None  # who is to be asked in this one's place from now on (see `choosing`)
    concerned: bool = True  # whether what cannot be read is a loss: not where it may be nobody's
    seen: bool = False  # something of this family's shape was seen
    final: bool = False  # the provider's end mark for usage was seen (M5)
    raw: Document | None = None
    model: str | None = None
    response_id: str | None = None
    service_tier: str | None = None
    error: str | None = None
    reason: str | None = None
    provider: str | None = None  # only where the answer gives it away
    operation: str | None = None  # only where the answer gives it away, and the address does not
    headers: Mapping[str, str] = _NO_HEADERS

    def __init__(self, anomaly: Callable[[str], None]) -> None:
        self.anomaly = anomaly
        self.finish_reasons: dict[int, str] = {}

    # What a reader that stands before another one overrides.

    def places(self) -> Tree:
        return self.wanted

    def signs(self) -> tuple[bytes, ...]:
        return self.end_signs

    def proven(self) -> bool:
        """Whether the provider's end mark for usage was seen."""
        return self.final

    def restore(self, final: bool) -> None:
        """The last message was cut off: what it proved does not count."""
        self.final = final

    def may_hold(self, body: bytes) -> bool:
        """Whether a small plain answer is worth parsing."""
        return True

    # What a family overrides.

    def head(self, headers: Mapping[str, str]) -> None:
        """Take the response headers named in `header_names`, before any byte of the body."""
        self.headers = headers

    @classmethod
    def claims(cls, document: Document) -> bool:
        """Whether a document or message of an unknown path is unmistakably of this family."""
        return False

    def recognises(self, document: Document, event: str) -> bool:
        """Whether a document or message is of this family, where the address already says so."""
        return self.claims(document)

    def dull_frame(self, head: bytes) -> bool:
        """Whether a binary frame with these header bytes can hold nothing of interest."""
        return False

    def frame(self, headers: Mapping[str, str], payload: bytes) -> bool:
        """Take one binary frame; True when it is the stream's end mark."""
        return False

    def dull(self, block: bytes) -> bool:
        """Whether these messages, whole and unparsed, can hold nothing of interest."""
        return False

    def message(self, document: Document, event: str) -> bool:
        """Take one message of a stream; True when it is the stream's end mark."""
        self.document(document)
        return False

    def expect(self, choices: int) -> None:
        """How many parallel answers the request asked for."""

    def done(self) -> bool:
        """A `[DONE]` line; True when it ends the stream."""
        return True

    def document(self, document: Document) -> None:
        """Take the one document of a plain answer."""

    def fill(self, usage: Usage, raw: Document) -> None:
        """Put the vendor's numbers into our vocabulary; the total is computed by the caller."""

    def fill_from_headers(self, usage: Usage) -> bool:
        """Where the body said nothing: the numbers of the response headers. True when there were any."""
        return False

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
