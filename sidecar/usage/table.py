"""Every place where usage is read, one row each, and the README's table made from it.

A row names the paths of an API, the reader of its answers and what the README says about it. Adding an API is
adding a row, and a reader where no other speaks its shape. A row without a reader of its own
(`Unmetered`) says why nothing is counted there.
"""

from __future__ import annotations

from dataclasses import dataclass

from sidecar.usage.anthropic import Messages
from sidecar.usage.openai import ChatCompletions, Embeddings
from sidecar.usage.openai_responses import Responses
from sidecar.usage.plain import Batch, Unmetered
from sidecar.usage.reader import Reader

STORED = "a stored answer read again: counted when it was made"
FREE = "an estimate, free of charge"


@dataclass(frozen=True, slots=True)
class Row:
    api: str
    paths: tuple[str, ...]
    reader: type[Reader]
    operation: str
    where: str = ""  # for the README: where the usage stands
    end_mark: str = ""  # for the README: what ends a stream
    provider: str | None = None  # where the path alone gives it away
    method: str = "POST"
    framing: str = ""  # "array": a JSON array is a stream of its elements; "lines": JSON may be one object a line
    unmetered: str | None = None  # why nothing is counted


_OPENAI_BASES = ("/v1", "", "/openai/v1", "/api/v1", "/inference/v1", "/openai/deployments/{deployment}", "*/v1")


def _openai(*ends: str) -> tuple[str, ...]:
    return tuple(base + end for end in ends for base in _OPENAI_BASES)


ROWS: tuple[Row, ...] = (
    Row(
        "OpenAI chat completions, and all that speak it",
        (*_openai("/chat/completions"), "*/chat/completions"),
        ChatCompletions,
        "chat",
        "`usage`; streamed: the last `usage` of a chunk, of `choices[0]` or of `x_groq`",
        "`[DONE]`",
    ),
    Row(
        "OpenAI completions (legacy)",
        (
            "/v1/completions",
            "/openai/v1/completions",
            "/api/v1/completions",
            "/inference/v1/completions",
            "/openai/deployments/{deployment}/completions",
            "*/v1/completions",
        ),
        ChatCompletions,
        "text_completion",
        "`usage`",
        "`[DONE]`",
    ),
    Row(
        "OpenAI responses",
        (
            "/v1/responses",
            "/openai/v1/responses",
            "/openai/responses",
            "/api/v1/responses",
            "*/v1/responses",
            "/v1/responses/compact",
            "*/v1/responses/compact",
        ),
        Responses,
        "chat",
        "`usage`; streamed: `.response.usage` of the terminal event",
        "`response.completed`, `.incomplete`, `.failed`",
    ),
    Row(
        "OpenAI embeddings, Voyage, Jina",
        _openai("/embeddings"),
        Embeddings,
        "embeddings",
        "`usage`",
    ),
    Row(
        "Anthropic messages",
        ("/v1/messages", "/api/v1/messages", "*/v1/messages"),
        Messages,
        "chat",
        "`usage`; streamed: `message_start`, then each `message_delta`",
        "`message_stop`",
        provider="anthropic",
    ),
    Row(
        "Token counts",
        (
            "/v1/messages/count_tokens",
            "*/v1/messages/count_tokens",
            "/v1/responses/input_tokens",
            "*/v1/responses/input_tokens",
            "/tokenize",
            "*/tokenize",
        ),
        Unmetered,
        "count_tokens",
        unmetered=FREE,
    ),
    Row("OpenAI moderations", _openai("/moderations"), Unmetered, "moderation", unmetered="free of charge"),
    Row(
        "Stored answers",
        ("/v1/responses/{id}", "*/v1/responses/{id}", "/v1/chat/completions/{id}", "*/chat/completions/{id}"),
        Unmetered,
        "fetch_response",
        method="GET",
        unmetered=STORED,
    ),
    Row(
        "Batch objects",
        ("/v1/batches/{id}", "*/batches/{id}"),
        Batch,
        "fetch_batch",
        method="GET",
        unmetered="shown on every poll: counting it would bill the batch once a poll",
    ),
)

READERS: tuple[type[Reader], ...] = tuple(dict.fromkeys(row.reader for row in ROWS))
"""All readers, for paths that nobody knows."""


def entries(rows: tuple[Row, ...] = ROWS) -> list[tuple[str, str, Row]]:
    """What `Patterns` wants to know."""
    return [(row.method, path, row) for row in rows for path in row.paths]


def known_routes(rows: tuple[Row, ...] = ROWS) -> list[str]:
    """Every pattern once, as `METHOD /path`: the routes that are known without being configured."""
    return list(dict.fromkeys(f"{method} {path}" for method, path, _ in entries(rows)))


def render(rows: tuple[Row, ...] = ROWS) -> str:
    """The README's table of what is read where."""
    lines = ["| API | paths | usage is read from | a stream ends with |", "|---|---|---|---|"]
    for row in rows:
        paths = ", ".join(f"`{path}`" for path in row.paths[:3]) + (", …" if len(row.paths) > 3 else "")
        where = f"not counted: {row.unmetered}" if row.unmetered else row.where
        lines.append(f"| {row.api} | {paths} | {where} | {row.end_mark or '–'} |")
    return "\n".join(lines) + "\n"
