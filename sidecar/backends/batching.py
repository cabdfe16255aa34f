"""How events become requests: the key that says which they are, and the cut within both limits.

A key is made from all members of its request, so that the same events always travel under the same key, and
others never under it. All of it is pure: the same records give the same bytes and keys, whoever asks and
whenever. What an event looks like is its backend's affair.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from sidecar.backends.base import Policy
from sidecar.model.delivery import Abilities, Encoded, Event, Sealed, Withheld
from sidecar.model.record import Record

KEY_CHARS_MAX: Final = 90  # of the 100 that every backend takes: the rest is for `.0` of a split, `~n` of a redrive
NDJSON: Final = "application/x-ndjson"

_PLAIN_KEY: Final = re.compile(rf"[!-~]{{1,{KEY_CHARS_MAX}}}")


def event_key(event_id: str) -> str:
    """A request key from one event's id. Ids are ours and plain; anything else is replaced by its digest."""
    return event_id if _PLAIN_KEY.fullmatch(event_id) else f"h-{_digest((event_id,), 32)}"


def batch_key(events: Sequence[Event]) -> str:
    """A request key from all its members: first id, their number, and a digest of every id in order."""
    first = events[0].event_id
    head = first if re.fullmatch(r"[!-~]{1,40}", first) else _digest((first,), 16)
    return f"{head}-{len(events)}-{_digest((e.event_id for e in events), 16)}"


class Piece(NamedTuple):
    """One event and its bytes, before requests are cut."""

    event: Event
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """How pieces become a body: what stands before, between and behind them."""

    opening: bytes = b""
    between: bytes = b""
    closing: bytes = b""

    def body(self, pieces: Sequence[Piece]) -> bytes:
        return self.opening + self.between.join(piece.data for piece in pieces) + self.closing

    def size(self, data_bytes: int, count: int) -> int:
        return len(self.opening) + data_bytes + len(self.between) * max(count - 1, 0) + len(self.closing)


JSON_ARRAY: Final = Frame(opening=b"[", between=b",", closing=b"]")
JSON_EVENTS: Final = Frame(opening=b'{"events":[', between=b",", closing=b"]}")
LINES: Final = Frame(between=b"\n", closing=b"\n")


def seal_batches(
    pieces: Iterable[Piece],
    encoded: Encoded,
    *,
    frame: Frame,
    events_max: int,
    bytes_max: int | None,
    path: str = "",
    content_type: str = "application/json",
    headers: tuple[tuple[str, str], ...] = (),
) -> Encoded:
    """Cut pieces into requests within both limits, in order. A piece too large by itself is parked alone."""
    for batch in _cut(_fitting(pieces, encoded, frame, bytes_max), frame, events_max, bytes_max):
        events = tuple(piece.event for piece in batch)
        encoded.sealed.append(
            Sealed(
                key=batch_key(events),
                events=events,
                body=frame.body(batch),
                path=path,
                content_type=content_type,
                headers=headers,
            )
        )
    return encoded


def seal_lines(records: Iterable[Record], policy: Policy, abilities: Abilities) -> Encoded:
    """The records themselves, one a line: their stored bytes, never made anew."""
    encoded = Encoded()
    return seal_batches(
        (Piece(Event(record.id, record.id), record.json) for record in records if policy.place(record, encoded)),
        encoded,
        frame=LINES,
        events_max=abilities.events_max,
        bytes_max=abilities.bytes_max,
        content_type=NDJSON,
    )


def _fitting(pieces: Iterable[Piece], encoded: Encoded, frame: Frame, bytes_max: int | None) -> Iterator[Piece]:
    for piece in pieces:
        if bytes_max is not None and frame.size(len(piece.data), 1) > bytes_max:
            if piece.event.event_id == piece.event.record_id:
                encoded.parked[piece.event.record_id] = "too_large"
            else:
                encoded.withheld[piece.event] = Withheld("too_large", f"{len(piece.data)} bytes")
        else:
            yield piece


def _cut(pieces: Iterable[Piece], frame: Frame, events_max: int, bytes_max: int | None) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        over = bytes_max is not None and frame.size(size + len(piece.data), len(batch) + 1) > bytes_max
        if batch and (len(batch) >= events_max or over):
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += len(piece.data)
    if batch:
        yield batch


def _digest(ids: Iterable[str], chars: int) -> str:
    whole = hashlib.sha256()
    for one in ids:
        data = one.encode("utf-8", "replace")
        whole.update(len(data).to_bytes(4, "big") + data)
    return whole.hexdigest()[:chars]
