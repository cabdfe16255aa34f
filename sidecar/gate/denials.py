"""What a client is told whose call the gate turned away, in the error shape of the API that it called.

Its own package then raises what it would raise at the provider. What is used up is 402 by default and says
`x-should-retry: false`, because OpenAI's and Anthropic's packages repeat a 429 twice, and each repeat would be denied
as well. A rate is 429, and may be waited for: `Retry-After` stands there only where it is short. Anthropic's package
sleeps through whatever is asked of it, an hour too, so a longer wait is never said.

A stream is denied before the upstream is called: as a plain JSON error, never as an event. The shapes are what
openai 3, anthropic 2, google-genai 3 and boto3 1.44 read; the types of the `error` members are those that their
documents give for the same case at the provider. Nothing of a request appears in any of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Literal
from urllib.parse import parse_qs

import orjson

from sidecar.model.target import query_of
from sidecar.settings import AskedSettings
from sidecar.usage.endpoints import Endpoints
from sidecar.usage.providers.anthropic import Messages
from sidecar.usage.providers.base import Reader
from sidecar.usage.providers.bedrock import Agents, Converse, Invoke
from sidecar.usage.providers.gemini import CloudCode, Gemini, Interactions, Vertex
from sidecar.usage.providers.openai import (
    AssistantRuns,
    ChatCompletions,
    Embeddings,
    Images,
    Media,
    Responses,
    Speech,
)

Kind = Literal["quota", "rate"]

QUOTA_STATUS: Final = 402
RATE_STATUS: Final = 429
RETRY_AFTER_S_MAX: Final = 120.0  # OpenAI's package waits for no more, Anthropic's for anything: never ask for more
JITTER_SHARE: Final = 0.1  # of the wait, at least a second: who was denied together should not come back together
NAME_CHARS_MAX: Final = 120  # of a limit's name in a header: vendors' rules have names too
TEXT_CHARS_MAX: Final = 500  # of a message

QUOTA_PROBLEM: Final = "https://iana.org/assignments/http-problem-types#quota-exceeded"  # draft-ietf-httpapi-ratelimit


class Family(StrEnum):
    """Whose error shape. Everybody else is told by `application/problem+json`."""

    OPENAI = "openai"  # and all that speak it: Azure, Groq, vLLM, xAI, …
    ANTHROPIC = "anthropic"
    GEMINI = "gemini"
    BEDROCK = "bedrock"


@dataclass(frozen=True, slots=True)
class Amounts:
    """What a limit allows and how much of it is gone, as texts; shown to clients only where an operator wants it."""

    used: str
    amount: str
    unit: str
    until: str | None = None  # RFC 3339


@dataclass(frozen=True, slots=True)
class Denial:
    """One response, whole. `headers` are without `Content-Length`, which goes with how it is written."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    @property
    def phrase(self) -> str:
        return _PHRASES.get(self.status, "Denied")

    def encode(
        self, *, close: bool, keep_alive_10: bool = False, head_only: bool = False, fields: bytes = b""
    ) -> bytes:
        """As HTTP/1.1. `fields` are further field lines, each with its line end."""
        connection = b"Connection: close\r\n" if close else b"Connection: keep-alive\r\n" if keep_alive_10 else b""
        own = b"".join(b"%b: %b\r\n" % (name.encode(), value.encode()) for name, value in self.headers)
        return b"HTTP/1.1 %d %b\r\n%bContent-Length: %d\r\n%b%b\r\n%b" % (
            self.status,
            self.phrase.encode(),
            own,
            len(self.body),
            connection,
            fields,
            b"" if head_only else self.body,
        )


