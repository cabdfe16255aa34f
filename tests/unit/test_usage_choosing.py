"""Whose answer it is: the address is a hint in any spelling, the answer decides, and what nobody knows is said."""

from __future__ import annotations

import json
import logging
import tracemalloc
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.usage_samples import READERS, Sample, load, play, sliced
from support.wsframes import frame

from sidecar.model.exchange import Usage
from sidecar.model.target import normal_path
from sidecar.runtime.unclaimed import SAY_EVERY_S, Unclaimed
from sidecar.usage.endpoints import PATHS_MAX, Pin
from sidecar.usage.providers.table import ROWS
from sidecar.usage.reader_choice import Claims, Mentions, united
from sidecar.usage.readers import UsageTaps

SAMPLES = load()
POSTED = [s for s in SAMPLES.values() if s.method == "POST" and not s.websocket]
JSON = [(b"Content-Type", b"application/json")]
EVENTS = [(b"Content-Type", b"text/event-stream")]

CHAT = {
    "id": "c", "object": "chat.completion", "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
}  # fmt: skip
RESPONSE = {
    "id": "r", "object": "response", "status": "completed", "model": "m", "output": [],
    "usage": {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7},
}  # fmt: skip
MESSAGE_STREAM = (
    b'event: message_start\ndata: {"type":"message_start","message":{"model":"c","usage":{"input_tokens":3,'
    b'"output_tokens":1}}}\n\nevent: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},'
    b'"usage":{"output_tokens":4}}\n\nevent: message_stop\ndata: {"type":"message_stop"}\n\n'
)
COHERE_STREAM = (
    b'data: {"id":"c","type":"message-start","delta":{"message":{"role":"assistant"}}}\n\n'
    b'data: {"type":"content-delta","index":0,"delta":{"message":{"content":{"text":"x"}}}}\n\n'
    b'data: {"type":"message-end","delta":{"finish_reason":"COMPLETE","usage":{"billed_units":{"input_tokens":3,'
    b'"output_tokens":4}}}}\n\n'
)
OLLAMA_STREAM = (
    b'{"model":"l","message":{"role":"assistant","content":"x"},"done":false}\n'
    b'{"model":"l","message":{"role":"assistant","content":""},"done":true,"prompt_eval_count":3,"eval_count":4}\n'
)


