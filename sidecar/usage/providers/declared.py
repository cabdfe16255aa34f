"""One reader for the vendors' own APIs that are nobody else's shape: where a vendor's numbers stand is data.

A place is written as a path: `results[].generated_token_count` is that member of each element, added up. Of several
places for the same thing the first that is there counts. Whatever the members are called, they are renamed to OpenAI's
names and mean what `fields` says. A vendor is a file with a class of nothing but data, such as `reka.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from sidecar.model.exchange import Usage
from sidecar.usage.providers.base import Document, Reader, Tree
from sidecar.usage.providers.fields import fill_tokens
from sidecar.usage.values import name, part, quantity

Path = str

_GOING_ON = ("", "null", "not_finished", "unfinished")  # words that stand for a reason while there is none
_ERRORS = ("error", "code", "error_code", "success")
_TEXT = re.compile(rb'"(?:content|text|response|generated_text|result|chunk)"\s*:\s*"[^"]')


class DeclaredReader(Reader):
    """The reader; a vendor is a subclass of nothing but data."""

    usage_at: ClassVar[tuple[Path, ...]] = ()  # the usage object
    numbers_at: ClassVar[tuple[Path, ...]] = ()  # or single numbers
    names: ClassVar[Mapping[str, str]] = {}  # the vendor's name of a member -> OpenAI's, or ours
    model_at: ClassVar[tuple[Path, ...]] = ("model",)
    id_at: ClassVar[tuple[Path, ...]] = ("id",)
    finish_at: ClassVar[tuple[Path, ...]] = ()  # why it ended; where that stands, the stream's last counts are known
    last_flag: ClassVar[Path] = ""  # true in the last message
    last_events: ClassVar[tuple[str, ...]] = ()  # types of the message that ends a stream
    usage_is_last: ClassVar[bool] = False  # the usage comes once, at the end
    told_by: ClassVar[tuple[tuple[Path, ...], ...]] = ()  # with all places of one of these it is this vendor's
    _telling: ClassVar[tuple[tuple[str, tuple[Path, ...]], ...]] = ()
    must: ClassVar[tuple[bytes, ...]] = ()  # one of these stands in every message of interest
    skip_after: ClassVar[tuple[str, ...]] = ("seen",)
    first_token: ClassVar[re.Pattern[bytes] | None] = _TEXT
    end_signs: ClassVar[tuple[bytes, ...]] = (b"[DONE]",)

    def __init_subclass__(cls) -> None:
        wanted: Tree = {}
        paths = [*cls.usage_at, *cls.numbers_at, *cls.model_at, *cls.id_at, *cls.finish_at, cls.last_flag]
        for path in [*paths, *(path for group in cls.told_by for path in group), *_ERRORS, "type"]:
            if path:
                _want(wanted, path)
        cls.wanted = wanted
        # Most documents are none of ours: one look for the first member of a place tells, before the place is walked.
        cls._telling = tuple((group[0].partition(".")[0].removesuffix("[]"), group) for group in cls.told_by)
        cls.claim_signs = (
            *(b"sage", b"oken"),
            *(group[-1].rpartition(".")[2].removesuffix("[]").encode() for group in cls.told_by),
            *(kind for kind in cls.must if b"." in kind),  # names of events
        )
        cls.keep = (*cls.must, b"error", b"[DONE]") if cls.must else None
        cls.end_signs = (*DeclaredReader.end_signs, *(kind.encode() for kind in cls.last_events))

    @classmethod
    def claims(cls, document: Document) -> bool:
        for begins, group in cls._telling:
            if begins in document and all(_first(document, path) is not None for path in group):
                return True
        return False

    def message(self, document: Document, event: str) -> bool:
        kind = document.get("type")
        kind = kind if type(kind) is str else event
        self.document(document)
        if (event == "error" or kind == "error") and self.error is None:
            self.seen = self.fail(document)
        if kind in self.last_events:
            self.seen = self.final = True
        return kind in self.last_events

    def done(self) -> bool:
        self.final = self.final or self.raw is not None
        return True

    def document(self, document: Document) -> None:
        for path in self.model_at:
            self.model = name(_first(document, path)) or self.model
        for path in self.id_at:
            self.response_id = name(_first(document, path)) or self.response_id
        self._ends(document)
        if self._reports(document) and self.usage_is_last:
            self.final = True
        elif self.raw is None:
            self._fails(document)
        self.seen = self.seen or type(self).claims(document)

    def _ends(self, document: Document) -> None:
        for path in self.finish_at:
            for place, reason in enumerate(_each(document, path)):
                word = part(reason).get("type", reason)
                if word not in _GOING_ON and self.finished(place, word):
                    self.seen = self.final = True
        if self.last_flag and _first(document, self.last_flag) is True:
            self.final = True

    def _reports(self, document: Document) -> bool:
        for path in self.usage_at:
            if self.report(_first(document, path)):
                return True
        found: Document = {}
        for path in self.numbers_at:
            values = [value for value in _each(document, path) if value is not None]
            key = path.rpartition(".")[2]
            if values and key not in found:
                found[key] = values[0] if len(values) == 1 else _added(values)
        return self.report(found)

    def _fails(self, document: Document) -> None:
        """Errors under status 200, as these vendors spell them."""
        code, number = document.get("code"), document.get("error_code")
        if self.fail(document.get("error")):
            self.seen = True
        elif document.get("success") is False or number or (code and type(code) is str and "message" in document):
            self.seen = self.fail({"code": number or code})

    def fill(self, usage: Usage, raw: Document) -> None:
        fill_tokens(self, usage, _renamed(raw, self.names))


class HeaderUnits(Reader):
    """An answer whose units stand in a header, whatever its body is."""

    units_in: ClassVar[Mapping[str, str]] = {}  # header -> unit

    def __init_subclass__(cls) -> None:
        cls.header_names = tuple(cls.units_in)

    def head(self, headers: Mapping[str, str]) -> None:
        super().head(headers)
        self.seen = any(header in headers for header in self.units_in)

    def can_skip(self, block: bytes) -> bool:
        return True

    def fill_from_headers(self, usage: Usage) -> bool:
        for header, unit in self.units_in.items():
            if (amount := quantity(self.headers.get(header))) is not None:
                usage.units[unit] = amount
        return bool(usage.units)


def _each(document: object, path: Path) -> Iterator[Any]:
    """The values at a path."""
    member, _, rest = path.partition(".")
    value = part(document).get(member.removesuffix("[]"))
    inner = value if member.endswith("[]") else [value]
    for item in inner if type(inner) is list else ():
        if rest:
            yield from _each(item, rest)
        else:
            yield item


def _first(document: Document, path: Path) -> Any:
    return next((value for value in _each(document, path) if value is not None), None)


def _added(values: list[Any]) -> Any:
    """The sum of what are numbers; where one is none, that one, so that it is seen to be none."""
    for value in values:
        if quantity(value) is None:
            return value
    return sum(quantity(value) or 0 for value in values)


def _want(tree: Tree, path: Path) -> None:
    """Make a path one of the wanted places."""
    member, _, rest = path.partition(".")
    key = member.removesuffix("[]")
    if tree.get(key) is True:
        return
    if not rest and not member.endswith("[]"):
        tree[key] = True
        return
    below = tree.setdefault(key, [{}] if member.endswith("[]") else {})
    if rest and (type(below) is list) is member.endswith("[]"):
        _want(below[0] if type(below) is list else below, rest)


def _renamed(raw: Document, names: Mapping[str, str]) -> Document:
    """The same object, and the objects in it, under OpenAI's names."""
    if not names:
        return raw
    return {names.get(key, key): _renamed(value, names) if type(value) is dict else value for key, value in raw.items()}
