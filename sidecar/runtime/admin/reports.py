"""`/usage` `/records` `/parked` `/limits`: what the commands of these names answer, over HTTP.

Reading goes on beside metering: in threads of its own, at most `AT_ONCE` at a time, through connections that cannot
write, and for `ANSWER_S` at most. Who comes while that many are read for waits a little, and is then told to come
again. An answer carries an `ETag` made of what the files say of themselves, so that asking again for what has not
changed reads nothing.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from time import monotonic
from typing import Any, Final, TypeVar

import orjson
from aiohttp import web

from sidecar.ledger import TooLongError
from sidecar.ledger.postgres_queries import PostgresReader
from sidecar.runtime.admin.answers import json_answer
from sidecar.runtime.backend_factory import DELIVERY, accounts, fleet_reader, open_reader
from sidecar.runtime.reports import calls, lists
from sidecar.runtime.reports.formats import MEDIA_TYPES, Format, Names, written
from sidecar.runtime.reports.parameters import QueryError, near, quoted, usage_query
from sidecar.runtime.reports.usage import usage
from sidecar.settings import Settings
from sidecar.spool import SpoolError, SpoolReader
from sidecar.storage.files import StorageError, Trouble

T = TypeVar("T")

AT_ONCE: Final = 2  # answers that are read for; the hop and the metering have the machine
WAITING_MAX: Final = 32  # who waits for one of these: two pages that open at once
WAIT_S: Final = 5.0
ANSWER_S: Final = 10.0  # for the reading of one answer
AGAIN_S: Final = 2  # what `Retry-After` says
ANSWER_BYTES_MAX: Final = 64 << 20
GZIP_FROM_BYTES: Final = 2048
GZIP_LEVEL: Final = 3  # 100 MB/s; a page of numbers becomes an eighth
RECORDS: Final = 100  # without `limit`
PARKED: Final = 1000
FORMATS: Final = (Format.JSON, Format.NDJSON, Format.CSV)

USAGE: Final = ("by", "since", "until", "where", "sort", "top", "timezone", "format")
CALLS: Final = ("since", "until", "where", "limit", "id", "format")
PARKED_NAMES: Final = ("backend", "reason", "limit", "format")
LIMITS: Final = ("limit", "over", "by", "format")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Bytes and what they are."""

    body: bytes | None  # None: it is what the client has already
    form: Format
    etag: str
    stopped: str | None = None  # why there may be more


Known = Callable[[str], bool]  # whether the client has the answer of this `ETag`


class Busy(Exception):
    """So many ask that this one is not read for."""


class NotYet(Exception):
    """What is asked for is not known yet; the text says why."""


class NothingThere(Exception):
    """What is asked for does not exist yet; the text says why."""


