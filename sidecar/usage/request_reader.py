"""Reading along with a request: which model was asked, and whether a stream and its usage were.

A small JSON body is kept and parsed once, when somebody asks; a large one is skimmed for the few members as it
passes. Of a multipart form only the short fields in question are kept. What was asked never decides how the
answer is read; it names the model where the answer does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from sidecar.usage.formats.content_encoding import Codings, Unreadable, decoder
from sidecar.usage.formats.json_scanner import Members, pruned
from sidecar.usage.formats.multipart import FormFields
from sidecar.usage.providers.base import Tree
from sidecar.usage.values import name

BODY_MAX_BYTES = 65_536  # kept whole; prompts with pictures are larger and are skimmed

WANTED: Tree = {
    "model": True,
    "stream": True,
    "stream_options": True,
    "service_tier": True,
    "background": True,
    "n": True,
    "model_id": True,
}


QUESTIONS = frozenset(("messages", "input", "prompt", "contents"))


class RequestReader:
    """One request body. Never raises; what cannot be read is simply not known."""

    # Defaults stand on the class: most requests are one piece of plain JSON.
    bytes_seen: int = 0
    _facts: Mapping[str, Any] | None = None
    _members: Members | None = None
    _form: FormFields | None = None
    _decoder: Codings | None = None
    _size: int = 0
    _busy: bool = False

    def __init__(self, more: tuple[str, ...] = (), anomaly: Callable[[str], None] | None = None) -> None:
        """`more`: further members at the top level that are wanted."""
        self._more = more
        self._anomaly = anomaly
        self._pieces: list[bytes] | None = []

    def describe(self, fields: Mapping[str, str]) -> None:
        """Take the head of a body that does not begin like an object, before any of it is fed."""
        content_type = fields.get("content-type", "")
        try:
            if coding := fields.get("content-encoding"):
                self._decoder = decoder(coding)
            if content_type[:10].lower() == "multipart/":
                self._form = FormFields(content_type, ("model", "stream", "n", *self._more))
        except Unreadable:
            self._pieces = None

    def feed(self, piece: bytes) -> None:
        self.bytes_seen += len(piece)
        if self._pieces is None and self._members is None and self._form is None:
            return
        if self._decoder is None:
            self._take(piece)
            return
        try:
            for part in self._decoder.feed(piece):
                self._take(part)
        except Unreadable:
            self._pieces = self._members = self._form = self._decoder = None

    def facts(self) -> Mapping[str, Any]:
        """The wanted members, of what has come so far."""
        if self._facts is not None:
            return self._facts
        if self._form is not None:
            return self._form.fields
        if self._members is not None:
            return self._members.document
        if not self._pieces:
            return {}
        facts = self._whole()
        return pruned(b"".join(self._pieces), self._wanted()) if facts is None else facts

    def settle(self) -> None:
        """Keep the facts and let go of the body: an open stream must not hold its prompt. Not while it still comes."""
        if self._facts is not None or self._form is not None:
            return
        if self._members is not None:
            members = self._members
            facts: Mapping[str, Any] | None = members.document if members.done and not members.busy else None
        else:
            facts = self._whole()
        if facts is not None:
            self._facts = {key: facts[key] for key in (*WANTED, *self._more) if key in facts}
            self._pieces = self._members = self._decoder = None

    @property
    def model(self) -> str | None:
        facts = self.facts()
        return name(facts.get("model"))

    @property
    def streams(self) -> bool:
        return self.facts().get("stream") in (True, "true")

    @property
    def asks_for_usage(self) -> bool:
        options = self.facts().get("stream_options")
        return type(options) is dict and options.get("include_usage") is True

    @property
    def choices(self) -> int:
        """How many parallel answers were asked for."""
        number = self.facts().get("n")
        return number if type(number) is int and number > 1 else 1

    @property
    def asks_a_model(self) -> bool:
        """Whether it puts a question: a body that only changes or ends something stored has none, and is small."""
        return self._size > BODY_MAX_BYTES or not QUESTIONS.isdisjoint(self.facts())

    def _wanted(self) -> Tree:
        return {**WANTED, **dict.fromkeys(self._more, True)} if self._more else WANTED

    def _whole(self) -> dict[str, Any] | None:
        """The document, if it is one and complete."""
        if not self._pieces:
            return None
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        try:
            document = orjson.loads(body)
        except ValueError:
            return None
        return document if type(document) is dict else {}

    def _take(self, part: bytes) -> None:
        if self._form is not None:
            self._form.feed(part)
            if self._form.too_many and not self._busy:
                self._say_busy()
        elif self._members is not None:
            self._members.feed(part)
            if self._members.busy and not self._busy:
                self._say_busy()
        elif self._pieces is not None:
            self._pieces.append(part)
            self._size += len(part)
            if self._size > BODY_MAX_BYTES or len(self._pieces) > 1024:
                self._compact()

    def _say_busy(self) -> None:
        """Only the beginning and the end are read: what the middle said is not known."""
        self._busy = True
        if self._anomaly is not None:
            self._anomaly("request_too_busy")

    def _compact(self) -> None:
        body = b"".join(self._pieces or ())
        self._pieces = [body]
        if len(body) > BODY_MAX_BYTES:
            self._members = Members(self._wanted())
            self._pieces = None
            self._take(body)
