"""Every place where usage is read, one row each, and the README's table made from it.

A row names the paths of an API, the reader of its responses and what the README says about it. Adding an API is
adding a row, and a reader where no other speaks its shape: docs/adding-a-provider.md. A row without a reader of its own
(`Unmetered`) says why nothing is counted there.
"""

from __future__ import annotations

from dataclasses import dataclass

from sidecar.usage.providers.anthropic import Messages
from sidecar.usage.providers.base import Reader
from sidecar.usage.providers.bedrock import Agents, Converse, Invoke
from sidecar.usage.providers.cloudflare import WorkersAi
from sidecar.usage.providers.cohere import Cohere
from sidecar.usage.providers.dashscope import DashScope, DashScopeApps
from sidecar.usage.providers.deepgram import Deepgram, DeepgramSpeak
from sidecar.usage.providers.elevenlabs import ElevenLabs
from sidecar.usage.providers.exa import Exa
from sidecar.usage.providers.fal import Fal
from sidecar.usage.providers.fallback import STORED, Batch, StoredAnswer, Unmetered
from sidecar.usage.providers.gemini import CloudCode, Gemini, Interactions, Vertex
from sidecar.usage.providers.jina import JinaReader
from sidecar.usage.providers.mistral import MistralConversations, MistralOcr
from sidecar.usage.providers.ollama import Ollama
from sidecar.usage.providers.openai import (
    AssistantRuns,
    ChatCompletions,
    Embeddings,
    Images,
    Media,
    Responses,
    Speech,
)
from sidecar.usage.providers.oracle import Oci
from sidecar.usage.providers.qianfan import Qianfan
from sidecar.usage.providers.reka import Reka
from sidecar.usage.providers.replicate import Replicate
from sidecar.usage.providers.selfhosted import LlamaCpp, LmStudio, SGLang, TextEmbeddings, TextGeneration
from sidecar.usage.providers.snowflake import Cortex
from sidecar.usage.providers.watsonx import Watsonx, WatsonxChat

FREE = "an estimate, free of charge"
BODY_END = "the end of the body, or the array's `]`"
"""The end mark of streams that have none."""


@dataclass(frozen=True, slots=True)
class Row:
    api: str
    paths: tuple[str, ...]
    reader: type[Reader]
    operation: str
    where: str = ""  # for the README: where the usage stands
    end_mark: str = ""  # for the README: what ends a stream
    provider: str | None = None  # where the path alone gives it away
    method: str = "POST"  # several with blanks between them
    hint_only: bool = False  # paths that others use as well: a call is a model's only where its answer is
    unmetered: str | None = None  # why nothing is counted
    hosts: tuple[str, ...] = ()  # the provider's public hosts (and all below them), which name it on any path
    reports_unasked: bool = False  # OpenAI's shape, and a stream's usage comes without `include_usage`
    reads_stored: bool = False  # a stored answer; a POST there that puts a question is none


_OPENAI_BASES = ("/v1", "", "/openai/v1", "/api/v1", "/inference/v1", "/openai/deployments/{deployment}", "*/v1")


def _openai(*ends: str) -> tuple[str, ...]:
    return tuple(base + end for end in ends for base in _OPENAI_BASES)


def _any(*paths: str) -> tuple[str, ...]:
    """The paths as they are, and behind any prefix."""
    return (*paths, *(f"*{path}" for path in paths))


