"""A local stand-in that speaks the billing backends' wire contracts on one port, for demos and tests.

What a vendor would refuse, it refuses with the vendor's status and body; it de-duplicates as the vendor does. A new
vendor is one file in `vendors/` and one row in its table.
"""

from sidecar.receiver.contract import Terms, Verdict
from sidecar.receiver.faults import Do, Fault, FaultError, Faults, Lie
from sidecar.receiver.server import Receiver, backends, serve
from sidecar.receiver.store import StoreError, Taken

__all__ = [
    "Do", "Fault", "FaultError", "Faults", "Lie", "Receiver", "StoreError", "Taken", "Terms", "Verdict", "backends",
    "serve",
]  # fmt: skip
