"""The configuration: one table of settings, one `load`, no global state.

A backend declares its own settings in its file:

    SETTINGS = (
        Setting("api_key", types.text, help="secret key", secret=True, required=True, also=("STRIPE_API_KEY",)),
        Setting("mode", types.word_of("v1", "v2"), "v1", "which of the vendor's interfaces"),
    )

and is given `settings.backend("stripe")`: `{"api_key": Secret(***), "mode": "v1"}`.
"""

from __future__ import annotations

from sidecar.model.grammar import Element, Unfit
from sidecar.settings import types
from sidecar.settings.loader import CONFIG, BackendSettings, SettingsError, all_settings, load
from sidecar.settings.schema import (
    PREFIX,
    Durability,
    Effective,
    Forwarded,
    LogLevel,
    OnDisconnect,
    OnSpoolFull,
    Route,
    Setting,
    Settings,
    core_settings,
)
from sidecar.settings.types import Address, Kind, Many, Secret

__all__ = [
    "CONFIG",
    "PREFIX",
    "Address",
    "BackendSettings",
    "Durability",
    "Effective",
    "Element",
    "Forwarded",
    "Kind",
    "LogLevel",
    "Many",
    "OnDisconnect",
    "OnSpoolFull",
    "Route",
    "Secret",
    "Setting",
    "Settings",
    "SettingsError",
    "Unfit",
    "all_settings",
    "core_settings",
    "load",
    "types",
]
