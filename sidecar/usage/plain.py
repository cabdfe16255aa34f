"""Readers of answers from which no tokens are taken: errors, free estimates, stored answers, unknown shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from sidecar.exchange import Usage
from sidecar.usage.members import Tree
from sidecar.usage.reader import Document, Reader

UNDECIDED_MESSAGES_MAX = 4  # messages after which a stream of unknown shape is left alone


class Failed(Reader):
    """The body of a 4xx or 5xx: the error's type, never a number."""

    wanted: ClassVar[Tree] = {"error": True, "type": True, "code": True, "status": True, "__type": True}

    def document(self, document: Document) -> None:
        self.seen = True
        if not self.fail(document.get("error")):
            self.fail({key: value for key, value in document.items() if key != "error"} or "error")
        if self.error == "error":
            self.error = None  # the caller has a better word: the status


class Unmetered(Reader):
    """An answer that belongs to a model but consumes nothing: only who it is from is noted."""

    wanted: ClassVar[Tree] = {"id": True, "model": True, "error": True}

    def dull(self, block: bytes) -> bool:
        return True

    def document(self, document: Document) -> None:
        self.seen = True
        self.identify(document)
        self.fail(document.get("error"))


class Batch(Unmetered):
    """A batch object: its usage is shown on every poll, so it is kept verbatim and counted nowhere."""

    wanted: ClassVar[Tree] = {**Unmetered.wanted, "usage": True}

    def document(self, document: Document) -> None:
        super().document(document)
        self.report(document.get("usage"))

    def fill(self, usage: Usage, raw: Document) -> None:
        """Nothing: `raw_usage` alone says what the batch used."""


class Undecided(Reader):
    """An unknown path: the first messages (or the document) must be unmistakable, else nothing is read."""

    wanted: ClassVar[Tree] = {}  # large documents of unknown paths are left alone
    must_hold: ClassVar[bytes] = b"sage"

    def __init__(self, anomaly: Callable[[str], None], candidates: Sequence[type[Reader]]) -> None:
        self.chosen: Reader | None = None
        super().__init__(anomaly)
        self._candidates = candidates
        self._left = UNDECIDED_MESSAGES_MAX

    def signs(self) -> tuple[bytes, ...]:
        return self.chosen.signs() if self.chosen is not None else ()

    def proven(self) -> bool:
        return self.chosen is not None and self.chosen.proven()

    def restore(self, final: bool) -> None:
        if self.chosen is not None:
            self.chosen.restore(final)

    def dull(self, block: bytes) -> bool:
        if self.chosen is not None:
            return self.chosen.dull(block)
        return self._left <= 0

    def done(self) -> bool:
        return self.chosen.done() if self.chosen is not None else False

    def message(self, document: Document, event: str) -> bool:
        if self.chosen is None and not self._choose(document):
            return False
        return self.chosen.message(document, event) if self.chosen is not None else False

    def document(self, document: Document) -> None:
        if self._choose(document) and self.chosen is not None:
            self.chosen.document(document)

    def _choose(self, document: Document) -> bool:
        self._left -= 1
        for candidate in self._candidates:
            if candidate.claims(document):
                self.chosen = candidate(self.anomaly)
                return True
        return False
