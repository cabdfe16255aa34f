"""WebSocket sessions and batch files: many answers, one usage each."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.usage_samples import Sample, differences, load

from sidecar.model.exchange import Usage
from sidecar.usage.readers import UsageTaps

SAMPLES = load()


def messages(sample: Sample, *, binary: bool) -> list[Usage]:
    session = UsageTaps().socket(sample.path)
    assert session is not None
    found = []
    for line in sample.body.splitlines():
        usage = session.server(line if binary else line.decode())
        if usage is not None:
            found.append(usage)
    return found


@pytest.mark.parametrize("name", ["openai_realtime.ws.jsonl", "gemini_live.ws.jsonl"])
@pytest.mark.parametrize("binary", [False, True])
def test_each_message_with_usage_is_one_record(name: str, binary: bool) -> None:
    sample = SAMPLES[name]
    found = messages(sample, binary=binary)
    assert sample.records is not None
    assert len(found) == len(sample.records)
    for usage, expected in zip(found, sample.records, strict=True):
        assert not differences(usage, expected)
        assert usage.provider == sample.provider
        assert usage.raw_usage


def test_the_model_comes_from_the_query_and_the_setup() -> None:
    realtime = UsageTaps().socket("/v1/realtime?model=gpt-realtime")
    assert realtime is not None
    usage = realtime.server(
        '{"type":"response.done","response":{"id":"r","status":"completed","usage":{"input_tokens":1}}}'
    )
    assert usage is not None
    assert (usage.request_model, usage.operation) == ("gpt-realtime", "realtime")
    live = UsageTaps(upstream_host="eu-aiplatform.googleapis.com").socket("/ws/x.LlmBidiService.BidiGenerateContent")
    assert live is not None
    live.client('{"setup":{"model":"models/gemini-live"}}')
    usage = live.server(b'{"usageMetadata":{"promptTokenCount":3,"responseTokenCount":2,"totalTokenCount":5}}')
    assert usage is not None
    assert (usage.request_model, usage.total_tokens, usage.provider) == ("gemini-live", 5, "gcp.vertex_ai")


def test_responses_over_a_socket() -> None:
    session = UsageTaps().socket("/v1/responses")
    assert session is not None
    session.client('{"type":"response.create","model":"gpt-5.6"}')
    found = []
    for line in SAMPLES["openai_responses_stream.sse"].body.splitlines():
        if line.startswith(b"data: ") and (usage := session.server(line[6:])) is not None:
            found.append(usage)
    assert [(usage.total_tokens, usage.request_model, usage.usage_state) for usage in found] == [
        (291, "gpt-5.6", "final")
    ]


def test_a_failed_response_has_an_error() -> None:
    session = UsageTaps().socket("/v1/realtime")
    assert session is not None
    usage = session.server(
        '{"type":"response.done","response":{"status":"failed","status_details":{"error":{"type":"a_b"}}}}'
    )
    assert usage is not None
    assert (usage.usage_state, usage.error) == ("absent", "a_b")


HEARD = b"""{"type":"conversation.item.input_audio_transcription.completed","item_id":"i1","usage":{"type":"tokens",
"input_tokens":30,"output_tokens":15,"total_tokens":45}}"""


@pytest.mark.parametrize(
    "session",
    [
        {"type": "transcription", "audio": {"input": {"transcription": {"model": "gpt-4o-transcribe"}}}},
        {"model": "gpt-realtime", "audio": {"input": {"transcription": {"model": "gpt-4o-transcribe"}}}},
        {"model": "gpt-realtime", "input_audio_transcription": {"model": "gpt-4o-transcribe"}},
    ],
)
@pytest.mark.parametrize("kind", ["session.created", "session.updated", "transcription_session.updated"])
def test_a_transcription_names_the_model_that_made_it(session: dict[str, object], kind: str) -> None:
    realtime = UsageTaps().socket("/v1/realtime?model=gpt-realtime")
    assert realtime is not None
    assert realtime.server(orjson.dumps({"type": kind, "session": session})) is None
    usage = realtime.server(HEARD)
    assert usage is not None
    assert (usage.model, usage.request_model, usage.total_tokens) == ("gpt-4o-transcribe", None, 45)
    realtime.client(orjson.dumps({"type": "session.update", "session": session}))
    usage = realtime.server(HEARD)
    assert usage is not None
    assert usage.request_model == "gpt-4o-transcribe"


@pytest.mark.parametrize(
    "path", ["/v1/audio/transcriptions/realtime?model=voxtral", "/mistral/audio/transcriptions/realtime"]
)
def test_mistrals_realtime_transcription_is_counted_at_its_end(path: str) -> None:
    socket = UsageTaps().socket(path)
    assert socket is not None
    assert socket.server(b'{"type":"session.created","session":{"model":"voxtral-2602"}}') is None
    assert socket.server(b'{"type":"transcription.text.delta","text":"transcription.done"}') is None
    used = b'{"prompt_audio_seconds":3,"prompt_tokens":5,"total_tokens":71,"completion_tokens":66}'
    usage = socket.server(b'{"type":"transcription.done","text":"x","usage":' + used + b"}")
    assert usage is not None
    assert (usage.usage_state, usage.total_tokens, usage.units) == ("final", 71, {"audio_seconds": 3})
    assert (usage.model, usage.provider, usage.operation) == ("voxtral-2602", "mistral_ai", "transcription")
    unstated = socket.server(b'{"type":"transcription.done","text":"x","usage":{"prompt_audio_seconds":null}}')
    assert unstated is not None
    assert (unstated.usage_state, unstated.model) == ("absent", "voxtral-2602")


def test_other_sockets_are_nobodys() -> None:
    assert UsageTaps().socket("/chat/room") is None


@given(
    st.sampled_from(["/v1/realtime", "/v1/responses", "/x.BidiGenerateContent", "/transcriptions/realtime"]),
    st.binary(max_size=80),
)
def test_garbage_is_endured(path: str, data: bytes) -> None:
    session = UsageTaps().socket(path)
    assert session is not None
    for message in (
        data,
        b'{"type":"response.done","response":' + data + b"}",
        b'{"usageMetadata":{"' + data + b'":1}}',
    ):
        session.client(message)
        session.server(message)
        session.server(message.decode("latin-1"))


@pytest.mark.parametrize("name", ["openai_batch_output.jsonl", "anthropic_batch_results.jsonl"])
def test_batch_results_are_not_counted(name: str) -> None:
    sample = SAMPLES[name]
    taps = UsageTaps()
    request = taps.request(sample.method, sample.path, [])
    assert request is not None
    response = taps.response(request, 200, sample.response_headers)
    assert response is not None
    response.feed(sample.body)
    usage = response.finish(True)
    assert usage is not None
    assert (usage.usage_state, usage.total_tokens) == ("absent", None)
    orjson.dumps(usage)
