"""Cloudflare Workers AI: `result.usage`, seen in public captures."""

from __future__ import annotations

from sidecar.usage.providers.base import Document
from sidecar.usage.providers.declared import DeclaredReader
from sidecar.usage.values import part


class WorkersAi(DeclaredReader):
    """Cloudflare: plain answers in an envelope; events bare, padded with `p`, the last one with `usage`."""

    usage_at = ("result.usage", "usage")
    told_by = (("success", "result.usage.prompt_tokens"),)
    must = (b'"usage"',)

    @classmethod
    def claims(cls, document: Document) -> bool:
        if super().claims(document):
            return True
        bare = type(document.get("response")) is str and "done" not in document
        return bare and (type(document.get("p")) is str or "prompt_tokens" in part(document.get("usage")))
