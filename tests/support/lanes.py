"""Lanes of a fleet in a real database, with sidecars that deliver them and none that serves: records are put into the
ledger by hand, and backends are stand-ins in the process of the test."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.backend_fixtures import T0_NS, record
from support.delivery_fixtures import CountingMetrics
from support.ledgers import again
from support.postgres_server import PostgresServer

from sidecar.delivery.elected import Elected
from sidecar.delivery.lane_balance import LanesBalance, read_lanes
from sidecar.delivery.lane_database import make_lanes
from sidecar.delivery.rows import StateError
from sidecar.ledger import postgres_schema
from sidecar.ledger.identity import Identity
from sidecar.ledger.lanes import LANES
from sidecar.ledger.postgres_schema import line_of
from sidecar.ledger.postgres_store import PostgresStore
from sidecar.model.delivery import Backend, Delivered
from sidecar.model.exchange import Subscriber
from sidecar.storage.postgres import Postgres

LIMIT_S = 30.0
BACKENDS = ("webhook",)
CUSTOMERS = [f"customer-{n}" for n in range(3 * LANES)]  # in every lane some


@dataclass(slots=True)
class Lanes:
    """`names`: of the backends that are delivered to lane by lane."""

    directory: Path
    url: str
    names: Sequence[str] = BACKENDS
    put_by: dict[str, int] = field(default_factory=dict)

    def put(self, count: int, instance: str = "one") -> list[str]:
        """Records of this sidecar, one of each customer in turn; their ids."""
        start = self.put_by.get(instance, 0)
        self.put_by[instance] = start + count
        made = [
            record(
                n,
                id=f"0199aaaa-0000-7000-8000-{instance.encode().hex()[:4]}{n:08d}",
                subscriber=Subscriber(CUSTOMERS[n % len(CUSTOMERS)], "jwt:sub"),
                started_ns=T0_NS,
            )
            for n in range(start, start + count)
        ]
        lines = [line for line in (line_of(one.json) for one in made) if line is not None]
        place = self.directory / f"ledger-of-{instance}"
        place.mkdir(exist_ok=True)
        with closing(PostgresStore(self.url, Identity(place, instance))) as store:
            assert store.write(lines, None, again) == Delivered()
        return [one.id for one in made]

    async def seen(self, enough: Callable[[LanesBalance], bool], what: str = "") -> LanesBalance:
        """How they stand, once it is so."""
        found = None
        try:
            async with asyncio.timeout(LIMIT_S):
                while found is None or not enough(found):
                    await asyncio.sleep(0.05)
                    try:
                        found = await asyncio.to_thread(read_lanes, self.url)
                    except StateError as error:
                        if "start a sidecar of it first" not in str(error):
                            raise  # else it is about to make its tables
        except TimeoutError:
            raise AssertionError(f"never {what or 'so'}: {found and found.to_dict()}") from None
        return found

    async def settled(self, backend: str = "webhook") -> LanesBalance:
        """Once nothing is pending there."""
        return await self.seen(
            lambda found: backend in found.total and found.total[backend].pending == 0, f"settled at {backend}"
        )

    @asynccontextmanager
    async def delivered_by(self, name: str, *backends: Backend, **changes: Any) -> AsyncIterator[Elected]:
        """A sidecar that delivers them, as soon as it holds its share."""
        elected = Elected(
            url=self.url,
            me=f"{name}/0123abcd",
            names=[backend.name for backend in backends] or self.names,
            make=lambda: list(backends),
            metrics=CountingMetrics(),
            retention_s=7 * 86_400.0,
            **changes,
        )
        async with elected:
            await self.seen(lambda found: name in found.holders, f"delivered by {name}")
            async with asyncio.timeout(LIMIT_S):
                while not elected.lanes:
                    await asyncio.sleep(0.02)
            yield elected


async def prepare(url: str, names: Sequence[str]) -> None:
    """All tables, as after the first start of a fleet with these backends."""
    database = Postgres(url, name="test")
    await database.migrate(postgres_schema.PART, postgres_schema.STEPS)
    await make_lanes(database, names)
    await database.close()


@pytest.fixture(scope="session")
def lanes_template(postgres_server: PostgresServer) -> str:
    """The name of a database with all tables in it, as after the first start of a fleet. A copy is there at once."""
    url = postgres_server.database()

    asyncio.run(prepare(url, BACKENDS))
    return url.rpartition("/")[2]


@pytest.fixture
def shared_lanes(tmp_path: Path, postgres_server: PostgresServer, lanes_template: str) -> Iterator[Lanes]:
    """In a database of its own, which is gone afterwards: a server with many of them takes long to stop."""
    name = f"{lanes_template}_{secrets.token_hex(4)}"
    postgres_server.sql(f"CREATE DATABASE {name} TEMPLATE {lanes_template}")
    yield Lanes(tmp_path, postgres_server.url(name))
    postgres_server.sql(f"DROP DATABASE {name} WITH (FORCE)")
