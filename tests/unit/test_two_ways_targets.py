"""Calls whose target is another one each time take the short way, and are what the careful way makes of them: with the
whole program's own parts, whatever hangs on a target (who pays, the route, the reader, the upstream, what is shown)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.conversation import Talk, conversation, ok

from sidecar.backends import backend_settings
from sidecar.gate.admission import Admission
from sidecar.prices import price_book
from sidecar.prices.book import PriceBook
from sidecar.proxy import plain_requests
from sidecar.proxy.plain_call import PlainCalls
from sidecar.runtime import factory, gate_factory
from sidecar.runtime.hop_counts import HopCounts
from sidecar.settings import Settings, load

KEY = b"k" * 32
JSON = b"Content-Type: application/json\r\n"
CHAT = (
    b'{"id":"c","object":"chat.completion","model":"gpt-5-mini","choices":[{"index":0,"finish_reason":"stop",'
    b'"message":{"role":"assistant","content":"hi"}}],"usage":{"prompt_tokens":7,"completion_tokens":2,"total_tokens":9}}'
)
GEMINI = (
    b'{"candidates":[{"content":{"parts":[{"text":"hi"}],"role":"model"},"index":0}],"modelVersion":"g",'
    b'"usageMetadata":{"promptTokenCount":7,"candidatesTokenCount":2,"totalTokenCount":9}}'
)
RESPONSES = [
    ok(b"plain"), ok(b'{"rows":5}', JSON + b"X-Rows: 3\r\n"), ok(CHAT, JSON), ok(GEMINI, JSON),
    ok(b"no", status=b"404 Not Found"), ok(b'{"usage":{"tokens":5}}', JSON),
]  # fmt: skip
BODIES = [b"", b'{"model":"gpt-5-mini","messages":[]}', b'{"model":"gpt-5-mini","stream":true,"messages":[]}', b"a=b"]
PARTS = [
    "orders", "123", "4567", "v1", "chat", "completions", "embeddings", "models", "gemini-2.5-flash:generateContent",
    "gemini-2.5-pro:generateContent", "internal", "silent", "..", ".", "", "%6frders", "%2e%2e", "a;b", "up", "upper",
    "x" * 300, "batches", "files", "%zz", "@", "'",
]  # fmt: skip
QUERIES = [
    "", "?", "?user=a", "?user=b&x=1", "?user=a&user=b", "?%75ser=c", "?page=2&key=secret", "?alt=sse",
    "?page=1&page=3",
]  # fmt: skip
USUAL = [
    "/orders/1", "/orders/2?user=a", "/orders/3/items/4", "/v1/chat/completions", "/v1/embeddings",
    "/v1beta/models/gemini-2.5-flash:generateContent", "/v1beta/models/gemini-2.5-pro:generateContent", "/silent/1",
    "/up/orders/1", "/up/v1/chat/completions", "/internal/5/chat", "/models/a", "/models/b",
]  # fmt: skip
TARGETS = st.one_of(
    st.sampled_from(USUAL),
    st.builds(lambda parts, query: "/" + "/".join(parts) + query, st.lists(st.sampled_from(PARTS), max_size=5),
              st.sampled_from(QUERIES)),
)  # fmt: skip
Call = tuple[str, str, int, int]  # method, target, and which body and response
CALLS: st.SearchStrategy[Call] = st.tuples(
    st.sampled_from(["GET", "POST", "DELETE", "PUT"]), TARGETS, st.integers(0, len(BODIES) - 1),
    st.integers(0, len(RESPONSES) - 1),
)  # fmt: skip
OPENAI = {"SIDECAR_UPSTREAM_URL": "http://up.test"}
SETTINGS: dict[str, dict[str, str]] = {
    "usual": OPENAI,
    "base": {"SIDECAR_UPSTREAM_URL": "http://up.test/base/v1", "SIDECAR_PUBLIC_URL": "https://api.example.com/x",
             "SIDECAR_QUERY_VALUES": "page"},
    "path": {**OPENAI, "SIDECAR_SUBSCRIBER": "path:2", "SIDECAR_ROUTES": "/orders/{id},/orders/{id}/items/{item}"},
    "query": {**OPENAI, "SIDECAR_SUBSCRIBER": "query:user,header:x-tenant"},
    "header first": {**OPENAI, "SIDECAR_SUBSCRIBER": "header:x-tenant,query:user"},
    "readers": {**OPENAI, "SIDECAR_PROVIDERS": "/orders/{id}=openai,/internal/{x}/chat=anthropic",
                "SIDECAR_ELEMENTS": "rows=json:rows,more=header:x-rows", "SIDECAR_ASK_FOR_USAGE": "on"},
    "toml": {"SIDECAR_UPSTREAM_URL": "http://up.test/base"},
}  # fmt: skip
TOML = """
[routes."/silent/{id}"]
record = false
[routes."/orders/{id}"]
timeout_s = 5
on_disconnect = "stop"
[[upstreams]]
name = "up"
prefix = "/up"
url = "http://vendor.test/base"
set_headers = { authorization = "Bearer ours" }
remove_headers = ["x-tenant"]
[[upstreams]]
name = "upper"
prefix = "/up/v1"
url = "http://upper.test"
"""


@cache
def configured(env: frozenset[tuple[str, str]]) -> tuple[Settings, PriceBook]:
    """Both are frozen, and the prices take long to read."""
    settings = load(dict(env), backend_settings=backend_settings())
    return settings, price_book(settings)


class Program(Talk):
    """The hop as the program puts it together."""

    def __init__(self, env: dict[str, str]) -> None:
        settings, book = configured(frozenset(env.items()))
        super().__init__()
        self.counted = HopCounts()
        policy = gate_factory.policy(settings, factory.usage_taps(settings, lambda kind: None), KEY)
        gate = None if policy is None else Admission(policy, clock_ns=lambda: 0, call_later=self.loop.call_later)
        self.proxy = factory.proxy(settings, self.recorder, self.counted, KEY, gate)
        readers = factory.plain_readers(settings, self.counted, book)  # type: ignore[arg-type]
        self.recorder.plain = readers("i")


@contextmanager
def never(short: bool) -> Iterator[None]:
    """With the short way closed, unless it is to be open."""
    take = PlainCalls.take
    if not short:
        PlainCalls.take = lambda *_: False  # type: ignore[method-assign]
    try:
        yield
    finally:
        PlainCalls.take = take  # type: ignore[method-assign]


def request(call: Call) -> bytes:
    method, target, body, _ = call
    length = b"" if method in ("GET", "DELETE") else JSON + b"Content-Length: %d\r\n" % len(BODIES[body])
    head = b"%b %b HTTP/1.1\r\nHost: me\r\nX-Tenant: acme\r\n%b\r\n" % (method.encode(), target.encode(), length)
    return head + (BODIES[body] if length else b"")


def told(calls: Sequence[Call], env: dict[str, str], *, short: bool) -> tuple[list[Any], int]:
    with never(short), conversation(Program(env)) as talk:
        assert isinstance(talk, Program)
        heard: list[Any] = []
        for call in calls:
            before = [len(peer.heard) + len(peer.unread) for peer in talk.upstreams]
            talk.client.says(request(call))
            asked = [
                peer
                for at, peer in enumerate(talk.upstreams)
                if len(peer.heard) + len(peer.unread) > (before[at] if at < len(before) else 0)
            ]
            for peer in asked:
                peer.says(RESPONSES[call[3]])
            heard.append([(peer.heard + peer.unread, peer.over) for peer in (talk.client, *talk.upstreams)])
            if talk.client.over:
                talk.client = talk.new_client()
        talk.finish()
        records = []
        for exchange in talk.recorder.records:
            facts = asdict(exchange)
            for name in ("started_ns", "started_mono_ns", "duration_ms", "first_byte_ms"):
                facts[name] = facts[name] is not None
            records.append(facts)
        return [heard, records, sorted(talk.counted.take())], talk.recorder.plain_calls


@pytest.mark.parametrize("name", SETTINGS)
@given(calls=st.lists(CALLS, max_size=8).flatmap(lambda some: st.permutations(some * 2)))
@example(calls=[("GET", target, 0, 0) for target in USUAL] * 2)
@example(calls=[("GET", "/a/1", 0, 0), ("DELETE", "/a/2", 0, 0)] * 3)
@example(calls=[("POST", target, 1, 2) for target in USUAL] * 2)
@example(calls=[("POST", target, 1, 3) for target in USUAL] * 2)
@settings(max_examples=25)
def test_both_ways_are_the_same_whatever_the_target(
    name: str, calls: list[Call], tmp_path_factory: pytest.TempPathFactory
) -> None:
    env = dict(SETTINGS[name])
    if name == "toml":
        file = tmp_path_factory.getbasetemp() / "targets.toml"
        file.write_text(TOML)
        env["SIDECAR_CONFIG"] = str(file)
    short, _ = told(calls, env, short=True)
    careful, none = told(calls, env, short=False)
    assert none == 0
    for one, other in zip(short, careful, strict=True):
        assert one == other


NUMBERED: dict[str, Callable[[int], str]] = {
    "an id": lambda n: f"/orders/{n}",
    "a query": lambda n: f"/orders?page={n}",
    "both": lambda n: f"/shops/{n % 3}/orders/{n}?page={n}&x",
    "long": lambda n: f"/orders/{n:0500d}",
}


@pytest.mark.parametrize("how", NUMBERED)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_target_that_never_comes_again_takes_the_short_way(how: str, method: str) -> None:
    calls: list[Call] = [(method, NUMBERED[how](n), 1, 1) for n in range(20)]
    (_, records, _), plain = told(calls, OPENAI, short=True)
    assert plain >= 18
    paths = [record["url"].removeprefix("http://up.test").partition("?")[0] for record in records]
    assert paths == [call[1].partition("?")[0] for call in calls]


def test_as_many_targets_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered of them has a bound, and nothing else is forgotten when it is reached."""
    monkeypatch.setattr(plain_requests, "AIMED_MAX", 5)
    calls: list[Call] = [("GET", f"/orders/{n % 7}", 0, 0) for n in range(40)]
    short, plain = told(calls, OPENAI, short=True)
    assert plain >= 38
    careful, _ = told(calls, OPENAI, short=False)
    assert short == careful
    monkeypatch.setattr(plain_requests, "AIMED_BYTES_MAX", 100)
    assert told(calls, OPENAI, short=True) == (careful, plain)