def plain(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


class Seen:
    """Taps that note what they say of odd answers."""

    def __init__(self, **options: Any) -> None:
        self.odd: list[str] = []
        self.unclaimed: list[tuple[str, str]] = []
        self.taps = UsageTaps(anomaly=self.odd.append, **options)
        self.taps.unclaimed = lambda method, target: self.unclaimed.append((method, target))

    def read(
        self,
        path: str,
        body: bytes,
        headers: list[tuple[bytes, bytes]] = JSON,
        *,
        size: int = 0,
        asked: bytes = b'{"model":"m"}',
        status: int = 200,
        method: str = "POST",
    ) -> Usage | None:
        request = self.taps.request(method, path, JSON)
        if request is None:
            return None
        request.feed(asked)
        response = self.taps.response(request, status, headers)
        if response is None:
            return None
        for piece in sliced(body, size or max(1, len(body))):
            response.feed(piece)
        return response.finish(True)


def tokens(usage: Usage | None) -> tuple[int | None, int | None] | None:
    return None if usage is None else (usage.input_tokens, usage.output_tokens)


# Any spelling.


@st.composite
def spellings(draw: st.DrawFn, path: str) -> str:
    """Another spelling of the same path: escapes, dot segments, doubled slashes, the absolute form."""
    out = []
    for segment in path.split("/")[1:]:
        chars = [
            f"%{ord(c):02{draw(st.sampled_from('xX'))}}" if c.isalnum() and draw(st.integers(0, 9)) == 0 else c
            for c in segment
        ]
        prefix = draw(st.sampled_from(["", "", "", "./", "x/../", "/", "%2e/", "a/%2E%2e/"]))
        out.append(prefix + "".join(chars))
    host = draw(st.sampled_from(["", "", "http://any.host", "HTTPS://u:p@other:8443"]))
    return f"{host}/{'/'.join(out)}"


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_any_spelling_that_means_the_same_gives_the_same_usage(data: st.DataObject) -> None:
    sample = data.draw(st.sampled_from(POSTED))
    path, mark, query = sample.path.partition("?")
    target = data.draw(spellings(path))
    assert normal_path(target) == normal_path(path)
    assert _usage(sample, target + mark + query) == _usage(sample, sample.path)


@pytest.mark.parametrize("sample", [pytest.param(sample, id=sample.name) for sample in POSTED])
def test_a_base_path_of_the_upstream_may_stand_before_the_clients_or_not(sample: Sample) -> None:
    head, _, tail = sample.path[1:].partition("/")
    if tail:
        seen = Seen(upstream_base=f"/{head}/")
        assert play(Sample(**{**_fields(sample), "path": f"/{tail}"}), [sample.body], taps=seen.taps)[0] == _usage(
            sample, sample.path
        )


def _fields(sample: Sample) -> dict[str, Any]:
    return {name: getattr(sample, name) for name in sample.__dataclass_fields__}


def _usage(sample: Sample, path: str) -> Usage | None:
    return play(Sample(**{**_fields(sample), "path": path}), [sample.body])[0]


@pytest.mark.parametrize("odd", ["{}", "/V1{}", "{};x", "{}%2f", "/%2f{}", "/nobody/knows"])
@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        ("/chat/completions", plain(CHAT), JSON),
        ("/responses", plain(RESPONSE), JSON),
        (
            "/responses",
            b'data: {"type":"response.created","response":{"id":"r","object":"response","usage":null}}\n\n'
            b'data: {"type":"response.completed","response":' + plain(RESPONSE) + b"}\n\n",
            EVENTS,
        ),
        ("/messages", MESSAGE_STREAM, EVENTS),
        ("/chat", COHERE_STREAM, EVENTS),
        ("/chat", b'{"id":"c","usage":{"billed_units":{"input_tokens":3,"output_tokens":4}}}', JSON),
        ("/api/chat", OLLAMA_STREAM, [(b"Content-Type", b"application/x-ndjson")]),
        ("/api/chat", OLLAMA_STREAM, JSON),
        (
            "/models/g:generateContent",
            (
                b'{"candidates":[],"modelVersion":"g","usageMetadata":{"promptTokenCount":3,"candidatesTokenCount":4,'
                b'"totalTokenCount":7}}'
            ),
            JSON,
        ),
        (
            "/models/g:streamGenerateContent",
            (
                b'[{"candidates":[],"usageMetadata":{"promptTokenCount":3}},\n'
                b'{"candidates":[{"finishReason":"STOP"}],"modelVersion":"g","usageMetadata":{"promptTokenCount":3,"candidatesTokenCount":4,"totalTokenCount":7}}]'
            ),
            JSON,
        ),
    ],
)
def test_what_the_normal_form_keeps_apart_is_known_by_its_shape(
    odd: str, path: str, body: bytes, headers: list[tuple[bytes, bytes]]
) -> None:
    for size in (0, 1, 7):
        usage = Seen().read(odd.format(path), body, headers, size=size)
        assert usage is not None
        assert (usage.usage_state, tokens(usage)) == ("final", (3, 4))


@pytest.mark.parametrize("odd", ["/V1/embeddings", "/v1/embeddings;x", "/v1%2fembeddings"])
def test_embeddings_and_rerankers_are_known_by_their_shape(odd: str) -> None:
    body = {"object": "list", "data": [{"object": "embedding", "embedding": [0.5]}], "usage": {"prompt_tokens": 3}}
    for document in (body, {**body, "filler": "x" * 200_000}):
        assert tokens(Seen().read(odd, plain(document))) == (3, None)
    assert tokens(Seen().read("/V2/embed", b'{"embeddings":[],"meta":{"billed_units":{"input_tokens":3}}}')) == (
        3,
        None,
    )
    usage = Seen().read("/V2/rerank", b'{"results":[],"meta":{"billed_units":{"search_units":2}}}')
    assert usage is not None
    assert (usage.units, usage.operation) == ({"search_units": 2}, "rerank")


