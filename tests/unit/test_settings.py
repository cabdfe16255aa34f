"""What may stand in a setting, what is said when something else does, and that no secret shows."""

from __future__ import annotations

import json
import pickle
import tempfile
from dataclasses import fields
from ipaddress import ip_network
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.backends import backend_settings
from sidecar.settings import (
    PREFIX,
    SECTIONS,
    Address,
    Durability,
    Element,
    OnDisconnect,
    Route,
    Secret,
    Setting,
    Settings,
    SettingsError,
    all_settings,
    core_settings,
    load,
    section_settings,
    types,
)

BACKENDS: dict[str, tuple[Setting, ...]] = {
    "ledger": (),
    "other": (),
    "meter": (
        Setting("url", types.http_url_query, required=True),
        Setting("batch", types.count(1, 1000), "100"),
    ),
    "stripe": (
        Setting("api_key", types.text, secret=True, required=True, also=("STRIPE_API_KEY",)),
        Setting("mode", types.word_of("v1", "v2", "stream"), "v1"),
        Setting("meters", types.names),
    ),
}
UPSTREAM = {"SIDECAR_UPSTREAM_URL": "https://api.example.com"}
PLACES = {
    found.name: f"{section}.{found.name}".lstrip(".")
    for section, kind in SECTIONS.items()
    for found in section_settings(kind)
}
# Of the proxy's, nobody's to set.
PROXY_LIMITS = {
    "calls_max", "head_fields_max", "retry_body_bytes_max", "linger_s", "linger_total_s", "linger_bytes_max",
}  # fmt: skip


def read(environ: dict[str, str] | None = None, **variables: str) -> Settings:
    return load(UPSTREAM | (environ or {}) | variables, backend_settings=BACKENDS)


