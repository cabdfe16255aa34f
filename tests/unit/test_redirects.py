"""Which redirects lead back through the proxy, and how they are written."""

from __future__ import annotations

import pytest

from sidecar.model.http_url import UpstreamAddress
from sidecar.proxy.redirects import Called, Redirects

ME = Called(b"/v1/things", b"http", b"me:8080")
UNSURE = Called(b"/v1/things")


def led(
    value: bytes,
    upstream: str = "http://up.example:9000",
    called: Called = ME,
    *,
    rewrite: bool = True,
    refresh: bool = False,
) -> tuple[bytes, list[str]]:
    counted: list[str] = []
    redirects = Redirects(UpstreamAddress.parse(upstream), rewrite=rewrite, counted=counted.append)
    return (redirects.refresh if refresh else redirects.location)(value, called), counted


@pytest.mark.parametrize(
    ("value", "upstream", "sent"),
    [
        (b"http://up.example:9000/v1/things/", "http://up.example:9000", b"http://me:8080/v1/things/"),
        (b"HTTP://UP.Example:9000/a%2Fb?x=http://up.example:9000#f", "http://up.example:9000",
         b"http://me:8080/a%2Fb?x=http://up.example:9000#f"),
        (b"//up.example:9000/x", "http://up.example:9000", b"//me:8080/x"),
        (b"http://up.example:9000", "http://up.example:9000", b"http://me:8080/"),
        (b"http://up.example:9000?x=1", "http://up.example:9000", b"http://me:8080/?x=1"),
        (b"http://up.example:9000#f", "http://up.example:9000", b"http://me:8080/#f"),
        (b"http://up.example/x", "http://up.example", b"http://me:8080/x"),
        (b"http://up.example:80/x", "http://up.example", b"http://me:8080/x"),
        (b"http://up.example:/x", "http://up.example", b"http://me:8080/x"),
        (b"https://up.example:443/x", "https://up.example", b"http://me:8080/x"),
        (b"http://[::1]:9000/x", "http://[::1]:9000", b"http://me:8080/x"),
        (b"http://[::1]/x", "http://[::1]", b"http://me:8080/x"),
        (b"http://localhost/x", "unix:/run/up.sock", b"http://me:8080/x"),
        (b"http://up.example:9000//other.example/x", "http://up.example:9000", b"http://me:8080//other.example/x"),
        # An upstream behind something that ends TLS, and one that believes X-Forwarded-Proto.
        (b"http://up.example/x", "https://up.example", b"http://me:8080/x"),
        (b"https://up.example:9000/x", "http://up.example:9000", b"http://me:8080/x"),
        # The base of the upstream's URL is taken off.
        (b"http://up.example/api/v1/things/", "http://up.example/api", b"http://me:8080/v1/things/"),
        (b"http://up.example/api", "http://up.example/api/", b"http://me:8080/"),
        (b"http://up.example/api?x", "http://up.example/api", b"http://me:8080/?x"),
        (b"/api/v1/things/", "http://up.example/api", b"/v1/things/"),
        (b"/api//other.example/", "http://up.example/api", b"/.//other.example/"),
    ],
)  # fmt: skip
def test_to_the_upstream(value: bytes, upstream: str, sent: bytes) -> None:
    assert led(value, upstream) == (sent, ["rewritten"])


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        (b"http://up.example:9000/x?y#z", b"/x?y#z"),
        (b"//up.example:9000/x", b"/x"),
        (b"http://up.example:9000", b"/"),
        (b"http://up.example:9000//other.example/x", b"/.//other.example/x"),
    ],
)
def test_where_the_clients_address_is_not_certain_it_is_a_path(value: bytes, sent: bytes) -> None:
    assert led(value, called=UNSURE) == (sent, ["rewritten"])


@pytest.mark.parametrize("rewrite", [True, False])
@pytest.mark.parametrize(
    "value",
    [
        b"http://other.example/x", b"http://up.example/x", b"http://up.example:9001/x", b"http://up.example:90000/x",
        b"http://up.example:9000.other.example/x", b"http://up.example:9000@other.example/x",
        b"http://u:p@up.example:9000/x", b"http://other.example:9000/up.example:9000/x",
        b"http://xup.example:9000/", b"http://up.example:9000\\@other.example/", b"http:\\\\up.example:9000/",
        b"http:/up.example:9000/", b"ftp://up.example:9000/", b"mailto:a@up.example:9000", b"/v1/things/", b"things/",
        b"?page=2", b"#f", b"", b"//", b"///up.example:9000/", b"up.example:9000/x", b"http://", b"\xff\xfe",
        b" http://up.example:9000/x",
    ],
)  # fmt: skip
def test_anything_else_is_left_alone(value: bytes, rewrite: bool) -> None:
    assert led(value, rewrite=rewrite) == (value, [])