def test_free_rows_are_free_only_where_their_path_is_beyond_doubt() -> None:
    seen = Seen()
    for path in (
        "/v1/chat/completions/x%2f..",
        "/v1/messages/count_tokens;x",
        "/v1/responses/x%5c..",
        "/tokenize%2f..",
    ):
        assert tokens(seen.read(path, plain(CHAT))) == (3, 4), path
    assert tokens(seen.read("/tokenize", plain(CHAT))) == (None, None)


def test_look_ups_are_remembered_within_bounds() -> None:
    places = UsageTaps().endpoints
    for number in range(3 * PATHS_MAX):
        places.of("POST", f"/v1/{number}/../messages")
        assert places.remembered <= PATHS_MAX
    assert places.of("POST", "/v1/messages?beta=true") is places.of("POST", "/v1/messages")


# Any size, any place, any type.


@pytest.mark.parametrize("path", ["/nobody/knows", "/v1/chat", "/api/chat"])
@pytest.mark.parametrize("document", [CHAT, RESPONSE])
@pytest.mark.parametrize("filler", [0, 70_000, 1_000_000])
@pytest.mark.parametrize("key", ["", "response", "result", "data"])
def test_neither_size_nor_envelope_decides(path: str, document: dict[str, Any], filler: int, key: str) -> None:
    grown = {"instructions": "i" * filler, "tools": [{"a": 1}] * 3, **document}
    body = plain({key: grown} if key else grown)
    for size in (0, 4096):
        seen = Seen()
        assert tokens(seen.read(path, body, size=size)) == (3, 4)
        assert not seen.odd


@pytest.mark.parametrize("path", ["/nobody/knows", "/v1/chat/completions", "/v1/chat", "/responses"])
@pytest.mark.parametrize(
    "before",
    [
        b": keep-alive\n\n" * 300,
        b'event: ping\ndata: {"type":"ping"}\n\n' * 300,
        b"data: this is no JSON\n\n" * 20,
        b'data: {"progress":' + b"1" * 300_000 + b"}\n\n",
        b'data: {"kind":"hello","note":"' + b"n" * 100_000 + b'"}\n\n' * 3,
    ],
    ids=["comments", "pings", "unreadable", "long", "longer"],
)
@pytest.mark.parametrize("long", [False, True])
def test_whatever_comes_before_the_telling_event(path: str, before: bytes, long: bool) -> None:
    filler = b'"instructions":"' + b"i" * 100_000 + b'",' if long else b""
    body = (
        before + b'event: response.created\ndata: {"type":"response.created","response":{' + filler + b'"id":"r",'
        b'"object":"response","usage":null}}\n\n'
        + b'data: {"type":"response.output_text.delta","delta":"x"}\n\n' * 9
        + b'data: {"type":"response.completed","response":{'
        + filler
        + plain(RESPONSE)[1:]
        + b"}\n\n"
    )
    for size in (0, 997):
        assert tokens(Seen().read(path, body, EVENTS, size=size)) == (3, 4)


@pytest.mark.parametrize(
    "kind", [b"binary/octet-stream", b"application/x-unknown", b"Multipart/Mixed; a=b", b"text/css"]
)
def test_no_type_but_a_pictures_or_a_sounds_hides_an_answer(kind: bytes) -> None:
    headers = [(b"Content-Type", kind)]
    for path in ("/v1/chat/completions", "/nobody/knows"):
        assert tokens(Seen().read(path, plain(CHAT), headers)) == (3, 4)
        assert tokens(Seen().read("/v1/messages", MESSAGE_STREAM, headers, size=1)) == (3, 4)
    for silent in (b"image/png", b"Audio/MPEG", b"video/mp4"):
        assert tokens(Seen().read("/nobody/knows", plain(CHAT), [(b"Content-Type", silent)])) is None


