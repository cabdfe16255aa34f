"""From the spool to the backends: persist, seal, send, verdict, retire.

`retry`, `pace` and `window` decide and touch nothing, `state` keeps what must outlive a crash in `delivery.db`,
`sealing` and `redriving` turn records into requests, `lane` runs one backend with what stands beside it (`supply`,
`waiting`, `offering`, `pacing`, `settling`, `storing`), `courier` owns the lanes. A backend's own contract is in
`sidecar.backends`; who calls `wake` and what the totals are compared with is the application's.
"""

from sidecar.delivery.limits import Limits
from sidecar.delivery.ports import Clock, SpoolReader, SystemClock
from sidecar.delivery.service import Delivery
from sidecar.delivery.state import DeliveryState
from sidecar.delivery.types import LaneStatus

__all__ = ["Clock", "Delivery", "DeliveryState", "LaneStatus", "Limits", "SpoolReader", "SystemClock"]
