"""The vendors' own clients, as they come, raise the right exception for a denial, and do not try again in vain."""

from __future__ import annotations

import asyncio
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.backend_fixtures import Request, ScriptedServer
from support.whole import Whole

from sidecar.gate.answers import told
from sidecar.gate.asking import Asking
from sidecar.gate.denials import Denial, Denials, Kind, denial, of_call
from sidecar.gate.sources import Answer, Caller
from sidecar.gate.sources.base import OfEach
from sidecar.settings import AskedSettings
from sidecar.usage.endpoints import Endpoints
from sidecar.usage.providers.table import ROWS

MESSAGES: Any = [{"role": "user", "content": "How is the sea?"}]
CLAUDE = "anthropic.claude-sonnet-4-6-v1:0"
ENDPOINTS = Endpoints(ROWS, (), (), None)
LIMIT = "acme-monthly"

Call = Callable[[str], Any]


def vendor(name: str) -> Any:
    """The vendor's package, of the `test` or `clients` extra."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a package says about its own dependencies is not ours to mend
            return importlib.import_module(name)
    except ImportError:
        pytest.skip(f"{name} is not installed: it is one of the `clients` extra, see requirements/test.lock")


def openai_chat(url: str, **more: Any) -> Any:
    with vendor("openai").OpenAI(api_key="k", base_url=f"{url}/v1") as client:
        return client.chat.completions.create(model="m", messages=MESSAGES, **more)


def openai_responses(url: str) -> Any:
    with vendor("openai").OpenAI(api_key="k", base_url=f"{url}/v1") as client:
        return client.responses.create(model="m", input="sea", stream=True)


def anthropic_messages(url: str, **more: Any) -> Any:
    with vendor("anthropic").Anthropic(api_key="k", base_url=url) as client:
        return client.messages.create(model="m", max_tokens=9, messages=MESSAGES, **more)


def gemini(url: str, *, stream: bool = False) -> Any:
    genai, types = vendor("google.genai"), vendor("google.genai.types")
    client = genai.Client(api_key="k", http_options=types.HttpOptions(base_url=url, api_version="v1beta"))
    try:
        if stream:
            return list(client.models.generate_content_stream(model="gemini-3-pro", contents="sea"))
        return client.models.generate_content(model="gemini-3-pro", contents="sea")
    finally:
        client.close()


def bedrock(url: str, *, mode: str = "legacy", stream: bool = False) -> Any:
    boto3, config = vendor("boto3"), vendor("botocore.config")
    client = boto3.client(
        "bedrock-runtime",
        region_name="us-east-1",
        aws_access_key_id="a",
        aws_secret_access_key="b",
        endpoint_url=url,
        config=config.Config(proxies={}, retries={"mode": mode}),
    )
    try:
        return (client.converse_stream if stream else client.converse)(modelId=CLAUDE, messages=[])
    finally:
        client.close()


async def denied(call: Call, kind: Kind, **more: Any) -> tuple[Any, list[Request]]:
    """What a client raised, and all that it sent, at a gate that lets nothing through."""

    def turned_away(request: Request) -> bytes:
        family, in_array = of_call(ENDPOINTS, request.method, request.target)
        found: Denial = denial(family, limit=LIMIT, kind=kind, streamed=in_array, **more)
        return found.encode(close=False)

    async with ScriptedServer(script=turned_away).running() as server:
        with pytest.raises(Exception) as raised:
            await asyncio.to_thread(call, server.url)
        return raised.value, server.requests


@pytest.mark.parametrize("call", [openai_chat, lambda url: openai_chat(url, stream=True), openai_responses])
async def test_openai_raises_a_status_error_for_a_quota_and_tries_once(call: Call) -> None:
    error, requests = await denied(call, "quota")
    openai = vendor("openai")
    assert type(error) is openai.APIStatusError
    assert len(requests) == 1
    assert (error.status_code, error.code, error.type) == (402, "insufficient_quota", "insufficient_quota")
    assert "acme-monthly is used up" in str(error)
    assert error.response.headers["x-sidecar-limit"] == LIMIT


async def test_openai_raises_a_rate_limit_error_and_comes_back_after_the_short_wait() -> None:
    error, requests = await denied(openai_chat, "rate", retry_after_s=0.5)
    openai = vendor("openai")
    assert type(error) is openai.RateLimitError
    assert error.code == "rate_limit_exceeded"
    assert len(requests) == 3, "its own two retries, a second apart"


@pytest.mark.parametrize("wait_s", [None, 70.0 * 3, 3600.0])
async def test_no_client_of_openai_or_anthropic_waits_for_long(wait_s: float | None) -> None:
    for call, package in ((openai_chat, "openai"), (anthropic_messages, "anthropic")):
        error, requests = await denied(call, "rate", retry_after_s=wait_s)
        assert type(error) is vendor(package).RateLimitError
        assert len(requests) == 1


async def test_a_quota_at_429_is_tried_once_too() -> None:
    for call, package in ((openai_chat, "openai"), (anthropic_messages, "anthropic")):
        error, requests = await denied(call, "quota", status=429)
        assert type(error) is vendor(package).RateLimitError
        assert len(requests) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_anthropic_raises_payment_required_and_tries_once(stream: bool) -> None:
    error, requests = await denied(lambda url: anthropic_messages(url, stream=stream), "quota")
    anthropic = vendor("anthropic")
    assert isinstance(error, getattr(anthropic, "PaymentRequiredError", anthropic.APIStatusError))
    assert error.status_code == 402
    assert error.body == {
        "type": "error",
        "error": {"type": "billing_error", "message": "The limit acme-monthly is used up."},
        "request_id": None,
    }
    assert len(requests) == 1


async def test_anthropic_raises_a_rate_limit_error_and_comes_back() -> None:
    error, requests = await denied(anthropic_messages, "rate", retry_after_s=0.5)
    assert type(error) is vendor("anthropic").RateLimitError
    assert len(requests) == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("kind", "status"), [("quota", 402), ("rate", 429)])
async def test_gemini_raises_a_client_error_and_tries_once(kind: Kind, status: int, stream: bool) -> None:
    error, requests = await denied(lambda url: gemini(url, stream=stream), kind, retry_after_s=1.0)
    errors = vendor("google.genai.errors")
    assert type(error) is errors.ClientError
    assert (error.code, error.status) == (status, "RESOURCE_EXHAUSTED")
    assert LIMIT in (error.message or "")
    assert len(requests) == 1


@pytest.mark.parametrize("mode", ["legacy", "standard"])
@pytest.mark.parametrize("stream", [False, True])
async def test_bedrock_raises_service_quota_exceeded_and_tries_once(mode: str, stream: bool) -> None:
    error, requests = await denied(lambda url: bedrock(url, mode=mode, stream=stream), "quota")
    assert type(error).__name__ == "ServiceQuotaExceededException"
    assert "acme-monthly is used up" in str(error)
    assert len(requests) == 1


async def test_bedrock_raises_throttling_for_a_rate() -> None:
    error, requests = await denied(lambda url: bedrock(url, mode="standard"), "rate", retry_after_s=1.0)
    assert type(error).__name__ == "ThrottlingException"
    assert len(requests) == 3


@pytest.mark.timeout(120)
async def test_through_the_whole_sidecar_each_client_raises_its_own_error_and_tries_once(tmp_path: Path) -> None:
    """Plain and streamed: what is on record is what was tried."""
    calls: dict[str, tuple[Call, Call]] = {
        "APIStatusError": (openai_chat, lambda url: openai_chat(url, stream=True)),
        "PaymentRequiredError": (anthropic_messages, lambda url: anthropic_messages(url, stream=True)),
        "ClientError": (gemini, lambda url: gemini(url, stream=True)),
        "ServiceQuotaExceededException": (bedrock, lambda url: bedrock(url, stream=True)),
    }
    settings = {"SIDECAR_LIMITS": "total_tokens=0/month", "SIDECAR_WORKERS": "2"}
    async with Whole(tmp_path / "data", "http://127.0.0.1:9", **settings) as whole:
        for error, (plain, streamed) in calls.items():
            for each in (plain, streamed):
                with pytest.raises(Exception, match="total_tokens-per-month is used up") as raised:
                    await asyncio.to_thread(each, whole.proxy_url)
                assert type(raised.value).__name__ == error
        await whole.settled()
        records = await whole.records()
        text = await whole.text("/metrics")
    assert [record["outcome"] for record in records] == ["denied"] * 8
    assert 'decision="denied",limit="total_tokens-per-month",source="limits"} 8.0' in text


async def test_what_a_vendor_denies_reaches_each_client_in_its_own_shape() -> None:
    """From the vendor's answer to the exception: one decision, and the response that is made of it."""
    says_no = Answer(allowed=False, reason="balance_used_up")
    deny = Denials(ENDPOINTS, AskedSettings(), chance=lambda: 0.5)

    class Wallets(OfEach):
        name, unit, by_model, lag_s, polled_s = "lago", None, False, 0.0, None

        def subject(self, caller: Caller) -> str | None:
            return caller.subscriber

        async def ask(self, subject: str) -> Answer:
            return says_no

        async def aclose(self) -> None: ...

    async with Asking([Wallets()], AskedSettings()) as asking:
        assert asking.decide(Caller(subscriber="acme")) is None
        await asking.wait(Caller(subscriber="acme"))
        decision = asking.decide(Caller(subscriber="acme"))
    assert decision is not None
    reason = told(decision)

    def turned_away(request: Request) -> bytes:
        return deny(request.method, request.target, **reason._asdict()).encode(close=False)

    async with ScriptedServer(script=turned_away).running() as server:
        for call in (openai_chat, anthropic_messages, gemini, bedrock):
            server.requests.clear()
            with pytest.raises(Exception, match=r"The prepaid balance is used up\."):
                await asyncio.to_thread(call, server.url)
            assert len(server.requests) == 1


async def test_whoever_speaks_no_known_api_reads_a_problem() -> None:
    httpx = vendor("httpx")

    def ask(url: str) -> Any:
        httpx.post(f"{url}/orders", json={}, trust_env=False).raise_for_status()

    error, requests = await denied(ask, "quota")
    assert isinstance(error, httpx.HTTPStatusError)
    assert error.response.headers["content-type"] == "application/problem+json"
    assert error.response.json()["violated-policies"] == [LIMIT]
    assert len(requests) == 1
