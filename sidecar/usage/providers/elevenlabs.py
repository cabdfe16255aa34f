"""ElevenLabs: a header says what a call cost; seen in public code that reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from sidecar.usage.providers.declared import HeaderUnits


class ElevenLabs(HeaderUnits):
    units_in: ClassVar[Mapping[str, str]] = {"character-cost": "characters"}