def test_the_reader_of_a_path_keeps_what_it_recognises() -> None:
    usage = Seen().read("/v1/messages", b'{"type":"message","usage":{"input_tokens":3,"output_tokens":4}}')
    assert usage is not None
    assert (usage.provider, usage.operation) == ("anthropic", "chat")
    usage = Seen().read("/v1/chat", plain(CHAT))  # Cohere's path, and Writer's
    assert usage is not None
    assert (tokens(usage), usage.provider) == ((3, 4), "openai")
    usage = Seen().read("/model/m/converse", plain(CHAT))  # a cloud's path still says whose cloud it is
    assert usage is not None
    assert (tokens(usage), usage.provider) == ((3, 4), "aws.bedrock")


def test_arrays_are_streams_only_where_they_are() -> None:
    seen = Seen()
    google = b'[{"candidates":[{"finishReason":"STOP"}],"usageMetadata":{"promptTokenCount":3,"totalTokenCount":3}}]'
    usage = seen.read("/v1beta/models/g:streamGenerateContent", google)
    assert usage is not None
    assert usage.streamed is True
    usage = seen.read("/v1beta/models/g:generateContent", google[1:-1])
    assert usage is not None
    assert usage.streamed is False
    floats = b"[[" + b"0.25," * 400_000 + b"0.5]]"
    headers = [*JSON, (b"x-compute-tokens", b"9")]
    usage = seen.read("/embed", floats, headers, size=65_536)
    assert usage is not None
    assert (usage.input_tokens, usage.streamed, usage.usage_state) == (9, False, "final")


def test_binary_frames_are_known_by_their_prelude() -> None:
    frames = SAMPLES["bedrock_converse_stream.bin"]
    for path in (frames.path, "/model/arn:aws/with/a/slash/converse-stream"):
        for kind in (b"application/octet-stream", b"application/vnd.amazon.eventstream", b"x/y"):
            for size in (0, 1, 11):
                usage = Seen().read(path, frames.body, [(b"Content-Type", kind)], size=size)
                assert usage is not None
                assert (usage.usage_state, usage.provider) == ("final", "aws.bedrock")
    assert Seen().read("/nobody/knows", b"\0" * 40, [(b"Content-Type", b"application/octet-stream")]) is None


@pytest.mark.parametrize("coding", ["", "gzip"])
def test_what_follows_the_end_mark_is_not_read_wherever_it_is_cut(coding: str) -> None:
    usage = b'"usage":{"prompt_tokens":%d,"completion_tokens":4}}'
    start = b'data: {"id":"c","object":"chat.completion.chunk","model":"m","choices":[],' + usage % 3
    body = start + b"\n\ndata: [DONE]\n\n" + start.replace(b'"prompt_tokens":3', b'"prompt_tokens":9')
    for tail in (b"", b"\n", b"\n\n"):
        wire = zlib.compress(body + tail, wbits=31) if coding else body + tail
        for cut in range(0, len(wire), 3):
            request = UsageTaps().request("POST", "/v1/chat/completions", JSON)
            assert request is not None
            more = [(b"Content-Encoding", coding.encode())] if coding else []
            response = UsageTaps().response(request, 200, [*EVENTS, *more])
            assert response is not None
            response.feed(wire[:cut])
            response.feed(wire[cut:])
            assert tokens(response.finish(True)) == (3, 4), cut


