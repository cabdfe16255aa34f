"""The upstream itself: reads a call, finds its maker, sends the answer piece by piece as the script says.

Bytes leave as soon as they are made, compressed or not, so that what stands behind it sees the same chunks as behind
a real vendor. It keeps what it saw, for tests to look at; it never looks at what a client means, only at its form.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Final, NamedTuple

import orjson
from aiohttp import web

from sidecar.dev.mock_llm import anthropic, openai
from sidecar.dev.mock_llm.script import Encoding, End, Script, ScriptError, parse

BODY_BYTES_MAX: Final = 64 * 2**20  # twice what the vendors take, images included
SEEN_MAX: Final = 1_000  # calls kept to look at; the oldest go first
SHUTDOWN_S: Final = 0.5  # streams that a script holds up are not waited for
_WINDOW_BITS: Final = {Encoding.GZIP: 31, Encoding.DEFLATE: 15}

Whole = Callable[[Mapping[str, Any], Script, int], dict[str, Any]]
Stream = Callable[[Mapping[str, Any], Script, int], Iterable[dict[str, Any] | str]]


@dataclass(frozen=True, slots=True)
class Seen:
    """One call as it arrived: names and values of the head's fields as spelled, and the body."""

    method: str
    target: str
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


class _Refusal(Exception):
    def __init__(self, status: int, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}


class _Vendor(NamedTuple):
    error: Callable[[int, str, int], dict[str, Any]]
    id_header: str
    distrust: Callable[[Mapping[str, str]], tuple[int, str] | None]  # what a call with these headers is refused with


class _Maker(NamedTuple):
    vendor: _Vendor
    path: str
    needs: str
    whole: Whole
    stream: Stream | None


class ScriptedLLM:
    """`url = await llm.start()`; OpenAI's clients take `url + "/v1"` as their base, Anthropic's `url`.

    `default` is the script of calls that order nothing. `key`: the only one that is let in; None: any.
    """

    def __init__(self, default: Script | None = None, *, key: str | None = None) -> None:
        self._key = key
        self.seen: deque[Seen] = deque(maxlen=SEEN_MAX)
        self._default = default or Script()
        self._numbers = count(1)
        self._runner: web.AppRunner | None = None

    def __repr__(self) -> str:
        return f"<ScriptedLLM: {len(self.seen)} seen>"

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Listen; the base address. Port 0 takes any free one."""
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        for maker in _MAKERS:
            app.router.add_post(maker.path, partial(self._answer, maker))
        app.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError:
            await self.aclose()
            raise
        bound_host, bound_port = self._runner.addresses[0][:2]
        return f"http://{f'[{bound_host}]' if ':' in bound_host else bound_host}:{bound_port}"

    async def aclose(self) -> None:
        """Stop listening and drop what is under way. May be called twice."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _answer(self, maker: _Maker, request: web.Request) -> web.StreamResponse:
        number = next(self._numbers)
        headers = {maker.vendor.id_header: f"req_{number:06d}"}
        raw = await request.read()
        self.seen.append(Seen(request.method, request.raw_path, request.raw_headers, raw))
        try:
            self._trust(request)
            script = self._script(request)
            body = _body(maker, request, raw)
        except _Refusal as refusal:
            reply = orjson.dumps(maker.vendor.error(refusal.status, refusal.message, number))
            headers |= refusal.headers
            return web.Response(status=refusal.status, body=reply, content_type="application/json", headers=headers)
        packer = _packer(request, script, headers)
        await asyncio.sleep(script.head_delay_s)
        if maker.stream is not None and body.get("stream") is True:
            events = maker.stream(body, script, number)
            return await _stream(request, events, script, packer, headers)
        data = packer.pack(orjson.dumps(maker.whole(body, script, number))) + packer.end()
        return web.Response(body=data, content_type="application/json", headers=headers)

    async def _models(self, request: web.Request) -> web.Response:
        self.seen.append(Seen(request.method, request.raw_path, request.raw_headers, b""))
        return web.Response(body=orjson.dumps(openai.models()), content_type="application/json")

    def _trust(self, request: web.Request) -> None:
        said = {request.headers.get("x-api-key"), request.headers.get("Authorization", "").removeprefix("Bearer ")}
        if self._key is not None and self._key not in said:
            raise _Refusal(401, "Incorrect API key provided.")

    def _script(self, request: web.Request) -> Script:
        try:
            script = parse(request.headers.get("X-Script", ""), self._default)
        except ScriptError as error:
            raise _Refusal(400, f"X-Script: {error}") from None
        if script.status != 200:
            raise _Refusal(script.status, "Told to by the script.", script.retry_after_s)
        return script


