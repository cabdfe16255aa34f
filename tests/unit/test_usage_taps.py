"""Which answers are read, which are not, and what is said of those that fail, lie or say nothing."""

from __future__ import annotations

import gzip
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

import brotli
import orjson
import pytest
from backports import zstd
from support.usage_samples import READERS

from sidecar.model.exchange import Usage
from sidecar.usage.providers.base import Reader
from sidecar.usage.providers.fallback import BACKGROUND as BACKGROUND_READ
from sidecar.usage.providers.fallback import NOT_FINISHED, STORED
from sidecar.usage.readers import Element, Pin, RequestReadingTap, UsageTaps
from sidecar.usage.response_reader import BROKEN_OFF

JSON = (b"Content-Type", b"application/json")
SSE = (b"content-type", b"text/event-stream")
CHAT = "/v1/chat/completions"
CODERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "zstd": zstd.compress,
}


class Seen:
    """Anomalies, as they are counted."""

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def __call__(self, kind: str) -> None:
        self.kinds.append(kind)


def answer(
    body: bytes | dict[str, Any],
    *,
    path: str = CHAT,
    method: str = "POST",
    status: int = 200,
    headers: tuple[tuple[bytes, bytes], ...] = (JSON,),
    request: bytes = b'{"model":"asked"}',
    request_headers: tuple[tuple[bytes, bytes], ...] = (JSON,),
    whole: bool = True,
    taps: UsageTaps | None = None,
    size: int = 65_536,
    **context: Any,
) -> Usage | None:
    data = orjson.dumps(body) if isinstance(body, dict) else body
    taps = taps or UsageTaps(**context)
    tap = taps.request(method, path, request_headers)
    if tap is None:
        return None
    tap.feed(request)
    response = taps.response(tap, status, headers)
    if response is None:
        return None
    for start in range(0, len(data), size):
        response.feed(data[start : start + size])
    usage = response.finish(whole)
    assert response.finish(whole) is usage, "twice gives the same"
    return usage


def chat(**usage: Any) -> dict[str, Any]:
    return {
        "id": "c1",
        "object": "chat.completion",
        "model": "m",
        "choices": [{"index": 0, "message": {"content": "x"}, "finish_reason": "stop"}],
        "usage": usage,
    }


def chunk(**more: Any) -> bytes:
    base = {"id": "c1", "object": "chat.completion.chunk", "model": "m", "choices": [{"index": 0, "delta": {}}]}
    return b"data: " + orjson.dumps(base | more) + b"\n\n"


# What must not be metered.


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/messages/count_tokens"),
        ("POST", "/v1/responses/input_tokens"),
        ("POST", "/v1beta/models/gemini-3-pro:countTokens"),
        ("POST", "/model/x/count-tokens"),
        ("POST", "/tokenize"),
        ("GET", "/v1/responses/resp_1"),
        ("GET", "/v1/chat/completions/c1"),
        ("GET", "/v1/threads/t/runs/r"),
        ("GET", "/v1/batches/b"),
        ("GET", "/v1/messages/batches/b/results"),
        ("POST", "/v1/moderations"),
    ],
)
@pytest.mark.parametrize("body", [chat(prompt_tokens=5, completion_tokens=2), {"input_tokens": 2095, "totalTokens": 4}])
def test_estimates_and_stored_answers_are_not_counted(method: str, path: str, body: dict[str, Any]) -> None:
    usage = answer(body, method=method, path=path)
    assert usage is not None
    assert usage.usage_state == "absent"
    assert usage.reason
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens, usage.units) == (None, None, None, {})


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "/v1/organization/usage/completions"),
        ("GET", "/v1/organization/costs"),
        ("HEAD", CHAT),
        ("OPTIONS", CHAT),
        ("DELETE", "/v1/responses/resp_1"),
        ("GET", CHAT),
    ],
)
def test_what_can_be_no_model_call_gets_no_tap(method: str, path: str) -> None:
    assert UsageTaps().request(method, path, []) is None


@pytest.mark.parametrize("status", [101, 103, 204, 304])
def test_answers_without_a_body_get_no_tap(status: int) -> None:
    taps = UsageTaps()
    tap = taps.request("POST", CHAT, [])
    assert tap is not None
    assert taps.response(tap, status, [JSON]) is None


# Unknown shapes.


@pytest.mark.parametrize(
    "body",
    [
        {"usage": {"prompt_tokens": 5, "total_tokens": 5}},
        {"usage": {"total_tokens": 5}, "items": []},
        {"object": "list", "data": [], "usage": {"prompt_tokens": 3}},
        {"usageMetadata": {"promptTokenCount": 3}},
        b"<html>",
        b"",
        b"[1,2,3]",
        b'{"usage": {',
        b"42",
        b'"usage"',
    ],
)
def test_unknown_paths_and_shapes_give_nothing(body: bytes | dict[str, Any]) -> None:
    assert answer(body, path="/orders") is None


