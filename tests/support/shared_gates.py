"""Sidecars that share limits over a real PostgreSQL, as far as limits go: each a gate, the owner of its counters and
what shares them, in one process, and the lines of its records as its spool. No proxy, no disk."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

from support.ledgers import again

from sidecar.gate.admission import Admission, Meant, Models, Policy
from sidecar.gate.admission import Verdict as Ruled
from sidecar.gate.allowance import TOTAL
from sidecar.gate.claim import Claim
from sidecar.gate.counters import Counters, Row
from sidecar.gate.denials import Denials
from sidecar.gate.fleet import Past, SharedCounters
from sidecar.gate.limits import PICO, Charging, read_limits
from sidecar.gate.owner import Owner, count_records
from sidecar.gate.windows import SECOND_NS
from sidecar.ledger.identity import Identity
from sidecar.ledger.postgres_schema import line_of
from sidecar.ledger.postgres_store import PostgresStore
from sidecar.model.delivery import Verdict
from sidecar.model.exchange import Exchange, Outcome, Subscriber, Usage, UsageState
from sidecar.model.record import encode
from sidecar.settings import AskedSettings
from sidecar.storage.postgres import Postgres
from sidecar.usage.readers import UsageTaps

LIMIT_S = 30.0
DENY = Denials(UsageTaps().endpoints, AskedSettings())
PICO_A_TOKEN = 10**6  # a dollar for a million tokens


class Gate:
    """One sidecar with one process that serves. `off_s`: how far its clock is ahead."""

    def __init__(
        self,
        directory: Path,
        url: str,
        *short: str,
        on_failure: str = "closed",
        off_s: float = 0.0,
        unknown: str = "reserve",
        tables: Sequence[dict[str, Any]] = (),
        past: Past | None = None,
        in_ledger: bool = False,
    ) -> None:
        name = directory.name
        directory.mkdir(exist_ok=True, parents=True)
        self.directory, self.name, self.url = directory, name, url
        self.limits = read_limits(tables, short, dimensions=["team"])
        self.off_s = off_s
        self.leap_s = 0.0  # of the clock that leases go by
        self.slot = secrets.token_hex(6)  # of its spool
        self.lines: list[bytes] = []
        self.beyond = 0  # tokens that calls took beyond what was left when they were let in
        self.charging = Charging(self.limits, None, unknown)
        self._on_failure, self.past, self._in_ledger = on_failure, past, in_ledger
        self._calls = 0
        self._store: PostgresStore | None = None
        self.shipped: Verdict | None = None  # what the ledger said last
        self.tail = name.encode().hex().rjust(12, "0")[-12:]
        self._running: asyncio.Task[None] | None = None
        self._asked: set[asyncio.Future[Ruled]] = set()

    def now_ns(self) -> int:
        return time.time_ns() + round(self.off_s * SECOND_NS)

    def clock_s(self) -> float:
        return time.monotonic() + self.leap_s

    async def ready(self) -> None:
        await until(lambda: self.shared.is_counted, lambda: self.shared.trouble)

    async def start(self, *, counted: bool = True) -> Gate:
        """`counted`: wait until it counts with the others."""
        loop = asyncio.get_running_loop()
        self.owner = Owner(
            self.charging, dry_run=False, clock_ns=self.now_ns, call_later=loop.call_later, shared=self.clock_s
        )
        price = Models(lambda provider, model, i, o, at_ns: (i + o) * PICO_A_TOKEN, lambda provider, model: None)
        policy = Policy(
            limits=self.limits,
            meant=lambda method, target, upstream: Meant("openai", None, True),
            key_of=lambda fields: None,
            deny=DENY,
            on_failure=self._on_failure,
            models=price,
        )
        self.gate = Admission(policy, clock_ns=self.now_ns, call_later=loop.call_later)
        self.gate.send = lambda question: self._soon(self.owner.ask, self.tail, question)
        self.db = Postgres(self.url, name=f"test {self.name}", command_timeout_s=2.0)
        self.shared = SharedCounters(
            self.db,
            Claim(self.directory, self.name, in_ledger=self._in_ledger),
            self.owner.counters,
            clock_s=self.clock_s,
            wall_ns=self.now_ns,
            past=self.past,
        )
        self.owner.fleet = self.shared
        self.owner.came(self.tail, self)
        self.owner.load(count_records(self.lines, self.charging, lambda record: True))
        self._running = asyncio.create_task(self.shared.run())
        if counted:
            await self.ready()
        return self

    def _soon(self, do: Callable[..., None], *values: Any) -> None:
        asyncio.get_running_loop().call_soon(do, *values)

    # What the owner says to the process that serves

    def answer(self, payload: tuple[Any, ...]) -> None:
        self._soon(self.gate.answered, payload)

    def please_tell(self) -> None:
        self._soon(lambda: self.owner.told(self.tail, self.gate.tell()))

    def tell(self) -> None:
        """As it does once a second: leases of processes end."""
        self.owner.told(self.tail, self.gate.tell())

    def leap(self, seconds: float) -> None:
        """So much time passes for its leases."""
        self.leap_s += seconds
        self.shared._wake.set()

    # Calls

    async def call(self, tokens: int = 10, who: str = "acme") -> Call:
        """`tokens`: that its response may have."""
        self._calls += 1
        ms = f"{self.now_ns() // 10**6:012x}"
        exchange = Exchange(
            method="POST",
            url="u",
            id=f"{ms[:8]}-{ms[8:]}-7{self._calls % 4096:03x}-8000-{self.tail}",
            subscriber=Subscriber(who, "test"),
            started_ns=self.now_ns(),
        )
        exchange.dimensions = {"team": "red"}
        prepared = self.gate.prepare(
            "POST", "/v1/x", (), subscriber=exchange.subscriber, dimensions=exchange.dimensions, route=None
        )
        body = b'{"model": "m", "max_tokens": %d}' % tokens
        weighed = self.gate.weigh(prepared, body, len(body))
        verdict = self.gate.at_once(weighed)
        waited = verdict is None
        if verdict is None:
            asked: asyncio.Future[Ruled] = asyncio.get_running_loop().create_future()
            self._asked.add(asked)
            self.gate.ask(weighed, exchange.id, asked.set_result)
            verdict = await asked
            self._asked.discard(asked)
        exchange.gate = verdict.gate
        call = Call(self, exchange, verdict, weighed.needs[TOTAL], waited)
        if verdict.denial is not None:
            exchange.outcome = Outcome.DENIED
            call.record()
        return call

    async def rows(self) -> dict[str, Row]:
        return {row.limit.name: row for row in await self.shared.rows()}

    async def ship(self) -> None:
        """Its records into the ledger, as its backend `ledger` does."""
        if self._store is None:
            self._store = PostgresStore(self.url, Identity(self.directory, self.name))
        lines = [line for one in self.lines if (line := line_of(one)) is not None]
        self.shipped = await asyncio.to_thread(self._store.write, lines, None, again)

    async def starts_to_ship(self) -> None:
        """As after a start of its backend `ledger`."""
        if self._store is not None:
            await asyncio.to_thread(self._store.close)
            self._store = None
        await self.ship()

    # Ends

    async def stop(self) -> None:
        """In good order."""
        await self._end()
        await self.shared.leave()

    async def kill(self) -> None:
        """Nothing is told to anybody: what is left is its records."""
        await self._end()
        await self.db.close()

    async def _end(self) -> None:
        self.owner.close()
        if self._store is not None:
            await asyncio.to_thread(self._store.close)
            self._store = None
        if self._running is not None:
            self._running.cancel()
            with suppress(asyncio.CancelledError):
                await self._running
            self._running = None


class Call:
    def __init__(self, gate: Gate, exchange: Exchange, verdict: Ruled, needs: int, asked: bool) -> None:
        """`needs`: tokens, at most. `asked`: the owner was."""
        self.sidecar, self.exchange, self.verdict, self.needs, self.asked = gate, exchange, verdict, needs, asked

    @property
    def let_in(self) -> bool:
        return self.verdict.denial is None

    def end(self, tokens: int | None = 10) -> None:
        """`tokens`: that it took, of input and output together; None: nobody knows."""
        exchange = self.exchange
        exchange.outcome = Outcome.CLIENT_LEFT if tokens is None else Outcome.COMPLETE
        exchange.status = 200
        state = UsageState.ABSENT if tokens is None else UsageState.FINAL
        exchange.usage = Usage(usage_state=state, request_model="m", provider="openai")
        if tokens is not None:
            exchange.usage.input_tokens, exchange.usage.output_tokens, exchange.usage.total_tokens = 0, tokens, tokens
            dollars = Decimal(tokens * PICO_A_TOKEN) / PICO
            exchange.cost = {"total": f"{dollars:f}", "currency": "USD"}
        assert exchange.gate is not None
        for key, held in exchange.gate.reserved.items():
            one = PICO_A_TOKEN if key.startswith("cost") else 1
            self.sidecar.beyond += max((tokens or 0) - held // one, 0)
        self.sidecar.gate.ended(exchange.gate)
        self.record()

    def record(self) -> None:
        self.sidecar.owner.settle(self.exchange)
        self.sidecar.lines.append(encode(self.exchange, seq=len(self.sidecar.lines) + 1, instance=self.sidecar.slot))


@asynccontextmanager
async def gates(*made: Gate) -> AsyncIterator[None]:
    """Started, and stopped in the end."""
    try:
        for gate in made:
            await gate.start()
        yield
    finally:
        for gate in made:
            await gate.kill()


def settled(*made: Gate) -> Counters:
    """What the records of all of them say."""
    lines = [line for gate in made for line in gate.lines]
    return count_records(lines, made[0].charging, lambda record: True)


async def until(true: Callable[[], bool] | Callable[[], Awaitable[bool]], what: Callable[[], object] = str) -> None:
    try:
        async with asyncio.timeout(LIMIT_S):
            while True:
                found = true()
                if await found if isinstance(found, Awaitable) else found:
                    return
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"it never came to that: {what()}") from None


async def ask(url: str, statement: str) -> Any:
    """Of the database, the first value of the first row."""
    import asyncpg

    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()
