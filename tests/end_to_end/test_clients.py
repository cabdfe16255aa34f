"""The vendors' own clients, unmodified, read the same through the sidecar as directly, and it is all metered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from support.scripted import running_llm
from support.whole import Whole

from sidecar.dev.mock_llm import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES, Tokens

MODEL, CLAUDE = "gpt-5-mini", "claude-sonnet-4-6"
MESSAGE: Any = [{"role": "user", "content": "How is the sea?"}]
Call = Callable[[str, dict[str, str]], Awaitable[list[Any]]]


NUMBERED = ("id", "item_id", "created", "created_at")  # differ between two calls by nature


def plain(answer: Any) -> Any:
    """What the client made of the answer, without ids and times."""
    found = answer.model_dump() if hasattr(answer, "model_dump") else answer
    if isinstance(found, dict):
        return {key: plain(value) for key, value in found.items() if key not in NUMBERED and not key.startswith("_")}
    return [plain(value) for value in found] if isinstance(found, list) else found


def openai_call(**wanted: Any) -> Call:
    async def call(url: str, headers: dict[str, str]) -> list[Any]:
        async with openai.AsyncOpenAI(api_key="sk-any", base_url=f"{url}/v1", max_retries=0) as client:
            part: Any = client
            for name in wanted["of"].split("."):
                part = getattr(part, name)
            answer = await part.create(extra_headers=headers, **{k: v for k, v in wanted.items() if k != "of"})
            return [plain(chunk) async for chunk in answer] if wanted.get("stream") else [plain(answer)]

    return call


def anthropic_call(stream: bool) -> Call:
    async def call(url: str, headers: dict[str, str]) -> list[Any]:
        async with anthropic.AsyncAnthropic(api_key="any", base_url=url, max_retries=0) as client:
            answer: Any = await client.messages.create(
                model=CLAUDE, max_tokens=64, messages=MESSAGE, stream=stream, extra_headers=headers
            )
            return [plain(event) async for event in answer] if stream else [plain(answer)]

    return call


WITH_USAGE = {"include_usage": True}
CALLS: dict[str, tuple[Call, str, str, Tokens, bool]] = {
    "chat": (openai_call(of="chat.completions", model=MODEL, messages=MESSAGE), "openai", "chat", CHAT, False),
    "chat streamed": (
        openai_call(of="chat.completions", model=MODEL, messages=MESSAGE, stream=True, stream_options=WITH_USAGE),
        *("openai", "chat", CHAT, True),
    ),
    "responses": (openai_call(of="responses", model=MODEL, input="sea"), "openai", "chat", RESPONSES, False),
    "responses streamed": (
        openai_call(of="responses", model=MODEL, input="sea", stream=True),
        *("openai", "chat", RESPONSES, True),
    ),
    "completions": (
        openai_call(of="completions", model="gpt-3.5-turbo-instruct", prompt="sea"),
        *("openai", "text_completion", COMPLETIONS, False),
    ),
    "embeddings": (
        openai_call(of="embeddings", model="text-embedding-3-small", input="sea"),
        *("openai", "embeddings", EMBEDDINGS, False),
    ),
    "messages": (anthropic_call(False), "anthropic", "chat", MESSAGES, False),
    "messages streamed": (anthropic_call(True), "anthropic", "chat", MESSAGES, True),
}


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
async def test_clients_read_the_same_and_the_records_carry_their_tokens(tmp_path: Path, encoding: str) -> None:
    headers = {"X-Script": f"encoding={encoding}"}
    async with running_llm() as (_, upstream):
        whole = Whole(tmp_path / "data", upstream, SIDECAR_DIMENSIONS="call=x-call")
        async with whole:
            for name, (call, *_) in CALLS.items():
                direct = await call(upstream, headers)
                through = await call(whole.proxy_url, headers | {"X-Call": name})
                assert through == direct, name
            balance = await whole.settled()
            records = {record["dimensions"]["call"]: record for record in await whole.records()}
            assert await whole.stop() == 0, whole.log.read_text()

    assert set(records) == set(CALLS)
    assert balance["holds"], balance
    assert balance["backends"]["ledger"]["delivered"] == len(CALLS)
    for name, (_, provider, operation, tokens, streamed) in CALLS.items():
        record = records[name]
        usage = record["usage"]
        assert record["outcome"] == "complete"
        assert record["status"] == 200
        assert usage["usage_state"] == "final", name
        assert (usage["provider"], usage["operation"], usage["streamed"]) == (provider, operation, streamed), name
        assert usage["input_tokens"] == tokens.input, name
        assert (usage["output_tokens"] or 0) == tokens.output, name
        assert usage["total_tokens"] == tokens.input + tokens.output, name
        assert usage.get("cache_read_input_tokens", 0) == tokens.cache_read, name
        assert usage.get("reasoning_output_tokens", 0) == tokens.reasoning, name
        assert record["request_bytes"] > 0
        assert record["response_bytes"] > 0
        assert "sk-any" not in str(record)
