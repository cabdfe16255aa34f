"""The configuration: one table of settings, one `load`, no global state.

A backend declares its own settings in its file, as a frozen dataclass whose fields they are:

    @dataclass(frozen=True, kw_only=True)
    class StripeSettings(HttpSettings):
        api_key: Secret = required_secret(HEADER_TEXT, "secret or restricted key", also=("STRIPE_API_KEY",))
        mode: str = setting(types.word_of("v1", "v2"), "v1", "which of the vendor's interfaces")

and is made with one of these: `StripeBackend(StripeSettings(**settings.backend("stripe")), context)`.
"""

from __future__ import annotations

from sidecar.model.grammar import Element, Unfit
from sidecar.settings import types
from sidecar.settings.loader import CONFIG, BackendSettings, SettingsError, all_settings, load
from sidecar.settings.schema import (
    PREFIX,
    SECTIONS,
    AskedSettings,
    AttributionSettings,
    Deliver,
    Durability,
    Effective,
    FleetSettings,
    Forwarded,
    GateSettings,
    LogFormat,
    LogLevel,
    OnDisconnect,
    OnSpoolFull,
    PriceSettings,
    ProxySettings,
    Route,
    ServeSettings,
    Setting,
    Settings,
    SpoolSettings,
    UsageSettings,
    core_settings,
    required_secret,
    required_setting,
    secret_setting,
    section_settings,
    setting,
    settings_of,
)
from sidecar.settings.types import Address, Kind, Many, Secret
from sidecar.settings.upstreams import SetHeader, UpstreamSettings

__all__ = [
    "CONFIG",
    "PREFIX",
    "SECTIONS",
    "Address",
    "AskedSettings",
    "AttributionSettings",
    "BackendSettings",
    "Deliver",
    "Durability",
    "Effective",
    "Element",
    "FleetSettings",
    "Forwarded",
    "GateSettings",
    "Kind",
    "LogFormat",
    "LogLevel",
    "Many",
    "OnDisconnect",
    "OnSpoolFull",
    "PriceSettings",
    "ProxySettings",
    "Route",
    "Secret",
    "ServeSettings",
    "SetHeader",
    "Setting",
    "Settings",
    "SettingsError",
    "SpoolSettings",
    "Unfit",
    "UpstreamSettings",
    "UsageSettings",
    "all_settings",
    "core_settings",
    "load",
    "required_secret",
    "required_setting",
    "secret_setting",
    "section_settings",
    "setting",
    "settings_of",
    "types",
]
