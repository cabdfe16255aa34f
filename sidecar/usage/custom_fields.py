"""Custom fields (`SIDECAR_ELEMENTS`): numbers that an API states in a header or a JSON member, under a name of yours.

`rows=json:meta.rows_returned`, `credits=header:x-credits-used`. They join the usage's `units`: beside the
tokens where the answer is a model's, alone where it is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sidecar.model.grammar import Element
from sidecar.usage.providers.base import Document, Reader, Tree
from sidecar.usage.values import quantity


def from_headers(elements: Sequence[Element], fields: Mapping[str, str]) -> dict[str, int | float]:
    """The custom fields that stand in a response's head."""
    found = {}
    for element in elements:
        if element.header is not None and (amount := quantity(fields.get(element.header))) is not None:
            found[element.name] = amount
    return found


class CustomFields(Reader):
    """Stands before the reader of the answer (or alone) and picks the custom fields out of the same documents."""

    def __init__(self, anomaly: Callable[[str], None], inner: Reader | None, elements: Sequence[Element]) -> None:
        self.inner = inner
        super().__init__(anomaly)
        self._elements = [element for element in elements if element.json]
        self._signs = [f'"{element.json[-1]}"'.encode() for element in self._elements]
        self._wanted: Tree = dict(inner.wanted) if inner is not None else {}
        for element in self._elements:
            _graft(self._wanted, element.json)
        self.units: dict[str, int | float] = {}

    @property
    def arrays_stream(self) -> bool:  # type: ignore[override]
        return self.inner is not None and self.inner.arrays_stream

    @property
    def wanted(self) -> Tree:  # type: ignore[override]
        return self._wanted

    @property
    def end_signs(self) -> tuple[bytes, ...]:  # type: ignore[override]
        return self.inner.end_signs if self.inner is not None else ()

    @property
    def final(self) -> bool:
        return self.inner is not None and self.inner.final

    @final.setter
    def final(self, final: bool) -> None:
        if self.inner is not None:
            self.inner.final = final

    def can_skip(self, block: bytes) -> bool:
        if any(sign in block for sign in self._signs):
            return False
        return self.inner.can_skip(block) if self.inner is not None else True

    def message(self, document: Document, event: str) -> bool:
        self._pick(document)
        return self.inner.message(document, event) if self.inner is not None else False

    def done(self) -> bool:
        return self.inner.done() if self.inner is not None else True

    def document(self, document: Document) -> None:
        self._pick(document)
        if self.inner is not None:
            self.inner.document(document)

    def _pick(self, document: Document) -> None:
        for element in self._elements:
            value: object = document
            for member in element.json:
                value = value.get(member) if isinstance(value, dict) else None
            amount = quantity(value)
            if amount is not None:
                self.units[element.name] = amount
            elif value is not None:
                self.anomaly("value_rejected")


def _graft(tree: Tree, path: tuple[str, ...]) -> None:
    """Make the path one of the wanted places; what is kept whole already is kept whole."""
    for member in path[:-1]:
        below = tree.get(member)
        if below is True:
            return
        inner = dict(below) if isinstance(below, dict) else {}
        tree[member] = inner
        tree = inner
    tree[path[-1]] = True
