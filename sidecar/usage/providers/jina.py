"""Jina's reader of pages. Unverified, from memory of the vendor's pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from sidecar.usage.providers.declared import DeclaredReader


class JinaReader(DeclaredReader):
    """Pages as text, on any path: tokens without a side, of the page or of all pages of a search."""

    numbers_at = ("meta.usage.tokens", "data.usage.tokens")
    names: ClassVar[Mapping[str, str]] = {"tokens": "total_tokens"}
    told_by = (("code", "meta.usage.tokens"), ("code", "data.usage.tokens"))
