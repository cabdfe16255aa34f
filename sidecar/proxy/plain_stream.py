"""A response that is under way on the short way: how its body is framed, and what of it is kept to be read when it is
over (`usage.keeping`)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from sidecar.model.exchange import ResponseShape
from sidecar.proxy.plain_head import CHUNKED
from sidecar.proxy.response_parser import CRLF, NOT_ALIKE, know_read, whole_chunks
from sidecar.usage.formats.likeness import Likeness
from sidecar.usage.keeping import DocumentKeeping, Keeping

log = logging.getLogger(__name__)

KEPT_BYTES_MAX: Final = 65_536  # of a body, to be read when it is over; most streams keep one
LAST_CHUNK: Final = b"0\r\n\r\n"

Pieces = tuple[list[bytes], bool]
"""What is in a read, without its framing, and whether the body ends with it."""


def nobody_reads(data: bytes) -> bool:
    return True


def not_known_yet(data: bytes) -> bool:
    return False


class PlainStream:
    """The state of one body. Every read of it is whole chunks, or some of a sized body."""

    __slots__ = (
        "_left",
        "behind",
        "body_bytes",
        "ended",
        "ends",
        "facts",
        "first_token_ns",
        "head",
        "keep_alive",
        "keeping",
        "kept",
        "kept_bytes",
        "likeness",
        "nothing_in",
        "reusable",
        "trailing",
    )

    def __init__(self, facts: ResponseShape, head: bytes, keeping: Keeping | DocumentKeeping | None, left: int) -> None:
        """`keeping`: None: nobody reads it. `left`: bytes of the body, or `CHUNKED`."""
        self.facts = facts
        self.head = head  # as it came, without its empty line
        self.keeping = keeping
        self._left = left
        self.kept: list[bytes] = []
        self.kept_bytes = 0
        self.first_token_ns = 0
        self.body_bytes = 0
        self.likeness = NOT_ALIKE
        self.ended = False  # its own end mark has been seen
        self.trailing = False  # and was sent: it is on record, and the last chunk is still to come
        self.behind: list[bytes] = []  # what came behind the end mark while that was held
        self.reusable = True
        self.keep_alive: bytes | None = None
        # Of whole chunks as they come: one that ends so and has nothing in it is passed on, and no more.
        self.ends = CRLF
        self.nothing_in: Callable[[bytes], bool] = not_known_yet
        if keeping is None and left == CHUNKED:
            self.nothing_in = nobody_reads
        elif isinstance(keeping, Keeping):
            self.ends = keeping.end + CRLF

    def pieces(self, data: bytes) -> Pieces | None:
        """None: it is to be parsed."""
        if self._left == CHUNKED:
            return in_chunks(data)
        left = self._left - len(data)
        return None if left < 0 else ([data] if data else [], left == 0)

    def keep(self, pieces: list[bytes], *, last: bool) -> bool:
        """Count these pieces, and keep what has to be read of them. False: they are to be read along, and nothing has
        changed."""
        keeping = self.keeping
        try:
            if keeping is None:
                kept = True
            elif isinstance(keeping, Keeping):
                kept = self._keep_events(keeping, pieces, last=last)
            else:
                kept = self._keep_document(keeping, pieces, last=last)
        except ValueError:  # of what was sent: not JSON, or events of another form
            return False
        except Exception:
            log.exception("a usage reader failed; the response is read along")
            return False
        if kept:
            size = sum(map(len, pieces))
            self.body_bytes += size
            if self._left != CHUNKED:
                self._left -= size
        return kept

    def _keep_document(self, keeping: DocumentKeeping, pieces: list[bytes], *, last: bool) -> bool:
        if not self.kept and pieces and not keeping.begins(pieces[0]):
            return False
        kept_bytes = self.kept_bytes + sum(map(len, pieces))
        if kept_bytes > KEPT_BYTES_MAX or (last and not keeping.may_wait([*self.kept, *pieces])):
            return False
        self.kept += pieces
        self.kept_bytes = kept_bytes
        return True

    def _keep_events(self, keeping: Keeping, pieces: list[bytes], *, last: bool) -> bool:
        kept: list[bytes] = []
        token_ns = self.first_token_ns
        known = self.nothing_in is not not_known_yet
        ended = False
        for piece in pieces:
            if not piece.endswith(keeping.end):
                return False
            if known and keeping.may_skip(piece):
                continue
            if not (self.kept or kept or keeping.begins(piece)):
                return False
            if not last and keeping.ends(piece):
                ended = True
            kept.append(piece)
            if not token_ns and keeping.holds_text(piece):
                token_ns = keeping.clock_ns()
                known = keeping.is_known([*self.kept, *kept])
                if not known:
                    return False
        kept_bytes = self.kept_bytes + sum(map(len, kept))
        if kept_bytes > KEPT_BYTES_MAX:
            return False
        self.kept += kept
        self.kept_bytes = kept_bytes
        self.first_token_ns = token_ns
        self.ended = ended
        if ended:
            self.nothing_in, self.likeness = not_known_yet, NOT_ALIKE
        elif known and self.nothing_in is not_known_yet:
            self.nothing_in = keeping.nothing_in
            self.likeness = Likeness(keeping.looked_at)
        return True


def in_chunks(data: bytes) -> Pieces | None:
    """None where `data` is not nothing but whole chunks."""
    pieces = whole_chunks(data)
    if pieces or not data:
        if len(pieces) == 1:
            know_read(data, len(pieces[0]))
        return pieces, False
    if not data.endswith(LAST_CHUNK):
        return None
    before = data[: -len(LAST_CHUNK)]
    pieces = whole_chunks(before) if before else []
    return (pieces, True) if pieces or not before else None
