"""The admin port: is it alive, is it ready, what was counted, does the balance hold.

It listens on loopback unless told otherwise, says nothing of the calls themselves, and changes nothing: that goes over
a socket of its own (`control`). What it shows is asked of `Instance` at the moment of the request; a failure to answer
is a 500 here and hurts no traffic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from aiohttp import web

from sidecar.model.balance import Balance
from sidecar.runtime.admin.answers import json_answer
from sidecar.runtime.admin.guard import Guard

PROMETHEUS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """`ready` decides between 200 and 503; `state` and `notes` say why to a person."""

    ready: bool
    state: str  # ok, degraded, full, stopping
    notes: Sequence[str] = field(default_factory=tuple)
    backends: Sequence[dict[str, object]] = field(default_factory=tuple)  # how each does, for programs


class Instance(Protocol):
    """What the admin port asks of the whole."""

    async def balance(self) -> Balance: ...

    async def metrics(self) -> bytes: ...

    async def readiness(self) -> Readiness: ...

    async def limits(self) -> list[dict[str, Any]]: ...


def application(instance: Instance, guard: Guard) -> web.Application:
    """`/healthz` `/readyz` `/metrics` `/balance` `/limits`, for whom `guard` lets through."""

    async def healthz(_: web.Request) -> web.Response:
        return json_answer({"status": "alive"})

    async def readyz(_: web.Request) -> web.Response:
        readiness = await instance.readiness()
        body = {"status": readiness.state, "notes": list(readiness.notes), "backends": list(readiness.backends)}
        return json_answer(body, status=200 if readiness.ready else 503)

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=await instance.metrics(), headers={"Content-Type": PROMETHEUS_TYPE})

    async def balance(_: web.Request) -> web.Response:
        found = await instance.balance()
        return json_answer(found.to_dict() | {"problems": found.problems, "notes": list(found.notes)})

    async def limits(_: web.Request) -> web.Response:
        return json_answer({"limits": await instance.limits()})

    app = web.Application(middlewares=[guard.middleware])
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/balance", balance)
    app.router.add_get("/limits", limits)
    return app
