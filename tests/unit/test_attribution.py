"""Who pays: each source, the order of sources, and that no credential is kept."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.model.exchange import Subscriber
from sidecar.model.grammar import Source
from sidecar.proxy.subscriber import (
    CACHED_MAX,
    CREDENTIALS,
    DIMENSION_CHARS_MAX,
    SUBSCRIBER_CHARS_MAX,
    Attributor,
    credential_sources,
)

KEY = b"k" * 32


def attributor(*sources: str, **dimensions: str) -> Attributor:
    return Attributor(sources=[Source.parse(s) for s in sources], dimensions=dimensions, hash_key=KEY)


def token(**claims: object) -> bytes:
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in ({"alg": "none"}, claims)]
    return b"Bearer " + b".".join([*parts, b"c2ln"])


@pytest.mark.parametrize(
    ("source", "headers", "target", "expected"),
    [
        ("header:x-tenant", [(b"X-Tenant", b"acme")], "/", Subscriber("acme", "header:x-tenant")),
        ("header:X-Tenant", [(b"x-tenant", "zürich".encode())], "/", Subscriber("zürich", "header:x-tenant")),
        ("header:x-tenant", [(b"X-Tenant", b"")], "/", None),
        ("header:x-tenant", [(b"X-Tenant", b" \t")], "/", None),
        ("header:authorization", [(b"Authorization", b"Bearer ")], "/", None),
        ("header:x-tenant", [(b"X-Other", b"acme")], "/", None),
        ("header:x-api-key:plain", [(b"x-api-key", b"cus_1")], "/", Subscriber("cus_1", "header:x-api-key")),
        ("jwt:sub", [(b"Authorization", token(sub="u-1"))], "/", Subscriber("u-1", "jwt:sub")),
        ("jwt:org", [(b"Authorization", token(org=17))], "/", Subscriber("17", "jwt:org")),
        ("jwt:sub", [(b"Authorization", token(sub=True))], "/", None),
        ("jwt:sub", [(b"Authorization", b"Bearer not.a.token")], "/", None),
        ("jwt:sub", [(b"Authorization", b"Bearer plain")], "/", None),
        ("query:tenant", [], "/v1?a=b&tenant=ac%6De", Subscriber("acme", "query:tenant")),
        ("query:tenant", [], "/v1?xtenant=1", None),
        ("path:2", [], "/v1/ac%6De/chat?x", Subscriber("acme", "path:2")),
        ("path:9", [], "/v1/acme", None),
        ("body:user", [], "/", None),
        # The last field counts, also an empty one; of a credential the first, by which servers authenticate.
        ("header:x-tenant", [(b"X-Tenant", b"a"), (b"x-tenant", b"b")], "/", Subscriber("b", "header:x-tenant")),
        ("header:x-tenant", [(b"X-Tenant", b"a"), (b"x-tenant", b"")], "/", None),
        ("jwt:sub", [(b"Authorization", token(sub="a")), (b"authorization", token(sub="b"))], "/",
         Subscriber("a", "jwt:sub")),
        ("jwt:sub", [(b"Authorization", token(sub="u").replace(b" ", b"\t \t"))], "/", Subscriber("u", "jwt:sub")),
        # A credential's field without a key is no credential: the other one opened the door.
        ("jwt:sub", [(b"Authorization", b"Bearer"), (b"authorization", token(sub="b"))], "/",
         Subscriber("b", "jwt:sub")),
        ("jwt:sub", [(b"Authorization", token(sub="a")), (b"authorization", b"")], "/", Subscriber("a", "jwt:sub")),
        ("jwt:sub", [(b"Authorization", token(sub="a")), (b"authorization", b"Bearer ")], "/",
         Subscriber("a", "jwt:sub")),
        ("header:x-api-key:plain", [(b"x-api-key", b"c"), (b"x-api-key", b" ")], "/",
         Subscriber("c", "header:x-api-key")),
        # A query name in any spelling; with two values it names nobody.
        ("query:tenant", [], "/v1?%74enant=acme", Subscriber("acme", "query:tenant")),
        ("query:my tenant", [], "/v1?my+tenant=acme", Subscriber("acme", "query:my tenant")),
        ("query:tenant", [], "/v1?tenant=a&tenant=a", Subscriber("a", "query:tenant")),
        ("query:tenant", [], "/v1?tenant=a&tenant=b", None),
        ("query:tenant", [], "/v1?tenant=a&%74enant=", None),
        ("query:tenant", [], "http://h?tenant=a", Subscriber("a", "query:tenant")),
        ("query:tenant", [], "/v1#?tenant=a", None),
        ("query:tenant", [], "/v1?a=b;tenant=a", None),
        # What is no UTF-8 is ISO 8859-1, or all that differ in such a letter were one subscriber.
        ("header:x-tenant", [(b"x-tenant", "Müller".encode())], "/", Subscriber("Müller", "header:x-tenant")),
        ("header:x-tenant", [(b"x-tenant", b"M\xfcller")], "/", Subscriber("Müller", "header:x-tenant")),
        ("header:x-tenant", [(b"x-tenant", b"M\xf6ller")], "/", Subscriber("Möller", "header:x-tenant")),
        ("query:tenant", [], "/v1?tenant=M%C3%BCller", Subscriber("Müller", "query:tenant")),
        ("query:tenant", [], "/v1?tenant=M%FCller", Subscriber("Müller", "query:tenant")),
        ("query:tenant", [], "/v1?tenant=M\udcf6ller", Subscriber("Möller", "query:tenant")),
        ("path:2", [], "/t/M%F6ller", Subscriber("Möller", "path:2")),
        ("path:2", [], "/t/M%C3%B6ller", Subscriber("Möller", "path:2")),
        # A path in its normal form.
        ("path:2", [], "http://victim/t/acme/x", Subscriber("acme", "path:2")),
        ("path:2", [], "/a/victim/../../t/acme", Subscriber("acme", "path:2")),
        ("path:2", [], "/t/./%61cme", Subscriber("acme", "path:2")),
        ("path:2", [], "/t/a%2Fb", Subscriber("a/b", "path:2")),
        ("path:1", [], "*", None),
        ("path:1", [], "victim:443", None),
    ],
)  # fmt: skip
def test_a_source_answers(
    source: str, headers: list[tuple[bytes, bytes]], target: str, expected: Subscriber | None
) -> None:
    assert attributor(source)(headers, target, None)[0] == expected


def test_the_first_source_that_knows_wins() -> None:
    both = attributor("header:x-tenant", "query:tenant")
    assert both([], "/?tenant=b", None)[0] == Subscriber("b", "query:tenant")
    assert both([(b"x-tenant", b"a")], "/?tenant=b", None)[0] == Subscriber("a", "header:x-tenant")


def test_a_credential_is_hashed_with_the_key_and_without_its_scheme() -> None:
    secret = b"sk-live-1234567890"
    bearer = attributor("header:authorization")([(b"Authorization", b"Bearer " + secret)], "/", None)[0]
    plain = attributor("header:x-api-key")([(b"x-api-key", secret)], "/", None)[0]
    other = Attributor(sources=[Source.parse("header:x-api-key")], dimensions={}, hash_key=b"o" * 32)
    assert bearer is not None
    assert plain is not None
    assert bearer.id == plain.id  # one customer, whichever of the two headers its client sends
    assert secret.decode() not in bearer.id
    assert other([(b"x-api-key", secret)], "/", None)[0] != plain


def test_an_overlong_or_unprintable_value_is_hashed() -> None:
    for value in (b"x" * (SUBSCRIBER_CHARS_MAX + 1), b"a\x00b"):
        subscriber = attributor("header:x-tenant")([(b"x-tenant", value)], "/", None)[0]
        assert subscriber is not None
        assert subscriber.id.startswith("key_")


def test_dimensions_come_from_named_headers() -> None:
    _, dimensions = attributor(feature="X-Feature", team="x-team")([(b"x-feature", b"search")], "/", None)
    assert dimensions == {"feature": "search"}
    _, dimensions = attributor(team="x-team")([(b"x-team", b"K\xfcche")], "/", None)
    assert dimensions == {"team": "Küche"}


@pytest.mark.parametrize(
    ("header", "values"),
    [
        ("authorization", [b"Bearer k", b"bearer k", b"BEARER\tk", b"Bearer   k ", b"Bearer\x0bk", b"Bearer\xa0k"]),
        ("authorization", [b"Bearer k", b"k", b"token k"]),
        ("authorization", [b"Key k", b"KEY k", b"key  k", b"key\tk"]),
        ("authorization", [b"Basic UkVBTEtFWQ==", b"basic UkVBTEtFWQ", b"Basic  UkVBTEtFWR=="]),
        ("x-api-key", [b"k", b" k\t", b"Bearer k"]),
        (
            "authorization",
            [
                b"AWS4-HMAC-SHA256 Credential=AKID/20261101/eu-1/bedrock/aws4_request, SignedHeaders=h, Signature=1",
                b"AWS4-HMAC-SHA256  SignedHeaders=h,Credential=AKID/20261102/eu-1/bedrock/aws4_request,Signature=2",
            ],
        ),
    ],
)
def test_one_credential_in_any_spelling_is_one_subscriber(header: str, values: list[bytes]) -> None:
    attribute = attributor(f"header:{header}")
    assert len({attribute([(header.encode(), value)], "/", None)[0] for value in values}) == 1


@pytest.mark.parametrize(
    ("header", "one", "other"),
    [
        ("authorization", b"Bearer k", b"Bearer K"),
        ("authorization", b"Key k", b"Bearer k"),
        ("authorization", b"Bearer k l", b"Bearer k  l"),
        ("authorization", b"Basic UkVBTEtFWQ==", b"Basic UkVBTEtFWg=="),
        ("cookie", b"a=1; b=2", b"A=1; b=2"),
        ("x-api-key", b"key k", b"KEY k"),
    ],
)
def test_credentials_that_differ_are_two_subscribers(header: str, one: bytes, other: bytes) -> None:
    attribute = attributor(f"header:{header}")
    assert attribute([(header.encode(), one)], "/", None) != attribute([(header.encode(), other)], "/", None)


def test_long_runs_of_blanks_cost_their_length() -> None:
    attribute = attributor("header:authorization")
    assert attribute([(b"Authorization", b"Bearer" + b" " * 500_000 + b"k" + b"\t" * 500_000)], "/", None)[0]
    assert attribute([(b"Authorization", b"a" * 500_000 + b"!" + b" " * 500_000 + b"k")], "/", None)[0]


@pytest.mark.parametrize(
    ("provider", "real"),
    [
        (None, b"authorization"),
        ("openai", b"authorization"),
        ("gcp.vertex_ai", b"authorization"),
        ("anthropic", b"x-api-key"),
        ("azure.ai.openai", b"api-key"),
        ("azure.ai.inference", b"api-key"),
        ("gcp.gemini", b"x-goog-api-key"),
    ],
)
def test_of_several_credentials_the_one_that_the_upstream_asks_for_counts(provider: str | None, real: bytes) -> None:
    """Whatever is made up beside it, and wherever it stands, the subscriber stays."""
    seen: list[str] = []
    attribute = Attributor(
        sources=[Source.parse("credential")], dimensions={}, hash_key=KEY, provider=provider, anomaly=seen.append
    )
    alone = attribute([(real, b"k")], "/", None)[0]
    assert alone is not None
    assert alone.source == f"header:{real.decode()}"
    assert seen == []
    for made_up in (name.encode() for name in CREDENTIALS if name.encode() != real):
        assert attribute([(made_up, b"z"), (real, b"k")], "/", None)[0] == alone
        assert attribute([(real, b"Bearer k"), (made_up, b"z")], "/", None)[0] == alone
        assert attribute([(real, b"k"), (made_up, b"k")], "/", None)[0] == alone
        only = attribute([(made_up, b"z")], "/", None)[0]
        assert only is not None
        assert only.source == f"header:{made_up.decode()}"
    assert seen == ["credentials_conflict"] * 6


def test_each_credential_header_is_asked_once() -> None:
    for provider in (None, "anthropic", "nobody"):
        assert sorted(source.name for source in credential_sources(provider)) == sorted(CREDENTIALS)


def test_only_credentials_that_were_asked_for_are_compared() -> None:
    seen: list[str] = []
    both = [(b"x-api-key", b"a"), (b"authorization", b"b"), (b"x-tenant", b"t")]
    for sources in (["header:x-api-key"], ["header:x-tenant", "credential"], ["header:x-api-key:plain", "jwt:sub"]):
        named = [Source.parse(source) for source in sources]
        Attributor(sources=named, dimensions={}, hash_key=KEY, anomaly=seen.append)(both, "/", None)
    assert seen == []


def test_what_is_odd_is_counted_once_a_call() -> None:
    seen: list[str] = []
    attribute = Attributor(
        sources=[Source.parse("query:t"), Source.parse("header:x-t")],
        dimensions={"d": "x-d", "again": "x-d"},
        hash_key=KEY,
        anomaly=seen.append,
    )
    _, dimensions = attribute([(b"x-t", b"a"), (b"x-t", b"b"), (b"x-d", b"v" * 300)], "/?t=1&t=2", None)
    assert sorted(seen) == ["dimension_cut", "dimension_cut", "header_repeated", "query_repeated"]
    assert dimensions["d"] == dimensions["again"] == "v" * (DIMENSION_CHARS_MAX - 1) + "…"


@pytest.mark.parametrize(
    "text", ["", "header", "header:", "cookie:x", "path:0", "path:x", "header:x:loud", "jwt", "credential:x"]
)
def test_a_source_that_cannot_be_read_says_what_was_expected(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        Source.parse(text)


def test_a_short_hash_key_is_refused() -> None:
    with pytest.raises(ValueError, match="16 to 64"):
        Attributor(sources=[], dimensions={}, hash_key=b"short")


@given(
    headers=st.lists(st.tuples(st.sampled_from([b"x-tenant", b"Authorization", b"x"]), st.binary(max_size=60))),
    target=st.text(max_size=60),
)
def test_no_bytes_make_it_raise(headers: list[tuple[bytes, bytes]], target: str) -> None:
    every = attributor("header:x-tenant", "jwt:sub", "header:authorization", "query:t", "path:1", "path:3")
    subscriber, _ = every(headers, target, None)
    assert subscriber is None or subscriber.id


@pytest.mark.parametrize(
    ("sources", "known", "body", "expected"),
    [
        (["header:x-tenant", "body:user"], None, {"user": "u"}, ("u", "body:user")),
        (["header:x-tenant", "body:user"], ("t", "header:x-tenant"), {"user": "u"}, ("t", "header:x-tenant")),
        (["body:user", "header:x-tenant"], ("t", "header:x-tenant"), {"user": "u"}, ("u", "body:user")),
        (["body:user", "header:x-tenant"], ("t", "header:x-tenant"), {}, ("t", "header:x-tenant")),
        (["body:user", "body:team"], None, {"team": "x"}, ("x", "body:team")),
        (["body:user"], None, {}, None),
    ],
)
def test_the_body_names_whom_no_earlier_source_knew(
    sources: list[str], known: tuple[str, str] | None, body: dict[str, str], expected: tuple[str, str] | None
) -> None:
    attribute = Attributor(sources=[Source.parse(text) for text in sources], dimensions={}, hash_key=b"k" * 16)
    found = attribute.by_body(None if known is None else Subscriber(*known), body.get)
    assert found == (None if expected is None else Subscriber(*expected))


def test_each_source_remembers_for_itself_and_only_so_much() -> None:
    attribute = attributor("header:x-api-key:plain", "header:x-api-key")
    assert attribute([(b"X-Api-Key", b"k")], "/", None)[0] == Subscriber("k", "header:x-api-key")
    hashed = attributor("header:x-tenant", "header:x-api-key")
    for number in range(CACHED_MAX + 10):
        name = str(number).encode()
        assert hashed([(b"x-tenant", name)], "/", None)[0] == Subscriber(str(number), "header:x-tenant")
    first = hashed([(b"x-api-key", b"0")], "/", None)[0]
    assert first is not None
    assert first.source == "header:x-api-key"
    assert first.id.startswith("key_")


def test_an_unfit_name_in_the_body_is_hashed() -> None:
    attribute = Attributor(sources=[Source.parse("body:user")], dimensions={}, hash_key=b"k" * 16)
    for value in ("x" * 10_000, "line\nbreak"):
        found = attribute.by_body(None, {"user": value}.get)
        assert found is not None
        assert found.id.startswith("key_")


@pytest.mark.parametrize("nothing", [b"", b" \t", b"Bearer", b"bearer \t", b"Basic "])
@pytest.mark.parametrize("header", CREDENTIALS)
def test_an_empty_field_beside_the_real_credential_changes_nothing_and_is_counted(header: str, nothing: bytes) -> None:
    """Most upstreams take the first of two, so the real one opened the door: it must not go unbilled by that."""
    seen: list[str] = []
    attribute = Attributor(sources=[Source.parse("credential")], dimensions={}, hash_key=KEY, anomaly=seen.append)
    name, real = header.encode(), b"Bearer k"
    payer, _ = attribute([(name, real)], "/", None)
    assert payer is not None
    assert attribute([(name, real), (name.title(), nothing)], "/", None)[0] == payer
    assert seen == ["credentials_conflict"]
    assert attribute([(name, nothing), (name, real)], "/", None)[0] == payer
