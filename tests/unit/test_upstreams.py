"""Which upstream a call goes to, what is said of upstreams in settings, and the secrets that are read for them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.gate.admission import Admission, ByUpstream, Deny, Meant, Models, Policy
from sidecar.gate.denials import Denial
from sidecar.gate.limits import read_limits
from sidecar.proxy.destinations import Destinations
from sidecar.runtime import gate_factory
from sidecar.runtime.factory import usage_taps
from sidecar.settings import ProxySettings, SettingsError, load
from sidecar.settings.upstreams import from_items, from_tables, reread

OPENAI = "https://api.openai.com"


def chosen(target: str, host: bytes = b"me") -> tuple[str, str]:
    table = Destinations(
        hosts={"claude.internal": "claude"}, prefixes={"/a": "a", "/a/b": "ab", "/openai": "openai"}, rest="rest"
    )
    return table.choose(target, [(b"HOST", host)])


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("/openai/v1/x?y=/openai", ("openai", "/v1/x?y=/openai")),
        ("/openai", ("openai", "/")),
        ("/openai/", ("openai", "/")),
        ("/openai?x=1", ("openai", "/?x=1")),
        ("/openaix/v1", ("rest", "/openaix/v1")),
        ("/a/b/c", ("ab", "/c")),
        ("/a/bc", ("a", "/bc")),
        ("/OPENAI/v1", ("rest", "/OPENAI/v1")),
        ("//openai/v1", ("rest", "//openai/v1")),
        ("/%6fpenai/v1", ("rest", "/%6fpenai/v1")),
        ("/openai/../a/v1", ("openai", "/../a/v1")),
        ("/openai//v1", ("openai", "//v1")),
        ("*", ("rest", "*")),
        ("http://me.test/openai/v1", ("openai", "http://me.test/v1")),
        ("http://me.test/openai", ("openai", "http://me.test/")),
        ("http://claude.internal:8080/openai/v1", ("claude", "http://claude.internal:8080/openai/v1")),
    ],
)
def test_the_longest_prefix_at_a_segments_border_wins(target: str, expected: tuple[str, str]) -> None:
    assert chosen(target) == expected


@pytest.mark.parametrize("host", [b"claude.internal", b"Claude.Internal:8080", b"claude.internal:"])
def test_a_host_is_known_whatever_its_port_and_before_a_prefix(host: bytes) -> None:
    assert chosen("/openai/v1", host) == ("claude", "/openai/v1")


@given(st.text("/abx.?%", min_size=1, max_size=12))
def test_what_is_left_of_a_target_is_its_end_and_a_path(rest: str) -> None:
    target = "/" + rest
    name, left = chosen(target)
    taken = {"a": "/a", "ab": "/a/b", "rest": "", "openai": "/openai"}[name]
    assert left.startswith("/")
    assert target in (taken + left, taken + left[1:])


def test_the_short_form_names_each_by_its_prefix_or_host() -> None:
    found = from_items([f"/openai={OPENAI}", "/a/b=http://up.test:80/base/", "x.internal=unix:/run/x.sock"])
    assert [(one.name, one.prefix, one.host, one.url) for one in found] == [
        ("openai", "/openai", None, OPENAI),
        ("a-b", "/a/b", None, "http://up.test/base"),
        ("x.internal", "", "x.internal", "unix:/run/x.sock"),
    ]


def test_all_faults_are_told_at_once_and_no_secret_with_them(tmp_path: Path) -> None:
    empty, control, blank = tmp_path / "empty", tmp_path / "control", tmp_path / "blank"
    empty.write_text("\n")
    control.write_text("sk-hidden\nsecond")
    blank.write_text(" sk-hidden\n")
    config = tmp_path / "sidecar.toml"
    config.write_text(
        f"""
        [[upstreams]]
        name = "one"
        prefix = "/same"
        url = "https://one.test"
        set_headers = {{ authorization = "file:{tmp_path}/gone" }}

        [[upstreams]]
        name = "two"
        prefix = "/same"
        url = "https://two.test"

        [[upstreams]]
        name = "two"
        prefix = "/three"
        url = "https://three.test"

        [[upstreams]]
        name = "four"
        prefix = "no-slash"
        url = "ftp://four.test"
        timeout_s = "soon"
        set_headers = {{Host = "x", x-a = "file:{empty}", x-b = "Bearer file:{control}", x-c = "file:{blank}", x-d = 1}}
        remove_headers = ["content-length", "b d"]
        colour = "red"

        [[upstreams]]
        prefix = "/five"
        host = "five.internal"
        url = "http://five.test"
        ca_file = "{empty}"
        set_headers = {{ x-e = "sk-hidden\\u0007", x-f = "sk-hidden-\\u00fc", x-g = "Bearer file:sk-hidden" }}
        """
    )
    with pytest.raises(SettingsError) as caught:
        load({"SIDECAR_CONFIG": str(config)}, backend_settings={"ledger": ()})
    said = "\n".join(caught.value.problems)
    for word in (
        f"one: set_headers: authorization: '{tmp_path}/gone' cannot be read: No such file or directory",
        "two upstreams have the name two",
        "four: prefix 'no-slash': expected a path such as /openai",
        "four: url: expected an http",
        "four: timeout_s: expected",
        "four: set_headers: host belongs to the connection",
        f"four: set_headers: x-a: '{empty}' is empty",
        f"four: set_headers: x-b: '{control}' holds a line end",
        f"four: set_headers: x-c: '{blank}' begins or ends with a blank",
        "four: set_headers: x-d: expected a text",
        "four: remove_headers: content-length belongs to",
        "four: remove_headers: 'b d' is no header name",
        "four: colour is not a setting of an upstream",
        "number 5: name is not set",
        "number 5: expected either prefix",
        "number 5: ca_file is set, but its url is no https:// one",
        "number 5: set_headers: x-f: its value (hidden) is not ASCII text",
        "number 5: set_headers: x-g: what stands behind file: (hidden) is no whole path: expected file:/run",
        "number 5: set_headers: x-e: its value (hidden) holds",
    ):
        assert word in said
    assert "hidden\n" not in said
    assert "sk-hidden" not in said
    assert "SIDECAR_UPSTREAM_URL is not set" not in said


@pytest.mark.parametrize("key", ["name", "prefix", "host"])
def test_two_with_one_name_prefix_or_host_are_told(key: str) -> None:
    tables: list[dict[str, Any]] = [
        {"name": "a", "prefix": "/a", "url": OPENAI},
        {"name": "b", "prefix": "/b", "url": OPENAI},
    ]
    for table in tables:
        if key == "host":
            del table["prefix"]
        table[key] = "/same" if key == "prefix" else "same"
    _, problems = from_tables(tables)
    assert problems == [f"two upstreams have the {key} {tables[0][key]}: expected another for each"]


def test_a_secret_file_is_read_without_its_line_end_and_read_again(tmp_path: Path) -> None:
    key, gone = tmp_path / "key", tmp_path / "gone"
    key.write_text("sk-one\r\n")
    gone.write_text("sk-stays")
    found, problems = from_tables(
        [
            {
                "name": "a",
                "prefix": "/a/",
                "url": OPENAI,
                "set_headers": {"Authorization": f"Bearer file:{key}", "x-key": f"file:{gone}", "x-team": "core"},
            }
        ]
    )
    assert problems == []
    values = {one.name: one.value.reveal() for one in found[0].set_headers}
    assert values == {"authorization": "Bearer sk-one", "x-key": "sk-stays", "x-team": "core"}
    assert "sk-" not in f"{found[0]} {found!r}"
    key.write_text("sk-two\n")
    gone.unlink()
    again, problems = reread(found)
    values = {one.name: one.value.reveal() for one in again[0].set_headers}
    assert values == {"authorization": "Bearer sk-two", "x-key": "sk-stays", "x-team": "core"}
    assert problems == [f"upstream a: x-key: '{gone}' cannot be read: No such file or directory"]


def test_the_gate_knows_whose_api_a_call_is_for() -> None:
    """What a call may cost, how a denial looks and whose credential it bears go by the upstream that it is sent to."""
    settings = load(
        {
            "SIDECAR_UPSTREAM_URL": "http://own.test",
            "SIDECAR_LIMITS": "cost_usd=5/month",
            "SIDECAR_UPSTREAMS": f"/openai={OPENAI},/claude=https://api.anthropic.com",
        },
        backend_settings={"ledger": ()},
    )
    policy = gate_factory.policy(settings, usage_taps(settings, lambda kind: None), b"k" * 32)
    assert policy is not None
    assert policy.upstreams.keys() == {"openai", "claude"}

    def price(models: Models | None, model: str) -> int | None:
        assert models is not None
        assert models.price is not None
        return models.price(None, model, 1000, 1000, 1_790_000_000_000_000_000)

    def type_of(deny: Deny) -> str:
        said = deny("POST", "/v9/new", limit="l", kind="quota", retry_after_s=None, message=None)
        return str(orjson.loads(said.body)["error"]["type"] if b'"error"' in said.body else dict(said.headers))

    openai, claude = policy.upstreams["openai"], policy.upstreams["claude"]
    assert price(openai.models, "gpt-4o")
    assert price(claude.models, "claude-sonnet-4-5")
    assert price(claude.models, "gpt-4o") is None
    assert (type_of(openai.deny), type_of(claude.deny)) == ("insufficient_quota", "billing_error")
    assert "application/problem+json" in type_of(policy.deny)
    # An API of OpenAI's kind at an unknown host is recorded as OpenAI's, and falls under the limits of that.
    chat = "/v1/chat/completions"
    assert policy.meant("POST", chat, None) == Meant("openai", None, True, provider_assumed=True)
    assert policy.meant("POST", chat, "openai") == Meant("openai", None, True)
    assert policy.meant("POST", "/v1/messages", None) == Meant("anthropic", None, True)
    assert policy.meant("POST", "/things", None).provider is None


def test_a_call_is_weighed_by_the_prices_of_its_upstream() -> None:
    def models(price: int, ceiling: int) -> Models:
        return Models(lambda provider, model, i, o, at_ns: price * (i + o), lambda provider, model: ceiling)

    policy = Policy(
        limits=read_limits((), ("cost_usd=9/day",)),
        meant=lambda method, target, upstream: Meant(None, None, True),
        key_of=lambda fields: None,
        deny=NoDenial(),
        models=models(1, 1000),
        upstreams={"dear": ByUpstream(lambda fields: None, models(7, 50), NoDenial())},
    )
    gate = Admission(policy, clock_ns=lambda: 0, call_later=lambda after_s, do: NoTimer())
    body = b'{"model": "m", "max_tokens": 99}'
    costs = []
    for upstream in (None, "dear", "default"):
        prepared = gate.prepare("POST", "/x", (), subscriber=None, dimensions={}, route=None, upstream=upstream)
        costs.append(gate.weigh(prepared, body, len(body)).needs[4])
    assert costs == [8 + 99, 7 * (8 + 50), 8 + 99]


def test_where_a_provider_is_assumed_the_model_s_name_tells_the_price() -> None:
    asked: list[str | None] = []

    def price(provider: str | None, *_: object) -> int:
        asked.append(provider)
        return 1

    for meant in (Meant("openai", None, True), Meant("openai", None, True, provider_assumed=True)):
        policy = Policy(
            limits=read_limits((), ("cost_usd=9/day",)),
            key_of=lambda fields: None,
            deny=NoDenial(),
            meant=partial(lambda meant, *_: meant, meant),
            models=Models(price, lambda provider, model: None),
        )
        gate = Admission(policy, clock_ns=lambda: 0, call_later=lambda after_s, do: NoTimer())
        prepared = gate.prepare("POST", "/x", (), subscriber=None, dimensions={}, route=None)
        assert prepared.facts.provider == "openai"
        gate.weigh(prepared, b'{"model": "claude"}', 19)
    assert asked == ["openai", None]


class NoTimer:
    def cancel(self) -> None: ...


class NoDenial:
    shows_amounts = False

    def __call__(self, method: str, target: str, **why: Any) -> Denial:
        raise AssertionError("nothing is denied here")


def test_several_upstreams_need_no_other() -> None:
    settings = load({"SIDECAR_UPSTREAMS": f"/openai={OPENAI}"}, backend_settings={"ledger": ()})
    assert settings.proxy.upstream_url is None
    assert [line.value for line in settings.effective if line.variable == "SIDECAR_UPSTREAMS"] == [f"/openai={OPENAI}"]
    assert ProxySettings().upstreams == ()
