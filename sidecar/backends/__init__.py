"""The billing systems: one file each, and one row in this table.

To add one, write `sidecar/backends/<name>.py` with a class that keeps the `Backend` contract of
`sidecar.model.delivery` and its settings as a frozen dataclass; add the row; add it to
`tests/support/backend_trials.py`. Nothing else knows backends by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from sidecar.backends.base import Context
from sidecar.backends.file import FileBackend
from sidecar.backends.flexprice import FlexpriceBackend
from sidecar.backends.lago import LagoBackend
from sidecar.backends.ledger import LedgerBackend, SharedLedgerBackend
from sidecar.backends.ledgerbee import LedgerbeeBackend
from sidecar.backends.meter import MeterBackend
from sidecar.backends.nats import NatsBackend
from sidecar.backends.openmeter import OpenmeterBackend
from sidecar.backends.revenium.backend import ReveniumBackend
from sidecar.backends.stripe.backend import StripeBackend
from sidecar.backends.webhook import WebhookBackend
from sidecar.model.delivery import Backend
from sidecar.settings import Setting, settings_of


class Buildable(Protocol):
    """A backend's class: made of its own settings and of what all are given."""

    settings_type: type[Any]

    def __call__(self, settings: Any, context: Context) -> Backend: ...


@dataclass(frozen=True, slots=True)
class Row:
    """A backend, before it is made."""

    kind: Buildable
    summary: str
    shared: Buildable | None = None  # in its place where sidecars share a ledger

    @property
    def settings(self) -> tuple[Setting, ...]:
        return settings_of(self.kind.settings_type)

    def make(self, values: Mapping[str, Any], context: Context) -> Backend:
        """`values`: by the settings' names, as `Settings.backend` gives them. Raises `ValueError`, `MetersError`."""
        kind = self.shared if self.shared is not None and context.open_shared_ledger is not None else self.kind
        return kind(kind.settings_type(**values), context)


BACKENDS: Final[Mapping[str, Row]] = {
    "ledger": Row(LedgerBackend, "the embedded usage store", SharedLedgerBackend),
    "meter": Row(MeterBackend, "/meter payloads in batches, to any address"),
    "revenium": Row(ReveniumBackend, "Revenium, one request a record"),
    "ledgerbee": Row(LedgerbeeBackend, "LedgerBee, one report a meter"),
    "stripe": Row(StripeBackend, "Stripe billing meters"),
    "flexprice": Row(FlexpriceBackend, "Flexprice events in bulk"),
    "openmeter": Row(OpenmeterBackend, "OpenMeter, as CloudEvents"),
    "lago": Row(LagoBackend, "Lago events, one a meter"),
    "webhook": Row(WebhookBackend, "records as lines of JSON, signed"),
    "nats": Row(NatsBackend, "records as messages of a JetStream stream"),
    "file": Row(FileBackend, "records as lines of JSON in a file"),
}

__all__ = ["BACKENDS", "Buildable", "Context", "Row", "backend_settings"]


def backend_settings() -> dict[str, tuple[Setting, ...]]:
    """Every backend's own settings, for `settings.load`."""
    return {name: row.settings for name, row in BACKENDS.items()}
