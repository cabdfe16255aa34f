"""Talking to the instance that runs on a data directory: questions go to the admin port that its lock names, what
changes something goes over the control socket beside the lock.

A proxy set in the environment is never used: the admin port is on this machine.
"""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from sidecar.cli.shared import EXIT_FAILED, EXIT_USAGE, CommandError
from sidecar.runtime.instance_lock import running
from sidecar.settings import Secret
from sidecar.storage.sockets import CONTROL, connect, is_socket

LIMIT_S: Final = 10.0  # for questions; what is asked to do something says its own
ANYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # "every interface" is no address to call


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, limit_s: float) -> None:
        super().__init__("localhost", timeout=limit_s)
        self._path, self._limit_s = path, limit_s

    def connect(self) -> None:
        self.sock = connect(self._path, timeout_s=self._limit_s)


def ask(data_dir: Path, path: str, *, limit_s: float = LIMIT_S, token: Secret | None = None) -> Any:
    """What the admin port of the running instance answers to a GET, as JSON; None where none runs. `token`: for what
    shows customers, where one is set."""
    found = _get(data_dir, path, limit_s, token)
    return None if found is None else _json(*found)


def counter(data_dir: Path, series: str, *, limit_s: float = LIMIT_S) -> int | None:
    """One series of the running instance's metrics, as it is written there; None where none runs."""
    found = _get(data_dir, "/metrics", limit_s)
    if found is None:
        return None
    for line in found[1].decode("utf-8", "replace").splitlines():
        name, _, value = line.rpartition(" ")
        if name == series:
            return int(float(value))
    return 0


def _get(data_dir: Path, path: str, limit_s: float, token: Secret | None = None) -> tuple[str, bytes] | None:
    note = running(data_dir)
    if note is None:
        return None
    if note.admin is None:
        raise CommandError(f"process {note.pid} is starting on {data_dir} and has no admin port yet: try again")
    return _exchange(_connection(note.admin, limit_s), f"process {note.pid}", note.admin, path, token=token)


def change(data_dir: Path, path: str, request: Any, *, limit_s: float) -> Any:
    """What the running instance answers to a change (see `runtime.admin.control`), as JSON; None where none runs."""
    note = running(data_dir)
    if note is None:
        return None
    socket = data_dir / CONTROL
    if not is_socket(socket):
        raise CommandError(
            f"process {note.pid} runs on {data_dir} and has no {CONTROL} in it (it is starting or stopping, or its log "
            "says why): try again, or stop it first"
        )
    return _json(*_exchange(_UnixConnection(socket, limit_s), f"process {note.pid}", str(socket), path, request))


def _exchange(
    connection: http.client.HTTPConnection,
    who: str,
    where: str,
    path: str,
    request: Any = None,
    token: Secret | None = None,
) -> tuple[str, bytes]:
    """Whom it was asked of, and the body of the answer."""
    try:
        if request is None:
            headers = {} if token is None else {"Authorization": f"Bearer {token.reveal()}"}
            connection.request("GET", path, headers=headers)
        else:
            connection.request("POST", path, json.dumps(request).encode(), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
    except PermissionError:
        raise CommandError(f"{where} may only be used by the user whose process it is ({who})") from None
    except (OSError, http.client.HTTPException) as error:
        raise CommandError(f"{who} does not answer at {where}{path}: {error}") from None
    finally:
        connection.close()
    if answer.status in (400, 409) and request is not None:
        # What was asked is wrong or is of no use now, and not the instance: only that is worth saying.
        raise CommandError(_reason(content), EXIT_USAGE if answer.status == 400 else EXIT_FAILED)
    if answer.status >= 400:
        raise CommandError(f"{where}{path} answered {answer.status}: {_reason(content)}")
    return where + path, content


def _json(where: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        raise CommandError(f"{where} answered with no JSON: is this a metering sidecar?") from None


def _connection(admin: str, limit_s: float) -> http.client.HTTPConnection:
    if admin.startswith("unix:"):
        return _UnixConnection(Path(admin.removeprefix("unix:")), limit_s)
    parts = urlsplit(admin if "://" in admin else f"http://{admin}")
    host = parts.hostname or "127.0.0.1"
    return http.client.HTTPConnection(ANYWHERE.get(host, host), parts.port or 80, timeout=limit_s)


def _reason(content: bytes) -> str:
    try:
        said = json.loads(content)
        return str(said.get("error") or said.get("message") or "no reason given")
    except (ValueError, AttributeError):
        return "no reason given"
