"""Whom the gate can ask outside: one file a vendor, and one row in this table.

To add one, write `sidecar/gate/sources/<name>.py` with a class that keeps the `Source` contract of
`sidecar.gate.sources.base`, its maker and its row here. Address, key and the customers' ids are those of the backend of
the same vendor, so that nothing is said twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from sidecar.gate.sources import flexprice, lago, openmeter, revenium, revenium_controls
from sidecar.gate.sources.base import Answer, Caller, Known, NoAnswer, Source
from sidecar.gate.sources.signed_claim import PublicKey
from sidecar.settings import PREFIX, Secret, Settings

__all__ = ["SOURCES", "Answer", "Caller", "Known", "NoAnswer", "Source", "problems", "sources"]


def sources(settings: Settings, names: Sequence[str]) -> list[Source]:
    """Those of `names` (of `SIDECAR_GATE`; `limits` and what is unknown are passed over), ready to be asked.

    Raises `ValueError` with the first thing that is missing; `problems` tells them all.
    """
    return [SOURCES[name](settings) for name in dict.fromkeys(names) if name in SOURCES]


def problems(settings: Settings, names: Sequence[str]) -> list[str]:
    """What keeps these sources from being asked, each with what to do. Opens nothing."""
    found: list[str] = []
    for name in dict.fromkeys(names):
        if name in SOURCES:
            try:
                SOURCES[name](settings)
            except ValueError as error:
                found.append(str(error))
    return found


def _revenium(settings: Settings) -> Source:
    own = settings.backend("revenium")
    key: PublicKey | None = None
    if settings.asked.gate_revenium_public_key_file is not None:
        given = settings.gate_public_key or b""  # its content, as it was when the settings were read
        try:
            if isinstance(given, OSError):
                raise given
            key = PublicKey.parse(given.decode("ascii"))
        except (OSError, ValueError) as error:
            why = "cannot be read" if isinstance(error, (OSError, UnicodeError)) else str(error)
            raise ValueError(f"{PREFIX}GATE_REVENIUM_PUBLIC_KEY_FILE: {why}") from None
    return revenium.ReveniumProductKey(
        api_key=_key(own, "revenium", "revenium"),
        url=own["url"] or revenium.HOST,
        field="productKey" if own["subscriber_field"] == "productkey" else "application",
        unit=settings.asked.gate_revenium_unit,
        customers=_customers(settings, "revenium"),
        public_key=key,
        timeout_s=settings.asked.gate_timeout,
    )


def _revenium_controls(settings: Settings) -> Source:
    own = settings.backend("revenium")
    return revenium_controls.ReveniumControls(
        api_key=_key(own, "revenium", "revenium_controls"),
        team=_needed(settings.asked.gate_revenium_team, "GATE_REVENIUM_TEAM", "revenium_controls", "the team's id"),
        url=own["url"] or revenium_controls.HOST,
        customers=_customers(settings, "revenium"),
        timeout_s=settings.asked.gate_timeout,
    )


def _openmeter(settings: Settings) -> Source:
    own = settings.backend("openmeter")
    key: Secret | None = own["api_key"]
    return openmeter.OpenmeterAccess(
        feature=_needed(
            settings.asked.gate_openmeter_feature, "GATE_OPENMETER_FEATURE", "openmeter", "the feature's key"
        ),
        api_key=None if key is None else key.reveal(),
        url=own["url"],
        unit=settings.asked.gate_openmeter_unit,
        customers=_customers(settings, "openmeter"),
        timeout_s=settings.asked.gate_timeout,
    )


def _flexprice(settings: Settings) -> Source:
    own = settings.backend("flexprice")
    return flexprice.FlexpriceWallets(
        api_key=_key(own, "flexprice", "flexprice"),
        url=own["url"],
        environment_id=own["environment_id"],
        customers=_customers(settings, "flexprice"),
        timeout_s=settings.asked.gate_timeout,
    )


def _lago(settings: Settings) -> Source:
    own = settings.backend("lago")
    return lago.LagoWallets(
        api_key=_key(own, "lago", "lago"),
        url=own["url"],
        by_subscription=settings.asked.gate_lago_id == "subscription",
        customers=_customers(settings, "lago"),
        timeout_s=settings.asked.gate_timeout,
    )


def _customers(settings: Settings, backend: str) -> dict[str, str]:
    return {ours: theirs[backend] for ours, theirs in settings.subscribers.items() if backend in theirs}


def _key(own: Mapping[str, Any], backend: str, source: str) -> str:
    key: Secret | None = own["api_key"]
    return _needed(None if key is None else key.reveal(), f"{backend.upper()}_API_KEY", source, "the vendor's API key")


def _needed(value: str | None, variable: str, source: str, what: str) -> str:
    if not value:
        raise ValueError(f"{PREFIX}{variable} is not set: SIDECAR_GATE={source} needs it: expected {what}")
    return value


SOURCES: Final[Mapping[str, Callable[[Settings], Source]]] = {
    "revenium": _revenium,
    "revenium_controls": _revenium_controls,
    "openmeter": _openmeter,
    "flexprice": _flexprice,
    "lago": _lago,
}