# Stored answers.


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions/chatcmpl-1",
        "/openai/v1/chat/completions/chatcmpl-1",
        "/v1/responses/resp_1",
        "/v1/responses/resp_1/cancel",
        "/backend-api/codex/responses/resp_1/cancel",
        "/openai/responses/resp_1/cancel",
        "/v1/threads/t/runs/run_1",
        "/v1/threads/t/runs/run_1/cancel",
        "/openai/threads/t/runs/run_1/cancel",
        "/v1beta/interactions/i/cancel",
        "/v1/predictions/p/cancel",
        "/v1/batches",
        "/v1/batches/b/cancel",
    ],
)
@pytest.mark.parametrize("document", [CHAT, RESPONSE], ids=["chat", "response"])
def test_a_post_that_shows_a_stored_answer_counts_nothing(path: str, document: dict[str, Any]) -> None:
    seen = Seen()
    usage = seen.read(path, plain(document), asked=b'{"metadata":{"a":"b"}}')
    assert tokens(usage) in (None, (None, None))
    assert not seen.odd


def test_a_post_that_asks_a_model_is_no_look_at_a_stored_answer() -> None:
    for asked in (b'{"messages":[]}', b'{"model":"m","input":"x"}', b'{"pad":"' + b"x" * 70_000 + b'"}'):
        assert tokens(Seen().read("/v1/chat/completions/stream", plain(CHAT), asked=asked)) == (3, 4)


# Pins.


def test_a_pin_chooses_the_reader() -> None:
    bare = b'{"id":"c","model":"m","usage":{"prompt_tokens":3,"completion_tokens":4}}'
    assert Seen().read("/my/path", bare) is None
    for provider in ("openai", "my-vendor"):
        usage = Seen(pins=[Pin("/my/path", provider)]).read("/my/%70ath", bare)
        assert usage is not None
        assert (tokens(usage), usage.provider) == ((3, 4), provider)
    usage = Seen(pins=[Pin("/my/path", "anthropic")]).read(
        "/my/path", b'{"model":"m","usage":{"input_tokens":1,"cache_read_input_tokens":2,"output_tokens":4}}'
    )
    assert tokens(usage) == (3, 4)
    base = Seen(upstream_base="/base", pins=[Pin("/base/my/path", "x_ai")])
    usage = base.read("/my/path", plain(CHAT))
    assert usage is not None
    assert usage.provider == "x_ai"


@pytest.mark.parametrize("pattern", ["/v1/%6dessages", "/v1//messages", "/v1/./x", "/a/../b", "*/x/%7E", "/v1/a%2fb"])
def test_a_pin_that_can_match_nothing_is_known(pattern: str) -> None:
    assert Pin(pattern, "openai").idle
    assert not Pin("/v1/messages/{id}", "openai").idle
    assert not Pin("*/chat/completions", "openai").idle
    assert not Pin("/v1/a%2Fb", "openai").idle