def problems(environ: dict[str, str] | None = None, **variables: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        read(environ, **variables)
    return list(caught.value.problems)


def test_defaults_are_the_documented_ones() -> None:
    s = read()
    assert s.proxy.upstream_url == "https://api.example.com"
    assert (s.serve.listen, s.serve.admin_listen) == (Address("0.0.0.0", 8080), Address("127.0.0.1", 9464))
    assert (s.data_dir, s.backends, s.serve.workers) == (Path("sidecar-data"), ("ledger",), 1)
    assert (s.spool.durability, s.spool.on_spool_full, s.proxy.on_disconnect) == ("committed", "pass", "drain")
    timeouts = (s.proxy.upstream_connect_timeout_s, s.proxy.upstream_timeout_s, s.proxy.idle_timeout_s)
    assert (*timeouts, s.serve.stop_s) == (10, 600, 600, 30)
    assert (s.spool.commit_wait_s, s.spool.spool_memory_bytes) == (1, 64 << 20)
    assert (s.spool.retention, s.spool.retention_bytes, s.proxy.disconnect_drain_s) == (7 * 86_400, 10 << 30, 30)
    head = (s.proxy.preserve_host, s.proxy.forwarded, s.proxy.via, s.proxy.meter_id_header)
    assert head == (False, "x-forwarded", None, False)
    assert s.attribution.subscriber == ("credential",)
    assert s.attribution.hash_key is None
    assert (s.usage.estimate, s.usage.ask_for_usage, s.serve.log_level) == (False, False, "INFO")


def test_settings_without_arguments_are_the_defaults() -> None:
    assert load({}, backend_settings={"ledger": ()}, serving=False) == Settings(backend_values={"ledger": {}})


def test_every_field_of_the_core_has_its_setting_and_a_help_text() -> None:
    structured = {"subscribers", "subscriber_names", "meters", "price_tables", "price_file", "gate_public_key"}
    structured |= {"backend_values", "effective"}
    assert {f.name for f in fields(Settings)} - set(PLACES) - set(SECTIONS) == structured
    sections = [kind for name, kind in SECTIONS.items() if name]
    assert {f.name for kind in sections for f in fields(kind)} - set(PLACES) == PROXY_LIMITS
    assert all(s.help for s in core_settings())


@pytest.mark.parametrize(
    "variable", ["SIDECAR_CONFIG", "SIDECAR_DATA_DIR", "SIDECAR_TLS_KEY_FILE", "SIDECAR_HASH_KEY_FILE"]
)
def test_a_path_in_the_home_of_nobody_is_told(variable: str) -> None:
    with pytest.raises(SettingsError, match="path"):
        load({variable: "~nobody-of-that-name/x"}, backend_settings={"ledger": ()}, serving=False)


@pytest.mark.parametrize(
    ("variable", "value", "attribute", "expected"),
    [
        ("UPSTREAM_URL", "HTTP://Example.COM:8000/Base/", "upstream_url", "http://example.com:8000/Base"),
        ("UPSTREAM_URL", "https://example.com:443", "upstream_url", "https://example.com"),
        ("UPSTREAM_URL", "http://[::1]:9000/", "upstream_url", "http://[::1]:9000"),
        ("UPSTREAM_URL", "http://my_api.example.:9000/", "upstream_url", "http://my_api.example.:9000"),
        ("UPSTREAM_URL", "unix:/run/api.sock", "upstream_url", "unix:/run/api.sock"),
        ("UPSTREAM_URL", "unix:/run/api.sock:/v1/", "upstream_url", "unix:/run/api.sock:/v1"),
        ("LISTEN", "unix:/run/sidecar.sock", "listen", Address(path="/run/sidecar.sock")),
        ("LISTEN", "[::]:8080", "listen", Address("::", 8080)),
        ("LISTEN", "localhost:0", "listen", Address("localhost", 0)),
        ("BACKENDS", " ledger , other ,ledger", "backends", ("ledger", "other")),
        ("BACKENDS", "none", "backends", ()),
        ("DURABILITY", "Buffered", "durability", Durability.BUFFERED),
        ("STOP_S", "1.5", "stop_s", 1.5),
        ("STOP_S", "250ms", "stop_s", 0.25),
        ("RETENTION", "12h", "retention", 43_200),
        ("RETENTION_BYTES", "1.5GiB", "retention_bytes", 3 << 29),
        ("RETENTION_BYTES", "2 GB", "retention_bytes", 2 * 10**9),
        ("SPOOL_MEMORY_BYTES", "8M", "spool_memory_bytes", 8 << 20),
        ("PRESERVE_HOST", "ON", "preserve_host", True),
        ("TRUSTED_PROXIES", "10.0.0.0/8, fd00::/8,192.168.1.7", "trusted_proxies",
         (ip_network("10.0.0.0/8"), ip_network("fd00::/8"), ip_network("192.168.1.7/32"))),
        ("SUBSCRIBER", "header:X-Tenant:plain,jwt:sub,path:2", "subscriber",
         ("header:x-tenant:plain", "jwt:sub", "path:2")),
        ("SUBSCRIBER", "none", "subscriber", ()),
        ("DIMENSIONS", "feature=X-Feature,x-team", "dimensions", {"feature": "x-feature", "x-team": "x-team"}),
        ("ROUTES", "/v1/things/{id},*/files", "routes",
         (Route(pattern="/v1/things/{id}"), Route(pattern="*/files"))),
        ("PROVIDERS", "/my/path=openai,/a=b/{c}=anthropic", "providers",
         {"/my/path": "openai", "/a=b/{c}": "anthropic"}),
        ("ELEMENTS", "rows=header:X-Rows,pages=json:meta.pages", "elements",
         (Element("rows", header="x-rows"), Element("pages", json=("meta", "pages")))),
        ("QUERY_VALUES", "model,version", "query_values", ("model", "version")),
        ("VIA", "meter", "via", "meter"),
    ],
)  # fmt: skip
def test_a_value_is_read(variable: str, value: str, attribute: str, expected: Any) -> None:
    found = attrgetter(PLACES[attribute])(read({f"SIDECAR_{variable}": value}))
    assert found == expected
    assert type(found) is type(expected) or isinstance(found, (int, float))


@pytest.mark.parametrize(
    ("variable", "value", "why"),
    [
        ("UPSTREAM_URL", "api.example.com", "expected an http:// or https:// address"),
        ("UPSTREAM_URL", "ftp://api.example.com", "expected an http:// or https:// address"),
        ("UPSTREAM_URL", "http://", "expected an http:// or https:// address"),
        ("UPSTREAM_URL", "http://u:p@example.com", "no user and password"),
        ("UPSTREAM_URL", "http://example.com:0", "port from 1 to 65535"),
        ("UPSTREAM_URL", "http://example.com:99999", "port from 1 to 65535"),
        ("UPSTREAM_URL", "http://exa mple.com", "plain ASCII"),
        ("UPSTREAM_URL", "http://bücher.example", "plain ASCII"),
        ("UPSTREAM_URL", "http://example.com/?key=1", "without query"),
        ("UPSTREAM_URL", "http://[::1", "expected a host"),
        ("UPSTREAM_URL", "http://a..b", "expected a host"),
        ("LEDGER_URL", "postgresql://a..b/x", "a host whose labels"),
        ("LEDGER_URL", f"postgresql:///x?host={'a' * 64}.example", "a host whose labels"),
        ("UPSTREAM_URL", f"http://{'a' * 64}.example", "expected a host"),
        ("UPSTREAM_URL", "unix:run/api.sock", "expected unix:/path"),
        ("UPSTREAM_URL", "unix:/run/api.sock:v1", "expected unix:/path"),
        ("ROUTES", "/v1/*/things", "is no path pattern"),
        ("ROUTES", "/v1/{}", "is no path pattern"),
        ("ROUTES", "/v1/{id", "is no path pattern"),
        ("ROUTES", "/v1/things/", "is no path pattern: expected no slash at the end"),
        ("ROUTES", "/{a}/{a}/b", "is no path pattern: expected each {name} once"),
        ("ROUTES", "/v1/{a}/{b}", "is no path pattern: expected a literal as its last piece or the one before"),
        ("UPSTREAM_URL", "unix:/run/s:/b?q=1", "expected a base path in plain ASCII"),
        ("UPSTREAM_URL", "http://bücher.example", "a host as xn--"),
        ("LISTEN", "0.0.0.0:80a80", "expected a TCP port, 1 to 65535"),
        ("LISTEN", "0.0.0.0:65536", "expected a TCP port, 1 to 65535"),
        ("LISTEN", "8080", "expected host:port or unix:/path"),
        ("LISTEN", ":8080", "expected a host before the colon"),
        ("LISTEN", "::1:8080", "in brackets"),
        ("LISTEN", "[nope]:8080", "an IPv6 address between the brackets"),
        ("LISTEN", "unix:", "expected unix: and a path"),
        ("LISTEN", "unix:/" + "x" * 110, "at most 103 bytes"),
        ("WORKERS", "0", "a whole number, 1 to 256"),
        ("WORKERS", "two", "a whole number, 1 to 256"),
        ("WORKERS", "²", "a whole number, 1 to 256"),
        ("STOP_S", "-1", "expected seconds, or a time"),
        ("STOP_S", "nan", "expected seconds, or a time"),
        ("STOP_S", "1e3", "expected seconds, or a time"),
        ("RETENTION", "7 weeks", "such as 500ms, 30s, 5m, 12h, 7d"),
        ("RETENTION", "99999999d", "expected a time from 0 s"),
        ("UPSTREAM_TIMEOUT_S", "0", "expected a time from 0.001 s"),
        ("SPOOL_MEMORY_BYTES", "1", "expected a size from 1048576"),
        ("RETENTION_BYTES", "10 GiBs", "expected bytes, or a size"),
        ("DURABILITY", "fast", "expected one of committed, buffered"),
        ("PRESERVE_HOST", "maybe", "expected true or false"),
        ("TRUSTED_PROXIES", "10.0.0.1/8", "has host bits set"),
        ("TRUSTED_PROXIES", "everyone", "expected networks such as"),
        ("SUBSCRIBER", "x-tenant", "expected header:NAME"),
        ("SUBSCRIBER", "path:0", "the first segment being 1"),
        ("SUBSCRIBER", "header:x y", "is no header name"),
        ("SUBSCRIBER", "header:Connection", "the upstream never gets this field"),
        ("SUBSCRIBER", "credential:x", "or credential"),
        ("DIMENSIONS", "hop=keep-alive", "the upstream never gets this field"),
        ("DIMENSIONS", "a=x-1,a=x-2", "named twice"),
        ("ROUTES", "v1/things", "is no path pattern"),
        ("PROVIDERS", "/v1/things", "has no name=value"),
        ("ELEMENTS", "rows=x-rows", "expected header:NAME or json:PATH"),
        ("ELEMENTS", "rows=json:meta..rows", "member names with dots between them"),
        ("TLS_CERT_FILE", "/nowhere/at/all.pem", "there is no such file"),
        ("VIA", "two words", "is no header name"),
        ("HASH_KEY", "short", "expected a text of 16 to 64 bytes"),
        ("METER_BATCH", "1001", "expected a whole number, 1 to 1000"),
        ("STRIPE_MODE", "v3", "expected one of v1, v2, stream"),
    ],
)
def test_a_bad_value_is_named_with_what_was_expected(variable: str, value: str, why: str) -> None:
    first = problems({f"SIDECAR_{variable}": value})[0]
    assert first.startswith(f"SIDECAR_{variable}")
    assert why in first


def test_every_problem_is_reported_at_once_and_in_words() -> None:
    with pytest.raises(SettingsError) as caught:
        load(
            {"SIDECAR_LISTEN": "0.0.0.0:80a80", "SIDECAR_UPSTRAEM_URL": "http://x", "SIDECAR_BACKENDS": "ledgr,stripe"},
            backend_settings=BACKENDS,
        )
    assert str(caught.value).splitlines() == [
        "the configuration has 5 problems:",
        "  SIDECAR_LISTEN='0.0.0.0:80a80': expected a TCP port, 1 to 65535 (0: any free one)",
        "  SIDECAR_UPSTRAEM_URL is not a setting; did you mean SIDECAR_UPSTREAM_URL?",
        "  SIDECAR_BACKENDS: ledgr is no backend; did you mean ledger?",
        "  SIDECAR_UPSTREAM_URL is not set: expected an http:// or https:// address",
        "  SIDECAR_STRIPE_API_KEY (or STRIPE_API_KEY) is not set: the backend stripe needs it: expected a text",
    ]


def test_one_problem_is_one_problem() -> None:
    with pytest.raises(SettingsError, match=r"^the configuration has 1 problem:\n  SIDECAR_UPSTREAM_URL is not set"):
        load({}, backend_settings=BACKENDS)


def test_commands_that_only_read_need_nothing_set() -> None:
    settings = load({"SIDECAR_BACKENDS": "stripe"}, backend_settings=BACKENDS, serving=False)
    assert settings.proxy.upstream_url is None


def test_an_unreadable_upstream_is_not_also_reported_as_missing() -> None:
    assert len(problems(SIDECAR_UPSTREAM_URL="example.com")) == 1


def test_an_empty_variable_counts_as_not_set() -> None:
    assert read(SIDECAR_LISTEN="", SIDECAR_HASH_KEY="", SIDECAR_HASH_KEY_FILE="").serve.listen.port == 8080


def test_a_long_value_is_not_repeated_whole() -> None:
    assert len(problems(SIDECAR_LISTEN="x" * 5000)[0]) < 200


def test_a_name_that_is_like_no_setting_gets_no_suggestion() -> None:
    assert problems(SIDECAR_X="1") == ["SIDECAR_X is not a setting"]
    (found,) = problems(SIDECAR_STRIPE_APIKEY="1")
    assert found == "SIDECAR_STRIPE_APIKEY is not a setting; did you mean SIDECAR_STRIPE_API_KEY?"


def test_an_address_without_its_end_is_told_before_a_name_that_is_a_letter_away() -> None:
    assert "SIDECAR_UPSTREAM is not a setting; did you mean SIDECAR_UPSTREAM_URL?" in problems(SIDECAR_UPSTREAM="x")


def test_other_programs_variables_are_left_alone() -> None:
    read({"PATH": "/bin", "METER_URL": "x", "SIDECARS": "3"})


def test_addresses_that_kubernetes_adds_for_a_service_called_sidecar_do_not_stop_us() -> None:
    read(
        {
            "SIDECAR_SERVICE_HOST": "10.0.0.1",
            "SIDECAR_SERVICE_PORT": "80",
            "SIDECAR_SERVICE_PORT_HTTP": "80",
            "SIDECAR_PORT": "tcp://10.0.0.1:80",
            "SIDECAR_PORT_80_TCP": "tcp://10.0.0.1:80",
            "SIDECAR_PORT_80_TCP_PROTO": "tcp",
            "SIDECAR_ADMIN_PORT_9464_TCP_ADDR": "10.0.0.1",
        }
    )
    assert "SIDECAR_LISTEN_PORT is not a setting; did you mean SIDECAR_LISTEN?" in problems(SIDECAR_LISTEN_PORT="80a80")


# Secrets


def test_a_secret_never_shows(tmp_path: Path) -> None:
    key = "sk_live_very_secret_0001"
    settings = read(SIDECAR_BACKENDS="stripe", SIDECAR_STRIPE_API_KEY=key, SIDECAR_HASH_KEY=key)
    secret = settings.backend("stripe")["api_key"]
    assert secret.reveal() == key
    shown = f"{settings!r} {settings} {secret} {secret!r} {settings.effective}"
    assert key not in shown
    with pytest.raises(TypeError):
        pickle.dumps(secret)


def test_a_bad_secret_is_not_in_the_message() -> None:
    (problem,) = problems(SIDECAR_HASH_KEY="hunter2")
    assert problem.startswith("SIDECAR_HASH_KEY (hidden): expected a text of 16 to 64 bytes")
    assert "hunter2" not in problem


WITH_PASSWORDS = (
    "http://user:hunter2@example.com",
    "https://user:hun@ter2,hunter2/hunter2@example.com/x",
    "/a=http://user:hunter2@example.com",
    "postgresql://user:hunter2@example.com/x?y=hunter2",
    "nats://user:hunter2@example.com",
    "https://example.com/x?token=hunter2",
)


@pytest.mark.parametrize(
    "backend_and_setting",
    [pytest.param(row, id=row[1].variable(row[0])) for row in all_settings(backend_settings())],
)
def test_a_password_in_an_address_never_shows(backend_and_setting: tuple[str | None, Setting]) -> None:
    backend, setting = backend_and_setting
    for value in WITH_PASSWORDS:
        said = UPSTREAM | {setting.variable(backend): value}
        try:
            shown = str(load(said, backend_settings=backend_settings()).effective)
        except SettingsError as error:
            shown = f"{error} {error.problems} {error.effective}"
        assert "hunter2" not in shown, value


def test_secrets_compare_by_value() -> None:
    assert Secret("a") == Secret("a")
    assert Secret("a") != Secret("b")
    assert Secret("a") != "a"
    assert len({Secret("a"), Secret("a")}) == 1
    assert not Secret("")


def test_a_secret_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("sk_test_1\n")
    settings = read(SIDECAR_BACKENDS="stripe", SIDECAR_STRIPE_API_KEY_FILE=str(file))
    assert settings.backend("stripe")["api_key"] == Secret("sk_test_1")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "cannot be read"),
        (b"", "is empty"),
        (b"\xff\xfe", "is not text"),
        (b"x" * 70_000, "more than 65536 bytes"),
    ],
)
def test_an_unusable_secret_file_is_named(tmp_path: Path, content: bytes | None, why: str) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
    found = problems(SIDECAR_STRIPE_API_KEY_FILE=str(file))
    assert len(found) == 1
    assert found[0].startswith("SIDECAR_STRIPE_API_KEY")
    assert why in found[0]


