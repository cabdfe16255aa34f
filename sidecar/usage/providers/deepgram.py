"""Deepgram: sound by the second, speech by the character. Unverified: `metadata`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from sidecar.usage.providers.declared import DeclaredReader, HeaderUnits


class Deepgram(DeclaredReader):
    """Sound by the second, of one channel: the price may be that of several."""

    numbers_at = ("metadata.duration",)
    names: ClassVar[Mapping[str, str]] = {"duration": "audio_seconds"}
    id_at = ("metadata.request_id",)
    told_by = (("metadata.request_id", "metadata.duration", "metadata.channels"),)


class DeepgramSpeak(HeaderUnits):
    units_in: ClassVar[Mapping[str, str]] = {"dg-char-count": "characters"}
