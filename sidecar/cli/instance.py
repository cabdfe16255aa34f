"""Talking to the instance that runs on a data directory, through the admin port that its lock names.

A proxy set in the environment is never used: the admin port is on this machine.
"""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from sidecar.cli.shared import CommandError
from sidecar.lock import running

LIMIT_S: Final = 10.0  # for questions; what is asked to do something says its own
ANYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # "every interface" is no address to call


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, limit_s: float) -> None:
        super().__init__("localhost", timeout=limit_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def ask(data_dir: Path, path: str, *, method: str = "GET", body: Any = None, limit_s: float = LIMIT_S) -> Any:
    """The running instance's JSON answer; None where none is running."""
    found = _answer(data_dir, path, method, body, limit_s)
    if found is None:
        return None
    admin, content = found
    try:
        return json.loads(content)
    except ValueError:
        raise CommandError(f"{admin}{path} answered with no JSON: is this a metering sidecar?") from None


def counter(data_dir: Path, series: str, *, limit_s: float = LIMIT_S) -> int | None:
    """One series of the running instance's metrics, as it is written there; None where none is running."""
    found = _answer(data_dir, "/metrics", "GET", None, limit_s)
    if found is None:
        return None
    for line in found[1].decode("utf-8", "replace").splitlines():
        name, _, value = line.rpartition(" ")
        if name == series:
            return int(float(value))
    return 0


def _answer(data_dir: Path, path: str, method: str, body: Any, limit_s: float) -> tuple[str, bytes] | None:
    note = running(data_dir)
    if note is None:
        return None
    if note.admin is None:
        raise CommandError(f"process {note.pid} is starting on {data_dir} and has no admin port yet: try again")
    connection = _connection(note.admin, limit_s)
    try:
        payload = None if body is None else json.dumps(body).encode()
        connection.request(method, path, payload, {"Content-Type": "application/json"} if payload else {})
        answer = connection.getresponse()
        content = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise CommandError(f"process {note.pid} does not answer at {note.admin}{path}: {error}") from None
    finally:
        connection.close()
    if answer.status >= 400:
        raise CommandError(f"{note.admin}{path} answered {answer.status}: {_reason(content)}")
    return note.admin, content


def _connection(admin: str, limit_s: float) -> http.client.HTTPConnection:
    if admin.startswith("unix:"):
        return _UnixConnection(admin.removeprefix("unix:"), limit_s)
    parts = urlsplit(admin if "://" in admin else f"http://{admin}")
    host = parts.hostname or "127.0.0.1"
    return http.client.HTTPConnection(ANYWHERE.get(host, host), parts.port or 80, timeout=limit_s)


def _reason(content: bytes) -> str:
    try:
        said = json.loads(content)
        return str(said.get("error") or said.get("message") or "no reason given")
    except (ValueError, AttributeError):
        return "no reason given"