def denial(
    family: str | None,
    *,
    limit: str,
    kind: Kind,
    retry_after_s: float | None = None,
    message: str | None = None,
    amounts: Amounts | None = None,
    streamed: bool = False,
    status: int | None = None,
    jitter: float = 0.0,
) -> Denial:
    """The response for a call that `limit` stopped.

    `kind`: `quota` for what is used up until its period ends, `rate` for what comes back by waiting. `retry_after_s`:
    how long that is, where it is known; of a quota it is not told. `message` takes the place of our own sentence.
    `amounts`: given only where clients may see them. `streamed`: the client expects Gemini's array (see `of_call`).
    `status`: another one than 402 and 429. `jitter`: chance, 0 to 1.
    """
    name = header_text(limit)
    status = status or (QUOTA_STATUS if kind == "quota" else RATE_STATUS)
    wait_s = _wait(retry_after_s, jitter) if kind == "rate" else None
    text = _sentence(name, kind, message, amounts)
    content_type = "application/json"
    more: tuple[tuple[str, str], ...] = ()
    match family:
        case Family.OPENAI:
            word = "insufficient_quota" if kind == "quota" else "rate_limit_exceeded"
            body: Any = {"error": {"message": text, "type": word, "param": None, "code": word}}
        case Family.ANTHROPIC:
            word = "billing_error" if kind == "quota" else "rate_limit_error"
            body = {"type": "error", "error": {"type": word, "message": text}, "request_id": None}
        case Family.GEMINI:
            body = _google(status, text, name, kind, wait_s)
            body = [body] if streamed else body
        case Family.BEDROCK:
            word = "ServiceQuotaExceededException" if kind == "quota" else "ThrottlingException"
            body, more = {"message": text}, (("x-amzn-errortype", word),)
        case _:
            content_type = "application/problem+json"
            body = {
                "type": QUOTA_PROBLEM,
                "title": "Quota exceeded" if kind == "quota" else "Rate limit exceeded",
                "status": status,
                "detail": text,
                "violated-policies": [name],
            }
    headers = [("Content-Type", content_type), ("X-Sidecar-Limit", name), *more]
    if wait_s is None:
        headers.append(("x-should-retry", "false"))
    else:
        headers.append(("Retry-After", str(wait_s)))
    return Denial(status, tuple(headers), orjson.dumps(body))


