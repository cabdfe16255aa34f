"""A local stand-in that speaks the billing backends' wire contracts on one port, for demos and tests.

What a vendor would refuse, it refuses with the vendor's status and body; it de-duplicates as the vendor does. A new
vendor is one file in `vendors/` and one row in its table.
"""

from sidecar.dev.mock_backends.contract import Terms, Verdict
from sidecar.dev.mock_backends.faults import Do, Fault, FaultError, Faults, GateLie, Lie
from sidecar.dev.mock_backends.server import Receiver, backends, serve
from sidecar.dev.mock_backends.store import StoreError, Taken

__all__ = [
    "Do", "Fault", "FaultError", "Faults", "GateLie", "Lie", "Receiver", "StoreError", "Taken", "Terms", "Verdict",
    "backends", "serve",
]  # fmt: skip