def test_a_secret_said_twice_is_a_problem(tmp_path: Path) -> None:
    (found,) = problems(SIDECAR_STRIPE_API_KEY="a", SIDECAR_STRIPE_API_KEY_FILE="/x")
    assert found == "SIDECAR_STRIPE_API_KEY: SIDECAR_STRIPE_API_KEY_FILE is set as well: keep one of the two"


def test_a_secret_said_twice_in_the_file_is_a_problem(tmp_path: Path) -> None:
    config = tmp_path / "sidecar.toml"
    config.write_text('[stripe]\napi_key = "a"\napi_key_file = "/x"\n')
    (found,) = problems(SIDECAR_CONFIG=str(config))
    assert found == f"SIDECAR_STRIPE_API_KEY (in {config}): api_key_file is set as well: keep one of the two"


@pytest.mark.parametrize("name", ["SUBSCRIBER", "ROUTES", "TRUSTED_PROXIES", "BACKENDS", "DIMENSIONS", "ELEMENTS"])
def test_what_is_wrong_with_a_long_value_does_not_repeat_it_whole(name: str) -> None:
    (found,) = problems({f"SIDECAR_{name}": "x" * 5000})
    assert len(found) < 500


def test_the_vendors_variable_is_read_when_ours_is_absent() -> None:
    theirs = {"STRIPE_API_KEY": "theirs", "SIDECAR_BACKENDS": "stripe"}
    assert read(theirs).backend("stripe")["api_key"] == Secret("theirs")
    assert read(theirs, SIDECAR_STRIPE_API_KEY="ours").backend("stripe")["api_key"] == Secret("ours")


