"""A real PgBouncer in transaction mode before a database, for a test. Skips it, by name, where there is none."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest
from support.ports import free_port

# Fewer connections to the server than a sidecar has to it: whoever relies on a session is found out.
CONNECTIONS = 3
WAIT_S = 30.0


@contextmanager
def pgbouncer(url: str, *, max_client_conn: int = 200) -> Iterator[str]:
    """The URL of the same database, through it; `max_client_conn`: so many clients at once."""
    program = shutil.which("pgbouncer") or shutil.which("/usr/sbin/pgbouncer")
    if program is None:
        pytest.skip("pgbouncer is not installed (Debian: apt-get install pgbouncer)")
    parts = urlsplit(url)
    port = free_port()
    directory = Path(tempfile.mkdtemp(prefix="pgbouncer-"))
    (directory / "ini").write_text(
        # `auth_type = any` asks nobody who it is, and wants the server's user said.
        f"[databases]\n* = host={parts.hostname} port={parts.port} user={parts.username}\n"
        "[pgbouncer]\nlisten_addr = 127.0.0.1\nauth_type = any\npool_mode = transaction\n"
        f"listen_port = {port}\nunix_socket_dir =\ndefault_pool_size = {CONNECTIONS}\n"
        f"max_client_conn = {max_client_conn}\n"
    )
    user: dict[str, Any] = {}
    if os.geteuid() == 0:  # it refuses to run as root
        user = {"user": "nobody", "group": "nogroup"}
        for path in (directory, *directory.iterdir()):
            shutil.chown(path, "nobody", "nogroup")
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen([program, str(directory / "ini")], stdout=log, stderr=log, **user)
    try:
        ends = time.monotonic() + WAIT_S
        while not _listens(port):
            assert process.poll() is None, (directory / "log").read_text()
            assert time.monotonic() < ends, "PgBouncer did not start in time"
            time.sleep(0.02)
        yield urlunsplit(parts._replace(netloc=f"{parts.username}@127.0.0.1:{port}"))
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(directory, ignore_errors=True)


def _listens(port: int) -> bool:
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0
