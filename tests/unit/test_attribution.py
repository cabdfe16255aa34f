"""Who pays: each source, the order of sources, and that no credential is kept."""

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.attribution import CACHED_MAX, SUBSCRIBER_CHARS_MAX, Attributor, parse_source
from sidecar.exchange import Subscriber

KEY = b"k" * 32


def attributor(*sources: str, **dimensions: str) -> Attributor:
    return Attributor(sources=[parse_source(s) for s in sources], dimensions=dimensions, hash_key=KEY)


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
    ],
)
def test_a_source_answers(source, headers, target, expected):
    assert attributor(source)(headers, target, None)[0] == expected


def test_the_first_source_that_knows_wins():
    both = attributor("header:x-tenant", "query:tenant")
    assert both([], "/?tenant=b", None)[0] == Subscriber("b", "query:tenant")
    assert both([(b"x-tenant", b"a")], "/?tenant=b", None)[0] == Subscriber("a", "header:x-tenant")


def test_a_credential_is_hashed_with_the_key_and_without_its_scheme():
    secret = b"sk-live-1234567890"
    bearer = attributor("header:authorization")([(b"Authorization", b"Bearer " + secret)], "/", None)[0]
    plain = attributor("header:x-api-key")([(b"x-api-key", secret)], "/", None)[0]
    other = Attributor(sources=[parse_source("header:x-api-key")], dimensions={}, hash_key=b"o" * 32)
    assert bearer is not None
    assert plain is not None
    assert bearer.id == plain.id  # one customer, whichever of the two headers its client sends
    assert secret.decode() not in bearer.id
    assert other([(b"x-api-key", secret)], "/", None)[0] != plain


def test_an_overlong_or_unprintable_value_is_hashed():
    for value in (b"x" * (SUBSCRIBER_CHARS_MAX + 1), b"a\x00b"):
        subscriber = attributor("header:x-tenant")([(b"x-tenant", value)], "/", None)[0]
        assert subscriber is not None
        assert subscriber.id.startswith("key_")


def test_dimensions_come_from_named_headers():
    _, dimensions = attributor(feature="X-Feature", team="x-team")([(b"x-feature", b"search")], "/", None)
    assert dimensions == {"feature": "search"}


@pytest.mark.parametrize("text", ["", "header", "header:", "cookie:x", "path:0", "path:x", "header:x:loud"])
def test_a_source_that_cannot_be_read_says_what_was_expected(text):
    with pytest.raises(ValueError, match="expected"):
        parse_source(text)


def test_a_short_hash_key_is_refused():
    with pytest.raises(ValueError, match="16 to 64"):
        Attributor(sources=[], dimensions={}, hash_key=b"short")


@given(
    headers=st.lists(st.tuples(st.sampled_from([b"x-tenant", b"Authorization", b"x"]), st.binary(max_size=60))),
    target=st.text(max_size=60),
)
def test_no_bytes_make_it_raise(headers, target):
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
def test_the_body_names_whom_no_earlier_source_knew(sources, known, body, expected):
    attribute = Attributor(sources=[parse_source(text) for text in sources], dimensions={}, hash_key=b"k" * 16)
    found = attribute.by_body(None if known is None else Subscriber(*known), body.get)
    assert found == (None if expected is None else Subscriber(*expected))


def test_each_source_remembers_for_itself_and_only_so_much():
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


def test_an_unfit_name_in_the_body_is_hashed():
    attribute = Attributor(sources=[parse_source("body:user")], dimensions={}, hash_key=b"k" * 16)
    for value in ("x" * 10_000, "line\nbreak"):
        found = attribute.by_body(None, {"user": value}.get)
        assert found is not None
        assert found.id.startswith("key_")