# What nobody knows.


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b'{"answer":"x","usage":{"words":7}}', JSON),
        (b'{"deep":{"down":{"usage":{"in":7}}}}', JSON),
        (b'{"a":"' + b"x" * 300_000 + b'","meta":{"usage_metadata":{"n":1}}}', JSON),
        (b'{"a":1,"stats":{"generated_tokens":12}}', JSON),
        (b'{"tokenUsage":{"inputTokens":12}}', JSON),
        (b'data: {"text":"x"}\n\ndata: {"usage":{"words":7}}\n\n', EVENTS),
        (b'{"n":1}\n{"usage":{"words":7}}\n', [(b"Content-Type", b"application/x-ndjson")]),
    ],
)
def test_an_answer_that_speaks_of_usage_and_is_nobodys_is_said(body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    for size in (0, 1 if len(body) < 1000 else 4096, 13_001):
        seen = Seen()
        assert seen.read("/own/thing", body, headers, size=size) is None
        assert seen.odd == ["answer_unclaimed"]
        assert seen.unclaimed == [("POST", "/own/thing")]
        for other in (
            {"status": 404},
            {"method": "GET"},
        ):
            seen = Seen()
            seen.read("/own/thing", body, headers, **other)
            assert not seen.odd


@pytest.mark.parametrize(
    "body",
    [
        b'{"id":1,"name":"x","message":"hello"}',
        b'{"usage":{}}',
        b'{"usage":null,"total_tokens":null}',
        b'{"text":"she wrote \\"usage\\":{\\"words\\":7} and \\"total_tokens\\":5"}',
        b'{"config":{"max_tokens":100,"max_output_tokens":5,"maxTokens":7}}',
        b'{"token":"abc","refresh_tokens":["a"]}',
        b"usage: none",
        b"<html>usage</html>",
        plain(CHAT),
    ],
)
def test_other_answers_are_not(body: bytes) -> None:
    seen = Seen()
    seen.read("/own/thing", body)
    assert not seen.odd
    assert not seen.unclaimed


def test_a_mention_may_be_cut_anywhere() -> None:
    body = b'{"a":"b","usage": {"words":7}}'
    for cut in range(len(body)):
        mentions = Mentions()
        mentions.feed(body[:cut])
        mentions.feed(body[cut:])
        assert mentions.found


def test_the_warning_names_the_route_and_the_host_and_comes_seldom(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    routes = {"/secret/42": "/secret/{id}"}
    say = Unclaimed(lambda method, path: routes.get(path), "api.vendor.example", lambda: now)
    with caplog.at_level(logging.WARNING, "sidecar.usage"):
        for _ in range(5):
            say("POST", "/secret/42")
            say("POST", "/other/42")
        assert [record.facts["route"] for record in caplog.records] == ["/secret/{id}", "other"]  # type: ignore[attr-defined]
        now = SAY_EVERY_S
        say("POST", "/secret/42")
        facts = caplog.records[-1].facts  # type: ignore[attr-defined]
        assert facts == {
            "kind": "answer_unclaimed",
            "route": "/secret/{id}",
            "host": "api.vendor.example",
            "calls": 5,
        }
        assert "42" not in caplog.text


# The parts.


def test_wanted_places_are_united() -> None:
    tree = united(
        {"a": True, "b": {"c": True}, "d": [{"e": True}]}, {"a": {"x": True}, "b": {"f": True}, "d": [{"g": True}]}
    )
    assert tree == {"a": True, "b": {"c": True, "f": True}, "d": [{"e": True, "g": True}]}
    tree = Claims(READERS).tree
    for reader in READERS:
        for name in reader.wanted.keys() - {"data"}:
            assert name in tree
            assert name in tree["response"], name


def test_every_claim_has_a_sign() -> None:
    """A reader claims no sample whose bytes have none of its signs: they would be passed over unread."""
    for row in ROWS:
        assert row.reader.claim_signs
    signs = Claims(READERS)
    for sample in POSTED:
        if sample.expected and sample.expected.get("input_tokens"):
            assert signs.may_hold(sample.body) or b"x-" in b"".join(name for name, _ in sample.response_headers).lower()


@pytest.mark.parametrize("size", [300_000, 3_000_000])
def test_a_socket_message_of_any_size_is_read_in_bounded_memory(size: int) -> None:
    taps = UsageTaps()
    filler = b'"instructions":"' + b"i" * size + b'","output":[' + b'{"type":"image","result":"AAAA"},' * 50 + b"1],"
    big = b'{"type":"response.completed","response":{' + filler + plain(RESPONSE)[1:] + b"}"
    done = b'{"type":"response.done","response":{"status":"completed",' + filler + b'"usage":{"input_tokens":3}}}'
    for path, message, expected in (("/v1/%72esponses", big, (3, 4)), ("/v1/realtime", done, (3, None))):
        socket = taps.websocket(path, [(b"Upgrade", b"websocket")])
        assert socket is not None
        pieces = sliced(frame(message) + frame(message), 65_536)
        tracemalloc.start()
        try:
            found = [usage for piece in pieces for usage in socket.from_server(piece)]
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert [tokens(usage) for usage in found] == [expected, expected]
        assert peak < 2_000_000
