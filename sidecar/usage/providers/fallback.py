"""Readers of answers from which no tokens are taken: errors, free estimates, stored answers."""

from __future__ import annotations

from typing import ClassVar

from sidecar.model.exchange import Usage
from sidecar.usage.providers.base import Document, Reader, Tree


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

    def can_skip(self, block: bytes) -> bool:
        return True

    def document(self, document: Document) -> None:
        self.seen = True
        self.identify(document)
        self.fail(document.get("error"))


STORED = "a stored answer read again: counted when it was made, where it was finished by then"
BACKGROUND = "a background response read again: counted where its stream was read to the end, else nowhere"
NOT_FINISHED = "not finished: what it used is shown when it is fetched, and counted nowhere"


class StoredAnswer(Unmetered):
    """An answer that is looked at again, however often: nobody here knows which look is the first, so none counts.

    One that was made in the background had no numbers when it was made. They are kept verbatim, for whoever adds them
    up once an id.
    """

    _INNER: ClassVar[Tree] = {"id": True, "model": True, "background": True, "usage": True}
    wanted: ClassVar[Tree] = {**Unmetered.wanted, **_INNER, "response": _INNER}

    def can_skip(self, block: bytes) -> bool:
        return b'"background"' not in block

    def message(self, document: Document, event: str) -> bool:
        response = document.get("response")
        self.document(response if type(response) is dict else document)
        return False

    def document(self, document: Document) -> None:
        super().document(document)
        if document.get("background") is True:
            self.reason = BACKGROUND
            self.report(document.get("usage"))

    def fill(self, usage: Usage, raw: Document) -> None:
        """Nothing: `raw_usage` alone says what the response used."""


class Batch(Unmetered):
    """A batch object: its usage is shown on every poll, so it is kept verbatim and counted nowhere."""

    wanted: ClassVar[Tree] = {**Unmetered.wanted, "usage": True}

    def document(self, document: Document) -> None:
        super().document(document)
        self.report(document.get("usage"))

    def fill(self, usage: Usage, raw: Document) -> None:
        """Nothing: `raw_usage` alone says what the batch used."""