@pytest.mark.parametrize("body", [b"<html>", b"", b"[1,2,3]", {"ok": True}, b"\x1f\x8b\x08garbage", b"{" * 300])
def test_a_known_path_with_an_answer_of_no_known_shape_gives_nothing(body: bytes | dict[str, Any]) -> None:
    assert answer(body) is None


@pytest.mark.parametrize(
    ("body", "headers", "provider", "tokens"),
    [
        (chat(prompt_tokens=5, completion_tokens=2, total_tokens=7), JSON, "openai", 7),
        ({"type": "message", "role": "assistant", "id": "m", "model": "c",
          "usage": {"input_tokens": 5, "output_tokens": 1, "cache_read_input_tokens": 4}}, JSON, "anthropic", 10),
        ({"candidates": [], "usageMetadata": {"promptTokenCount": 5, "candidatesTokenCount": 1, "totalTokenCount": 6}},
         JSON, "gcp.gemini", 6),
        (chunk(usage={"prompt_tokens": 3, "completion_tokens": 1}) + b"data: [DONE]\n\n", SSE, "openai", 4),
    ],
)  # fmt: skip
def test_an_unknown_path_is_read_where_the_shape_is_unmistakable(
    body: bytes | dict[str, Any], headers: tuple[bytes, bytes], provider: str, tokens: int
) -> None:
    usage = answer(body, path="/my/own/gateway", headers=(headers,))
    assert usage is not None
    assert (usage.provider, usage.total_tokens, usage.request_model) == (provider, tokens, "asked")


def test_the_request_does_not_decide_how_the_answer_is_read() -> None:
    plain = answer(chat(prompt_tokens=5, completion_tokens=2), request=b'{"model":"m","stream":true}')
    assert plain is not None
    assert (plain.total_tokens, plain.streamed) == (7, False)


# Errors.


@pytest.mark.parametrize(
    ("path", "body", "headers", "word"),
    [
        (CHAT, {"error": {"type": "bad_request", "message": "used 4000 tokens"}}, (JSON,), "bad_request"),
        ("/v1/messages", {"type": "error", "error": {"type": "overloaded_error"}}, (JSON,), "overloaded_error"),
        ("/v1beta/models/g:generateContent", {"error": {"code": 400, "status": "BAD"}}, (JSON,), "http_400"),
        ("/api/chat", {"error": "model 'x' not found"}, (JSON,), "http_429"),
        (CHAT, b"<html>gateway</html>", ((b"content-type", b"text/html"),), "http_429"),
        (CHAT, b"", (), "http_429"),
        (CHAT, {"usage": {"prompt_tokens": 10, "completion_tokens": 3}}, (JSON,), "http_429"),
    ],
)  # fmt: skip
def test_a_failed_model_call_has_an_error_and_no_numbers(
    path: str, body: bytes | dict[str, Any], headers: tuple[tuple[bytes, bytes], ...], word: str
) -> None:
    usage = answer(body, path=path, status=429, headers=headers)
    assert usage is not None
    assert (usage.usage_state, usage.error) == ("absent", word)
    assert (usage.input_tokens, usage.total_tokens, usage.raw_usage) == (None, None, None)
    assert usage.request_model in ("asked", "g")


def test_a_failed_call_of_an_unknown_path_is_nobodys() -> None:
    assert answer({"error": {"type": "x_error"}}, path="/orders", status=500) is None


def test_an_error_under_status_200_is_seen() -> None:
    plain = answer({"error": {"type": "server_error", "message": "m"}})
    assert plain is not None
    assert (plain.usage_state, plain.error) == ("absent", "server_error")
    stream = chunk() + chunk(
        error={"code": 502, "message": "no"},
        choices=[{"index": 0, "delta": {}, "finish_reason": "error"}],
        usage={"prompt_tokens": 9, "completion_tokens": 1},
    )
    usage = answer(stream, headers=(SSE,))
    assert usage is not None
    assert (usage.error, usage.total_tokens, usage.finish_reasons) == ("http_502", 10, ["error"])


def test_geminis_bare_error_in_a_stream_is_seen() -> None:
    event = b'data: {"candidates":[{}],"usageMetadata":{"promptTokenCount":3,"totalTokenCount":3}}\n\n'
    error = b'{\n  "error": {\n    "code": 503,\n    "status": "UNAVAILABLE"\n  }\n}\n'
    usage = answer(event + error, path="/v1beta/models/g:streamGenerateContent", headers=(SSE,))
    assert usage is not None
    assert (usage.error, usage.usage_state, usage.input_tokens) == ("http_503", "partial", 3)


