"""Exa: searches and pages, priced by the call; `costDollars.total` says what it cost.

Unverified, from memory of the vendor's pages: the spelling of all members, and that a streamed answer has `costDollars`
in its last event.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from sidecar.usage.providers.declared import DeclaredReader


class Exa(DeclaredReader):
    numbers_at = ("costDollars.total",)
    names: ClassVar[Mapping[str, str]] = {"total": "cost"}
    id_at = ("requestId",)
    told_by = (
        ("requestId", "costDollars.total", "costDollars"),
    )  # the last one is searched for: `total` is everywhere
    usage_is_last = True
