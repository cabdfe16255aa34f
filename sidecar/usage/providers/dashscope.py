"""Alibaba's own API beside its OpenAI surface. Unverified, from memory of the vendor's pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from sidecar.model.exchange import Usage
from sidecar.usage.providers.base import Document
from sidecar.usage.providers.declared import DeclaredReader


class DashScope(DeclaredReader):
    """Alibaba's own API: the usage of each event is a running total."""

    usage_at = ("usage",)
    names: ClassVar[Mapping[str, str]] = {"image_tokens": "image_input_tokens", "audio_tokens": "audio_input_tokens"}
    id_at = ("request_id",)
    finish_at = ("output.choices[].finish_reason", "output.finish_reason")
    told_by = (
        ("request_id", "usage.input_tokens", "output.choices[].finish_reason"),
        ("request_id", "usage.input_tokens", "output.finish_reason"),
        ("request_id", "usage.total_tokens", "output.embeddings[].text_index"),
    )

    def fill(self, usage: Usage, raw: Document) -> None:
        super().fill(usage, raw)
        if usage.input_tokens is None and usage.output_tokens is None:
            usage.input_tokens = usage.total_tokens  # of embeddings and rerankers: nothing is generated


class DashScopeApps(DeclaredReader):
    """An application may ask several models; each has its counts in a list."""

    numbers_at = ("usage.models[].input_tokens", "usage.models[].output_tokens")
    model_at = ("usage.models[].model_id",)
    id_at = ("request_id",)
    finish_at = ("output.finish_reason",)
    told_by = (("request_id", "usage.models[].input_tokens"),)