# Values and merging.


@pytest.mark.parametrize("bad", [-1, 1.5, True, "NaN", [5], {"n": 5}, 2**60, "12 "])
def test_a_rejected_number_hurts_no_other(bad: Any) -> None:
    seen = Seen()
    usage = answer(chat(prompt_tokens=5, completion_tokens=bad, total_tokens=9), anomaly=seen)
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens) == (5, None)
    assert seen.kinds == ["value_rejected"]


def test_nan_and_its_kin_leave_the_rest_readable() -> None:
    body = (
        b'{"id":"c1","object":"chat.completion","model":"m","x":NaN,"choices":[{"index":0,"finish_reason":"stop",'
        b'"message":{"content":"\\ud800"}}],"usage":{"prompt_tokens":7,"completion_tokens":Infinity,"total_tokens":1e400}}'
    )
    usage = answer(body)
    assert usage is not None
    assert (usage.usage_state, usage.input_tokens, usage.output_tokens) == ("final", 7, None)
    orjson.dumps(usage)


def test_null_usage_never_replaces_a_number() -> None:
    stream = chunk(usage={"prompt_tokens": 5, "completion_tokens": 2}) + chunk(usage=None) + b"data: [DONE]\n\n"
    usage = answer(stream, headers=(SSE,))
    assert usage is not None
    assert (usage.total_tokens, usage.usage_state) == (7, "final")


def test_zero_is_reported_and_null_is_not() -> None:
    usage = answer(chat(prompt_tokens=0, completion_tokens=0, total_tokens=0))
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (0, 0, 0)
    assert usage.cache_read_input_tokens is None


def test_running_totals_are_final_only_with_the_finish_of_all_choices() -> None:
    request = b'{"model":"m","n":2,"stream":true}'
    first = chunk(
        choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}], usage={"prompt_tokens": 5, "completion_tokens": 3}
    )
    second = chunk(
        choices=[{"index": 1, "delta": {}, "finish_reason": "stop"}], usage={"prompt_tokens": 5, "completion_tokens": 9}
    )
    half = answer(first, headers=(SSE,), request=request, whole=False)
    full = answer(first + second, headers=(SSE,), request=request, whole=False)
    assert half is not None
    assert full is not None
    assert (half.usage_state, half.output_tokens) == ("partial", 3)
    assert (full.usage_state, full.output_tokens, full.finish_reasons) == ("final", 9, ["stop", "stop"])


def test_usage_that_is_only_talked_about_is_not_usage() -> None:
    talk = '{"usage":{"prompt_tokens":1000000,"completion_tokens":5}}'
    stream = (
        chunk(choices=[{"index": 0, "delta": {"content": talk, "tool_calls": [{"usage": {"prompt_tokens": 8}}]}}])
        + chunk(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}], metadata={"usage": {"prompt_tokens": 4}})
        + b"data: [DONE]\n\n"
    )
    usage = answer(stream, headers=(SSE,))
    assert usage is not None
    assert (usage.usage_state, usage.input_tokens, usage.reason) == ("absent", None, "the stream ended without usage")


def test_escaped_names_in_a_stream_are_found() -> None:
    stream = chunk() + b'data: {"choices":[],"\\u0075sage":{"prompt_tokens":4,"completion_tokens":1}}\n\n'
    usage = answer(stream, headers=(SSE,))
    assert usage is not None
    assert usage.total_tokens == 5


def test_the_split_of_an_earlier_report_is_not_the_totals() -> None:
    start = {
        "type": "message_start",
        "message": {
            "id": "m",
            "model": "c",
            "role": "assistant",
            "usage": {
                "input_tokens": 1,
                "cache_creation_input_tokens": 10,
                "cache_creation": {"ephemeral_5m_input_tokens": 10},
            },
        },
    }
    delta = {
        "type": "message_delta",
        "delta": {"stop_reason": "end_turn"},
        "usage": {"cache_creation_input_tokens": 25, "output_tokens": 3},
    }
    stream = b"".join(b"data: " + orjson.dumps(event) + b"\n\n" for event in (start, delta))
    usage = answer(stream, path="/v1/messages", headers=(SSE,))
    assert usage is not None
    assert (usage.cache_write_input_tokens, usage.cache_write_5m_input_tokens, usage.input_tokens) == (25, None, 26)


# Leaving early.


def test_who_leaves_an_openai_stream_early_leaves_nothing_to_count() -> None:
    usage = answer(chunk(), headers=(SSE,), whole=False)
    assert usage is not None
    assert (usage.usage_state, usage.model, usage.request_model) == ("absent", "m", "asked")


