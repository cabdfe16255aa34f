"""`metering-sidecar collect` as a child process, and records in a stream as sidecars put them there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from support.nats_server import client
from support.whole import ROOT, START_LIMIT_S, STOP_LIMIT_S, environment

from sidecar.backends import backend_settings
from sidecar.cli.collect import provision
from sidecar.model.record import Record
from sidecar.runtime import collect
from sidecar.runtime.instance_lock import DataLock
from sidecar.settings import Settings, load
from sidecar.spool import SpoolReader


class Collector:
    """One data directory, and who collects into it, over restarts."""

    def __init__(self, data_dir: Path, nats_url: str, stream: str = "S", **settings: str) -> None:
        self.data_dir = data_dir
        self.env = {
            "SIDECAR_DATA_DIR": str(data_dir),
            "SIDECAR_ADMIN_LISTEN": "127.0.0.1:0",
            "SIDECAR_LOG_LEVEL": "WARNING",
            "SIDECAR_NATS_URL": nats_url,
            "SIDECAR_NATS_STREAM": stream,
            "SIDECAR_NATS_SUBJECT": f"{stream}.records",
            "SIDECAR_NATS_REPLICAS": "1",
            "SIDECAR_NATS_TIMEOUT": "5s",
            "SIDECAR_COLLECT_REMEMBER": "3650d",  # the records of tests bear old times
            **settings,
        }
        self.process: asyncio.subprocess.Process | None = None
        self.admin_url = ""
        self.log = data_dir.parent / f"{data_dir.name}.log"

    async def spawn(self) -> asyncio.subprocess.Process:
        with self.log.open("ab") as log:
            command = (sys.executable, str(ROOT / "tests" / "support" / "serve.py"), "collect")
            self.process = await asyncio.create_subprocess_exec(
                *command, env=environment(self.env), cwd=ROOT, stderr=log, stdout=log
            )
        return self.process

    async def start(self) -> Collector:
        """Start, and wait until it says in its lock file where it is asked."""
        process = await self.spawn()
        async with asyncio.timeout(START_LIMIT_S):
            while not self._find():
                if process.returncode is not None:
                    raise AssertionError(f"it ended with {process.returncode}:\n{self.log.read_text()}")
                await asyncio.sleep(0.01)
        return self

    def _find(self) -> bool:
        try:
            lock = json.loads((self.data_dir / "lock").read_text())
        except (OSError, ValueError):
            return False
        if self.process is None or lock.get("pid") != self.process.pid or not lock.get("admin"):
            return False
        self.admin_url = lock["admin"]
        return True

    async def ended(self) -> int:
        assert self.process is not None
        async with asyncio.timeout(START_LIMIT_S):
            return await self.process.wait()

    async def stop(self) -> int:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(STOP_LIMIT_S):
            return await self.process.wait()

    async def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    async def get(self, path: str) -> tuple[int, Any]:
        async with aiohttp.ClientSession() as session, session.get(self.admin_url + path) as answer:
            return answer.status, await answer.json()

    async def metric(self, begin: str) -> float:
        async with aiohttp.ClientSession() as session, session.get(self.admin_url + "/metrics") as answer:
            lines = (await answer.text()).splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(begin))

    async def until_recorded(self, count: int, limit_s: float = 30.0) -> dict[str, Any]:
        """Until so many records are here and delivered; the balance."""
        balance: dict[str, Any] = {}
        try:
            async with asyncio.timeout(limit_s):
                while True:
                    with contextlib.suppress(aiohttp.ClientError):
                        _, balance = await self.get("/balance")
                        pending = sum(one["pending"] for one in balance["backends"].values())
                        if balance["recorded"] >= count and not pending:
                            return balance
                    await asyncio.sleep(0.02)
        except TimeoutError:
            said = self.log.read_text() if self.log.exists() else ""  # of a process of its own
            raise AssertionError(f"not within {limit_s:.0f} s: {count} recorded: {balance}; {said}") from None

    async def until(self, path: str, wanted: int, limit_s: float = 30.0) -> Any:
        """Until a page has this status; what it says."""
        async with asyncio.timeout(limit_s):
            while True:
                status, body = await self.get(path)
                if status == wanted:
                    return body
                await asyncio.sleep(0.02)

    async def command(self, *arguments: str) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "sidecar", *arguments),
            env=environment(self.env),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    def ids(self) -> list[str]:
        """Of all records that are here, in order."""
        with SpoolReader(self.data_dir) as reader:
            return [json.loads(line)["id"] for line in reader.lines()]

    def ledger_calls(self) -> int:
        """As the ledger adds them up."""
        with contextlib.closing(sqlite3.connect(self.data_dir / "ledger.db")) as db:
            return int(db.execute("SELECT sum(calls) FROM hourly").fetchone()[0])


class CollectorHere(Collector):
    """The same in the test's own loop, which starts in no time."""

    _task: asyncio.Task[None]

    async def start(self) -> Collector:
        self._started, self._stop = asyncio.Event(), asyncio.Event()
        self._task = asyncio.create_task(self._run())
        started = asyncio.create_task(self._started.wait())
        await asyncio.wait((started, self._task), return_when=asyncio.FIRST_COMPLETED)
        started.cancel()
        if self._task.done():
            self._task.result()
        return self

    @property
    def settings(self) -> Settings:
        return load(self.env, backend_settings=backend_settings(), serving=False)

    async def _run(self) -> None:
        with DataLock.take(self.data_dir) as lock:
            await self._collect(lock)

    async def _collect(self, lock: DataLock) -> None:
        async with collect.collecting(self.settings, lock) as whole:
            self.admin_url = whole.admin_url
            self._started.set()
            assert whole.reader is not None
            await whole.reader.run(self._stop)

    async def stop(self) -> int:
        self._stop.set()
        async with asyncio.timeout(STOP_LIMIT_S):
            await self._task
        return 0

    async def kill(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def provision(self) -> int:
        """`collect --provision` with these settings."""
        return await provision(self.settings)


@asynccontextmanager
async def collecting(data_dir: Path, nats_url: str, stream: str = "S", **settings: str) -> AsyncIterator[CollectorHere]:
    collector = CollectorHere(data_dir, nats_url, stream, **settings)
    try:
        await collector.start()
        yield collector
    finally:
        await collector.kill()


async def publish(url: str, records: Iterable[Record | bytes], stream: str = "S", *, ids: bool = True) -> None:
    """As the backend does, or without ids, so that a repeat is stored twice in the stream."""
    connection = await client(url)
    try:
        context = connection.jetstream()
        for one in records:
            known = isinstance(one, Record) and ids
            headers = {"Nats-Msg-Id": one.id} if isinstance(one, Record) and known else None
            await context.publish(
                f"{stream}.records", one.json if isinstance(one, Record) else one, headers=headers, timeout=5
            )
    finally:
        await connection.close()
