"""Every place where usage is read, one row each, and the README's table made from it.

A row names the paths of an API, the reader of its answers and what the README says about it. Adding an API is
adding a row, and a reader where no other speaks its shape. A row without a reader of its own
(`Unmetered`) says why nothing is counted there.
"""

from __future__ import annotations

from dataclasses import dataclass

from sidecar.usage.anthropic import Messages
from sidecar.usage.batches import BatchFile
from sidecar.usage.bedrock import Converse, Invoke
from sidecar.usage.cohere import Cohere
from sidecar.usage.gemini import Gemini, Interactions, Vertex
from sidecar.usage.ollama import Ollama
from sidecar.usage.openai import ChatCompletions, Embeddings
from sidecar.usage.openai_media import Media
from sidecar.usage.openai_responses import Responses
from sidecar.usage.plain import Batch, Unmetered
from sidecar.usage.predictions import Fal, MistralConversations, MistralOcr, Replicate
from sidecar.usage.reader import Reader
from sidecar.usage.servers import LlamaCpp, TextEmbeddings, TextGeneration

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
    reads_stored: bool = False  # a stored answer, which may be counted once an id


_OPENAI_BASES = ("/v1", "", "/openai/v1", "/api/v1", "/inference/v1", "/openai/deployments/{deployment}", "*/v1")


def _openai(*ends: str) -> tuple[str, ...]:
    return tuple(base + end for end in ends for base in _OPENAI_BASES)


def _any(*paths: str) -> tuple[str, ...]:
    """The paths as they are, and behind any prefix."""
    return (*paths, *(f"*{path}" for path in paths))


_GOOGLE = ("*/models/{model}", "*/tunedModels/{model}", "*/endpoints/{model}")
_VERTEX = (
    "*/projects/{project}/locations/{location}/publishers/{publisher}/models/{model}",
    "*/projects/{project}/locations/{location}/endpoints/{model}",
)


def _verbs(bases: tuple[str, ...], *verbs: str) -> tuple[str, ...]:
    return tuple(f"{base}:{verb}" for base in bases for verb in verbs)


