"""What a sidecar tells of itself where many share a ledger, and what all of them have told: balance, age, what waits.

Each tells how it stands every few seconds, also while nothing is written, and reads what the others told. So any of
them can be asked for the whole, and one that is gone shows by its age. Nothing waits for it: a ledger that is away
leaves what was known last, and its age.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sidecar.backends.ledger import SharedLedgerBackend
from sidecar.ledger.postgres_queries import InstanceRow, PostgresReader
from sidecar.ledger.postgres_schema import Reported
from sidecar.model.balance import BackendTotals, Balance, add_totals
from sidecar.model.delivery import Delivered
from sidecar.spool import SpoolError
from sidecar.storage.files import StorageError

log = logging.getLogger(__name__)

TELL_EVERY_S: Final = 10.0
SILENT_S: Final = 60.0  # of somebody who tells every ten seconds: down, or the ledger is away from there
SHOWN_MAX: Final = 100  # instances in `/metrics`: those that are behind, or silent, come first


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One sidecar of the fleet. `balance`: as it told it last; None: it never did."""

    instance: str
    balance: Balance | None
    age_s: float  # of what it told
    in_ledger: int  # records that it put there
    earlier: int
    lag_s: float  # the age of the oldest record that it has and the ledger lacks

    @property
    def problems(self) -> list[str]:
        """What does not add up, in words."""
        if self.balance is None:
            return []
        found = [f"{self.instance}: {problem}" for problem in self.balance.problems]
        ledger = self.balance.backends.get("ledger")
        # A record is in the ledger before its sidecar calls it delivered, so this holds at any two moments.
        if ledger is not None and ledger.delivered - self.earlier > self.in_ledger:
            found.append(
                f"{self.instance}: {ledger.delivered - self.earlier} records are said to be delivered, and the shared "
                f"ledger has {self.in_ledger} of it: was it put back from a backup?"
            )
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """All of them."""

    members: Sequence[Member]

    @property
    def total(self) -> Balance:
        """The sum of what all have told."""
        told = [member.balance for member in self.members if member.balance is not None]
        names = dict.fromkeys(name for one in told for name in one.backends)
        # A backend that one of them lacks owes nothing for its records: only who has it is in its equation.
        return Balance.over(
            told, {name: add_totals(one.backends[name] for one in told if name in one.backends) for name in names}
        )

    @property
    def problems(self) -> list[str]:
        return [problem for member in self.members for problem in member.problems]

    @property
    def notes(self) -> list[str]:
        return [
            f"{member.instance} was last heard of {member.age_s:.0f} s ago: what it recorded since is not in these sums"
            for member in self.members
            if member.age_s > SILENT_S
        ]

    @property
    def holds(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """As `balance --format json` has it under `fleet`."""
        total = self.total.to_dict()
        del total["holds"]
        return {
            "instances": {
                member.instance: {
                    **({} if member.balance is None else member.balance.to_dict()),
                    "in_ledger": member.in_ledger,
                    "lag_s": round(member.lag_s, 1),
                    "age_s": round(member.age_s, 1),
                }
                for member in self.members
            },
            "sum": total,
            "in_ledger": sum(member.in_ledger for member in self.members),
            "holds": self.holds,
        }


def whole_of(rows: Iterable[InstanceRow]) -> Whole:
    """What the shared ledger has of each."""
    members = [
        Member(
            instance=row.instance,
            balance=None if row.balance is None else balance_from(row.balance),
            age_s=row.age_s,
            in_ledger=row.records,
            earlier=row.earlier,
            lag_s=row.oldest_pending_s or 0.0,
        )
        for row in rows
    ]
    return Whole(members=members)


def balance_from(told: Mapping[str, Any]) -> Balance:
    """`Balance.to_dict`, the other way round."""
    backends = {
        name: BackendTotals(
            delivered=one["delivered"],
            duplicate=one["duplicate"],
            pending=one["pending"],
            parked=one["parked"],
            skipped=one["skipped"],
        )
        for name, one in told["backends"].items()
    }
    return Balance(
        admitted=told["admitted"], recorded=told["recorded"], open=told["open"], lost=told["lost"], backends=backends
    )


def most_behind(members: Iterable[Member]) -> list[Member]:
    """So many as `/metrics` shows."""
    return sorted(members, key=lambda one: (-one.lag_s, -one.age_s, one.instance))[:SHOWN_MAX]


@dataclass(slots=True)
class Fleet:
    """Tells of this sidecar, and knows what the others told."""

    backend: SharedLedgerBackend
    reader: PostgresReader
    whole: Whole = field(default_factory=lambda: Whole(members=()))

    async def keep(
        self, balance: Callable[[], Awaitable[Balance]], oldest_pending_s: Callable[[], float | None]
    ) -> None:
        """Tell and ask, for ever. `oldest_pending_s` blocks."""
        while True:
            try:
                mine = await balance()
                ledger = mine.backends.get(self.backend.name, BackendTotals())
                told = Reported(
                    oldest_pending_s=await asyncio.to_thread(oldest_pending_s),
                    balance=mine.to_dict(),
                    delivered=ledger.delivered,
                )
                if isinstance(await self.backend.report(told), Delivered):
                    self.whole = whole_of(await asyncio.to_thread(self.reader.instances))
            except (StorageError, SpoolError, OSError) as error:
                log.info("the fleet could not be told or asked how it stands: %s", error)
            except Exception:  # whatever it was, the others take who tells nothing any more for gone
                log.exception("the fleet could not be told or asked how it stands")
            await asyncio.sleep(TELL_EVERY_S)
