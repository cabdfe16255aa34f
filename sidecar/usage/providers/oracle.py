"""Oracle OCI: chat and embeddings, plain and streamed; seen in public captures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from sidecar.usage.providers.base import Document
from sidecar.usage.providers.declared import DeclaredReader


class Oci(DeclaredReader):
    """Oracle: `chatResponse`; streamed, the usage is an event of its own behind the finish, where it was asked for."""

    usage_at = ("chatResponse.usage", "usage")
    names: ClassVar[Mapping[str, str]] = {
        "promptTokens": "prompt_tokens",
        "completionTokens": "completion_tokens",
        "totalTokens": "total_tokens",
        "promptTokensDetails": "prompt_tokens_details",
        "completionTokensDetails": "completion_tokens_details",
        "cachedTokens": "cached_tokens",
        "reasoningTokens": "reasoning_tokens",
        "acceptedPredictionTokens": "accepted_prediction_tokens",
        "rejectedPredictionTokens": "rejected_prediction_tokens",
    }
    model_at = ("modelId",)
    finish_at = ("chatResponse.choices[].finishReason", "chatResponse.finishReason", "finishReason")
    told_by = (("modelId", "chatResponse.apiFormat"), ("pad", "usage.promptTokens"))
    usage_is_last = True
    must = (b'"usage"', b"finishReason")

    def _ends(self, document: Document) -> None:
        """The finish comes before the usage, and is not the end of the counting."""
        final = self.final
        super()._ends(document)
        self.final = final
