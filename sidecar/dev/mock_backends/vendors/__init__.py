"""The vendors, one row each. A row is a file's contract under the name that the sidecar's backend has.

Where two share a path, the routes tell them apart by what only one of them takes (`Route.when`), and the row that
asks comes first.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from sidecar.dev.mock_backends.contract import Vendor
from sidecar.dev.mock_backends.vendors.flexprice import Flexprice
from sidecar.dev.mock_backends.vendors.lago import Lago
from sidecar.dev.mock_backends.vendors.ledgerbee import LedgerBee
from sidecar.dev.mock_backends.vendors.meter import Meter
from sidecar.dev.mock_backends.vendors.openmeter import OpenMeter
from sidecar.dev.mock_backends.vendors.revenium_v1 import ReveniumV1
from sidecar.dev.mock_backends.vendors.revenium_v2 import ReveniumV2
from sidecar.dev.mock_backends.vendors.stripe_v1 import StripeV1
from sidecar.dev.mock_backends.vendors.stripe_v2 import StripeV2
from sidecar.dev.mock_backends.vendors.webhook import Webhook


class Row(NamedTuple):
    backend: str
    vendor: type[Vendor]


VENDORS: Final[tuple[Row, ...]] = (
    Row("meter", Meter),
    Row("revenium", ReveniumV1),
    Row("revenium", ReveniumV2),
    Row("ledgerbee", LedgerBee),
    Row("stripe", StripeV1),
    Row("stripe", StripeV2),
    Row("flexprice", Flexprice),
    Row("lago", Lago),
    Row("openmeter", OpenMeter),
    Row("webhook", Webhook),
)