def test_two_settings_for_one_variable_are_a_fault_of_ours() -> None:
    clash = (Setting("key", types.text, secret=True), Setting("key_file", types.path))
    with pytest.raises(ValueError, match="SIDECAR_X_KEY_FILE would stand for two settings"):
        all_settings({"x": clash})


# TOML


def toml(tmp_path: Path, text: str) -> dict[str, str]:
    file = tmp_path / "sidecar.toml"
    file.write_text(text)
    return {"SIDECAR_CONFIG": str(file)}


def test_a_toml_file_may_hold_everything(tmp_path: Path) -> None:
    (tmp_path / "hash").write_text("0123456789abcdef")
    settings = load(
        toml(
            tmp_path,
            f"""
            upstream_url = "http://up.example"
            workers = 2
            stop_s = 1.5
            preserve_host = true
            backends = ["ledger", "stripe"]
            hash_key_file = "{tmp_path / "hash"}"
            stripe_mode = "v2"
            [stripe]
            api_key = "sk_test"
            [dimensions]
            feature = "x-feature"
            [elements]
            rows = "header:x-rows"
            [providers]
            "/a" = "openai"
            [routes."/v1/things/{{id}}"]
            on_disconnect = "stop"
            provider = "openai"
            [routes."/v1/other"]
            [subscribers.acme]
            stripe = "cus_1"
            [[meters]]
            name = "calls"
            aggregation = "COUNT"
            """,
        ),
        backend_settings=BACKENDS,
    )
    assert (settings.proxy.upstream_url, settings.serve.workers, settings.serve.stop_s) == ("http://up.example", 2, 1.5)
    assert settings.proxy.preserve_host is True
    assert settings.backends == ("ledger", "stripe")
    assert settings.attribution.hash_key == Secret("0123456789abcdef")
    assert settings.backend("stripe") == {"api_key": Secret("sk_test"), "mode": "v2", "meters": ()}
    assert settings.attribution.dimensions == {"feature": "x-feature"}
    assert settings.usage.elements == (Element("rows", header="x-rows"),)
    assert settings.usage.providers == {"/a": "openai"}
    assert settings.proxy.routes == (
        Route(pattern="/v1/things/{id}", on_disconnect=OnDisconnect.STOP, provider="openai"),
        Route(pattern="/v1/other"),
    )
    assert settings.subscribers == {"acme": {"stripe": "cus_1"}}
    assert settings.meters == ({"name": "calls", "aggregation": "COUNT"},)


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    file = toml(tmp_path, 'workers = 2\nlisten = "0.0.0.0:1"\n')
    settings = read(file, SIDECAR_WORKERS="3")
    assert (settings.serve.workers, settings.serve.listen.port) == (3, 1)
    origins = {line.variable: line.origin for line in settings.effective}
    assert origins["SIDECAR_WORKERS"] == "environment"
    assert origins["SIDECAR_LISTEN"] == file["SIDECAR_CONFIG"]
    assert origins["SIDECAR_STOP_S"] == "default"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("worker = 2", "worker (in {file}): is not a setting; did you mean workers?"),
        ("SIDECAR_WORKERS = 2", "SIDECAR_WORKERS (in {file}): is not a setting; did you mean workers?"),
        ("[[meter]]\nname = 'x'", "meter (in {file}): is not a setting; did you mean meters?"),
        ("[strpe]\nmode = 'v1'", "strpe (in {file}): is not a setting; did you mean stripe?"),
        ("[route.'/x']\nprovider = 'y'", "route (in {file}): is not a setting; did you mean routes?"),
        ("[dimension]\na = 'x-a'", "dimension (in {file}): is not a setting; did you mean dimensions?"),
        ("[upstream]\nurl = 'http://x'", "upstream (in {file}): is not a setting; did you mean upstreams?"),
        ("[upstreams]\nname = 'a'\nurl = 'http://x'", "upstreams (in {file}): expected [[upstreams]] tables"),
        ("[[stripe]]\nmode = 'v1'", "stripe (in {file}): is not a setting; did you mean [stripe]?"),
        ("hash_key_fil = '/x'", "hash_key_fil (in {file}): is not a setting; did you mean hash_key_file?"),
        (
            "[stripe]\napi_key_fil = '/x'",
            "stripe.api_key_fil (in {file}): is not a setting; did you mean api_key_file?",
        ),
        ("upstream = 'http://x'", "upstream (in {file}): is not a setting; did you mean upstream_url?"),
        ("workers = 0", "SIDECAR_WORKERS='0' (in {file}): expected a whole number, 1 to 256"),
        ("workers = [1]", "SIDECAR_WORKERS='1' (in {file}): expected a whole number"),
        ("workers = 1979-05-27", "SIDECAR_WORKERS='1979-05-27' (in {file}): expected a whole number"),
        ("[stripe]\nmod = 'v1'", "stripe.mod (in {file}): is not a setting; did you mean mode?"),
        ("[routes.v1]", "'v1' is no path pattern"),
        ("[routes.'/v1']\nstay = 1", "/v1: stay is not a setting of a route"),
        ("[routes.'/v1']\non_disconnect = 'wait'", "/v1: on_disconnect is one of drain, stop"),
        ("[routes]\n'/v1' = 'openai'", "expected a table for each pattern"),
        ("[subscribers]\nacme = 'cus'", 'subscribers.acme (in {file}): expected backend = "its id there" pairs'),
        ("[subscribers.acme]\nstrip = 'cus'", "strip is no backend; did you mean stripe?"),
        ("subscribers = 3", "subscribers (in {file}): expected tables such as"),
        ("meters = 3", "meters (in {file}): expected [[meters]] tables"),
        ('[limits]\nname = "a"\nunit = "calls"', "limits (in {file}): expected [[limits]] tables"),
        ("workers = ", "SIDECAR_CONFIG={quoted}: is no TOML: "),
    ],
)
def test_a_fault_of_the_file_is_named(tmp_path: Path, text: str, why: str) -> None:
    file = toml(tmp_path, text)
    found = problems(file)
    quoted = repr(file["SIDECAR_CONFIG"][:79] + "…" if len(file["SIDECAR_CONFIG"]) > 80 else file["SIDECAR_CONFIG"])
    assert len(found) == 1
    assert why.format(file=file["SIDECAR_CONFIG"], quoted=quoted) in found[0]


