"""fal: a header says how many units a call cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from sidecar.usage.providers.declared import HeaderUnits


class Fal(HeaderUnits):
    """Any path; what a unit is depends on the model."""

    units_in: ClassVar[Mapping[str, str]] = {"x-fal-billable-units": "billable_units"}
