"""The vendors' own clients, unmodified, make of the samples through the sidecar what they make of them directly."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import warnings
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import pytest
from support.rawhttp import Conversation, Hop, RawUpstream, until
from support.usage_samples import Sample, differences, load
from websockets.asyncio.server import ServerConnection, serve

from sidecar.usage.readers import UsageTaps

SAMPLES = load()
MESSAGES: Any = [{"role": "user", "content": "How is the sea?"}]
CLAUDE = "anthropic.claude-sonnet-4-6-v1:0"
CHUNK_BYTES = 37  # cuts lines, events and frames
OF_THE_REQUEST = ("request_model",)  # the clients ask for what they like

Call = Callable[[str], Any]


def vendor(name: str) -> Any:
    """The vendor's package; without it there is nothing to compare."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a package says about its own dependencies is not ours to mend
            return importlib.import_module(name)
    except ImportError:
        pytest.skip(f"{name} is not installed: it is one of the `clients` extra, see requirements/test.lock")


def plain(value: Any) -> Any:
    """What a client made of an answer, as data that can be compared."""
    if hasattr(value, "model_dump"):
        return plain(value.model_dump(warnings=False))  # samples hold kinds newer than the types
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if not str(key).startswith("_")}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] in ("cohere", "mistralai", "google"):
        return plain(vars(value))
    return value if isinstance(value, (str, int, float, bytes, bool, type(None))) else str(value)


def to_the_end(stream: Iterable[Any], *failures: type[Exception]) -> list[Any]:
    """Everything that comes, and the failure that it ends with, if it does."""
    found = []
    try:
        for event in stream:
            found.append(plain(event))
    except failures as failure:
        found.append(f"{type(failure).__name__}: {failure}")
    return found


def openai(call: Callable[[Any], Any]) -> Call:
    def run(url: str) -> Any:
        with vendor("openai").OpenAI(api_key="k", base_url=f"{url}/v1", max_retries=0) as client:
            answer = call(client)
            return to_the_end(answer) if type(answer).__name__ == "Stream" else plain(answer)

    return run


def anthropic(stream: bool) -> Call:
    def run(url: str) -> Any:
        package = vendor("anthropic")
        with package.Anthropic(api_key="k", base_url=url, max_retries=0) as client:
            answer = client.messages.create(model="m", max_tokens=9, messages=MESSAGES, stream=stream)
            return to_the_end(answer, package.APIError) if stream else plain(answer)

    return run


def gemini(call: Callable[[Any], Any]) -> Call:
    def run(url: str) -> Any:
        genai, types = vendor("google.genai"), vendor("google.genai.types")
        client = genai.Client(api_key="k", http_options=types.HttpOptions(base_url=url, api_version="v1beta"))
        try:
            answer = call(client.models)
            return to_the_end(answer) if hasattr(answer, "__next__") else plain(answer)
        finally:
            client.close()

    return run


def bedrock(call: Callable[[Any], Any], stream: str = "") -> Call:
    def run(url: str) -> Any:
        boto3, config = vendor("boto3"), vendor("botocore.config")
        client = boto3.client(
            "bedrock-runtime",
            region_name="us-east-1",
            aws_access_key_id="a",
            aws_secret_access_key="b",
            endpoint_url=url,
            config=config.Config(retries={"total_max_attempts": 1}, proxies={}),
        )
        try:
            answer = call(client)
            if stream:
                with contextlib.closing(answer[stream]) as events:
                    answer[stream] = to_the_end(events, vendor("botocore.exceptions").EventStreamError)
            elif "body" in answer:
                answer["body"] = answer["body"].read()
            return plain(answer)
        finally:
            client.close()

    return run


def cohere(version: int, call: Callable[[Any], Any]) -> Call:
    def run(url: str) -> Any:
        package = vendor("cohere")
        httpx = vendor("httpx")
        with httpx.Client() as connections:
            kind = package.ClientV2 if version == 2 else package.Client
            answer = call(kind(api_key="k", base_url=url, httpx_client=connections))
            return to_the_end(answer) if hasattr(answer, "__next__") else plain(answer)

    return run