@pytest.mark.parametrize(
    ("value", "upstream", "word"),
    [
        (b"http://up.example/other", "http://up.example/api", "outside"),
        (b"http://up.example/apis", "http://up.example/api", "outside"),
        (b"http://up.example/api/../other", "http://up.example/api", "outside"),
        (b"http://up.example/api/%2E%2e", "http://up.example/api", "outside"),
        # To TLS, for the same resource: led back it would come here again, for ever.
        (b"https://up.example/v1/things", "http://up.example", "scheme"),
        (b"http://up.example/v1/things#f", "https://up.example", "scheme"),
        (b"/apis/x", "http://up.example/api", None),
        (b"/api/../x", "http://up.example/api", None),
        (b"https://up.example:443/x", "http://up.example", None),  # another origin
    ],
)
def test_what_cannot_be_led_back_is_left_and_counted(value: bytes, upstream: str, word: str | None) -> None:
    assert led(value, upstream) == (value, [] if word is None else [word])


def test_switched_off() -> None:
    value = b"http://up.example:9000/x"
    assert led(value, rewrite=False) == (value, ["off"])
    assert led(b"/api/x", "http://up.example/api", rewrite=False) == (b"/api/x", [])


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        (b"5; url=http://up.example:9000/x", b"5; url=http://me:8080/x"),
        (b"0;URL='http://up.example:9000/x'", b"0;URL='http://me:8080/x'"),
        (b'0.5 , url = "http://up.example:9000/x" ', b'0.5 , url = "http://me:8080/x" '),
        (b"0;http://up.example:9000/x", b"0;http://me:8080/x"),
        (b"0;url='http://up.example:9000/x", b"0;url='http://me:8080/x"),
        (b"5", b"5"),
        (b"5; url=/x", b"5; url=/x"),
        (b"5; url=http://other.example/", b"5; url=http://other.example/"),
    ],
)
def test_refresh(value: bytes, sent: bytes) -> None:
    assert led(value, refresh=True) == (sent, ["rewritten"] if value != sent else [])


HOST = (b"Host", b"me.example")


@pytest.mark.parametrize(
    ("target", "fields", "trusted", "expected"),
    [
        ("/a?b", [HOST], False, (b"/a?b", b"http", b"me.example")),
        ("/a", [(b"hOST", b"[::1]:80")], False, (b"/a", b"http", b"[::1]:80")),
        ("http://api.example:81/a", [HOST], False, (b"/a", b"http", b"api.example:81")),
        ("/a", [], False, (b"/a", None, None)),
        ("/a", [(b"Host", b"")], False, (b"/a", None, None)),
        ("/a", [(b"Host", b"me/x")], False, (b"/a", None, None)),
        ("/a", [(b"Host", b"u@me")], False, (b"/a", None, None)),
        ("/a", [HOST, (b"X-Forwarded-For", b"1.1.1.1")], False, (b"/a", None, None)),
        ("/a", [HOST, (b"Via", b"1.1 lb")], True, (b"/a", None, None)),
        ("/a", [HOST, (b"X-Forwarded-Proto", b"https")], False, (b"/a", None, None)),
        ("/a", [HOST, (b"X-Forwarded-Proto", b"https")], True, (b"/a", b"https", b"me.example")),
        ("/a", [HOST, (b"X-Forwarded-Proto", b"HTTPS, http"), (b"x-forwarded-host", b"api.example, lb")], True,
         (b"/a", b"https", b"api.example")),
        ("/a", [HOST, (b"X-Forwarded-Proto", b"gopher")], True, (b"/a", None, None)),
        ("/a\udcff", [HOST], False, (b"/a\xff", b"http", b"me.example")),
    ],
)  # fmt: skip
def test_what_the_client_called(
    target: str,
    fields: list[tuple[bytes, bytes]],
    trusted: bool,
    expected: tuple[bytes, bytes | None, bytes | None],
) -> None:
    called = Called.of(target, fields, scheme=b"http", trusted=trusted)
    assert (called.target, called.scheme, called.authority) == expected