def test_who_leaves_before_the_first_byte_still_made_a_model_call() -> None:
    usage = answer(b"", headers=(SSE,), whole=False)
    assert usage is not None
    assert (usage.usage_state, usage.request_model, usage.operation) == ("absent", "asked", "chat")


def test_who_got_no_answer_at_all_still_made_a_model_call() -> None:
    taps = UsageTaps(upstream_host="api.mistral.ai")
    tap = taps.request("POST", CHAT, [JSON])
    assert tap is not None
    tap.feed(b'{"model":"asked"}')
    usage = tap.unanswered()
    assert usage is not None
    assert (usage.usage_state, usage.request_model, usage.provider) == ("absent", "asked", "mistral_ai")
    other = taps.request("POST", "/orders", [])
    assert other is not None
    assert other.unanswered() is None


@pytest.mark.parametrize(
    ("host", "request_body", "waiting"),
    [
        ("api.openai.com", b'{"stream":true}', False),
        ("api.openai.com", b'{"stream":true,"stream_options":{"include_usage":true}}', True),
        ("api.mistral.ai", b'{"stream":true}', True),
        (None, b'{"stream":true}', True),
    ],
)
def test_waiting_ends_where_nothing_can_come(host: str | None, request_body: bytes, waiting: bool) -> None:
    taps = UsageTaps(upstream_host=host)
    tap = taps.request("POST", CHAT, [JSON])
    assert tap is not None
    tap.feed(request_body)
    response = taps.response(tap, 200, [SSE])
    assert response is not None
    response.feed(chunk())
    assert response.waiting is waiting
    response.feed(chunk(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}]))
    assert response.waiting is waiting, "the last content is not the usage"
    response.feed(chunk(choices=[], usage={"prompt_tokens": 1, "completion_tokens": 1}))
    assert not response.waiting


# Codings.


def gz(data: bytes) -> bytes:
    compressor = zlib.compressobj(9, wbits=31)
    return compressor.compress(data) + compressor.flush()


@pytest.mark.parametrize(("coding", "kind"), [(b"gzip", "decoding_failed"), (b"exotic", "coding_unknown")])
def test_a_lying_or_unknown_coding_is_said_and_hurts_nothing(coding: bytes, kind: str) -> None:
    seen = Seen()
    usage = answer(chat(prompt_tokens=5), headers=(JSON, (b"Content-Encoding", coding)), anomaly=seen)
    assert usage is not None
    assert usage.usage_state == "absent"
    assert usage.reason
    assert "content coding" in usage.reason
    assert seen.kinds == [kind]


def test_usage_at_the_end_of_a_small_bomb_is_found_in_steps() -> None:
    body = (
        b'{"object":"list","data":['
        + b"0.0123," * 1_400_000
        + b'1],"model":"m","usage":{"prompt_tokens":5,"total_tokens":5}}'
    )
    taps = UsageTaps()
    tap = taps.request("POST", "/v1/embeddings", [])
    assert tap is not None
    response = taps.response(tap, 200, [JSON, (b"content-encoding", b"gzip")])
    assert response is not None
    response.feed(gz(body))
    steps = 0
    while response.behind:
        response.feed(b"")
        steps += 1
    usage = response.finish(True)
    assert steps > 5
    assert usage is not None
    assert usage.input_tokens == 5


def test_a_real_bomb_ends_the_reading() -> None:
    seen = Seen()
    bomb = gz(b'{"usage":' + bytes(300_000_000))
    usage = answer(bomb, headers=(JSON, (b"content-encoding", b"gzip")), anomaly=seen)
    assert usage is not None
    assert (usage.usage_state, seen.kinds[0]) == ("absent", "decoded_too_large")


def test_requests_may_be_coded_too() -> None:
    usage = answer(
        chat(prompt_tokens=1, completion_tokens=1),
        request=gz(b'{"model":"packed"}'),
        request_headers=(JSON, (b"Content-Encoding", b"gzip")),
    )
    assert usage is not None
    assert usage.request_model == "packed"


def test_the_model_of_a_large_request_is_found() -> None:
    usage = answer(
        chat(prompt_tokens=1, completion_tokens=1),
        request=b'{"messages":[{"content":"' + b'\\"model\\":' * 30_000 + b'"}],"model":"last"}',
    )
    assert usage is not None
    assert usage.request_model == "last"


# Large answers.


