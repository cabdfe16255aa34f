"""The receiver's one port: finds the route of a call, lets faults and vendor have their say, keeps what was taken.

For one call, in this order: refuse what is under way already, wait (a slow fault happens *while* the call is under
way), fail before (nothing is taken), let the vendor answer, write the journal, fail after (it is taken), answer. The
vendor's step and the journal's are one turn of the event loop, so what `/_received` lists is what was answered or
lost on the way back, never half of it.

No credential leaves here: wherever a caller's own key turns up in what it sent, `[key]` is kept instead.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import re
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson
from aiohttp import web

from sidecar.dev.mock_backends import asked
from sidecar.dev.mock_backends.contract import Answer, Call, Route, Terms, Unit, Vendor, Verdict
from sidecar.dev.mock_backends.faults import Do, Fault, FaultError, Faults, GateLie, lie_of, parse
from sidecar.dev.mock_backends.store import TAKEN_BYTES_MAX, Store, StoreError, Taken
from sidecar.dev.mock_backends.vendors import VENDORS
from sidecar.runtime.signals import stop_event

BODY_BYTES_MAX: Final = (
    40 * 2**20
)  # above the largest limit among the vendors (Flexprice, 32 MiB), so that it can say no itself
REFUSED_TEXT_CHARS_MAX: Final = 2_000  # of a body that is no JSON, enough to see what it was
SHUTDOWN_S: Final = 0.5  # calls that a fault holds back are not waited for
SECRET_CHARS_MIN: Final = 8  # a shorter key is replaced only where it is the whole text, not inside words
_PARAMETER: Final = re.compile(r"{(\w+)}")


class _Stand(NamedTuple):
    backend: str
    vendor: Vendor
    route: Route


class Receiver:
    """All vendors on one port. In tests: `url = await receiver.start()`, then look at `received` and set `faults`.

    `terms` holds, by backend name, the one good key and the webhook secret. `now` is the clock for windows.
    """

    def __init__(
        self,
        *,
        store: Path | None = None,
        terms: Mapping[str, Terms] | None = None,
        now: Callable[[], float] = time.time,
        taken_bytes_max: int = TAKEN_BYTES_MAX,
    ) -> None:
        given = dict(terms or {})
        unknown = [name for name in given if name not in {row.backend for row in VENDORS}]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no backend of the receiver; known are {', '.join(backends())}")
        self.faults = Faults()
        self.url = ""  # once it listens
        self._store = Store(store, taken_bytes_max=taken_bytes_max)
        self._now = now
        self._exact: dict[tuple[str, str], list[_Stand]] = defaultdict(list)
        self._patterns: list[tuple[str, re.Pattern[str], _Stand]] = []
        self._under_way: set[tuple[str, str]] = set()
        self._runner: web.AppRunner | None = None
        for row in VENDORS:
            vendor = row.vendor(self._store.memory(row.backend), given.get(row.backend, Terms()))
            for route in vendor.routes:
                self._add(_Stand(row.backend, vendor, route))

    def __repr__(self) -> str:
        return f"<Receiver: {len(self._store)} taken, {len(self._under_way)} under way>"

    @property
    def received(self) -> list[Taken]:
        """What was taken and refused so far, oldest first."""
        return self._store.taken()

    def billed(self, backend: str) -> list[Any]:
        """What this backend would bill: the bodies of what was delivered, lists laid flat."""
        rows = [row.body for row in self._store.taken(backend) if row.verdict == Verdict.DELIVERED]
        return [item for body in rows for item in (body if isinstance(body, list) else [body])]

    def forget(self) -> None:
        """Everything that was taken, also for de-duplication."""
        self._store.forget()

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Open the store and listen; the base address. Port 0 takes any free one. Raises `StoreError`, `OSError`."""
        self._store.open()
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        app.router.add_get("/_received", self._list)
        app.router.add_delete("/_received", self._forget)
        app.router.add_get("/_claim_key", self._claim_key)
        app.router.add_get("/_faults", self._faults)
        app.router.add_post("/_faults", self._set_faults)
        app.router.add_delete("/_faults", self._set_faults)
        app.router.add_route("*", "/{path:.*}", self._call)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError:
            await self.aclose()
            raise
        bound_host, bound_port = self._runner.addresses[0][:2]
        self.url = f"http://{f'[{bound_host}]' if ':' in bound_host else bound_host}:{bound_port}"
        return self.url

    async def aclose(self) -> None:
        """Stop listening, drop what is under way, close the store. May be called twice."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        self._store.close()

    def _add(self, stand: _Stand) -> None:
        method, path = stand.route.method, stand.route.path
        if _PARAMETER.search(path):
            parts = (
                f"(?P<{part[1:-1]}>[^/]+)" if part.startswith("{") else re.escape(part) for part in path.split("/")
            )
            self._patterns.append((method, re.compile("/".join(parts)), stand))
        else:
            self._exact[method, path].append(stand)

    # -- a vendor's call

    async def _call(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Content-Encoding", "identity") != "identity":
            return _web(
                Answer.json(415, {"error": "no vendor here documents compressed bodies: send the body as it is"})
            )
        if not all(_is_text(value) for value in request.headers.values()):
            return _web(Answer.json(400, {"error": "a header's value is no UTF-8"}))
        call = Call(
            request.method, request.path, dict(request.query), request.headers, await request.read(), self._now()
        )
        stand, call = self._find(call)
        if stand is None:
            return _web(self._nowhere(call))
        if self._store.is_full:
            return _web(Answer.json(507, {"error": "the receiver is full: DELETE /_received makes room"}))
        name = stand.route.exclusive(call) if stand.route.exclusive else None
        if name is None:
            return await self._answer(request, call, stand)
        if (stand.backend, name) in self._under_way:
            assert stand.route.busy is not None, "a route that excludes has an answer for the second"
            return self._settle(call, stand, stand.route.busy(call))
        self._under_way.add((stand.backend, name))
        try:
            return await self._answer(request, call, stand)
        finally:
            self._under_way.discard((stand.backend, name))

    async def _answer(self, request: web.Request, call: Call, stand: _Stand) -> web.StreamResponse:
        fate = self.faults.decide(stand.backend, call.path)
        if fate.delay_s:
            await asyncio.sleep(fate.delay_s)
        fault = fate.fault
        if fault is not None and fault.do is Do.CUT_BEFORE:
            return _cut(request)
        if fault is not None and fault.do is Do.STATUS:
            return self._fail(call, stand, fault)
        if fault is not None and fault.do is Do.LIE and fault.lie in list(GateLie):
            lies = stand.route.lies
            return self._settle(call, stand, self._ask(call, stand) if lies is None else lies(call, fault.lie))
        if fault is not None and fault.do is Do.LIE:
            status, body, content_type = lie_of(fault.lie, stand.vendor.fault_body(500))
            return _web(Answer(status, body, content_type))
        response = self._settle(call, stand, self._ask(call, stand))
        if fault is not None and fault.do is Do.CUT_AFTER:
            return _cut(request)
        if fault is not None:
            return self._fail(call, stand, fault)
        return response

    def _ask(self, call: Call, stand: _Stand) -> Answer:
        try:
            return stand.route.handle(call)
        except BaseException:
            self._store.discard()
            raise

    def _settle(self, call: Call, stand: _Stand, answer: Answer) -> web.Response:
        """Keep what the vendor took, then let its answer go."""
        units = answer.units
        if not units and answer.status >= 400 and call.method == "POST":
            units = (Unit(None, _readable(call), _meaning(answer.status)),)
        secrets = _credentials(call)
        in_body = secrets if _may_hold(call.body, secrets) else ()
        path = f"{call.path}?{'&'.join(f'{k}={v}' for k, v in call.query.items())}" if call.query else call.path
        at = datetime.fromtimestamp(call.at_s, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        try:
            self._store.commit(
                stand.backend,
                _scrub(path, secrets),
                [Unit(_scrub(u.key, secrets), _scrub(u.body, in_body), u.verdict) for u in units],
                at,
            )
        except StoreError as error:
            return _web(Answer.json(500, {"error": str(error)}))
        return _web(answer)

    def _fail(self, call: Call, stand: _Stand, fault: Fault) -> web.Response:
        headers = {} if fault.retry_after_s is None else {"Retry-After": str(fault.retry_after_s)}
        answer = Answer(fault.status, stand.vendor.fault_body(fault.status), headers=headers)
        if stand.route.failed is not None:
            stand.route.failed(call, answer)
            self._store.commit(stand.backend, call.path, (), "")
        return _web(answer)

    def _find(self, call: Call) -> tuple[_Stand | None, Call]:
        stands = self._exact.get((call.method, call.path), ())
        for stand in stands:
            if stand.route.when is None or stand.route.when(call):
                return stand, call
        for method, pattern, stand in self._patterns:
            if method == call.method and (match := pattern.fullmatch(call.path)):
                query = {**call.query, **match.groupdict()}
                return stand, Call(call.method, call.path, query, call.headers, call.body, call.at_s)
        return None, call

    def _nowhere(self, call: Call) -> Answer:
        methods = sorted(method for method, path in self._exact if path == call.path)
        if methods and call.method not in methods:
            return Answer.json(405, {"error": f"{call.path} takes {', '.join(methods)}"}, Allow=", ".join(methods))
        known = sorted(f"{method} {path}" for method, path in self._exact)
        return Answer.json(404, {"error": f"no backend here speaks {call.method} {call.path}", "known": known})

    # -- the receiver's own

    async def _list(self, request: web.Request) -> web.Response:
        body = b"".join(self._store.lines(request.query.get("backend")))
        return web.Response(body=body, content_type="application/x-ndjson")

    async def _claim_key(self, request: web.Request) -> web.Response:
        return web.Response(text=asked.PUBLIC_KEY, content_type="application/x-pem-file")

    async def _forget(self, request: web.Request) -> web.Response:
        self.forget()
        return web.Response(status=204)

    async def _faults(self, request: web.Request) -> web.Response:
        return _web(Answer.json(200, self.faults.status()))

    async def _set_faults(self, request: web.Request) -> web.Response:
        try:
            rules = [] if request.method == "DELETE" else parse(orjson.loads(await request.read()))
        except FaultError as error:
            return _web(Answer.json(400, {"error": str(error)}))
        except orjson.JSONDecodeError as error:
            return _web(Answer.json(400, {"error": f"the order is no JSON: {error.msg}"}))
        self.faults.set(*rules)
        return _web(Answer.json(200, self.faults.status()))


def backends() -> list[str]:
    """The backends that a receiver stands in for, in the order of the table."""
    return list(dict.fromkeys(row.backend for row in VENDORS))


async def serve(
    host: str = "127.0.0.1",
    port: int = 9700,
    *,
    store: Path | None = None,
    terms: Mapping[str, Terms] | None = None,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Run until SIGINT or SIGTERM (or cancellation); `ready` is told the address once it listens."""
    receiver = Receiver(store=store, terms=terms)
    try:
        with stop_event() as stop:
            ready(await receiver.start(host, port))
            await stop.wait()
    finally:
        await receiver.aclose()


