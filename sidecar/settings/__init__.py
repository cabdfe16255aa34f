"""The configuration: one table of settings, one `load`, no global state.

A backend declares its own settings in its file:

    SETTINGS = (
        Setting("api_key", kinds.text, help="secret key", secret=True, required=True, also=("STRIPE_API_KEY",)),
        Setting("mode", kinds.word_of("v1", "v2"), "v1", "which of the vendor's interfaces"),
    )

and is given `settings.backend("stripe")`: `{"api_key": Secret(***), "mode": "v1"}`.
"""

from __future__ import annotations

from sidecar.settings import kinds
from sidecar.settings.kinds import Address, Element, Kind, Many, Secret, Unfit
from sidecar.settings.loading import CONFIG, BackendSettings, SettingsError, all_settings, load
from sidecar.settings.table import (
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
    "kinds",
    "load",
]