def test_sixty_mebibytes_of_embeddings_keep_almost_nothing() -> None:
    import tracemalloc

    taps = UsageTaps()
    tap = taps.request("POST", "/v1/embeddings", [])
    assert tap is not None
    response = taps.response(tap, 200, [JSON])
    assert response is not None
    piece = b"0.0123456789," * 5000
    response.feed(b'{"object":"list","data":[{"embedding":[')
    tracemalloc.start()
    try:
        fed = 0
        while fed < 60 * 1024 * 1024:
            response.feed(piece)
            fed += len(piece)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    response.feed(b'1]}],"model":"m","usage":{"prompt_tokens":5,"total_tokens":5}}')
    usage = response.finish(True)
    assert usage is not None
    assert (usage.input_tokens, usage.usage_state) == (5, "final")
    assert kept < 200_000
    assert peak < 1_000_000


def test_a_large_terminal_event_is_skimmed() -> None:
    text = "x" * 3_000_000
    done = {
        "type": "response.completed",
        "response": {
            "id": "r",
            "object": "response",
            "status": "completed",
            "model": "m",
            "output": [{"text": text}],
            "usage": {"input_tokens": 3, "output_tokens": 4},
        },
    }
    stream = b"event: response.completed\ndata: " + orjson.dumps(done) + b"\n\n"
    taps = UsageTaps()
    tap = taps.request("POST", "/v1/responses", [])
    assert tap is not None
    response = taps.response(tap, 200, [SSE])
    assert response is not None
    pieces = [stream[i : i + 30_000] for i in range(0, len(stream), 30_000)]
    marks = [number for number, piece in enumerate(pieces) if response.feed(piece)]
    assert marks == [len(pieces) - 1]
    usage = response.finish(True)
    assert usage is not None
    assert (usage.total_tokens, usage.usage_state, usage.finish_reasons) == (7, "final", ["completed"])


def test_a_picture_in_an_event_does_not_hide_the_usage_behind_it() -> None:
    done = {
        "type": "image_generation.completed",
        "b64_json": "A" * 900_000,
        "usage": {"input_tokens": 3, "output_tokens": 4},
    }
    stream = b"data: " + orjson.dumps(done) + b"\n\n"
    for size in (1_000, 70_000, len(stream)):
        usage = answer(stream, path="/v1/images/generations", headers=(SSE,), size=size)
        assert usage is not None
        assert usage.total_tokens == 7


# Who and where.


@pytest.mark.parametrize(
    ("host", "provider"),
    [
        ("api.openai.com", "openai"),
        ("eu.api.openai.com", "openai"),
        ("mine.openai.azure.com", "azure.ai.openai"),
        ("bedrock-runtime.eu-west-1.amazonaws.com", "aws.bedrock"),
        ("europe-west4-aiplatform.googleapis.com", "gcp.vertex_ai"),
        ("API.Groq.com", "groq"),
        ("notapi.openai.com.evil.test", "openai"),
        ("127.0.0.1", "openai"),
        (None, "openai"),
    ],
)
def test_the_upstreams_host_names_the_provider(host: str | None, provider: str) -> None:
    usage = answer(chat(prompt_tokens=1, completion_tokens=1), upstream_host=host)
    assert usage is not None
    assert usage.provider == provider


def test_a_pin_wins_over_everything() -> None:
    usage = answer(
        chat(prompt_tokens=1, completion_tokens=1),
        upstream_host="api.openai.com",
        pins=[Pin("/v1/chat/completions", "house")],
    )
    assert usage is not None
    assert usage.provider == "house"


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/model/anthropic.claude%3A0/converse", "anthropic.claude:0"),
        ("/model/arn%3Aaws%3Abedrock%3Aus%3A1%3Aprofile%2Fx.y/converse", "arn:aws:bedrock:us:1:profile/x.y"),
        ("/v1beta/models/gemini-3:generateContent", "gemini-3"),
        ("/openai/deployments/prod-chat/chat/completions?api-version=1", "prod-chat"),
    ],
)
def test_the_model_in_the_path_is_the_one_asked(path: str, model: str) -> None:
    usage = answer(b"", path=path, request=b"{}", status=500)
    assert usage is not None
    assert usage.request_model == model


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/model/us.anthropic.claude-opus-4-1-20250805-v1%3A0/converse", "us.anthropic.claude-opus-4-1-20250805-v1:0"),
        ("/v1beta/models/gemini-3:generateContent", "gemini-3"),
        ("/v1/projects/p/locations/l/publishers/anthropic/models/claude-opus-4-5:rawPredict", "claude-opus-4-5"),
        ("/v1/projects/p/locations/l/publishers/mistralai/models/m-1:rawPredict", "m-1"),
        ("/openai/deployments/prod-chat/chat/completions", "cheaper"),  # whose name is one's own
        ("/v1/projects/p/locations/l/endpoints/123:generateContent", "cheaper"),
        ("/v1/chat/completions", "cheaper"),
    ],
)
def test_where_the_path_names_the_model_the_body_cannot_name_another(path: str, model: str) -> None:
    used = {"prompt_tokens": 61, "completion_tokens": 13, "total_tokens": 74}
    document = orjson.dumps({"id": "c", "object": "chat.completion", "choices": [], "usage": used})
    for body, status in ((document, 200), (b"", 500)):
        usage = answer(body, path=path, request=b'{"model":"cheaper"}', status=status)
        assert usage is not None
        assert usage.request_model == model