def mistral(url: str) -> Any:
    with vendor("mistralai.client").Mistral(api_key="k", server_url=url) as client:
        with client.chat.stream(model="m", messages=MESSAGES) as events:
            return to_the_end(events)


def ollama(call: Callable[[Any], Any]) -> Call:
    def run(url: str) -> Any:
        package = vendor("ollama")
        client = package.Client(host=url)
        try:
            answer = call(client)
            return to_the_end(answer, package.ResponseError) if hasattr(answer, "__next__") else plain(answer)
        finally:
            client._client.close()

    return run


CALLS: dict[str, Call] = {
    "openai_chat.json": openai(lambda c: c.chat.completions.create(model="m", messages=MESSAGES)),
    "openai_chat_stream.sse": openai(
        lambda c: c.chat.completions.create(
            model="m", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    ),
    "openai_completions_stream.sse": openai(lambda c: c.completions.create(model="m", prompt="sea", stream=True)),
    "openai_responses.json": openai(lambda c: c.responses.create(model="m", input="sea")),
    "openai_responses_stream.sse": openai(lambda c: c.responses.create(model="m", input="sea", stream=True)),
    "openai_responses_stream_failed.sse": openai(lambda c: c.responses.create(model="m", input="sea", stream=True)),
    "openai_embeddings.json": openai(lambda c: c.embeddings.create(model="m", input="sea", encoding_format="float")),
    "openai_moderations.json": openai(lambda c: c.moderations.create(input="sea")),
    "openai_transcription_tokens.json": openai(
        lambda c: c.audio.transcriptions.create(model="m", file=("a.wav", b"RIFF", "audio/wav"))
    ),
    "openai_images.json": openai(lambda c: c.images.generate(model="m", prompt="sea")),
    "anthropic_messages.json": anthropic(False),
    "anthropic_messages_compaction.json": anthropic(False),
    "anthropic_messages_stream.sse": anthropic(True),
    "anthropic_stream_error.sse": anthropic(True),
    "gemini_generate.json": gemini(lambda m: m.generate_content(model="gemini-3-pro", contents="sea")),
    "gemini_stream.sse": gemini(lambda m: m.generate_content_stream(model="gemini-3-flash", contents="sea")),
    "gemini_count_tokens.json": gemini(lambda m: m.count_tokens(model="gemini-3-pro", contents="sea")),
    "bedrock_converse.json": bedrock(lambda c: c.converse(modelId=CLAUDE, messages=[])),
    "bedrock_converse_stream.bin": bedrock(lambda c: c.converse_stream(modelId=CLAUDE, messages=[]), "stream"),
    "bedrock_converse_stream_exception.bin": bedrock(
        lambda c: c.converse_stream(modelId=CLAUDE, messages=[]), "stream"
    ),
    "bedrock_invoke_anthropic.json": bedrock(lambda c: c.invoke_model(modelId=CLAUDE, body=b"{}")),
    "bedrock_invoke_nova_embed.json": bedrock(
        lambda c: c.invoke_model(modelId="amazon.titan-embed-text-v2:0", body=b"{}")
    ),
    "bedrock_invoke_stream.bin": bedrock(
        lambda c: c.invoke_model_with_response_stream(modelId=CLAUDE, body=b"{}"), "body"
    ),
    "cohere_v2_chat.json": cohere(2, lambda c: c.chat(model="m", messages=MESSAGES)),
    "cohere_v2_chat_stream.sse": cohere(2, lambda c: c.chat_stream(model="m", messages=MESSAGES)),
    "cohere_v1_chat_stream.ndjson": cohere(1, lambda c: c.chat_stream(message="sea", model="m")),
    "cohere_rerank.json": cohere(2, lambda c: c.rerank(model="m", query="q", documents=["a", "b"])),
    "mistral_chat_stream.sse": mistral,
    "ollama_chat.ndjson": ollama(lambda c: c.chat(model="m", messages=MESSAGES, stream=True)),
    "ollama_generate.json": ollama(lambda c: c.generate(model="m", prompt="sea")),
}


class Serving:
    """Answers every call with the sample, in small chunks."""

    def __init__(self, sample: Sample) -> None:
        self.targets: list[str] = []
        self.head = b"HTTP/1.1 %d OK\r\n%b" % (
            sample.status,
            b"".join(b"%b: %b\r\n" % field for field in sample.response_headers),
        )
        self.body = sample.body

    async def __call__(self, conversation: Conversation) -> None:
        while True:
            head, _ = await conversation.message()
            self.targets.append(head.split(b" ")[1].decode())
            pieces = [self.body[at : at + CHUNK_BYTES] for at in range(0, len(self.body), CHUNK_BYTES)]
            chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
            answer = self.head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
            middle = len(answer) // 2
            await conversation.send(answer[:middle])
            await asyncio.sleep(0)
            await conversation.send(answer[middle:])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the clients' own
@pytest.mark.parametrize("name", CALLS)
async def test_the_client_reads_the_sample_as_it_does_directly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    sample, call = SAMPLES[name], CALLS[name]
    serving = Serving(sample)
    async with RawUpstream(serving) as upstream, Hop(upstream.url, taps=UsageTaps()) as hop:
        direct = await asyncio.to_thread(call, upstream.url)
        through = await asyncio.to_thread(call, f"http://127.0.0.1:{hop.port}")
        exchange = await hop.recorder.ended()
    assert direct == through
    assert direct
    assert {target.partition("?")[0] for target in serving.targets} == {sample.path.partition("?")[0]}
    assert exchange.outcome == "complete"
    if sample.expected is None:
        assert exchange.usage is None or exchange.usage.usage_state == "absent"
    else:
        assert exchange.usage is not None
        expected = {key: value for key, value in sample.expected.items() if key not in OF_THE_REQUEST}
        assert not differences(exchange.usage, expected, sample.null_or_zero)
        assert exchange.usage.request_model is not None or name == "openai_moderations.json"


async def realtime(url: str) -> list[Any]:
    found = []
    client = vendor("openai").AsyncOpenAI(api_key="k", websocket_base_url=f"{url}/v1", max_retries=0)
    async with client, client.realtime.connect(model="gpt-realtime") as connection:
        async for event in connection:
            found.append(plain(event))
    return found


async def live(url: str) -> list[Any]:
    genai, types = vendor("google.genai"), vendor("google.genai.types")
    client = genai.Client(api_key="k", http_options=types.HttpOptions(base_url="http://none", api_version="v1beta"))
    client._api_client._websocket_base_url = lambda *_: url  # it knows no other scheme than wss
    client._api_client._websocket_ssl_ctx = {}
    config = {"response_modalities": ["TEXT"]}
    found = []
    try:
        async with client.aio.live.connect(model="gemini-live-2.5", config=config) as session:
            for _ in SAMPLES["gemini_live.ws.jsonl"].body.splitlines():
                found.append(plain(await session._receive()))
    finally:
        client.close()
        await client.aio.aclose()
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("name", "call"), [("openai_realtime.ws.jsonl", realtime), ("gemini_live.ws.jsonl", live)])
async def test_the_client_reads_the_socket_as_it_does_directly(
    name: str, call: Callable[[str], Awaitable[list[Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    sample = SAMPLES[name]
    targets: list[str] = []

    async def answer(socket: ServerConnection) -> None:
        assert socket.request is not None
        targets.append(socket.request.path)
        if call is live:
            assert b"setup" in (await socket.recv(decode=False))
            await socket.send('{"setupComplete": {}}')
        for line in sample.body.decode().splitlines():
            await socket.send(line)

    async with serve(answer, "127.0.0.1", 0) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        async with Hop(f"http://127.0.0.1:{port}", taps=UsageTaps()) as hop:
            direct = await call(f"ws://127.0.0.1:{port}")
            through = await call(f"ws://127.0.0.1:{hop.port}")
            await until(lambda: bool(hop.recorder.records) and hop.recorder.records[-1].parent_id is None)
    assert direct == through
    assert direct
    assert {target.partition("?")[0].lstrip("/") for target in targets} == {sample.path.partition("?")[0].lstrip("/")}
    assert sample.records is not None
    for child, expected in zip(hop.recorder.records[:-1], sample.records, strict=True):
        assert child.usage is not None
        assert not differences(child.usage, {k: v for k, v in expected.items() if k not in OF_THE_REQUEST})
        assert child.usage.request_model in ("gpt-realtime", "gemini-live-2.5", None)
