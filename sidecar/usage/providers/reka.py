"""Reka: usage from a published package. Unverified: its stream (running counts)."""

from __future__ import annotations

from sidecar.usage.providers.declared import DeclaredReader


class Reka(DeclaredReader):
    usage_at = ("usage",)
    finish_at = ("responses[].finish_reason",)
    told_by = (("responses[]", "usage.input_tokens"),)
