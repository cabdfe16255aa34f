"""What changes something: over a Unix socket in the data directory that only the instance's own user can open.

`CHANGES` is the table: the fields of a wish, and the function that does it. Each change is logged with the user who
asked for it, what was asked and what came of it. A wish is JSON; nothing in it is a secret.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import orjson
from aiohttp import web

from sidecar.runtime.admin.answers import json_answer
from sidecar.storage.sockets import peer_uid

log = logging.getLogger("sidecar.control")

WISH_BYTES_MAX: Final = 4 << 20  # a redrive by id: 100,000 of them
COMPLAINTS_MAX: Final = 1000  # in one request: each is a scan of the requests that are remembered
LOGGED_MAX: Final = 20  # names of what was changed in one line of the log; beyond that the count tells
LOGGED_CHARS_MAX: Final = 200  # of one text; an id has about 40


class Controlled(Protocol):
    """What can be changed of the whole."""

    async def redrive(
        self,
        *,
        backend: str | None,
        reason: str | None,
        ids: Sequence[str] | None,
        since_s: float | None,
        resend_unknown: bool,
    ) -> dict[str, Any]: ...

    async def retry(self, backend: str) -> dict[str, Any]: ...

    async def cancel(self, one: str, *, backend: str | None) -> dict[str, Any]: ...

    async def complain(self, backend: str, named: Sequence[tuple[str, str]]) -> dict[str, Any]: ...

    async def adopt(self, how: str) -> dict[str, int] | None: ...


class WishError(ValueError):
    """What was asked for cannot be read. The text says what was expected."""

    status = 400


class DeclinedError(WishError):
    """It can be read, and there is nothing here to do it to."""

    status = 409


Wish = Mapping[str, Any]  # the fields of its row; those that were not sent are None


@dataclass(frozen=True, slots=True)
class Done:
    """What came of it: `answer` is sent as JSON, `facts` are logged beside the wish."""

    answer: Mapping[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Change:
    """One row: the fields of the wish with their types, and who does it. `do` raises `WishError` for a bad wish."""

    fields: Mapping[str, Any]
    do: Callable[[Controlled, Wish], Awaitable[Done]]


async def redrive(instance: Controlled, wish: Wish) -> Done:
    """Offer parked records again."""
    ids = wish["ids"]
    if ids is not None and not all(isinstance(one, str) for one in ids):
        raise WishError("ids: expected a list of ids")
    try:
        told = await instance.redrive(**{**wish, "resend_unknown": bool(wish["resend_unknown"])})
    except LookupError as error:
        raise WishError(str(error)) from None
    facts = {"redriven": told["redriven"], "counts": told["counts"], "not_found": len(told["not_found"])}
    return Done(told, facts | _left(told))


async def retry(instance: Controlled, wish: Wish) -> Done:
    """End the waits of a backend."""
    if not wish["backend"]:
        raise WishError("backend: expected the name of one")
    try:
        told = await instance.retry(wish["backend"])
    except LookupError as error:
        raise WishError(str(error)) from None
    facts = {name: told[name] for name in ("requests", "was", "paused_s")}
    return Done(told, facts | _left(told))


async def cancel(instance: Controlled, wish: Wish) -> Done:
    """Take back what was delivered of one call."""
    if not wish["id"]:
        raise WishError("id: expected that of a record or an event")
    told = await instance.cancel(wish["id"], backend=wish["backend"])
    return Done(told, _counted(told["outcomes"]) | _left(told))


async def complain(instance: Controlled, wish: Wish) -> Done:
    """Park what a backend says it did not bill: pairs of event id and code."""
    named = wish["named"]
    if not wish["backend"]:
        raise WishError("backend: expected the name of the one that complains")
    if not named or len(named) > COMPLAINTS_MAX or not all(_is_pair(one) for one in named):
        raise WishError(f"named: expected 1 to {COMPLAINTS_MAX} pairs of event id and code")
    told = await instance.complain(wish["backend"], [(one[0], one[1]) for one in named])
    return Done(told, _counted(told["outcomes"]) | _left(told))


async def adopt(instance: Controlled, wish: Wish) -> Done:
    """Say what a copied data directory is."""
    if wish["as"] not in ("original", "copy"):
        raise WishError("as: expected original or copy")
    counts = await instance.adopt(wish["as"])
    if counts is None:
        raise DeclinedError(
            "this data directory was not noticed to be a copy; stop the instance to adopt it all the same"
        )
    return Done({"parked": counts}, {"parked": counts})


NUMBER: Final = (int, float)
CHANGES: Final[Mapping[str, Change]] = {
    "redrive": Change({"backend": str, "reason": str, "ids": list, "since_s": NUMBER, "resend_unknown": bool}, redrive),
    "retry": Change({"backend": str}, retry),
    "cancel": Change({"id": str, "backend": str}, cancel),
    "adopt": Change({"as": str}, adopt),
    "complain": Change({"backend": str, "named": list}, complain),
}


def control(instance: Controlled) -> web.Application:
    """`POST /NAME` of each row."""
    app = web.Application(client_max_size=WISH_BYTES_MAX)
    for name, change in CHANGES.items():
        app.router.add_post(f"/{name}", _handler(instance, name, change))
    return app


def read_wish(body: bytes, fields: Mapping[str, Any]) -> Wish:
    """An object of these fields; those that are not there are None. Raises `WishError`."""
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
        # True is an int to Python, and no number to anybody else.
        odd = isinstance(value, bool) and fields[name] is not bool
        if value is not None and (odd or not isinstance(value, fields[name])):
            raise WishError(f"{name} has the wrong type")
    return {name: wish.get(name) for name in fields}


def _handler(instance: Controlled, name: str, change: Change) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        if request.content_type != "application/json":
            return json_answer({"error": "send application/json"}, status=415)
        uid, body = _uid(request), await request.read()
        try:
            wish = read_wish(body, change.fields)
        except WishError as error:
            return json_answer({"error": str(error)}, status=400)
        try:
            done = await change.do(instance, wish)
        except WishError as error:
            return json_answer({"error": str(error)}, status=error.status)
        except Exception as error:
            # What was done of it before is not known here: the log has who asked, and for what.
            log.exception("%s failed", name, extra={"facts": {"uid": uid, "asked": shortened(wish)}})
            return json_answer({"error": f"{type(error).__name__}: the log says more"}, status=500)
        log.info("%s", name, extra={"facts": {"uid": uid, "asked": shortened(wish), **done.facts}})
        return json_answer(done.answer)

    return handle


def shortened(wish: Wish) -> dict[str, Any]:
    """What was asked, for the log: long lists and texts by their beginning."""
    return {name: _short(value) for name, value in wish.items() if value is not None}


def _short(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= LOGGED_CHARS_MAX else value[:LOGGED_CHARS_MAX] + "…"
    if isinstance(value, list):
        more = [f"and {len(value) - LOGGED_MAX} more"] if len(value) > LOGGED_MAX else []
        return [_short(one) for one in value[:LOGGED_MAX]] + more
    return value


def _counted(outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What became of each of a few, and of how many."""
    shown = [f"{one.get('event_id')}: {one.get('text')}" for one in outcomes[:LOGGED_MAX]]
    return {"done": sum(bool(one.get("done")) for one in outcomes), "of": len(outcomes), "outcomes": shown}


def _left(told: Mapping[str, Any]) -> dict[str, Any]:
    """Of the lanes that other sidecars deliver: where it is not done."""
    return {"not_done": told["lanes"]["texts"]} if "lanes" in told else {}


def _is_pair(one: object) -> bool:
    return isinstance(one, list) and len(one) == 2 and all(isinstance(part, str) for part in one)


def _uid(request: web.Request) -> int | None:
    transport = request.transport
    sock = None if transport is None else transport.get_extra_info("socket")
    return None if sock is None else peer_uid(sock.fileno())