def test_tenants_in_paths_are_told_apart(tmp_path: Path) -> None:
    env = {**OPENAI, "SIDECAR_SUBSCRIBER": "path:2"}
    calls: list[Call] = [("GET", f"/tenants/{n % 4}/orders/{n}", 0, 0) for n in range(40)]
    (_, records, _), plain = told(calls, env, short=True)
    assert plain >= 32
    assert [record["subscriber"]["id"] for record in records] == [str(n % 4) for n in range(40)]


def test_a_call_that_goes_on_with_care_keeps_its_own_target() -> None:
    """One of which the response is unusual, where the first of its kind had another target."""
    stream = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;x=1\r\nhello\r\n0\r\n\r\n"
    for short in (True, False):
        with never(short), conversation(Program(OPENAI)) as talk:
            for n in range(4):
                talk.client.says(request(("GET", f"/orders/{n}", 0, 0)))
                talk.upstream.says(stream if n == 3 else ok())
            talk.finish()
            assert [record.url for record in talk.recorder.records] == [f"http://up.test/orders/{n}" for n in range(4)]
            assert json.loads(json.dumps(talk.recorder.records[3].route)) is None


def test_what_limits_ask_of_a_target_is_told_apart() -> None:
    """Of calls that nothing else tells apart: a pinned path names the provider, and no response of it is read."""
    env = {**OPENAI, "SIDECAR_PROVIDERS": "/orders/{id}=openai", "SIDECAR_LIMITS": "calls=9/day"}
    with conversation(Program(env)) as talk:
        assert talk.proxy._plain is not None
        aims = [talk.proxy._plain._aimed("GET", target) for target in ("/orders/1", "/orders/2", "/things/1")]
    kinds = [aim[0] for aim in aims if aim is not None]
    assert kinds[0] == kinds[1] != kinds[2]
    assert len({hash(kind) for kind in kinds}) == 2
