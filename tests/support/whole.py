"""The whole sidecar as its user runs it: a child process, configured by environment, found by its lock file."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import aiohttp

from sidecar.dev.mock_backends import Receiver

ROOT = Path(__file__).parent.parent.parent
START_LIMIT_S = 30.0  # a busy two-core machine with four suites on it needs up to five
STOP_LIMIT_S = 45.0
RELOAD_LIMIT_S = 60.0


class Whole:
    """One data directory, and the instance that runs on it, over restarts."""

    def __init__(self, data_dir: Path, upstream_url: str, **settings: str) -> None:
        self.data_dir = data_dir
        self.env = {
            "SIDECAR_UPSTREAM_URL": upstream_url,
            "SIDECAR_LISTEN": "127.0.0.1:0",
            "SIDECAR_ADMIN_LISTEN": "127.0.0.1:0",
            "SIDECAR_DATA_DIR": str(data_dir),
            "SIDECAR_LOG_LEVEL": "WARNING",
            **settings,
        }
        self.before: tuple[str, ...] = ()  # a command that becomes the one behind it
        self.arguments: tuple[str, ...] = ()  # of `serve`
        self.process: asyncio.subprocess.Process | None = None
        self.proxy_url = ""
        self.admin_url = ""
        self.log = data_dir.parent / f"{data_dir.name}.log"

    async def start(self) -> Self:
        """Start, and wait until it says in its lock file where it listens."""
        with self.log.open("ab") as log:
            program = (sys.executable, str(ROOT / "tests" / "support" / "serve.py"))
            command = (*self.before, *program, "serve", *self.arguments)
            self.process = await asyncio.create_subprocess_exec(
                *command, env=environment(self.env), cwd=ROOT, stderr=log, stdout=log
            )
        async with asyncio.timeout(START_LIMIT_S):
            while not self._find():
                if self.process.returncode is not None:
                    raise AssertionError(f"the sidecar ended with {self.process.returncode}:\n{self.log.read_text()}")
                await asyncio.sleep(0.01)
        return self

    def _find(self) -> bool:
        try:
            lock = json.loads((self.data_dir / "lock").read_text())
        except (OSError, ValueError):
            return False
        if self.process is None or lock.get("pid") != self.process.pid or not lock.get("proxy"):
            return False
        self.proxy_url, self.admin_url = lock["proxy"], lock["admin"]
        return True

    def children(self) -> dict[str, list[int]]:
        """The processes that it has started, by what they do: `meter` and `serve`."""
        assert self.process is not None
        found: dict[str, list[int]] = {"meter": [], "serve": []}
        for pid in children(self.process.pid):
            with contextlib.suppress(OSError):
                name = Path(f"/proc/{pid}/comm").read_text().strip().removeprefix("sidecar-")
                found.setdefault(name.partition("-")[0], []).append(pid)
        return found

    def memory_bytes(self) -> int:
        """Of all processes, what they share counted once (PSS)."""
        assert self.process is not None
        total = 0
        for pid in (self.process.pid, *children(self.process.pid)):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
        return total

    async def kill(self) -> None:
        """SIGKILL of everything at once, as at the end of a container: no last words."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGSTOP)  # so that it starts none anew meanwhile
            pids = children(self.process.pid)
            self.process.kill()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await self.process.wait()
            async with asyncio.timeout(STOP_LIMIT_S):
                while any(is_running(pid) for pid in pids):
                    await asyncio.sleep(0.005)

    async def kill_supervisor(self) -> None:
        """SIGKILL of the process that was started, and of no other."""
        assert self.process is not None
        self.process.kill()
        await self.process.wait()

    async def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask it to end, and answer its exit code."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(STOP_LIMIT_S):
            return await self.process.wait()

    async def get(self, path: str) -> Any:
        """JSON of the admin port."""
        async with aiohttp.ClientSession() as session, session.get(self.admin_url + path) as answer:
            return await answer.json()

    async def text(self, path: str) -> str:
        """What the admin port says, as it is."""
        async with aiohttp.ClientSession() as session, session.get(self.admin_url + path) as answer:
            return await answer.text()

    async def until_metric(self, begin: str, limit_s: float = 30.0) -> None:
        """Until there is a sample that begins so and is not 0."""
        async with asyncio.timeout(limit_s):
            while not any(
                line.startswith(begin) and float(line.rpartition(" ")[2]) > 0
                for line in (await self.text("/metrics")).splitlines()
            ):
                await asyncio.sleep(0.02)

    async def change(self, path: str, **body: Any) -> tuple[int, Any]:
        """A wish over the control socket: the status of its answer, and what it says."""
        # By a short name: the directory of a test may be too deep for a socket's address.
        fd = os.open(self.data_dir, os.O_RDONLY)
        try:
            connector = aiohttp.UnixConnector(f"/proc/self/fd/{fd}/control.sock")
            async with aiohttp.ClientSession(connector=connector) as session:
                async with session.post(f"http://control{path}", **body) as answer:
                    return answer.status, await answer.json()
        finally:
            os.close(fd)

    async def settled(self, *, limit_s: float = 30.0) -> dict[str, Any]:
        """The balance once nothing is open or pending any more."""
        balance: dict[str, Any] = {}
        try:
            async with asyncio.timeout(limit_s):
                while True:
                    balance = await self.get("/balance")
                    if balance["open"] == 0 and all(b["pending"] == 0 for b in balance["backends"].values()):
                        return balance
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"not settled within {limit_s:.0f} s: {balance}; {self.log.read_text()}") from None

    async def command(self, *arguments: str) -> tuple[int, str, str]:
        """Run one of the sidecar's commands with the same environment: exit code, output, errors."""
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

    async def records(self) -> list[dict[str, Any]]:
        code, out, err = await self.command("records", "--format", "ndjson")
        assert code == 0, err
        return [json.loads(line) for line in out.splitlines()]

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        if self.process is not None:
            await self.kill()


