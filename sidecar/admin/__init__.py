"""The admin port: is it alive, is it ready, what was counted, does the balance hold.

It listens on loopback unless told otherwise and says nothing of the calls themselves. What it shows is
asked of `Instance` at the moment of the request; a failure to answer is a 500 here and hurts no traffic.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import orjson
from aiohttp import web

from sidecar.balance import Balance

WISH_BYTES_MAX: Final = 4 << 20  # a redrive by id: 100,000 of them
COMPLAINTS_MAX: Final = 1000  # in one request: each is a scan of the requests that are remembered
WISHES: Final[dict[str, Any]] = {
    "backend": str,
    "reason": str,
    "ids": list,
    "since_s": (int, float),
    "resend_unknown": bool,
}
CANCEL: Final[dict[str, Any]] = {"id": str, "backend": str}
COMPLAINT: Final[dict[str, Any]] = {"backend": str, "named": list}
PROMETHEUS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """`ready` decides between 200 and 503; `state` and `notes` say why to a person."""

    ready: bool
    state: str  # ok, degraded, full, stopping
    notes: Sequence[str] = field(default_factory=tuple)


class Instance(Protocol):
    """What the admin port asks of the whole."""

    async def balance(self) -> Balance: ...

    async def metrics(self) -> bytes: ...

    async def readiness(self) -> Readiness: ...

    async def redrive(
        self,
        *,
        backend: str | None,
        reason: str | None,
        ids: Sequence[str] | None,
        since_s: float | None,
        resend_unknown: bool,
    ) -> int: ...

    async def cancel(self, one: str, *, backend: str | None) -> list[dict[str, Any]]: ...

    async def complain(self, backend: str, named: Sequence[tuple[str, str]]) -> list[dict[str, Any]]: ...


def application(instance: Instance) -> web.Application:
    """`/healthz` `/readyz` `/metrics` `/balance`, and `POST` of `/redrive`, `/cancel` and `/complain`."""

    async def healthz(_: web.Request) -> web.Response:
        return _json({"status": "alive"})

    async def readyz(_: web.Request) -> web.Response:
        readiness = await instance.readiness()
        body = {"status": readiness.state, "notes": list(readiness.notes)}
        return _json(body, status=200 if readiness.ready else 503)

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=await instance.metrics(), headers={"Content-Type": PROMETHEUS_TYPE})

    async def balance(_: web.Request) -> web.Response:
        found = await instance.balance()
        return _json(found.to_dict() | {"problems": found.problems})

    async def redrive(wish: bytes) -> object:
        return {"redriven": await instance.redrive(**read_wish(wish))}

    async def cancel(wish: bytes) -> object:
        return {"outcomes": await instance.cancel(**read_cancel(wish))}

    async def complain(wish: bytes) -> object:
        return {"outcomes": await instance.complain(**read_complaint(wish))}

    app = web.Application(client_max_size=WISH_BYTES_MAX)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/balance", balance)
    for change in (redrive, cancel, complain):
        app.router.add_post(f"/{change.__name__}", _changing(change))
    return app


def _changing(do: Callable[[bytes], Awaitable[object]]) -> Callable[[web.Request], Awaitable[web.Response]]:
    """What changes something takes JSON only, so that no page elsewhere can have a browser post it here as a form."""

    async def handle(request: web.Request) -> web.Response:
        if request.content_type != "application/json":
            return _json({"error": "send application/json"}, status=415)
        try:
            return _json(await do(await request.read()))
        except WishError as error:
            return _json({"error": str(error)}, status=400)

    return handle


class WishError(ValueError):
    """What was asked for cannot be read. The text says what was expected."""


def read_wish(body: bytes) -> dict[str, Any]:
    """What is to be offered again. Raises `WishError`."""
    wish = _read(body, WISHES)
    ids = wish["ids"]
    if ids is not None and not all(isinstance(one, str) for one in ids):
        raise WishError("ids: expected a list of ids")
    return wish | {"resend_unknown": bool(wish["resend_unknown"])}


def read_cancel(body: bytes) -> dict[str, Any]:
    """What is to be taken back. Raises `WishError`."""
    wish = _read(body, CANCEL)
    if not wish["id"]:
        raise WishError("id: expected that of a record or an event")
    return {"one": wish["id"], "backend": wish["backend"]}


def read_complaint(body: bytes) -> dict[str, Any]:
    """What a backend says it did not bill: its name, and pairs of event id and code. Raises `WishError`."""
    wish = _read(body, COMPLAINT)
    named = wish["named"]
    if not wish["backend"]:
        raise WishError("backend: expected the name of the one that complains")
    if not named or len(named) > COMPLAINTS_MAX or not all(_is_pair(one) for one in named):
        raise WishError(f"named: expected 1 to {COMPLAINTS_MAX} pairs of event id and code")
    return {"backend": wish["backend"], "named": [(one[0], one[1]) for one in named]}


def _is_pair(one: object) -> bool:
    return isinstance(one, list) and len(one) == 2 and all(isinstance(part, str) for part in one)


def _read(body: bytes, fields: dict[str, Any]) -> dict[str, Any]:
    """An object of these fields; those that are not there are None."""
    try:
        wish = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise WishError("expected JSON") from None
    if not isinstance(wish, dict):
        raise WishError("expected an object")
    unknown = wish.keys() - fields.keys()
    if unknown:
        raise WishError(f"{min(unknown)} is unknown: expected {', '.join(fields)}")
    for name, value in wish.items():
        if value is not None and not isinstance(value, fields[name]):
            raise WishError(f"{name} has the wrong type")
    return {name: wish.get(name) for name in fields}


def _json(body: object, *, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json")
