"""Snowflake Cortex. Unverified, from memory of the vendor's pages: the order of its events."""

from __future__ import annotations

from sidecar.usage.providers.base import Document
from sidecar.usage.providers.openai import ChatCompletions


class Cortex(ChatCompletions):
    """Snowflake: OpenAI's shape, with neither a finish reason nor an end mark; its usage is empty until it is told."""

    @classmethod
    def claims(cls, document: Document) -> bool:
        return False

    def report(self, raw: object) -> bool:
        told = super().report(raw)
        self.final = self.final or told
        return told