def _web(answer: Answer) -> web.Response:
    headers = dict(answer.headers)
    if answer.body and answer.content_type:
        headers["Content-Type"] = answer.content_type
    return web.Response(status=answer.status, body=answer.body, headers=headers)


def _cut(request: web.Request) -> web.Response:
    """Close without a word. The response is for aiohttp, which finds nobody to write it to."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


def _is_text(value: str) -> bool:
    """Whether a header's value was UTF-8: other bytes arrive as lone surrogates, which no JSON can hold."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def _meaning(status: int) -> Verdict:
    if status in (401, 403):
        return Verdict.BLOCKED
    return Verdict.RETRY if status == 429 or status >= 500 else Verdict.REFUSED


def _readable(call: Call) -> Any:
    """A refused body for the list: as JSON where it is some, else the beginning of its text."""
    try:
        return orjson.loads(call.body)
    except orjson.JSONDecodeError:
        return call.body[:REFUSED_TEXT_CHARS_MAX].decode(errors="replace")


def _credentials(call: Call) -> tuple[str, ...]:
    """The keys that this call came with, however it carried them."""
    scheme, _, rest = call.header("Authorization").partition(" ")
    found = [call.header("x-api-key"), rest.strip()]
    if scheme.lower() == "basic":
        with contextlib.suppress(binascii.Error, UnicodeDecodeError):
            found += base64.b64decode(rest, validate=True).decode().split(":", 1)
    return tuple(secret for secret in found if secret)


def _may_hold(body: bytes, secrets: Iterable[str]) -> bool:
    """Whether a body is worth searching: it has a secret as it is, or something escaped that may hide one."""
    return b"\\" in body or b"%" in body or b"+" in body or any(secret.encode() in body for secret in secrets)


def _scrub(value: Any, secrets: Collection[str]) -> Any:
    """The value with `[key]` wherever one of the secrets stands."""
    if not secrets:
        return value
    if isinstance(value, str):
        for secret in secrets:
            if value == secret:
                return "[key]"
            if len(secret) >= SECRET_CHARS_MIN and secret in value:
                value = value.replace(secret, "[key]")
        return value
    if isinstance(value, dict):
        return {_scrub(name, secrets): _scrub(inner, secrets) for name, inner in value.items()}
    if isinstance(value, list):
        return [_scrub(inner, secrets) for inner in value]
    return value