_GOOGLE = ("*/models/{model}", "*/tunedModels/{model}", "*/endpoints/{deployment}")
_CLOUD_CODE = (
    "*/v1internal",
    "*/v1internal/projects/{project}/locations/{location}/publishers/{publisher}/models/{model}",
)
_VERTEX = (
    "*/projects/{project}/locations/{location}/publishers/{publisher}/models/{model}",
    "*/projects/{project}/locations/{location}/endpoints/{deployment}",
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
        (*_openai("/embeddings"), "*/embeddings", *_any("/v1/multimodalembeddings", "/v1/contextualizedembeddings")),
        Embeddings,
        "embeddings",
        "`usage`",
    ),
    Row(
        "OpenAI transcriptions and translations",
        (*_openai("/audio/transcriptions", "/audio/translations"), "*/audio/transcriptions", "*/audio/translations"),
        Media,
        "transcription",
        "`usage`: tokens or seconds (formats without JSON state none)",
        "`transcript.text.done`",
    ),
    Row(
        "OpenAI speech",
        (*_openai("/audio/speech"), "*/audio/speech"),
        Speech,
        "speech",
        "events only: `usage` of the last one",
        "`speech.audio.done`",
    ),
    Row(
        "OpenAI images",
        (
            *_openai("/images/generations", "/images/edits", "/images/variations"),
            *("*/images/generations", "*/images/edits", "*/images/variations"),
        ),
        Images,
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
        "Others on Vertex (Mistral, AI21)",
        tuple(f"*/publishers/{{publisher}}/models/{{model}}:{verb}" for verb in ("rawPredict", "streamRawPredict")),
        ChatCompletions,
        "chat",
        "as OpenAI chat completions",
        "`[DONE]`",
        provider="gcp.vertex_ai",
    ),
    Row(
        "Cloud Code (Gemini CLI)",
        _verbs(_CLOUD_CODE, "generateContent", "streamGenerateContent"),
        CloudCode,
        "generate_content",
        "`response.usageMetadata`, the last one",
        BODY_END,
        provider="gcp.gen_ai",
    ),
    Row(
        "Vertex generateContent",
        _verbs(_VERTEX, "generateContent", "streamGenerateContent"),
        Vertex,
        "generate_content",
        "`usageMetadata`, the last one",
        BODY_END,
        provider="gcp.vertex_ai",
    ),
    Row(
        "Gemini generateContent",
        _verbs(_GOOGLE, "generateContent", "streamGenerateContent"),
        Gemini,
        "generate_content",
        "`usageMetadata`, the last one",
        BODY_END,
        provider="gcp.gemini",
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
        "Bedrock agents",
        (*_any("/agents/{agent}/agentAliases/{alias}/sessions/{session}/text"), "/agents/{session}"),
        Agents,
        "invoke_agent",
        "the sum of `modelInvocationOutput.metadata.usage` of the traces, where they were asked for",
        provider="aws.bedrock",
    ),
    Row(
        "LM Studio chat",
        ("/api/v1/chat",),
        LmStudio,
        "chat",
        "`stats`; streamed: `.result.stats`",
        "`chat.end`",
        provider="lm_studio",
    ),
    Row(
        "Cohere chat",
        _any("/v2/chat", "/v1/chat"),
        Cohere,
        "chat",
        "`usage.billed_units` (v2), `meta.billed_units` (v1)",
        "`message-end` (v2), `stream-end` (v1)",
        provider="cohere",
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
        "Rankings: NVIDIA NIM",
        (*_any("/v1/ranking"), "*/reranking"),
        Embeddings,
        "rerank",
        "`usage`",
        provider="nvidia.nim",
    ),
    Row("vLLM score", ("/score", *_any("/v1/score")), Embeddings, "rerank", "`usage`"),
    Row(
        "vLLM pooling and classify",
        ("/pooling", *_any("/v1/pooling"), "/classify"),
        Embeddings,
        "embeddings",
        "`usage`",
    ),
    Row(
        "Mistral conversations",
        _any("/v1/conversations", "/v1/conversations/{id}", "/v1/conversations/{id}/restart"),
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
        "Cloudflare Workers AI",
        ("*/ai/run/{model}",),
        WorkersAi,
        "chat",
        "`result.usage`; streamed: `usage` of the last event",
        "`[DONE]`",
        provider="cloudflare.workers_ai",
    ),
    Row(
        "IBM watsonx generation, embeddings and rerank",
        _any(
            "/ml/v1/text/generation",
            "/ml/v1/text/generation_stream",
            "/ml/v1/deployments/{deployment}/text/generation",
            "/ml/v1/deployments/{deployment}/text/generation_stream",
            "/ml/v1/text/embeddings",
            "/ml/v1/text/rerank",
        ),
        Watsonx,
        "text_completion",
        "`results[].input_token_count`, `generated_token_count`",
        provider="ibm.watsonx.ai",
    ),
    Row(
        "IBM watsonx chat",
        _any(
            "/ml/v1/text/chat",
            "/ml/v1/text/chat_stream",
            "/ml/v1/deployments/{deployment}/text/chat",
            "/ml/v1/deployments/{deployment}/text/chat_stream",
        ),
        WatsonxChat,
        "chat",
        "`usage`",
        provider="ibm.watsonx.ai",
    ),
    Row(
        "Snowflake Cortex",
        ("*/cortex/inference:complete", "*/cortex/inference/complete"),
        Cortex,
        "chat",
        "`usage`, the last one",
        provider="snowflake.cortex",
    ),
    Row(
        "Oracle OCI chat and embeddings",
        ("*/actions/chat", "*/actions/embedText"),
        Oci,
        "chat",
        "`chatResponse.usage`; streamed: the event with `usage`, where it was asked for",
        provider="oracle.oci",
    ),
    Row(
        "DashScope generation",
        ("*/services/aigc/{task}/generation",),
        DashScope,
        "chat",
        "`usage`, the last one",
        provider="alibaba.dashscope",
    ),
    Row(
        "DashScope embeddings and rerank",
        (
            "*/services/embeddings/{kind}/text-embedding",
            "*/services/embeddings/{kind}/multimodal-embedding",
            "*/services/rerank/{kind}/text-rerank",
        ),
        DashScope,
        "embeddings",
        "`usage`",
        provider="alibaba.dashscope",
    ),
    Row(
        "DashScope applications",
        ("*/api/v1/apps/{app}/completion",),
        DashScopeApps,
        "invoke_agent",
        "the sum of `usage.models[]`",
        provider="alibaba.dashscope",
    ),
    Row(
        "Baidu Qianfan (v1)",
        ("*/wenxinworkshop/chat/{model}", "*/wenxinworkshop/completions/{model}", "*/wenxinworkshop/plugin/{model}"),
        Qianfan,
        "chat",
        "`usage`",
        "`is_end: true`",
        provider="baidu.qianfan",
    ),
    Row(
        "Baidu Qianfan embeddings and rerank (v1)",
        ("*/wenxinworkshop/embeddings/{model}", "*/wenxinworkshop/reranker/{model}"),
        Embeddings,
        "embeddings",
        "`usage`",
        provider="baidu.qianfan",
    ),
    Row(
        "SGLang generate",
        (),
        SGLang,
        "text_completion",
        "`meta_info`, known by its shape (`/generate` is TGI's as well); of a batch, the sum",
        "`[DONE]`",
        provider="sglang",
    ),
    Row("Reka chat", (), Reka, "chat", "`usage`, known by its shape (`/v1/chat` is Cohere's as well)", provider="reka"),
    Row(
        "OpenAI assistants, streamed runs",
        (
            "*/threads/runs",
            "*/threads/{thread}/runs",
            "*/threads/{thread}/runs/{run}/submit_tool_outputs",
        ),
        AssistantRuns,
        "invoke_agent",
        "`usage` of the run's last event",
        "`thread.run.completed`, `.incomplete`, `.failed`, `.cancelled`, `.expired`",
    ),
    Row(
        "Exa search, contents and answers",
        (),
        Exa,
        "search",
        "`costDollars.total`, on any path",
        provider="exa",
        hosts=("api.exa.ai",),
    ),
    Row("Jina reader", (), JinaReader, "fetch_page", "`meta.usage.tokens`, on any path", provider="jina"),
    Row("Deepgram listen", _any("/v1/listen"), Deepgram, "transcription", "`metadata.duration`", provider="deepgram"),
    Row(
        "Deepgram speak", _any("/v1/speak"), DeepgramSpeak, "speech", "the header `dg-char-count`", provider="deepgram"
    ),
    Row(
        "ElevenLabs speech",
        _any(
            "/v1/text-to-speech/{voice}",
            "/v1/text-to-speech/{voice}/stream",
            "/v1/text-to-speech/{voice}/with-timestamps",
            "/v1/text-to-speech/{voice}/stream/with-timestamps",
            "/v1/speech-to-speech/{voice}",
            "/v1/speech-to-speech/{voice}/stream",
            "/v1/text-to-dialogue",
            "/v1/sound-generation",
        ),
        ElevenLabs,
        "speech",
        "the header `character-cost`",
        provider="elevenlabs",
    ),
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
        _verbs((*_GOOGLE, "*/v1internal"), "countTokens", "computeTokens"),
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
        "Responses behind other prefixes",
        ("*/responses", "*/responses/compact"),
        Responses,
        "chat",
        "as OpenAI responses, where it is one",
        "`response.completed`, `.incomplete`, `.failed`",
        hint_only=True,
    ),
    Row(
        "Messages behind other prefixes",
        ("*/messages",),
        Messages,
        "chat",
        "as Anthropic messages, where it is one",
        "`message_stop`",
        hint_only=True,
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
            *_any("/v1/responses/{id}/cancel", "/v1beta/interactions/{id}/cancel", "/v1/predictions/{id}/cancel"),
            *_any("/v1/threads/{thread}/runs/{run}/cancel"),
            "/openai/v1/responses/{id}",
        ),
        StoredAnswer,
        "fetch_response",
        method="GET POST",
        unmetered=STORED,
        reads_stored=True,
    ),
    Row(
        "Stored answers behind other prefixes",
        (
            *("*/responses/{id}", "*/responses/{id}/cancel", "*/chat/completions/{id}", "*/interactions/{id}/cancel"),
            *("*/threads/{thread}/runs/{id}", "*/threads/{thread}/runs/{run}/cancel"),
        ),
        StoredAnswer,
        "fetch_response",
        hint_only=True,
        unmetered=STORED,
        reads_stored=True,
    ),
    Row(
        "Batches made and cancelled",
        _any("/v1/batches", "/v1/batches/{id}/cancel", "/v1/messages/batches", "/v1/messages/batches/{id}/cancel"),
        Batch,
        "fetch_batch",
        unmetered="its answers are counted nowhere but in its results",
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
        Unmetered,
        "fetch_batch",
        method="GET",
        unmetered="can be fetched again and again: each line is an answer of its own",
    ),
)

