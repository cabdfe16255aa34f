"""From the spool to the backends: persist, seal, send, verdict, retire.

`retry_policy`, `circuit_breaker` and `dedup_window` decide and touch nothing; `store` keeps what must outlive a crash
in `delivery.db`, `queries` counts and lists it; `tail` reads the spool once for all backends, `encoding` turns records
into requests; `worker` runs one backend, `service` owns the workers. A backend's own contract is in `sidecar.backends`;
who calls `wake` and what the totals are compared with is the application's.
"""

from sidecar.delivery.context import SystemClock, read_clock
from sidecar.delivery.limits import Limits
from sidecar.delivery.rows import StateBusy, StateError, StateFull
from sidecar.delivery.service import Delivery
from sidecar.delivery.store import DeliveryStore
from sidecar.delivery.types import BackendStatus, Clock, SpoolReader

__all__ = [
    "BackendStatus",
    "Clock",
    "Delivery",
    "DeliveryStore",
    "Limits",
    "SpoolReader",
    "StateBusy",
    "StateError",
    "StateFull",
    "SystemClock",
    "read_clock",
]
