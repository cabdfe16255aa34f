"""The billing systems: one file each, and one row in this table.

To add one, write `sidecar/backends/<name>.py` with a class that keeps the `Backend` contract of
`sidecar.model.delivery`, its `SETTINGS` and a `from_settings`; add the row; add it to
`tests/support/backend_trials.py`. Nothing else knows backends by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sidecar.backends import file, flexprice, lago, ledger, ledgerbee, meter, openmeter, webhook
from sidecar.backends.base import Context
from sidecar.backends.revenium import backend as revenium
from sidecar.backends.stripe import backend as stripe
from sidecar.model.delivery import Backend
from sidecar.settings import Setting


@dataclass(frozen=True, slots=True)
class Row:
    """A backend, before it is made."""

    make: Callable[[Mapping[str, Any], Context], Backend]
    settings: tuple[Setting, ...]
    summary: str


BACKENDS: Final[Mapping[str, Row]] = {
    "ledger": Row(ledger.LedgerBackend.from_settings, ledger.SETTINGS, "the embedded usage store"),
    "meter": Row(meter.MeterBackend.from_settings, meter.SETTINGS, "/meter payloads in batches, to any address"),
    "revenium": Row(revenium.ReveniumBackend.from_settings, revenium.SETTINGS, "Revenium, one request a record"),
    "ledgerbee": Row(ledgerbee.LedgerbeeBackend.from_settings, ledgerbee.SETTINGS, "LedgerBee, one report a meter"),
    "stripe": Row(stripe.StripeBackend.from_settings, stripe.SETTINGS, "Stripe billing meters"),
    "flexprice": Row(flexprice.FlexpriceBackend.from_settings, flexprice.SETTINGS, "Flexprice events in bulk"),
    "openmeter": Row(openmeter.OpenmeterBackend.from_settings, openmeter.SETTINGS, "OpenMeter, as CloudEvents"),
    "lago": Row(lago.LagoBackend.from_settings, lago.SETTINGS, "Lago events, one a meter"),
    "webhook": Row(webhook.WebhookBackend.from_settings, webhook.SETTINGS, "records as lines of JSON, signed"),
    "file": Row(file.FileBackend.from_settings, file.SETTINGS, "records as lines of JSON in a file"),
}

__all__ = ["BACKENDS", "Context", "Row", "backend_settings"]


def backend_settings() -> dict[str, tuple[Setting, ...]]:
    """Every backend's own settings, for `settings.load`."""
    return {name: row.settings for name, row in BACKENDS.items()}