def test_the_time_to_the_first_token_is_the_first_texts_not_the_first_events() -> None:
    now = [1_000_000_000]
    taps = UsageTaps(clock_ns=lambda: now[0])
    tap = taps.request("POST", CHAT, [])
    assert tap is not None
    response = taps.response(tap, 200, [SSE])
    assert response is not None
    now[0] += 5_000_000
    response.feed(chunk(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}]))
    now[0] += 7_000_000
    response.feed(chunk(choices=[{"index": 0, "delta": {"content": "Hi"}}]))
    now[0] += 9_000_000
    response.feed(chunk(choices=[{"index": 0, "delta": {"content": "!"}}]))
    usage = response.finish(True)
    assert usage is not None
    assert usage.time_to_first_token_ms == 12.0


@pytest.mark.parametrize("coding", [None, b"gzip"])
def test_the_first_token_is_seen_wherever_its_event_is_cut(coding: bytes | None) -> None:
    events = [chunk(choices=[{"index": 0, "delta": {"content": text}}]) for text in ("", "Hi")]
    now = [1_000_000_000]
    taps = UsageTaps(clock_ns=lambda: now[0])
    for cut in range(1, len(events[1])):
        tap = taps.request("POST", CHAT, [])
        assert tap is not None
        headers = [SSE] if coding is None else [SSE, (b"content-encoding", coding)]
        response = taps.response(tap, 200, headers)
        assert response is not None
        coder = zlib.compressobj(wbits=31)
        for piece in (events[0], events[1][:cut], events[1][cut:]):
            now[0] += 5_000_000
            flushed = coder.compress(piece) + coder.flush(zlib.Z_SYNC_FLUSH)
            response.feed(piece if coding is None else flushed)
        usage = response.finish(False)
        assert usage is not None
        assert usage.time_to_first_token_ms in (10.0, 15.0), cut


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd"])
def test_a_coding_that_breaks_off_is_said_and_is_not_taken_for_an_answer_without_usage(coding: str) -> None:
    headers = (JSON, (b"content-encoding", coding.encode()))
    usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
    coded = CODERS[coding](orjson.dumps(chat(**usage)))
    for cut in range(1, len(coded)):
        found = answer(coded[:cut], headers=headers)
        assert found is not None, cut
        if found.usage_state == "absent":
            assert found.reason == BROKEN_OFF, cut
            assert (found.operation, found.request_model) == ("chat", "asked")
        else:  # all of the document came, and not the coding's own end
            assert (found.usage_state, found.input_tokens, found.output_tokens) == ("final", 7, 5)
    for nothing in (b"", CODERS[coding](b"")):
        assert answer(nothing, headers=headers) is None


def test_the_upstreams_request_id_is_kept() -> None:
    usage = answer(chat(prompt_tokens=1), headers=(JSON, (b"X-Request-ID", b"req_7"), (b"x-request-id-other", b"no")))
    assert usage is not None
    assert usage.upstream_request_id == "req_7"


def test_sound_is_a_model_call_without_usage() -> None:
    usage = answer(b"ID3\x00", path="/v1/audio/speech", headers=((b"content-type", b"audio/mpeg"),))
    assert usage is not None
    assert (usage.usage_state, usage.operation, usage.request_model) == ("absent", "speech", "asked")


# Estimates.


def test_estimates_are_off_by_default_marked_and_never_in_place_of_a_number() -> None:
    stream = chunk() * 40 + b"data: [DONE]\n\n"
    off = answer(stream, headers=(SSE,))
    on = answer(stream, headers=(SSE,), estimate=True)
    real = answer(chat(prompt_tokens=1, completion_tokens=2), estimate=True)
    failed = answer({"error": {"type": "x_y"}}, status=500, estimate=True)
    for usage in (off, on, real, failed):
        assert usage is not None
    assert off.usage_state == "absent"  # type: ignore[union-attr]
    assert (on.usage_state, on.output_tokens) == ("estimated", 41)  # type: ignore[union-attr]
    assert (real.usage_state, real.total_tokens) == ("final", 3)  # type: ignore[union-attr]
    assert failed.usage_state == "absent"  # type: ignore[union-attr]


# Own fields.


def own(body: Any, *elements: Element, **more: Any) -> Usage | None:
    return answer(body, elements=elements, path=more.pop("path", "/report"), **more)