class _Packer:
    """The body's coding. Each piece comes out whole, so that a stream stays one."""

    def __init__(self, encoding: Encoding) -> None:
        self._zlib = None if encoding is Encoding.IDENTITY else zlib.compressobj(wbits=_WINDOW_BITS[encoding])

    def pack(self, data: bytes) -> bytes:
        return data if self._zlib is None else self._zlib.compress(data) + self._zlib.flush(zlib.Z_SYNC_FLUSH)

    def end(self) -> bytes:
        return b"" if self._zlib is None else self._zlib.flush()


def _packer(request: web.Request, script: Script, headers: dict[str, str]) -> _Packer:
    """What the script wants, if the caller accepts it; the head says so."""
    accepted = {part.partition(";")[0].strip() for part in request.headers.get("Accept-Encoding", "").split(",")}
    if script.encoding not in accepted:
        return _Packer(Encoding.IDENTITY)
    headers["Content-Encoding"] = script.encoding
    return _Packer(script.encoding)


def _body(maker: _Maker, request: web.Request, raw: bytes) -> dict[str, Any]:
    """The call's JSON; raises the refusal."""
    if refused := maker.vendor.distrust(request.headers):
        raise _Refusal(*refused)
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise _Refusal(400, "We could not parse the JSON body of your request.") from None
    if not isinstance(body, dict):
        raise _Refusal(400, "The body must be an object.")
    if not isinstance(body.get("model"), str):
        raise _Refusal(400, "model: is required and must be a string.")
    if body.get(maker.needs) is None:
        raise _Refusal(400, f"{maker.needs}: is required.")
    return body


async def _stream(
    request: web.Request,
    events: Iterable[dict[str, Any] | str],
    script: Script,
    packer: _Packer,
    headers: dict[str, str],
) -> web.StreamResponse:
    response = web.StreamResponse(headers={**headers, "Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    for event in events:
        await response.write(packer.pack(_event(event)))
        if script.delay_s:
            await asyncio.sleep(script.delay_s)
    if script.end is End.CUT:
        if request.transport is not None:
            request.transport.abort()
        return response
    if last := packer.end():
        await response.write(last)
    await response.write_eof()
    return response


def _event(event: dict[str, Any] | str) -> bytes:
    """One server-sent event. What bears a type is sent under its name, as both vendors do."""
    if isinstance(event, str):
        return f"data: {event}\n\n".encode()
    name = f"event: {event['type']}\n".encode() if "type" in event else b""
    return name + b"data: " + orjson.dumps(event) + b"\n\n"


def _distrust_openai(headers: Mapping[str, str]) -> tuple[int, str] | None:
    if headers.get("Authorization", "").startswith("Bearer "):
        return None
    return 401, "You didn't provide an API key: send it as Authorization: Bearer."


def _distrust_anthropic(headers: Mapping[str, str]) -> tuple[int, str] | None:
    if not headers.get("x-api-key") and not headers.get("Authorization"):
        return 401, "x-api-key header is required"
    return None if headers.get("anthropic-version") else (400, "anthropic-version: header is required")


_OPENAI: Final = _Vendor(lambda status, text, _: openai.error(status, text), "x-request-id", _distrust_openai)
_ANTHROPIC: Final = _Vendor(anthropic.error, "request-id", _distrust_anthropic)
_MAKERS: Final = (
    _Maker(_OPENAI, "/v1/chat/completions", "messages", openai.chat, openai.chat_stream),
    _Maker(_OPENAI, "/v1/completions", "prompt", openai.completion, openai.completion_stream),
    _Maker(_OPENAI, "/v1/responses", "input", openai.response, openai.response_stream),
    _Maker(_OPENAI, "/v1/embeddings", "input", openai.embeddings, None),
    _Maker(_ANTHROPIC, "/v1/messages", "messages", anthropic.message, anthropic.message_stream),
    _Maker(_ANTHROPIC, "/v1/messages/count_tokens", "messages", anthropic.count_tokens, None),
)