class Reports:
    """The four, for one data directory."""

    def __init__(self, settings: Settings, limits: Callable[[], Awaitable[Sequence[Mapping[str, Any]] | None]]) -> None:
        """`limits`: where each counter stands; None: it is not known yet."""
        self._settings = settings
        self._limits = limits
        self._names = Names(settings.subscriber_names)
        # What an `ETag` begins with: numbers of one life are not those of the next, nor names those of other settings.
        self._life = secrets.token_hex(4)
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="reports")
        self._free = asyncio.Semaphore(AT_ONCE)
        self._waiting = 0
        self._reader: SpoolReader | None = None
        self._ledger = open_reader(settings)
        self._fleet = fleet_reader(settings)

    def add_to(self, app: web.Application) -> None:
        for path, names, do in (
            ("/usage", USAGE, self._usage),
            ("/records", CALLS, self._records),
            ("/parked", PARKED_NAMES, self._parked),
            ("/limits", LIMITS, self._limits_answer),
        ):
            app.router.add_get(path, self._handler(names, do))
        app.on_cleanup.append(self._close)

    async def _close(self, _: web.Application) -> None:
        await asyncio.to_thread(self._pool.shutdown, wait=True, cancel_futures=True)
        if self._reader is not None:
            self._reader.close()
        self._ledger.close()
        if self._fleet is not None:
            self._fleet.close()

    # From a request to an answer

    def _handler(
        self, names: Sequence[str], do: Callable[[web.Request], Awaitable[Answer]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                _check(request, names)
                answer = await do(request)
                return _response(request, answer, await self._packed(request, answer.body))
            except QueryError as error:
                return _refusal(str(error), 400)
            except Busy:
                return _refusal("too many ask at once: try again in a moment", 503, again_s=AGAIN_S)
            except NotYet as error:
                return _refusal(str(error), 503, again_s=AGAIN_S)
            except TooLongError:
                text = f"reading took longer than {ANSWER_S:.0f} s: ask for a shorter time, or for fewer names in by"
                return _refusal(text, 503)
            except NothingThere as error:
                return _refusal(str(error), 404)
            except SpoolError as error:
                return _refusal(str(error), 503)
            except StorageError as error:
                gone = error.trouble is Trouble.GONE
                return _refusal(str(error), 404 if gone else 503, again_s=AGAIN_S if error.passes else None)

        return handle

    async def _read(self, do: Callable[[], T]) -> T:
        """In a thread, once one is free."""
        if self._free.locked():
            if self._waiting >= WAITING_MAX:
                raise Busy
            self._waiting += 1
            try:
                async with asyncio.timeout(WAIT_S):
                    await self._free.acquire()
            except TimeoutError:
                raise Busy from None
            finally:
                self._waiting -= 1
        else:
            await self._free.acquire()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, do)
        finally:
            self._free.release()

    async def _packed(self, request: web.Request, body: bytes | None) -> bytes | None:
        """Made smaller for who takes that; None: sent as it is."""
        if body is None or len(body) < GZIP_FROM_BYTES or not _takes_gzip(request.headers.get("Accept-Encoding", "")):
            return None
        pack = partial(gzip.compress, body, GZIP_LEVEL, mtime=0)
        return await asyncio.get_running_loop().run_in_executor(self._pool, pack)

    # The four

    async def _usage(self, request: web.Request) -> Answer:
        asked = request.query
        query = usage_query(
            now=datetime.now(UTC),
            dimensions=self._settings.attribution.dimensions,
            where=asked.getall("where", ()),
            **{name: asked.get(name) for name in ("by", "since", "until", "sort", "top", "timezone")},
        )
        form, has = _form(request), _known(request)
        # The ledger counts by whole hours: what is asked for later within one is the same question.
        question = replace(query, since=_hour(query.since), until=_hour(query.until, up=True))

        def read() -> Answer:
            etag = self._etag("usage", self._ledger.version(), question, form)
            if has(etag):
                return Answer(body=None, form=form, etag=etag)
            found = usage(self._ledger, query, self._names, limit_s=ANSWER_S)
            return Answer(body=_body(found.flat(self._names), found.columns(), form), form=form, etag=etag)

        return await self._read(read)

    async def _records(self, request: web.Request) -> Answer:
        asked = request.query
        # An age counts from the whole minute: a page that asks again for the last hour asks the same then.
        query = calls.records_query(
            now=datetime.now(UTC).replace(second=0, microsecond=0),
            dimensions=self._settings.attribution.dimensions,
            since=asked.get("since"),
            until=asked.get("until"),
            where=asked.getall("where", ()),
            limit=asked.get("limit", str(RECORDS)),
            record_id=asked.get("id"),
        )
        form, has = _form(request), _known(request)
        fleet = self._fleet

        def of_fleet(fleet: PostgresReader) -> Answer:
            etag = self._etag("records", fleet.version(), query, form)
            if has(etag):
                return Answer(body=None, form=form, etag=etag)
            ends_s = monotonic() + ANSWER_S
            found = calls.fleet_calls(fleet, query, self._names, late=lambda: monotonic() > ends_s)
            return Answer(body=self._of_calls(found, form), form=form, etag=etag, stopped=found.stopped)

        def read() -> Answer:
            if fleet is not None:
                return of_fleet(fleet)
            reader = self._spool()
            places = {instance: reader.last_seq(instance) for instance in reader.instances()}
            begins = [segments[0].first_seq for i in places if (segments := reader.segments(i))]
            etag = self._etag("records", places, begins, query, form)
            if has(etag):
                return Answer(body=None, form=form, etag=etag)
            ends_s = monotonic() + ANSWER_S

            def late() -> bool:
                return monotonic() > ends_s

            if query.id is not None:
                found = calls.call_by_id(reader, query.id, late=late)
            else:
                found = calls.last_calls(reader, query, self._names, upto=places, late=late)
            return Answer(body=self._of_calls(found, form), form=form, etag=etag, stopped=found.stopped)

        return await self._read(read)

    def _of_calls(self, found: calls.Calls, form: Format) -> bytes:
        if form is Format.NDJSON:
            return b"".join(line + b"\n" for line in found.lines)
        if form is Format.JSON:
            return calls.as_json(found.lines, self._names)
        return _body(calls.flat(found.lines, self._names), tuple(calls.COLUMNS), form)

    async def _parked(self, request: web.Request) -> Answer:
        asked = request.query
        query = lists.parked_query(
            backend=asked.get("backend"), reason=asked.get("reason"), limit=asked.get("limit", str(PARKED))
        )
        form, has = _form(request), _known(request)

        def read() -> Answer:
            with accounts(self._settings) as found:
                if not found:
                    path = self._settings.data_dir / DELIVERY
                    raise NothingThere(f"there is no {path} yet: nothing was recorded or delivered")
                lists.check_backend(found, query, self._settings.backends)
                rows = list(lists.parked(found, query, self._names))
            columns = lists.PARKED if form is Format.CSV else lists.PARKED_WHOLE
            return self._of_bytes(_body(rows, columns, form), form, has)

        return await self._read(read)

    async def _limits_answer(self, request: web.Request) -> Answer:
        asked = request.query
        query = lists.limits_query(limit=asked.get("limit"), over=asked.get("over"), by=asked.get("by"))
        form, has = _form(request), _known(request)
        standing = await self._limits()
        if standing is None:
            raise NotYet("what was used of the limits is still being read: try again in a moment")

        def write() -> Answer:
            rows = lists.limits(standing, query, self._names)
            if form is Format.JSON:
                return self._of_bytes(orjson.dumps({"limits": rows}), form, has)
            columns = lists.LIMITS_BY_INSTANCE if query.by_instance else lists.LIMITS
            return self._of_bytes(_body(lists.limits_flat(rows), columns, form), form, has)

        return await self._read(write)

    # What they need

    def _of_bytes(self, body: bytes, form: Format, has: Known) -> Answer:
        etag = self._etag(form, body)
        return Answer(body=None if has(etag) else body, form=form, etag=etag)

    def _etag(self, *parts: object) -> str:
        told = hashlib.blake2b(repr(parts).encode("utf-8", "replace"), digest_size=12).hexdigest()
        return f"{self._life}-{told}"

    def _spool(self) -> SpoolReader:
        """Kept open: it knows where in the files the last records are. One of our own, so that delivery never waits for
        it."""
        if self._reader is None:
            self._reader = SpoolReader(self._settings.data_dir)
        return self._reader


def _check(request: web.Request, names: Sequence[str]) -> None:
    """Each parameter is known, and said once."""
    for name in dict.fromkeys(request.query):
        if name not in names:
            raise QueryError(f"{quoted(name)} is no parameter of {request.path}{near(name, names)}")
        if name != "where" and len(request.query.getall(name)) > 1:
            raise QueryError(f"{name} is given more than once")


def _form(request: web.Request) -> Format:
    text = request.query.get("format", Format.JSON)
    if text not in FORMATS:
        raise QueryError(f"format={quoted(text)} is none{near(text, FORMATS)}")
    return Format(text)


def _known(request: web.Request) -> Known:
    given = request.if_none_match or ()
    values = {each.value for each in given}
    return lambda etag: etag in values or "*" in values


def _hour(moment: datetime | None, *, up: bool = False) -> datetime | None:
    if moment is None:
        return None
    whole = moment.replace(minute=0, second=0, microsecond=0)
    return whole + timedelta(hours=1) if up and whole != moment else whole


def _body(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], form: Format) -> bytes:
    """Raises `QueryError` where it becomes too large."""
    pieces: list[bytes] = []
    size = 0
    for piece in written(rows, columns, form):
        encoded = piece.encode("utf-8", "replace")
        size += len(encoded)
        if size > ANSWER_BYTES_MAX:
            raise QueryError(f"the answer has more than {ANSWER_BYTES_MAX >> 20} MiB: ask for less")
        pieces.append(encoded)
    return b"".join(pieces)


