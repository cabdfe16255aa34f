"""The admin port: is it alive, is it ready, what was counted, does the balance hold.

It listens on loopback unless told otherwise and says nothing of the calls themselves. What it shows is
asked of `Instance` at the moment of the request; a failure to answer is a 500 here and hurts no traffic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import orjson
from aiohttp import web

from sidecar.balance import Balance

WISH_BYTES_MAX: Final = 4 << 20  # a redrive by id: 100,000 of them
WISHES: Final[dict[str, Any]] = {
    "backend": str,
    "reason": str,
    "ids": list,
    "since_s": (int, float),
    "resend_unknown": bool,
}
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


def application(instance: Instance) -> web.Application:
    """`/healthz` `/readyz` `/metrics` `/balance`, and `POST /redrive`."""

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

    async def redrive(request: web.Request) -> web.Response:
        # A form on a page elsewhere could be posted here by a browser; one with this content type cannot.
        if request.content_type != "application/json":
            return _json({"error": "send application/json"}, status=415)
        try:
            wish = read_wish(await request.read())
        except ValueError as error:
            return _json({"error": str(error)}, status=400)
        return _json({"redriven": await instance.redrive(**wish)})

    app = web.Application(client_max_size=WISH_BYTES_MAX)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/balance", balance)
    app.router.add_post("/redrive", redrive)
    return app


def read_wish(body: bytes) -> dict[str, Any]:
    """What is to be offered again. Raises `ValueError` that says what was expected."""
    wish = orjson.loads(body)
    if not isinstance(wish, dict):
        raise ValueError("expected an object")
    unknown = wish.keys() - WISHES.keys()
    if unknown:
        raise ValueError(f"{min(unknown)} is unknown: expected {', '.join(WISHES)}")
    for name, value in wish.items():
        if value is not None and not isinstance(value, WISHES[name]):
            raise ValueError(f"{name} has the wrong type")
    ids = wish.get("ids")
    if ids is not None and not all(isinstance(one, str) for one in ids):
        raise ValueError("ids: expected a list of ids")
    return {name: wish.get(name) for name in WISHES} | {"resend_unknown": bool(wish.get("resend_unknown"))}


def _json(body: object, *, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json")
