"""The admin port: is it alive, is it ready, what was counted, does the balance hold.

It listens on loopback unless told otherwise and changes nothing: that goes over a socket of its own (`control`). What
it shows is asked of `Instance` at the moment of the request, and what shows customers is read from the files
(`reports`); a failure to answer hurts no traffic: it is a 503 that says which file cannot be read, or a 500, and then
the log says where.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from aiohttp import web
from aiohttp.typedefs import Handler

import sidecar
from sidecar.model.balance import Balance
from sidecar.runtime.admin import page
from sidecar.runtime.admin.answers import json_answer
from sidecar.runtime.admin.guard import Guard
from sidecar.runtime.admin.reports import Reports
from sidecar.runtime.reports.parameters import near, quoted
from sidecar.spool import SpoolError
from sidecar.storage.files import StorageError

log = logging.getLogger("sidecar.admin")

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
    def fleet_balance(self) -> dict[str, object] | None: ...
    async def lanes_balance(self) -> dict[str, Any] | None: ...

    async def metrics(self) -> bytes: ...

    async def readiness(self) -> Readiness: ...

    async def times(self) -> list[dict[str, Any]]: ...


@web.middleware
async def _faults_told(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException:
        raise
    except (SpoolError, StorageError) as error:
        return json_answer({"error": str(error)}, status=503)
    except Exception:
        log.exception("what was asked at the admin port could not be answered")
        return json_answer({"error": "a mistake of the sidecar's own: its log says where"}, status=500)


@web.middleware
async def _unknown_told(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What is not there and what cannot be done, as JSON that says what can."""
    try:
        return await handler(request)
    except web.HTTPNotFound:
        there = sorted(route.resource.canonical for route in request.app.router.routes() if route.resource is not None)
        paths = list(dict.fromkeys(path for path in there if "{" not in path))
        return json_answer({"error": f"{quoted(request.path)} is not here{near(request.path, paths)}"}, status=404)
    except web.HTTPMethodNotAllowed as error:
        answer = json_answer(
            {"error": "this port only reads: GET it; what changes something are the commands"}, status=405
        )
        answer.headers["Allow"] = error.headers["Allow"]
        return answer


def application(instance: Instance, guard: Guard, reports: Reports | None = None) -> web.Application:
    """The page, how it is, what was counted, and what `reports` has, for whom `guard` lets through."""

    async def healthz(_: web.Request) -> web.Response:
        return json_answer({"status": "alive"})

    async def readyz(_: web.Request) -> web.Response:
        readiness = await instance.readiness()
        body = {
            "status": readiness.state,
            "version": sidecar.__version__,
            "notes": list(readiness.notes),
            "backends": list(readiness.backends),
        }
        return json_answer(body, status=200 if readiness.ready else 503)

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=await instance.metrics(), headers={"Content-Type": PROMETHEUS_TYPE})

    async def balance(_: web.Request) -> web.Response:
        found = await instance.balance()
        body = found.to_dict() | {"problems": found.problems, "notes": list(found.notes)}
        if (fleet := instance.fleet_balance()) is not None:
            body["fleet"] = fleet
        if (lanes := await instance.lanes_balance()) is not None:
            body["lanes"] = lanes
        return json_answer(body)

    async def times(_: web.Request) -> web.Response:
        return json_answer({"days": await instance.times()})

    app = web.Application(middlewares=[_faults_told, guard.middleware, _unknown_told])
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/balance", balance)
    app.router.add_get("/times", times)
    if reports is not None:
        reports.add_to(app)
    page.add(app)
    return app