def test_own_fields_of_headers_and_members() -> None:
    elements = (Element.parse("credits=header:X-Credits-Used"), Element.parse("rows=json:meta.rows"))
    for method in ("GET", "POST"):
        usage = own(
            {"meta": {"rows": 12, "pages": 3}}, *elements, method=method, headers=(JSON, (b"x-credits-used", b"1.5"))
        )
        assert usage is not None
        assert (usage.usage_state, usage.units, usage.provider) == ("final", {"rows": 12, "credits": 1.5}, None)


def test_own_fields_join_a_models_usage() -> None:
    usage = own(
        chat(prompt_tokens=5, completion_tokens=1) | {"billing": {"credits": 2}},
        Element.parse("credits=json:billing.credits"),
        path=CHAT,
    )
    assert usage is not None
    assert (usage.total_tokens, usage.units) == (6, {"credits": 2})


def test_own_fields_of_a_large_answer_and_of_a_stream() -> None:
    element = Element.parse("rows=json:meta.rows")
    large = b'{"data":[' + b"1," * 200_000 + b'1],"meta":{"rows":7}}'
    assert own(large, element).units == {"rows": 7}  # type: ignore[union-attr]
    stream = b'data: {"x":1}\n\ndata: {"meta":{"rows":8}}\n\n'
    assert own(stream, element, headers=(SSE,)).units == {"rows": 8}  # type: ignore[union-attr]


@pytest.mark.parametrize("value", [True, "many", -3, [1], {"a": 1}])
def test_what_is_no_number_is_no_own_field(value: Any) -> None:
    seen = Seen()
    assert own({"rows": value}, Element.parse("rows=json:rows"), anomaly=seen) is None
    assert seen.kinds == ["value_rejected"]


def test_own_fields_belong_to_their_paths() -> None:
    element = Element.parse("rows=json:rows", pattern="/report/{id}")
    assert own({"rows": 1}, element, path="/other") is None
    assert own({"rows": 1}, element, path="/report/7") is not None
    assert own({"rows": 1}, element, path="/report/7", method="GET") is not None


@pytest.mark.parametrize(
    "text", ["rows", "rows=body:x", "rows=header:a b", "=json:x", "rows=json:a..b", "rows=json:" + "a." * 9 + "b"]
)
def test_a_bad_element_says_what_is_expected(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected|no header name"):
        Element.parse(text)


def test_an_open_stream_does_not_hold_its_prompt() -> None:
    taps = UsageTaps()
    tap = taps.request("POST", CHAT, [JSON])
    assert isinstance(tap, RequestReadingTap)
    prompt = b'{"model":"m","messages":["' + b"x" * 50_000 + b'"]}'
    mine = sys.getrefcount(prompt)
    tap.feed(prompt)
    assert sys.getrefcount(prompt) > mine
    response = taps.response(tap, 200, [SSE])
    assert response is not None
    response.feed(chunk())
    assert tap.body.model == "m"
    assert sys.getrefcount(prompt) == mine


def test_a_tap_is_quick_enough_to_be_called_often() -> None:
    """No timing is asserted; a quadratic step would make this test run into its limit."""
    taps = UsageTaps()
    tap = taps.request("POST", CHAT, [JSON])
    assert tap is not None
    response = taps.response(tap, 200, [SSE])
    assert response is not None
    started = time.monotonic()
    response.feed(b"data: {")
    for _ in range(200_000):
        response.feed(b"x")
    assert time.monotonic() - started < 50


@pytest.mark.parametrize("first", [b"", chunk()])
@pytest.mark.parametrize("end", [b"", b"data: [DONE]\n\n"])
def test_an_error_event_without_an_error_member_is_an_error(first: bytes, end: bytes) -> None:
    body = first + b'event: error\ndata: {"code":"Throttling","message":"x","request_id":"r"}\n\n' + end
    for size in (1, 65_536):
        usage = answer(body, headers=(SSE,), size=size)
        assert usage is not None
        assert (usage.usage_state, usage.error, usage.input_tokens) == ("absent", "Throttling", None)


def test_an_answer_that_mentions_a_code_is_no_error() -> None:
    usage = answer(chat(prompt_tokens=5, completion_tokens=2) | {"code": "OK"})
    assert usage is not None
    assert (usage.error, usage.total_tokens) == (None, 7)


@pytest.mark.parametrize("kind", ["completed", "incomplete", "failed", "done", "cancelled"])
def test_a_stream_of_responses_ends_under_each_of_its_names(kind: str) -> None:
    used = {"input_tokens": 111, "output_tokens": 11, "total_tokens": 122}
    inner = {"id": "r", "object": "response", "model": "m", "output": []}
    begun = {"type": "response.created", "response": inner | {"status": "in_progress", "usage": None}}
    ended = {"type": f"response.{kind}", "response": inner | {"status": "completed", "usage": used}}
    body = b"".join(b"data: " + orjson.dumps(event) + b"\n\n" for event in (begun, ended))
    usage = answer(body, path="/v1/responses", headers=(SSE,))
    assert usage is not None
    assert (usage.usage_state, usage.total_tokens) == ("final", 122)


@pytest.mark.parametrize("publisher", ["mistralai", "ai21"])
def test_models_of_others_on_vertex_are_vertex(publisher: str) -> None:
    path = f"/v1/projects/p/locations/l/publishers/{publisher}/models/m-1:rawPredict"
    usage = answer(chat(prompt_tokens=61, completion_tokens=13), path=path)
    assert usage is not None
    assert (usage.provider, usage.total_tokens, usage.request_model) == ("gcp.vertex_ai", 74, "m-1")


@pytest.mark.parametrize("path", ["/v1/chat", "/v2/chat", "/v1/rerank"])
def test_a_path_of_coheres_does_not_make_another_answer_coheres(path: str) -> None:
    """What has choices is somebody else's, and must never be read by half."""
    body = chat(prompt_tokens=223, completion_tokens=1187, total_tokens=1410)
    usage = answer(body, path=path)
    assert usage is None or (usage.input_tokens, usage.output_tokens) == (223, 1187)
    plain = {"model": "m", "text": "x", "usage": {"prompt_tokens": 223, "completion_tokens": 1187}}
    usage = answer(plain, path=path)
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens) == (223, 1187)


