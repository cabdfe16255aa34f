"""What of a response that comes in pieces is kept, so that its usage can be read once it is over, and elsewhere.

A document is kept whole. Of a stream, nearly all events are text, which no reader wants to see. Where the path's own
family answers, as its first events show, the others are told apart by the same search that spares the taps, and what is
left is a few events: `whole.Plan.read` gives out of them what the taps give out of all. Where anything is unusual, the
taps are to read along after all, and are told first what was kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import orjson

from sidecar.usage import RawHeaders, ResponseTap, Taps
from sidecar.usage.formats.content_encoding import is_one_step
from sidecar.usage.formats.event_stream import SKIPPED_BYTES_MAX, ServerSentEvents
from sidecar.usage.formats.likeness import looked_at
from sidecar.usage.providers.base import Reader
from sidecar.usage.readers import UsageTaps
from sidecar.usage.response_reader import ResponseReader
from sidecar.usage.whole import ReaderFailedError, event_of, prepare

END_MARK: Final = b"[DONE]"
SEPARATOR: Final = ServerSentEvents.separator
EVENTS_FIRST_MAX: Final = 4  # in which it has to show whose response it is, and its first text to come


def _ignore(kind: str) -> None:
    """Whoever reads what is kept counts what is odd in it."""


class Keeping:
    """For responses of one shape; holds no state of a call. Pieces are whole events: each ends with `end`. What is
    asked of it may raise, and then the response is to be read along: `ValueError` for what is sent, anything else where
    a reader has a fault."""

    __slots__ = ("_end_signs", "_family", "_first_token", "clock_ns", "end", "looked_at", "nothing_in")

    def __init__(self, family: type[Reader], first_token: re.Pattern[bytes], clock_ns: Callable[[], int]) -> None:
        """`clock_ns`: of the time at which text came first."""
        self._family = family
        self._first_token = first_token
        self._end_signs = family.end_signs
        # Whether a short piece, or the chunk around it, need not be kept; to be asked once it `is_known` whose it is.
        self.nothing_in: Callable[[bytes], bool] = family(_ignore).nothing_in
        self.looked_at = looked_at(family)  # names of the members that matter
        self.clock_ns = clock_ns
        self.end = SEPARATOR

    def may_skip(self, piece: bytes) -> bool:
        """As `nothing_in`, of a piece of any size."""
        return len(piece) <= SKIPPED_BYTES_MAX and self.nothing_in(piece)

    def holds_text(self, piece: bytes) -> bool:
        """Whether the first text of a response is in it."""
        return self._first_token.search(piece) is not None

    def ends(self, piece: bytes) -> bool:
        """Whether the stream's own end mark is in it."""
        if not any(sign in piece for sign in self._end_signs):
            return False
        reader = self._family(_ignore)
        for message in piece.split(SEPARATOR)[:-1]:
            event, data = event_of(message)
            if data is None:
                raise ValueError("an event of another form")
            if data.strip() == END_MARK:
                if reader.done():
                    return True
                continue
            if reader.message(orjson.loads(data), event):
                return True
        return False

    def begins(self, piece: bytes) -> bool:
        """Whether the first piece is of the family that the path names. Of another one's stream the end mark would not
        be seen, and text might never be."""
        event, data = event_of(piece.partition(SEPARATOR)[0])
        document = None if data is None or data.strip() == END_MARK else orjson.loads(data)
        return type(document) is dict and self._family(_ignore).recognises(document, event)

    def is_known(self, kept: Sequence[bytes]) -> bool:
        """Whether these first pieces show that the others will be as expected. False: it is to be read along."""
        messages = b"".join(kept).split(SEPARATOR)[:-1]
        if not 0 < len(messages) <= EVENTS_FIRST_MAX:
            return False
        reader = self._family(_ignore)
        for message in messages:
            event, data = event_of(message)
            document = None if data is None or data.strip() == END_MARK else orjson.loads(data)
            if type(document) is not dict or not reader.recognises(document, event):
                return False
            if reader.message(document, event) or reader.error is not None:
                return False
        return reader.may_skip

    def read_along(self, tap: ResponseTap, kept: Sequence[bytes], first_token_ns: int) -> None:
        """Tell a new tap what came so far. `first_token_ns`: when text came first; 0: none has come."""
        for piece in kept:
            tap.feed(piece)
        if first_token_ns and isinstance(tap, ResponseReader):
            tap.first_token_at(first_token_ns)


class DocumentKeeping:
    """For responses of one shape that are one document of JSON: all of it is kept, as it came. One that is coded may be
    a thousand times as large: it is read later only where that takes one step, and else along, step by step."""

    __slots__ = ("_coded",)

    def __init__(self, *, coded: bool) -> None:
        self._coded = coded

    def begins(self, piece: bytes) -> bool:
        """Whether the document may begin so. Else it may be a stream under a wrong name, whose first token is timed."""
        return self._coded or piece[:1] == b"{"

    def may_wait(self, pieces: Sequence[bytes]) -> bool:
        """Whether all of it may be read later, at once."""
        return not self._coded or is_one_step(b"".join(pieces))

    def read_along(self, tap: ResponseTap, kept: Sequence[bytes], first_token_ns: int) -> None:
        """As `Keeping.read_along`."""
        for piece in kept:
            tap.feed(piece)


def keeping(
    taps: Taps, method: str, target: str, request_headers: RawHeaders, status: int, response_headers: RawHeaders
) -> Keeping | DocumentKeeping | None:
    """For responses with such heads that come in pieces, whatever the values of fields that are another one in each
    call; None where they are to be read along. Never raises."""
    if type(taps) is not UsageTaps:
        return None
    plan = None
    with suppress(ReaderFailedError):
        plan = prepare(taps, method, target, request_headers, status, response_headers)
    if plan is None:
        return None
    if plan.is_document:
        return DocumentKeeping(coded=plan.coded)
    family = plan.lean if plan.streams and not plan.coded else None
    if taps.estimate or family is None or family.first_token is None or family.can_skip is not Reader.can_skip:
        return None
    return Keeping(family, family.first_token, taps.clock_ns)