HOSTS = {host: row.provider for row in ROWS for host in row.hosts if row.provider is not None}
"""Of providers with a row of their own; see `response_headers` for those that only speak another's shape."""

REPORTING = frozenset(row.provider for row in ROWS if row.reports_unasked)


def entries(rows: tuple[Row, ...] = ROWS) -> list[tuple[str, str, Row]]:
    """What `Patterns` wants to know."""
    return [(method, path, row) for row in rows for path in row.paths for method in row.method.split()]


def known_routes() -> list[str]:
    """Every pattern once, as `METHOD /path`: the routes that are known without being configured."""
    return list(dict.fromkeys(f"{method} {path}" for method, path, _ in entries()))


def row_providers() -> set[str]:
    """Every provider that a path or a response can name, whatever the host."""
    return {row.provider for row in ROWS if row.provider is not None} | {TextEmbeddings.NAME}


def render(rows: tuple[Row, ...] = ROWS) -> str:
    """The README's table of what is read where."""
    lines = ["| API | paths | usage is read from | a stream ends with |", "|---|---|---|---|"]
    for row in rows:
        paths = ", ".join(f"`{path}`" for path in row.paths[:3]) + (", …" if len(row.paths) > 3 else "")
        where = f"not counted: {row.unmetered}" if row.unmetered else row.where
        lines.append(f"| {row.api} | {paths} | {where} | {row.end_mark or '–'} |")
    return "\n".join(lines) + "\n"