def _takes_gzip(accepted: str) -> bool:
    """RFC 9110, 12.5.3, as far as it has to be: named, and not with a weight of nothing."""
    for each in accepted.lower().split(","):
        coding, _, weight = each.partition(";")
        if coding.strip() in ("gzip", "*"):
            return weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False


def _response(request: web.Request, answer: Answer, packed: bytes | None) -> web.Response:
    headers = {
        "ETag": f'W/"{answer.etag}"',
        # Kept by the browser that asked, and by nobody between; asked again each time.
        "Cache-Control": "private, no-cache",
        "Vary": "Accept-Encoding, Authorization",
        "X-Content-Type-Options": "nosniff",
    }
    if answer.body is None:
        return web.Response(status=304, headers=headers)
    headers["Content-Type"] = MEDIA_TYPES[answer.form]
    if answer.form is Format.CSV:
        headers["Content-Disposition"] = f'attachment; filename="{request.path.strip("/")}.csv"'
    if answer.stopped is not None:
        headers["X-Incomplete"] = answer.stopped
    if packed is not None:
        headers["Content-Encoding"] = "gzip"
    return web.Response(body=answer.body if packed is None else packed, headers=headers)


def _refusal(text: str, status: int, *, again_s: int | None = None) -> web.Response:
    answer = json_answer({"error": text}, status=status)
    answer.headers["Cache-Control"] = "no-store"
    if again_s is not None:
        answer.headers["Retry-After"] = str(again_s)
    return answer