BACKGROUND = {"id": "resp_1", "object": "response", "background": True, "model": "gpt-5"}
COUNTED = {"input_tokens": 111, "output_tokens": 11, "total_tokens": 122}


def test_a_background_response_is_counted_nowhere_and_says_so_each_time() -> None:
    made = answer(BACKGROUND | {"status": "queued", "usage": None}, path="/v1/responses")
    assert made is not None
    assert (made.usage_state, made.total_tokens, made.reason) == ("absent", None, NOT_FINISHED)
    done = BACKGROUND | {"status": "completed", "usage": COUNTED}
    events = b"data: %b\n\n" % orjson.dumps({"type": "response.completed", "response": done})
    for body, headers in ((orjson.dumps(done), (JSON,)), (events, (SSE,))):
        fetched = answer(body, path="/v1/responses/resp_1", headers=headers, method="GET", request=b"")
        assert fetched is not None
        assert (fetched.usage_state, fetched.total_tokens, fetched.reason) == ("absent", None, BACKGROUND_READ)
        assert (fetched.response_id, fetched.raw_usage) == ("resp_1", COUNTED)
    streamed = answer(events, path="/v1/responses", headers=(SSE,))
    assert streamed is not None
    assert (streamed.usage_state, streamed.total_tokens) == ("final", 122)


def test_a_stored_response_that_was_not_made_in_the_background_was_counted_when_it_was_made() -> None:
    done = BACKGROUND | {"background": False, "status": "completed", "usage": COUNTED}
    fetched = answer(done, path="/v1/responses/resp_1", method="GET", request=b"")
    assert fetched is not None
    assert (fetched.usage_state, fetched.reason, fetched.raw_usage) == ("absent", STORED, None)


@pytest.mark.parametrize("reader", [reader for reader in READERS if reader.keep is not None])
def test_what_ends_a_stream_is_not_skipped(reader: type[Reader]) -> None:
    """Else it would be the end in a piece with something else, and none alone."""
    if reader(lambda kind: None).done():
        assert not reader(lambda kind: None).nothing_in(b"data: [DONE]\n\n")
        assert not reader.end_signs or b"[DONE]" in reader.end_signs


@pytest.mark.parametrize("alone", [False, True])
def test_done_ends_a_stream_of_responses_alone_or_with_others(alone: bool) -> None:
    delta = b'data: {"type":"response.output_text.delta","delta":"a"}\n\n'
    created = b'data: {"type":"response.created","response":{"id":"r","object":"response","model":"m"}}\n\n'
    taps = UsageTaps()
    asked = taps.request("POST", "/v1/responses", [(b"Content-Type", b"application/json")])
    assert asked is not None
    tap = taps.response(asked, 200, [(b"Content-Type", b"text/event-stream")])
    assert tap is not None
    assert not tap.feed(created)
    assert not tap.feed(delta)
    pieces = [delta, b"data: [DONE]\n\n"] if alone else [delta + b"data: [DONE]\n\n"]
    assert [tap.feed(piece) for piece in pieces][-1]
