"""The normal form of a target: spellings that RFC 3986 calls equal are equal, and others are not."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.model.target import client_path, is_authority, normal_path, origin_form, query_of


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/v1/messages", "/v1/messages"),
        ("/v1/messages?beta=true", "/v1/messages"),
        ("/v1/messages#part", "/v1/messages"),
        ("/v1/%6dessages", "/v1/messages"),
        ("/v1/%6Dessages", "/v1/messages"),
        ("/%76%31/messages", "/v1/messages"),
        ("/v1/./messages", "/v1/messages"),
        ("/v1/x/../messages", "/v1/messages"),
        ("/v1/x/%2e%2E/messages", "/v1/messages"),
        ("/v1/messages/.", "/v1/messages/"),
        ("/v1/messages/x/..", "/v1/messages/"),
        ("//v1///messages", "/v1/messages"),
        ("/../../v1/messages", "/v1/messages"),
        ("/..", "/"),
        ("/", "/"),
        ("http://other.example/v1/messages", "/v1/messages"),
        ("HTTPS://u:p@other.example:8443/v1/%6dessages?x", "/v1/messages"),
        ("http://other.example", "/"),
        ("http://other.example?x=/v1/messages", "/"),
        ("*", "*"),
        # Not the same resource by RFC 3986: they stay apart.
        ("/v1%2fmessages", "/v1%2Fmessages"),
        ("/v1/models/a%3ab", "/v1/models/a%3Ab"),
        ("/V1/messages", "/V1/messages"),
        ("/v1/messages;x", "/v1/messages;x"),
        ("/v1/%zz%4", "/v1/%zz%4"),
        ("/v1/%256dessages", "/v1/%256dessages"),
        ("/v1/.hidden/..x/...", "/v1/.hidden/..x/..."),
        ("/v1/\udcff", "/v1/\udcff"),
    ],
)
def test_the_normal_form_of_a_path(target: str, path: str) -> None:
    assert normal_path(target) == path


@pytest.mark.parametrize(
    ("target", "base", "path"),
    [
        ("/messages", "/v1", "/v1/messages"),
        ("/../v2/chat", "/v1", "/v2/chat"),
        ("http://other.example/messages?x", "/v1", "/v1/messages"),
        ("//messages", "/v1", "/v1/messages"),
    ],
)
def test_the_base_path_stands_in_front_before_dots_go(target: str, base: str, path: str) -> None:
    assert normal_path(target, base) == path


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("/a?b", ("/a?b", None)),
        ("*", ("*", None)),
        ("http://u:p@host:80/a", ("/a", "host:80")),
        ("http://host?a", ("/?a", "host")),
        ("host:443", ("host:443", None)),
    ],
)
def test_an_absolute_target_loses_its_authority(target: str, expected: tuple[str, str | None]) -> None:
    assert origin_form(target) == expected


@pytest.mark.parametrize(
    ("target", "base", "path"),
    [
        ("/t/acme", "", "/t/acme"),
        ("/t/acme?x#y", "/v1", "/t/acme"),
        ("http://victim/t/acme", "/v1", "/t/acme"),
        ("//t/%61cme/.", "/v1", "/t/acme/"),
        ("/x/../t/acme", "/v1", "/t/acme"),
        ("/../v1/t/acme", "/v1", "/t/acme"),  # out of the base and back into it
        ("/./t/acme", "/%76%31", "/t/acme"),
        ("/../t/acme", "/a/b", "/a/t/acme"),  # out of it: what the upstream sees
        ("/../v10/x", "/v1", "/v10/x"),
        ("/.", "/v1", "/"),
        ("/", "/v1", "/"),
        ("*", "/v1", "*"),
        ("http://victim", "/v1", "/"),
    ],
)
def test_the_path_below_the_base(target: str, base: str, path: str) -> None:
    assert client_path(target, base) == path


@pytest.mark.parametrize(
    ("target", "query"),
    [
        ("/x", ""),
        ("/x?a=b", "a=b"),
        ("/x?a?b#c?d", "a?b"),
        ("/x#?a", ""),
        ("http://h?a", "a"),
        ("http://h/x?a#b", "a"),
    ],
)
def test_the_query(target: str, query: str) -> None:
    assert query_of(target) == query


_SEGMENT = st.text(string.ascii_letters + string.digits + "-._~:@%20/", max_size=8)


@given(st.lists(_SEGMENT, max_size=6), st.randoms(use_true_random=False))
def test_spellings_that_are_equal_have_one_normal_form(segments: list[str], random: object) -> None:
    from random import Random

    assert isinstance(random, Random)
    path = "/" + "/".join(segments)
    normal = normal_path(path)
    assert normal_path(normal) == normal
    spelled = "".join(
        f"%{ord(c):02x}" if c.isalpha() and path[max(0, i - 2) : i].find("%") < 0 and random.random() < 0.3 else c
        for i, c in enumerate(path)
    )
    detour = spelled.replace("/", random.choice(["/", "/./", "//", "/x/../"]))
    assert normal_path(detour) == normal_path(path.replace("/", "//"))


@pytest.mark.parametrize(
    "host", [b"", b"a.test", b"A_b:8080", b"[::1]:80", b"[fe80::1%25eth0]", b"a,b", b"xn--bcher-kva.test."]
)
def test_what_may_stand_in_host(host: bytes) -> None:
    assert is_authority(host)


@pytest.mark.parametrize(
    "host",
    [b" ", b"a b", b"a/b", b"a\\b", b"u@a", b"a?b", b"a#b", b"b\xc3\xbccher.test", b"a\tb", b"a\x7f", b'a"b', b"a\n"],
)
def test_what_may_not(host: bytes) -> None:
    assert not is_authority(host)
