"""Which data directory may publish under a name in the tables of shared limits, and what became of those before it.

As in the shared ledger a name alone cannot tell a directory from its copy, so each start puts a nonce of its own in the
place of the one before (`metering.limit_instances`), and everything is published with it: of a directory and its copy
the one that started last goes on, and the other changes nothing more. A directory that finds a nonce which it never
gave may take the name over only where the ledger, or a person, has decided that it is the one: what was published
under the name until then stays, as that of a sidecar that is no more.

A sidecar that writes to the ledger is decided upon there (`metering.instances`, `spool adopt`). One that only shares
limits has the decision in the file of its directory.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final, NamedTuple

from sidecar.ledger.identity import Identity
from sidecar.storage.postgres import SCHEMA, Connection, Fault, Postgres, PostgresError

FILE: Final = "limits-instance"  # in the data directory, beside that of the ledger
DERIVED: Final = ""  # in the place of a nonce: somebody else made up this row out of the ledger

_MADE: Final = f"""
INSERT INTO {SCHEMA}.limit_instances (instance, nonce) VALUES ($1, $2)
ON CONFLICT (instance) DO NOTHING RETURNING instance"""
_THERE: Final = f"SELECT nonce FROM {SCHEMA}.limit_instances WHERE instance = $1 FOR UPDATE"
_CLAIM: Final = f"""
UPDATE {SCHEMA}.limit_instances SET nonce = $2, seen = now(), since = CASE WHEN $3 THEN now() ELSE since END
WHERE instance = $1 RETURNING extract(epoch FROM since)::float8"""
# No name of a sidecar has a space in it.
_SET_ASIDE: Final = (
    'UPDATE {table} SET instance = instance || to_char(now(), \'" until "YYYY-MM-DD"T"HH24:MI:SS.US\') '
    "WHERE instance = $1"
)
_LEDGERS: Final = f"SELECT nonce FROM {SCHEMA}.instances WHERE instance = $1"


class Taken(NamedTuple):
    """`made`: nothing was there of this name. `since_s`: until then another directory had it, Unix seconds."""

    made: bool
    since_s: float | None


class Claim:
    """Of one data directory. Its files are read and written in threads."""

    def __init__(self, data_dir: Path, name: str | None, *, in_ledger: bool) -> None:
        """`name`: SIDECAR_INSTANCE. `in_ledger`: this sidecar writes to the shared ledger too."""
        self._dir, self._given, self._in_ledger = data_dir, name, in_ledger
        self._own = Identity(data_dir, file=FILE)
        self._lost_with: str | None = None  # the directory's nonce in the ledger when another took the name
        self._held = self._refused = False
        self.name = Identity(data_dir, name).name

    @property
    def nonce(self) -> str:
        return self._own.nonce

    async def take(self, database: Postgres) -> Taken:
        """Put our nonce there. Raises `PostgresError`, also where the name is another's, and `OSError`."""
        main = await asyncio.to_thread(Identity, self._dir, self._given)
        self.name = await asyncio.to_thread(main.ensure)
        async with database.transaction() as db:
            made = await db.fetchval(_MADE, self.name, self._own.nonce) is not None
            there = self._own.nonce if made else str(await db.fetchval(_THERE, self.name))
            aside = there not in (self._own.nonce, DERIVED) and not self._own.is_known(there)
            if aside:
                await self._allowed(db, main, database.where)
                for table in ("limit_counters", "limit_leases"):
                    await db.execute(_SET_ASIDE.format(table=f"{SCHEMA}.{table}"), self.name)
            await asyncio.to_thread(self._own.begin)
            since = await db.fetchval(_CLAIM, self.name, self._own.nonce, aside)
        await asyncio.to_thread(self._own.confirm)
        if aside and not self._in_ledger:
            await asyncio.to_thread(main.confirm)  # the decision is carried out
        self._held, self._refused, self._lost_with = True, False, None
        return Taken(made, None if since is None else float(since))

    @property
    def is_lost(self) -> bool:
        """Whether another directory has the name, and nobody decided yet."""
        return self._refused

    async def adopt(self, *, copy: bool) -> None:
        """Somebody has decided what this directory is, which writes to no ledger. Raises `OSError`."""
        main = await asyncio.to_thread(Identity, self._dir, self._given)
        await asyncio.to_thread(main.become_new if copy else main.take_over)

    async def _allowed(self, db: Connection, main: Identity, where: str) -> None:
        """Whether this directory may have the name that another has published under."""
        if self._held and self._lost_with is None:
            self._lost_with = main.confirmed or "none"
        if not self._in_ledger:
            # A new directory is no copy, which would have its original's file: pods come without their disks.
            if main.is_decided or (not self._held and self._own.confirmed is None):
                return
        elif main.confirmed != self._lost_with and await db.fetchval(
            "SELECT to_regclass($1) IS NOT NULL", f"{SCHEMA}.instances"
        ):
            nonce = await db.fetchval(_LEDGERS, self.name)
            if nonce is not None and main.is_known(str(nonce)):
                return
        self._refused = True
        raise PostgresError(
            f"another data directory counts its limits in {where} as {self.name}, so this one or that one is a copy: "
            "`metering-sidecar spool adopt --as original` here, or `--as copy` with another SIDECAR_INSTANCE if one is "
            "set",
            Fault.FOREIGN,
        )
