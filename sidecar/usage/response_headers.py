"""What the heads of a call say about its body: type, coding, request id, and whose answer it is.

One pass over the raw fields; a field's name is lowered and judged once per spelling, not once per call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sidecar.model.exchange import cut
from sidecar.usage import RawHeaders
from sidecar.usage.providers.table import HOSTS

SPELLINGS_MAX = 2_048  # remembered field names; an upstream that invents names must not fill memory
ID_MAX_CHARS = 256  # of a request id that is kept; the longest seen has about 60
VALUE_MAX_BYTES = 1_024  # of a header value that is looked at

# The most telling first: gateways add their own id beside that of what stands behind them.
REQUEST_IDS = (
    "x-amzn-requestid",
    "request-id",
    "x-request-id",
    "apim-request-id",
    "x-generation-id",
    "x-fal-request-id",
)

# Headers that only one provider sends. Azure comes before OpenAI, whose headers it passes on.
_HINTS = {
    "x-ms-region": "azure.ai.openai",
    "apim-request-id": "azure.ai.openai",
    "anthropic-organization-id": "anthropic",
    "x-generation-id": "openrouter",
    "fireworks-prompt-tokens": "fireworks",
    "x-groq-region": "groq",
    "x-fal-request-id": "fal",
    "openai-organization": "openai",
    "openai-processing-ms": "openai",
    "openai-version": "openai",
}

_HOSTS = {
    **HOSTS,
    "api.openai.com": "openai",
    "openai.azure.com": "azure.ai.openai",
    "cognitiveservices.azure.com": "azure.ai.openai",
    "services.ai.azure.com": "azure.ai.inference",
    "api.anthropic.com": "anthropic",
    "generativelanguage.googleapis.com": "gcp.gemini",
    "aiplatform.googleapis.com": "gcp.vertex_ai",
    "api.cohere.com": "cohere",
    "api.cohere.ai": "cohere",
    "api.mistral.ai": "mistral_ai",
    "api.groq.com": "groq",
    "api.deepseek.com": "deepseek",
    "api.x.ai": "x_ai",
    "api.moonshot.ai": "moonshot_ai",
    "api.moonshot.cn": "moonshot_ai",
    "openrouter.ai": "openrouter",
    "api.perplexity.ai": "perplexity",
    "api.together.xyz": "together",
    "api.together.ai": "together",
    "api.fireworks.ai": "fireworks",
    "api.voyageai.com": "voyage",
    "api.jina.ai": "jina",
    "api.replicate.com": "replicate",
    "fal.run": "fal",
    "cloudcode-pa.googleapis.com": "gcp.gen_ai",
    "api.cloudflare.com": "cloudflare.workers_ai",
    "api.deepgram.com": "deepgram",
    "api.deepinfra.com": "deepinfra",
    "api.elevenlabs.io": "elevenlabs",
    "api.reka.ai": "reka",
    "api.writer.com": "writer",
    "aip.baidubce.com": "baidu.qianfan",
    "azuredatabricks.net": "databricks",
    "cloud.databricks.com": "databricks",
    "dashscope.aliyuncs.com": "alibaba.dashscope",
    "dashscope-intl.aliyuncs.com": "alibaba.dashscope",
    "integrate.api.nvidia.com": "nvidia.nim",
    "ai.api.nvidia.com": "nvidia.nim",
    "ml.cloud.ibm.com": "ibm.watsonx.ai",
    "oci.oraclecloud.com": "oracle.oci",
    "api.pinecone.io": "pinecone",
    "r.jina.ai": "jina",
    "s.jina.ai": "jina",
    "snowflakecomputing.com": "snowflake.cortex",
}

_ID_RANK = {name: rank for rank, name in enumerate(REQUEST_IDS)}
_HINT_RANK = {name: rank for rank, name in enumerate(_HINTS)}
_ID_NAMES = frozenset(_ID_RANK)
_HINT_NAMES = frozenset(_HINT_RANK)

NEEDED = frozenset(("content-type", "content-encoding", *REQUEST_IDS, *_HINTS))


class _Spellings(dict[bytes, str]):
    """Field name as spelled -> its lower-case name, or an empty one for a field that nobody needs."""

    def __init__(self, needed: frozenset[str]) -> None:
        super().__init__()
        self._needed = needed

    def __missing__(self, raw: bytes) -> str:
        lower = bytes(raw).decode("latin-1").lower()
        name = lower if lower in self._needed else ""
        if len(self) < SPELLINGS_MAX and len(raw) <= 128:
            self[bytes(raw)] = name
        return name


def known_providers() -> set[str]:
    """Every provider that a host or a header can name."""
    return {*_HOSTS.values(), *_HINTS.values()}


class Heads:
    """Picks the few fields that matter out of a head."""

    __slots__ = ("_spellings",)

    def __init__(self, more: Iterable[str] = ()) -> None:
        self._spellings = _Spellings(NEEDED | {name.lower() for name in more})

    def pick(self, headers: RawHeaders) -> dict[str, str]:
        """Needed fields by lower-case name; repeated ones are joined as HTTP says."""
        spellings = self._spellings
        found: dict[str, str] = {}
        for raw, value in headers:
            if name := spellings[raw]:
                text = value[:VALUE_MAX_BYTES].decode("latin-1").strip()
                found[name] = f"{found[name]}, {text}" if name in found else text
        return found


def id_name(names: Iterable[str]) -> str | None:
    """Of these fields the one that says the vendor's own id of the call, where several do the most telling."""
    best, rank = None, len(_ID_RANK)
    for name in names:
        own = _ID_RANK.get(name, rank)
        if own < rank:
            best, rank = name, own
    return best


def request_id(fields: Mapping[str, str]) -> str | None:
    """The vendor's own id of the call, from the field that is the most telling of those there are."""
    if _ID_NAMES.isdisjoint(fields):
        return None
    best = id_name(fields)
    return None if best is None else cut(fields[best], ID_MAX_CHARS) or None


def hinted_provider(fields: Mapping[str, str]) -> str | None:
    """Whose API the fields say it is; None: they do not say."""
    if _HINT_NAMES.isdisjoint(fields):
        return None
    best, rank = None, len(_HINT_RANK)
    for name in fields:
        own = _HINT_RANK.get(name, rank)
        if own < rank:
            best, rank = name, own
    return None if best is None else _HINTS[best]


def provider_of_host(host: str | None) -> str | None:
    """The provider whose public host this is (or lies under), by OpenTelemetry's name where it has one."""
    if not host:
        return None
    host = host.lower().rstrip(".")
    if host.startswith("bedrock") and host.endswith(".amazonaws.com"):
        return "aws.bedrock"
    while "." in host:
        if host in _HOSTS:
            return _HOSTS[host]
        if host.endswith("-aiplatform.googleapis.com") and host.count(".") == 2:
            return "gcp.vertex_ai"
        host = host.partition(".")[2]
    return None
