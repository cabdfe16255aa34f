"""Whose answer it is: the address is a hint, the answer decides.

`Choice` stands where a reader stands. The reader that the address names is asked first; what it does not recognise is
shown to the `claims` of all readers, message by message, as it is and inside one level of an envelope. So neither the
spelling of a path, nor its prefix, nor what comes before the telling event, nor an answer's size decides what is read.
Once it is known whose answer it is, the framing asks that reader directly (`settled`), and the choice costs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sidecar.usage.providers.base import Document, Reader, Tree, escaped_key

ENVELOPES = ("response", "result", "data")
"""Members in which gateways and vendors wrap a known answer."""

MENTION_MAX_BYTES = 128  # of the longest mention, cut between two pieces

MENTIONS_MAX = 4_096  # words of one answer that are looked at closely; a real one has a handful

# Both begin with fixed letters, so that the search for them runs at the speed of C.
_USAGE = re.compile(rb'"usage(?:_?[mM]etadata|_info)?"\s*+:\s*+\{\s*+"')
_COUNT = re.compile(rb'oken(?:s|[Uu]sage|_usage|_?[cC]ount)"\s*+:\s*+(?:"?[0-9]|\{\s*+")')


class Claims:
    """All readers, and what they look at to know their answers. Made once."""

    __slots__ = ("_framed", "readers", "signs", "tree")

    def __init__(self, readers: Sequence[type[Reader]]) -> None:
        self.readers = tuple(readers)
        self._framed = {event: reader for reader in reversed(self.readers) for event in reader.frame_events}
        signs = {sign for reader in readers for sign in reader.claim_signs}
        self.signs = tuple(sorted(sign for sign in signs if not any(o in sign for o in signs - {sign})))
        tree: Tree = {}
        for reader in readers:
            tree = united(tree, reader.wanted)
        for key in ENVELOPES:  # an array of that name is what was made, and has nothing to say
            if not isinstance(tree.get(key), dict):
                tree.pop(key, None)
        self.tree = united(tree, dict.fromkeys(ENVELOPES, tree))

    def of(self, document: Document) -> type[Reader] | None:
        for reader in self.readers:
            if reader.claims(document):
                return reader
        return None

    def of_frame(self, event: str) -> type[Reader] | None:
        return self._framed.get(event)

    def may_hold(self, block: bytes) -> bool:
        """Whether any reader could know these bytes."""
        return any(sign in block for sign in self.signs) or (92 in block and escaped_key(block))


def united(one: Any, other: Any) -> Any:
    """The wanted places of both. What one of them wants whole is kept whole."""
    if one is True or other is True:
        return True
    if isinstance(one, dict) and isinstance(other, dict):
        return {**one, **{key: united(one[key], tree) if key in one else tree for key, tree in other.items()}}
    if isinstance(one, list) and isinstance(other, list):
        return [united(one[0], other[0])]
    return one  # an array and an object of the same name: the reader that comes first in the table


class Choice(Reader):
    """Implements `Reader`, and `FrameReader`. `hint`: the reader that the address names, where it names one."""

    decided = False

    def __init__(self, anomaly: Callable[[str], None], everybody: Claims, hint: Reader | None = None) -> None:
        super().__init__(anomaly)
        self._everybody = everybody
        self.hint = hint
        self.reader: Reader | None = None  # whose answer it is; `settled` is the same, or its envelope
        self.first_token = None if hint is None else hint.first_token  # type: ignore[misc]

    @property
    def best(self) -> Reader | None:
        """Whose answer it is, as far as is known."""
        return self.reader or self.hint

    @property
    def counts_anomalies(self) -> bool:  # type: ignore[override]
        return self.best is not None

    @property
    def arrays_stream(self) -> bool:  # type: ignore[override]
        return self.best is not None and self.best.arrays_stream

    @property
    def wanted(self) -> Tree:  # type: ignore[override]
        return self._everybody.tree if self.settled is None else self.settled.wanted

    @property
    def end_signs(self) -> tuple[bytes, ...]:  # type: ignore[override]
        reader = self.settled or self.hint
        return () if reader is None else reader.end_signs

    @property
    def final(self) -> bool:
        return self.best is not None and self.best.final

    @final.setter
    def final(self, final: bool) -> None:
        if self.best is not None:
            self.best.final = final

    def worth_parsing(self, body: bytes) -> bool:
        return self.hint is not None or self._everybody.may_hold(body)

    def expect(self, choices: int) -> None:
        """How many parallel completions the request asked for."""
        self.choices = choices
        if self.hint is not None:
            self.hint.choices = choices

    def can_skip(self, block: bytes) -> bool:
        if self.settled is not None:
            return self.settled.can_skip(block)
        return (self.hint is None or self.hint.can_skip(block)) and not self._everybody.may_hold(block)

    def done(self) -> bool:
        reader = self.settled or self.hint
        return reader is not None and reader.done()

    def message(self, document: Document, event: str) -> bool:
        reader = self._reader_of(document, event)
        return reader is not None and reader.message(document, event)

    def document(self, document: Document) -> None:
        reader = self._reader_of(document, "")
        if reader is not None:
            reader.document(document)

    def can_skip_frame(self, head: bytes) -> bool:
        return self.settled is not None and self.settled.can_skip_frame(head)

    def frame(self, headers: Mapping[str, str], payload: bytes) -> bool:
        if self.settled is None:
            kind = headers.get(":event-type", "")
            if self.hint is not None and self.hint.frame_events:
                self._settle(self.hint)
            elif (found := self._everybody.of_frame(kind)) is not None:
                self._settle(found(self.anomaly))
            else:
                return False
        return self.settled is not None and self.settled.frame(headers, payload)

    def _reader_of(self, document: Document, event: str) -> Reader | None:
        """Who takes this message; where it shows whose answer it is, that is settled."""
        if self.settled is None:
            hint = self.hint
            if hint is not None and hint.recognises(document, event):
                self._settle(hint)
            elif (found := self._claiming(document)) is not None:
                self._settle(found)
            else:
                for key in ENVELOPES:
                    inner = document.get(key)
                    if type(inner) is not dict or not inner:
                        continue
                    if hint is not None and hint.recognises(inner, event):
                        found = hint
                    else:
                        found = self._claiming(inner)
                    if found is not None:
                        self._settle(found, key)
                        break
        return self.settled or self.hint

    def _claiming(self, document: Document) -> Reader | None:
        found = self._everybody.of(document)
        if found is None:
            return None
        return self.hint if type(self.hint) is found else found(self.anomaly)

    def _settle(self, reader: Reader, envelope: str = "") -> None:
        self.reader = reader
        reader.choices = self.choices
        self.settled = Envelope(reader, envelope) if envelope else reader


class Envelope(Reader):
    """Hands what stands inside one member on to the reader of it."""

    def __init__(self, inner: Reader, key: str) -> None:
        super().__init__(inner.anomaly)
        self._inner = inner
        self._key = key

    @property
    def arrays_stream(self) -> bool:  # type: ignore[override]
        return self._inner.arrays_stream

    @property
    def wanted(self) -> Tree:  # type: ignore[override]
        inner = self._inner.wanted
        both: Tree = united(inner, {self._key: inner})
        return both

    @property
    def end_signs(self) -> tuple[bytes, ...]:  # type: ignore[override]
        return self._inner.end_signs

    @property
    def final(self) -> bool:
        return self._inner.final

    @final.setter
    def final(self, final: bool) -> None:
        self._inner.final = final

    def can_skip(self, block: bytes) -> bool:
        return self._inner.can_skip(block)

    def done(self) -> bool:
        return self._inner.done()

    def message(self, document: Document, event: str) -> bool:
        return self._inner.message(self._open(document), event)

    def document(self, document: Document) -> None:
        self._inner.document(self._open(document))

    def _open(self, document: Document) -> Document:
        """Errors come without the envelope."""
        inner = document.get(self._key)
        return inner if type(inner) is dict else document


class Mentions:
    """Whether an answer speaks of usage at all, wherever in it: what nobody reads must not go by in silence.

    Two searches of a piece where it does not, which is next to nothing; the text of a model cannot pretend to, because
    its quotes are escaped. An answer that says `usage` without end is taken to speak of it.
    """

    __slots__ = ("_counts", "_tail", "_usages", "found")

    def __init__(self) -> None:
        self._tail = b""
        self._usages = self._counts = 0  # how often the words came
        self.found = False

    def feed(self, piece: bytes) -> None:
        if self.found:
            return
        data = self._tail + piece if self._tail else piece
        self._tail = data[-MENTION_MAX_BYTES:]
        if usages := data.count(b'"usage'):
            self._usages += usages
            self.found = self._usages > MENTIONS_MAX or _USAGE.search(data) is not None
        if not self.found and (counts := data.count(b"oken")):
            self._counts += counts
            self.found = self._counts <= MENTIONS_MAX and any(_is_count(data, hit) for hit in _COUNT.finditer(data))


def _is_count(data: bytes, hit: re.Match[bytes]) -> bool:
    """Whether it is the name of a count, and not of a limit that was asked for and is repeated (`max_tokens`)."""
    quote = data.rfind(b'"', 0, hit.start())
    return quote >= 0 and not data.startswith(b"max", quote + 1)
