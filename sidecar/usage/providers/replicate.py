"""Replicate: predictions, by the second."""

from __future__ import annotations

from typing import ClassVar

from sidecar.model.exchange import Usage
from sidecar.usage.providers.base import Document, Reader, Tree
from sidecar.usage.providers.fallback import NOT_FINISHED
from sidecar.usage.values import part, quantity


class Replicate(Reader):
    """A prediction: seconds, once it is finished; a later look at it is a stored answer."""

    wanted: ClassVar[Tree] = {
        "id": True,
        "model": True,
        "version": True,
        "status": True,
        "error": True,
        "metrics": True,
    }

    claim_signs: ClassVar[tuple[bytes, ...]] = (b"predict_time",)

    @classmethod
    def claims(cls, document: Document) -> bool:
        return "predict_time" in part(document.get("metrics")) and "status" in document

    def document(self, document: Document) -> None:
        self.seen = "status" in document
        self.identify(document)
        self.finished(0, document.get("status"))
        if document.get("status") == "failed":
            self.error = "failed"
        elif document.get("status") in ("starting", "processing"):
            self.reason = NOT_FINISHED
        self.report(document.get("metrics"))

    def fill(self, usage: Usage, raw: Document) -> None:
        seconds = quantity(raw.get("predict_time"))
        if seconds is not None:
            usage.units["predict_seconds"] = seconds