class Denials:
    """Makes the response for a call that the gate turned away, as the operator has it."""

    def __init__(
        self,
        endpoints: Endpoints,
        settings: AskedSettings,
        *,
        statuses: Mapping[str, int] | None = None,
        chance: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """`statuses`: by kind, where they are not 402 and 429. `chance`: 0 to 1, for the jitter of waits."""
        self._endpoints = endpoints
        self._statuses = statuses or {}
        self.shows_amounts = settings.gate_amounts
        self._chance = chance

    def __call__(
        self,
        method: str,
        target: str,
        *,
        limit: str,
        kind: str,
        retry_after_s: float | None,
        message: str | None,
        amounts: Amounts | None = None,
    ) -> Denial:
        family, in_array = of_call(self._endpoints, method, target)
        return denial(
            family,
            limit=limit,
            kind="quota" if kind == "quota" else "rate",
            retry_after_s=retry_after_s,
            message=message,
            amounts=amounts if self.shows_amounts else None,
            streamed=in_array,
            status=self._statuses.get(kind),
            jitter=self._chance(),
        )


def of_call(endpoints: Endpoints, method: str, target: str) -> tuple[Family | None, bool]:
    """Whose shape a call's errors have, and whether they are to stand in an array.

    By the API that the path belongs to; where no path says it, by the provider, pinned or known by the upstream's host.
    Google's `:streamGenerateContent` answers with an array of objects unless events are asked for by `alt=sse`.
    """
    endpoint = endpoints.of(method, target)
    row = None if endpoint is None else endpoint.row
    family = None if row is None else _BY_READER.get(row.reader)
    if family is None:
        provider = endpoint.provider if endpoint is not None else endpoints.provider_of(method, target)
        family = _by_provider(provider or (None if row is None else row.provider))
    in_array = family is Family.GEMINI and _wants_array(target)
    return family, in_array


def header_text(name: str) -> str:
    """A limit's name as a field's value can carry it: whoever named it may have used any letters."""
    text = _UNFIT.sub("?", name[:NAME_CHARS_MAX]).strip()
    return text or "limit"


_BY_READER: Final[Mapping[type[Reader], Family]] = {
    **dict.fromkeys(
        (ChatCompletions, Responses, Embeddings, Media, Speech, Images, AssistantRuns), Family.OPENAI
    ),
    Messages: Family.ANTHROPIC,
    **dict.fromkeys((Gemini, Vertex, CloudCode, Interactions), Family.GEMINI),
    **dict.fromkeys((Converse, Invoke, Agents), Family.BEDROCK),
}  # fmt: skip
_BY_PROVIDER: Final = {
    "anthropic": Family.ANTHROPIC,
    "aws.bedrock": Family.BEDROCK,
    # Those whose own packages are OpenAI's, or read its errors; paths that only they have are not in the table above.
    **dict.fromkeys(
        (
            "openai", "azure.ai.openai", "azure.ai.inference", "x_ai", "deepseek", "groq", "perplexity", "together",
            "fireworks", "openrouter", "deepinfra", "cerebras", "moonshot_ai", "databricks", "nvidia.nim", "vllm",
        ),
        Family.OPENAI,
    ),
}  # fmt: skip
_PHRASES: Final = {
    400: "Bad Request", 402: "Payment Required", 403: "Forbidden", 409: "Conflict", 412: "Precondition Failed",
    422: "Unprocessable Content", 429: "Too Many Requests", 503: "Service Unavailable",
}  # fmt: skip
_GOOGLE_REASONS: Final = {403: "PERMISSION_DENIED", 503: "UNAVAILABLE"}
_GOOGLE_TYPE: Final = "type.googleapis.com/google.rpc."
_UNFIT: Final = re.compile(r"[^ -~]")


def _by_provider(provider: str | None) -> Family | None:
    if provider is not None and provider.startswith("gcp."):
        return Family.GEMINI
    return _BY_PROVIDER.get(provider or "")


def _wants_array(target: str) -> bool:
    path, query = target.partition("?")[0], query_of(target)
    return path.endswith("streamGenerateContent") and parse_qs(query).get("alt", [""])[-1] != "sse"


def _wait(retry_after_s: float | None, jitter: float) -> int | None:
    """Whole seconds, never less than true and never more than anybody should sleep."""
    if retry_after_s is None or not 0 <= retry_after_s <= RETRY_AFTER_S_MAX:
        return None
    spread = max(1.0, retry_after_s * JITTER_SHARE) * min(max(jitter, 0.0), 1.0)
    return int(min(max(math.ceil(retry_after_s + spread), 1), RETRY_AFTER_S_MAX))


def _sentence(name: str, kind: Kind, message: str | None, amounts: Amounts | None) -> str:
    text = message
    if not text:
        text = (
            f"The limit {name} is used up." if kind == "quota" else f"The limit {name} allows no more calls just now."
        )
    if amounts is not None:
        until = "" if amounts.until is None else f" until {amounts.until}"
        text += f" {amounts.used} of {amounts.amount} {amounts.unit} are used{until}."
    return text[:TEXT_CHARS_MAX].encode("utf-8", "replace").decode()


def _google(status: int, text: str, name: str, kind: Kind, wait_s: int | None) -> dict[str, Any]:
    failure = {"@type": f"{_GOOGLE_TYPE}QuotaFailure", "violations": [{"subject": name, "description": text}]}
    details: list[dict[str, Any]] = [failure]
    if kind == "rate" and wait_s is not None:
        details.append({"@type": f"{_GOOGLE_TYPE}RetryInfo", "retryDelay": f"{wait_s}s"})
    word = _GOOGLE_REASONS.get(status, "RESOURCE_EXHAUSTED")
    return {"error": {"code": status, "message": text, "status": word, "details": details}}
