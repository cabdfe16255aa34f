"""Baidu Qianfan's first API; seen in public code that reads it."""

from __future__ import annotations

from sidecar.usage.providers.base import Document
from sidecar.usage.providers.declared import DeclaredReader


class Qianfan(DeclaredReader):
    """Baidu's first API: OpenAI's names beside `result`; the last event has `is_end`."""

    usage_at = ("usage",)
    finish_at = ("finish_reason",)
    last_flag = "is_end"
    told_by = (("is_truncated", "usage.prompt_tokens"), ("sentence_id", "is_end"))

    def _ends(self, document: Document) -> None:
        super()._ends(document)
        if document.get("is_end") is False:
            self.final = False