class Reloaded(Whole):
    """An instance with a TOML file that changes."""

    def __init__(self, tmp_path: Path, url: str, toml: str, **settings: str) -> None:
        self.config = tmp_path / "sidecar.toml"
        self.config.write_text(toml)
        base = {"SIDECAR_SUBSCRIBER": "header:x-tenant", "SIDECAR_CONFIG": str(self.config)}
        super().__init__(tmp_path / "data", url, **(base | settings))

    async def reload(self, toml: str | None = None) -> tuple[int, str]:
        """Exit code of the command, and what it printed."""
        if toml is not None:
            self.config.write_text(toml)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "sidecar",
            "reload",
            env=environment(self.env),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        async with asyncio.timeout(RELOAD_LIMIT_S):
            out, _ = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode()


@asynccontextmanager
async def running_receiver() -> AsyncIterator[tuple[Receiver, str]]:
    """The stand-in backends in the test's own loop, and their address."""
    receiver = Receiver()
    try:
        yield receiver, await receiver.start()
    finally:
        await receiver.aclose()


def children(pid: int) -> list[int]:
    """The processes that this one has started and that run; none where it has ended."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def is_running(pid: int) -> bool:
    """Not gone, and no zombie that nobody has collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def suspend(pid: int) -> None:
    """SIGSTOP, and wait until all threads stand: one on another core goes on for a moment, and may still answer."""
    os.kill(pid, signal.SIGSTOP)
    ends = time.monotonic() + STOP_LIMIT_S
    while any(is_moving(thread) for thread in Path(f"/proc/{pid}/task").iterdir()):
        assert time.monotonic() < ends, f"process {pid} does not stop"
        time.sleep(0.001)


def is_moving(thread: Path) -> bool:
    try:
        return (thread / "stat").read_text().rpartition(")")[2].split()[0] not in "TZX"
    except OSError:
        return False  # it has ended


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Ours and nothing of the caller's that could reach in."""
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV", "PYTHONPATH")}
    return kept | {"PYTHONDONTWRITEBYTECODE": "1"} | dict(settings)