def test_a_missing_or_odd_file_is_named(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in problems(SIDECAR_CONFIG=str(tmp_path / "none.toml"))[0]
    (tmp_path / "odd.toml").write_bytes(b"\xff")
    assert problems(SIDECAR_CONFIG="a\0b") == [f"SIDECAR_CONFIG={'a' + chr(0) + 'b'!r}: is no path"]
    assert "is not UTF-8" in problems(SIDECAR_CONFIG=str(tmp_path / "odd.toml"))[0]


# What must fit together


def test_a_certificate_needs_its_key(tmp_path: Path) -> None:
    pem = tmp_path / "x.pem"
    pem.touch()
    assert problems(SIDECAR_TLS_CERT_FILE=str(pem)) == [
        "SIDECAR_TLS_KEY_FILE is not set: expected beside SIDECAR_TLS_CERT_FILE"
    ]
    assert problems(SIDECAR_UPSTREAM_KEY_FILE=str(pem)) == [
        "SIDECAR_UPSTREAM_CERT_FILE is not set: expected beside SIDECAR_UPSTREAM_KEY_FILE"
    ]


def test_tls_settings_for_a_plain_upstream_are_no_silent_nothing() -> None:
    found = problems(SIDECAR_UPSTREAM_URL="http://up.example", SIDECAR_UPSTREAM_SERVER_NAME="up")
    assert found == ["SIDECAR_UPSTREAM_SERVER_NAME is set, but SIDECAR_UPSTREAM_URL is no https:// one"]


def test_both_doors_cannot_be_the_same() -> None:
    same = {"SIDECAR_LISTEN": "127.0.0.1:9000", "SIDECAR_ADMIN_LISTEN": "127.0.0.1:9000"}
    assert problems(same) == ["SIDECAR_ADMIN_LISTEN=127.0.0.1:9000: is SIDECAR_LISTEN already"]


@pytest.mark.parametrize(
    ("listen", "admin", "overlaps"),
    [
        ("0.0.0.0:9000", "127.0.0.1:9000", True),
        ("127.0.0.1:9000", "0.0.0.0:9000", True),
        ("0.0.0.0:9000", "localhost:9000", True),
        ("[::]:9000", "[::1]:9000", True),
        ("0.0.0.0:9000", "[::1]:9000", False),
        ("0.0.0.0:9000", "127.0.0.1:9001", False),
        ("127.0.0.1:9000", "127.0.0.2:9000", False),
        ("0.0.0.0:0", "127.0.0.1:0", False),
        ("unix:/a", "unix:/a", True),
        ("unix:/a", "unix:/b", False),
    ],
)
def test_two_addresses_that_cannot_both_be_listened_on(listen: str, admin: str, overlaps: bool) -> None:
    said = {"SIDECAR_LISTEN": listen, "SIDECAR_ADMIN_LISTEN": admin}
    if overlaps:
        (problem,) = problems(said)
        assert problem.startswith(f"SIDECAR_ADMIN_LISTEN={admin}: is SIDECAR_LISTEN")
    else:
        assert str(read(said).serve.admin_listen) == admin
    read(SIDECAR_LISTEN="127.0.0.1:0", SIDECAR_ADMIN_LISTEN="127.0.0.1:0")


def test_the_problems_come_with_what_could_be_read() -> None:
    with pytest.raises(SettingsError) as caught:
        read(SIDECAR_WORKERS="x", SIDECAR_STOP_S="5")
    assert {line.variable: line.value for line in caught.value.effective}["SIDECAR_STOP_S"] == "5"


# Whatever is in the environment


@given(
    st.dictionaries(
        st.sampled_from([s.variable(b) for b, s in all_settings(BACKENDS)] + ["SIDECAR_CONFIG", "SIDECAR_X"]),
        st.text(max_size=40),
        max_size=6,
    )
)
def test_any_environment_is_read_or_refused_in_words(environ: dict[str, str]) -> None:
    try:
        load(environ, backend_settings=BACKENDS, serving=False)
    except SettingsError as error:
        assert all(problem.startswith("SIDECAR_") for problem in error.problems)  # noqa: PT017 - either end is right


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return repr(value) if isinstance(value, float) else json.dumps(value)


_SCALARS = st.booleans() | st.integers(-(10**15), 10**15) | st.floats() | st.text("ab/=:,{}*-. 1", max_size=8)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab/{}-", max_size=4), inner, max_size=3),
    max_leaves=6,
)
_KEYS = [s.variable(b).removeprefix(PREFIX).lower() for b, s in all_settings(BACKENDS)]


@given(st.dictionaries(st.sampled_from([*_KEYS, "meters", "subscribers", "stripe", "meter", "x"]), _VALUES, max_size=4))
def test_any_toml_is_read_or_refused_in_words(values: dict[str, Any]) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write("".join(f"{key} = {_toml(value)}\n" for key, value in values.items()))
        file.flush()
        try:
            load({"SIDECAR_CONFIG": file.name}, backend_settings=BACKENDS, serving=False)
        except SettingsError as error:
            assert "is no TOML" not in str(error)  # noqa: PT017 - either end is right


@given(
    st.builds(Address, st.sampled_from(["0.0.0.0", "::1", "localhost"]), st.integers(0, 65535))
    | st.builds(Address, path=st.from_regex(r"/[a-z]{1,20}", fullmatch=True))
)
def test_an_address_reads_back_as_it_is_written(address: Address) -> None:
    assert types.address.parse(str(address)) == address
