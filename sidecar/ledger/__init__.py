"""The embedded usage store: `ledger.db`, written by one process, read by any."""

from sidecar.ledger.queries import LedgerReader, MeterRow, UnpricedModel, UsageRow
from sidecar.ledger.schema import LedgerError, ledger_problem
from sidecar.ledger.store import LedgerStore

__all__ = ["LedgerError", "LedgerReader", "LedgerStore", "MeterRow", "UnpricedModel", "UsageRow", "ledger_problem"]