ROWS: tuple[Row, ...] = (
    Row(
        "OpenAI chat completions, and all that speak it",
        (*_openai("/chat/completions"), "*/chat/completions", *_any("/v1/fim/completions", "/v1/agents/completions")),
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
        (*_any("/v1/responses", "/v1/responses/compact"), "/openai/v1/responses", "/openai/responses"),
        Responses,
        "chat",
        "`usage`; streamed: `.response.usage` of the terminal event",
        "`response.completed`, `.incomplete`, `.failed`",
    ),
    Row(
        "OpenAI embeddings, Voyage, Jina",
        (*_openai("/embeddings"), *_any("/v1/multimodalembeddings", "/v1/contextualizedembeddings")),
        Embeddings,
        "embeddings",
        "`usage`",
    ),
    Row(
        "OpenAI transcriptions and translations",
        _openai("/audio/transcriptions", "/audio/translations"),
        Media,
        "transcription",
        "`usage`: tokens or seconds (formats without JSON state none)",
        "`transcript.text.done`",
    ),
    Row(
        "OpenAI speech",
        _openai("/audio/speech"),
        Media,
        "speech",
        "events only: `usage` of the last one",
        "`speech.audio.done`",
    ),
    Row(
        "OpenAI images",
        _openai("/images/generations", "/images/edits", "/images/variations"),
        Media,
        "image_generation",
        "`usage`",
        "`image_generation.completed`, `image_edit.completed`",
    ),
    Row(
        "Anthropic messages",
        (*_any("/v1/messages"), "/api/v1/messages"),
        Messages,
        "chat",
        "`usage`; streamed: `message_start`, then each `message_delta`",
        "`message_stop`",
        provider="anthropic",
    ),
    Row(
        "Anthropic on Vertex",
        tuple(f"*/publishers/anthropic/models/{{model}}:{verb}" for verb in ("rawPredict", "streamRawPredict")),
        Messages,
        "chat",
        "as Anthropic messages",
        "`message_stop`",
        provider="gcp.vertex_ai",
    ),
    Row(
        "Vertex generateContent",
        _verbs(_VERTEX, "generateContent", "streamGenerateContent"),
        Vertex,
        "generate_content",
        "`usageMetadata`, the last one",
        "the end of the body, or the array's `]`",
        provider="gcp.vertex_ai",
        framing="array",
    ),
    Row(
        "Gemini generateContent",
        _verbs(_GOOGLE, "generateContent", "streamGenerateContent"),
        Gemini,
        "generate_content",
        "`usageMetadata`, the last one",
        "the end of the body, or the array's `]`",
        provider="gcp.gemini",
        framing="array",
    ),
    Row(
        "Vertex embeddings",
        _verbs(_VERTEX, "embedContent", "batchEmbedContents", "predict"),
        Vertex,
        "embeddings",
        "`usageMetadata`, or the sum of `statistics.token_count`",
        provider="gcp.vertex_ai",
    ),
    Row(
        "Gemini embeddings",
        _verbs(_GOOGLE, "embedContent", "batchEmbedContents"),
        Gemini,
        "embeddings",
        "`usageMetadata`",
        provider="gcp.gemini",
    ),
    Row(
        "Gemini interactions",
        _any("/v1beta/interactions", "/v1/interactions"),
        Interactions,
        "generate_content",
        "`usage` (`total_*_tokens`); streamed: `.interaction.usage`",
        "`interaction.completed`",
        provider="gcp.gemini",
    ),
    Row(
        "Bedrock Converse",
        _any("/model/{model}/converse", "/model/{model}/converse-stream"),
        Converse,
        "chat",
        "`usage`; streamed: the `metadata` frame",
        "`metadata`",
        provider="aws.bedrock",
    ),
    Row(
        "Bedrock InvokeModel",
        _any("/model/{model}/invoke", "/model/{model}/invoke-with-response-stream"),
        Invoke,
        "chat",
        "the model's own body, then `amazon-bedrock-invocationMetrics`, then `X-Amzn-Bedrock-*-Token-Count`",
        "the chunk with `amazon-bedrock-invocationMetrics`",
        provider="aws.bedrock",
    ),
    Row(
        "Cohere chat",
        _any("/v2/chat", "/v1/chat"),
        Cohere,
        "chat",
        "`usage.billed_units` (v2), `meta.billed_units` (v1)",
        "`message-end` (v2), `stream-end` (v1)",
        provider="cohere",
        framing="lines",
    ),
    Row(
        "Cohere embed and classify",
        _any("/v2/embed", "/v1/embed", "/v1/classify"),
        Cohere,
        "embeddings",
        "`meta.billed_units`",
        provider="cohere",
    ),
    Row(
        "Rerank: Cohere, Jina, Voyage",
        _any("/v2/rerank", "/v1/rerank"),
        Cohere,
        "rerank",
        "`meta.billed_units`, or `usage.total_tokens`",
    ),
    Row(
        "Mistral conversations",
        (*_any("/v1/conversations"), "/v1/conversations/{id}", "*/v1/conversations/{id}"),
        MistralConversations,
        "invoke_agent",
        "`usage`",
        "`conversation.response.done`",
        provider="mistral_ai",
    ),
    Row("Mistral OCR", _any("/v1/ocr"), MistralOcr, "ocr", "`usage_info.pages_processed`", provider="mistral_ai"),
    Row(
        "Ollama chat and generate",
        _any("/api/chat", "/api/generate"),
        Ollama,
        "chat",
        "`prompt_eval_count`, `eval_count` of the line with `done: true`",
        "`done: true`",
        provider="ollama",
        framing="lines",
    ),
    Row("Ollama embed", _any("/api/embed"), Ollama, "embeddings", "`prompt_eval_count`", provider="ollama"),
    Row(
        "llama.cpp completion",
        ("/completion", "/completions", "/infill"),
        LlamaCpp,
        "text_completion",
        "`tokens_evaluated`, `tokens_predicted`, `timings.cache_n`",
        "`stop: true`",
        provider="llama.cpp",
    ),
    Row(
        "TGI generate",
        ("/generate", "/generate_stream"),
        TextGeneration,
        "text_completion",
        "`details`, and the headers `x-prompt-tokens`, `x-generated-tokens`",
        "the event with `details`",
        provider="huggingface.tgi",
    ),
    Row(
        "TEI embed",
        ("/embed", "/embed_all", "/embed_sparse"),
        TextEmbeddings,
        "embeddings",
        "the header `x-compute-tokens`",
    ),
    Row("TEI rerank", ("/rerank", "/predict"), TextEmbeddings, "rerank", "the header `x-compute-tokens`"),
    Row(
        "Replicate predictions",
        _any("/v1/predictions", "/v1/models/{owner}/{name}/predictions", "/v1/deployments/{owner}/{name}/predictions"),
        Replicate,
        "prediction",
        "`metrics.predict_time` (with `Prefer: wait`)",
        provider="replicate",
    ),
    Row("fal", (), Fal, "prediction", "the header `x-fal-billable-units`, on any path", provider="fal"),
    Row(
        "Anthropic token counts",
        (*_any("/v1/messages/count_tokens"), "*/publishers/anthropic/models/count-tokens:rawPredict"),
        Unmetered,
        "count_tokens",
        provider="anthropic",
        unmetered=FREE,
    ),
    Row(
        "Gemini token counts",
        _verbs(_GOOGLE, "countTokens", "computeTokens"),
        Unmetered,
        "count_tokens",
        provider="gcp.gemini",
        unmetered=FREE,
    ),
    Row(
        "Bedrock token counts",
        _any("/model/{model}/count-tokens"),
        Unmetered,
        "count_tokens",
        provider="aws.bedrock",
        unmetered=FREE,
    ),
    Row(
        "Other token counts",
        _any("/v1/responses/input_tokens", "/tokenize", "/v1/tokenize", "/v1/detokenize", "/detokenize"),
        Unmetered,
        "count_tokens",
        unmetered=FREE,
    ),
    Row("OpenAI moderations", _openai("/moderations"), Unmetered, "moderation", unmetered="free of charge"),
    Row(
        "Stored answers",
        (
            *_any(
                "/v1/responses/{id}", "/v1/chat/completions/{id}", "/v1beta/interactions/{id}", "/v1/predictions/{id}"
            ),
            *_any("/v1/threads/{thread}/runs/{id}", "/v1/threads/{thread}/runs/{run}/steps/{id}"),
            "/openai/v1/responses/{id}",
        ),
        Unmetered,
        "fetch_response",
        method="GET",
        unmetered=STORED,
        reads_stored=True,
    ),
    Row(
        "Batch objects",
        _any("/v1/batches/{id}"),
        Batch,
        "fetch_batch",
        method="GET",
        unmetered="shown on every poll: counting it would bill the batch once a poll",
    ),
    Row(
        "Batch results",
        _any("/v1/files/{id}/content", "/v1/messages/batches/{id}/results"),
        BatchFile,
        "fetch_batch",
        "each line's own answer, where each line is to be counted once",
        method="GET",
        framing="lines",
        reads_stored=True,
        unmetered="can be fetched again and again: each line is an answer of its own",
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
