"""What is wrong with settings that only the parts can see: meters, prices, limits, backends, the ledger's file,
certificates."""

from __future__ import annotations

from sidecar import prices
from sidecar.runtime import backend_factory, certificates, gate_factory, shipping
from sidecar.settings import Settings


def faults(settings: Settings, *, starting: bool = False) -> list[str]:
    """All of it. `starting`: only what is a reason not to serve."""
    money = [*prices.faults(settings, gate_factory.providers(settings)), *gate_factory.faults(settings)]
    own = [*money, *shipping.faults(settings)]
    return [*backend_factory.faults(settings, starting=starting), *own, *certificates.faults(settings.proxy)]
