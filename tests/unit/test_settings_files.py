"""Settings that name files: what stands in such a variable by mistake, and files as other systems save them."""

from __future__ import annotations

import io
import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sidecar.backends import backend_settings
from sidecar.prices import table
from sidecar.prices.table import TableError
from sidecar.prices.table import load as load_prices
from sidecar.runtime.factory import idle_names
from sidecar.runtime.logging import JsonLines, TextLines
from sidecar.settings import Settings, SettingsError, Unfit, given_file, load, loader, upstreams

URL = {"SIDECAR_UPSTREAM_URL": "http://127.0.0.1:9"}
KEY = "-----BEGIN PRIVATE KEY-----\n" + "MIIEvgIBADANBgkqhkiG9w0BAQEFAASC\n" * 24 + "-----END PRIVATE KEY-----\n"


def read(**variables: str) -> Settings:
    return load({**URL, **variables}, backend_settings=backend_settings())


def refused(**variables: str) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        read(**variables)
    return caught.value


@pytest.mark.parametrize(
    "variable",
    [
        "SIDECAR_TLS_KEY_FILE", "SIDECAR_UPSTREAM_CA_FILE", "SIDECAR_GATE_REVENIUM_PUBLIC_KEY_FILE",
        "SIDECAR_NATS_KEY_FILE", "SIDECAR_FILE_PATH", "SIDECAR_DATA_DIR", "SIDECAR_CONFIG",
        "SIDECAR_ADMIN_TOKEN_FILE",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [KEY, KEY.replace("\n", "")], ids=["lines", "one line"])
def test_a_key_in_place_of_its_file_is_told_and_not_shown(variable: str, value: str) -> None:
    error = refused(**{variable: value})
    assert any(variable in problem for problem in error.problems)
    assert "MII" not in str(error)
    assert not any("MII" in line.value for line in error.effective)


def test_a_secret_in_the_variable_for_its_file_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = refused(SIDECAR_STRIPE_API_KEY_FILE="sk_live_mine").problems
    assert found.startswith("SIDECAR_STRIPE_API_KEY (in SIDECAR_STRIPE_API_KEY_FILE): a file of that name (hidden)")
    (found,) = refused(SIDECAR_STRIPE_API_KEY_FILE="~sk_live_mine").problems
    assert "sk_live" not in found
    assert "no user whose home directory" in found
    assert "'/run/nothing' cannot be read" in str(refused(SIDECAR_STRIPE_API_KEY_FILE="/run/nothing"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys").mkdir()
    assert "'keys' cannot be read: Is a directory" in str(refused(SIDECAR_STRIPE_API_KEY_FILE="keys"))


@pytest.mark.parametrize(
    "variable", ["SIDECAR_PRICES", "SIDECAR_DATA_DIR", "SIDECAR_FILE_PATH", "SIDECAR_TLS_CERT_FILE", "SIDECAR_CONFIG"]
)
@pytest.mark.parametrize("address", ["https://me:hidden@prices.test/v2.json", "https://prices.test/v2.json?key=hidden"])
def test_an_address_in_place_of_a_path_is_told_without_what_is_secret_in_it(variable: str, address: str) -> None:
    error = refused(**{variable: address})
    assert variable in str(error)
    assert "expected a path, not an address" in str(error) or variable == "SIDECAR_CONFIG"
    assert "hidden@" not in str(error)
    assert "=hidden" not in str(error)
    assert not any("hidden@" in line.value or "=hidden" in line.value for line in error.effective)


def test_what_the_parts_say_of_a_setting_has_no_password_either() -> None:
    said = [f"SIDECAR_LIMITS: {address!r} is wrong" for address in ("nats://me:hidden@n:4222", "http://h/?key=hidden")]
    with pytest.raises(SettingsError) as caught:
        load(URL, backend_settings=backend_settings(), judge=lambda _: said)
    assert [text.partition(":")[0] for text in caught.value.problems] == ["SIDECAR_LIMITS"] * 2
    assert "hidden" not in str(caught.value)


def test_a_path_that_no_system_takes_is_refused_in_words(tmp_path: Path) -> None:
    assert "expected a shorter path" in str(refused(SIDECAR_DATA_DIR="x" * 300))
    assert "expected a shorter path" in str(refused(SIDECAR_TLS_KEY_FILE="/x" * 3000))
    assert "this is a directory" in str(refused(SIDECAR_UPSTREAM_CA_FILE=str(tmp_path)))
    config = tmp_path / "sidecar.toml"
    config.write_text('hash_key_file = "a\\u0000b"')
    assert "this is no path" in str(refused(SIDECAR_CONFIG=str(config)))


def test_the_mark_before_utf_8_is_read_over_or_named(tmp_path: Path) -> None:
    config, key = tmp_path / "sidecar.toml", tmp_path / "key"
    config.write_text("\ufeffworkers = 3\r\n", "utf-8")
    assert read(SIDECAR_CONFIG=str(config)).serve.workers == 3
    key.write_text("\ufeffone of sixteen or more", "utf-8")  # in a key of hashes it would be taken for a part of it
    (found,) = refused(SIDECAR_HASH_KEY_FILE=str(key)).problems
    assert found.endswith("begins with a byte order mark: save it as UTF-8 without one")


@pytest.mark.parametrize(
    ("variable", "value", "why"),
    [
        ("TRUSTED_PROXIES", "x,10.0.0.0/8,y", ("'x' does not", "'y' does not")),
        ("DIMENSIONS", "a b=x,c,c=y", ("'a b' is no name", "'c' is named twice")),
        ("ELEMENTS", "a=b,c=json:x,c=json:y", ("a='b'", "'c' is named twice")),
        ("PROVIDERS", "/x=a,y,/x=b", ("'y' has no", "'/x' is named twice")),
        ("GATE_STATUS", "quota=5,rate=429,rate=430", ("quota=5", "rate is named twice")),
        ("BACKENDS", "a b,ledger,c d", ("'a b' is", "'c d' is")),
    ],
)
def test_of_several_values_all_that_are_wrong_are_named(variable: str, value: str, why: tuple[str, ...]) -> None:
    (found,) = refused(**{f"SIDECAR_{variable}": value}).problems
    assert all(text in found for text in why)


def test_of_several_routes_all_that_are_wrong_are_named(tmp_path: Path) -> None:
    config = tmp_path / "sidecar.toml"
    config.write_text('[routes."/x"]\nrecord = "no"\n[routes."/y"]\nprovider = 3\n[routes."/z"]\n')
    (found,) = refused(SIDECAR_CONFIG=str(config)).problems
    assert "/x: record is true or false; /y: provider is a name" in found


def test_names_that_no_call_can_have_are_told(tmp_path: Path) -> None:
    config = tmp_path / "sidecar.toml"
    config.write_text(
        f'[subscribers.acme]\nstripe = "cus_1"\n[subscribers.key_{"0a" * 16}]\nstripe = "cus_2"\n'
        '[[prices]]\nprovider = "house"\nmodel = "m"\ninput = "1"\n'
    )
    pins = "/a=opanai,/b=house,/c=openai,/d=perplexity"
    told = idle_names(read(SIDECAR_CONFIG=str(config), SIDECAR_PROVIDERS=pins))
    assert [setting for setting, _ in told] == ["SIDECAR_PROVIDERS", "[subscribers]"]
    assert "no provider is known as opanai (did you mean openai?)" in told[0][1]
    assert "no call is ever of acme:" in told[1][1]
    assert idle_names(read(SIDECAR_CONFIG=str(config), SIDECAR_SUBSCRIBER="header:x-tenant,credential")) == []


@pytest.mark.parametrize("lines", [JsonLines(role="supervisor"), TextLines(role="supervisor")])
def test_a_name_that_is_no_utf_8_can_be_logged(lines: logging.Formatter) -> None:
    (problem,) = refused(**{"SIDECAR_A\udcff": "1"}).problems
    record = logging.makeLogRecord({"msg": problem, "facts": {"problems": [problem], "count": 1 << 80}})
    line = lines.format(record)
    io.BytesIO().write(line.encode())
    assert "is not a setting" in line
    if isinstance(lines, JsonLines):
        assert json.loads(line)["count"] == 1 << 80


def told(read_it: Callable[[], object]) -> str:
    with pytest.raises((SettingsError, TableError, Unfit)) as caught:
        read_it()
    return str(caught.value)


READERS: dict[str, Callable[[Path], object]] = {
    "settings": lambda path: read(SIDECAR_CONFIG=str(path)),
    "secret": lambda path: read(SIDECAR_STRIPE_API_KEY_FILE=str(path)),
    "header": lambda path: upstreams.read_header_file(str(path)),
    "prices": load_prices,
}


@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_never_comes_or_never_ends_is_told_and_not_waited_for(
    reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(given_file, "PATIENCE_S", 0.05)
    os.mkfifo(tmp_path / "pipe")
    assert "cannot be read: nothing was written into it for 0.05 s" in told(lambda: READERS[reader](tmp_path / "pipe"))
    monkeypatch.setattr(loader, "CONFIG_BYTES_MAX", 4096)
    monkeypatch.setattr(table, "FILE_BYTES_MAX", 1 << 20)
    endless = told(lambda: READERS[reader](Path("/dev/zero")))
    assert "holds more than" in endless or "is larger than 1 MiB" in endless


def test_what_a_command_writes_into_a_pipe_is_read_to_its_end() -> None:
    """As `<(command)` of a shell hands it over: piece by piece, some of it later."""
    out, into = os.pipe()

    def write() -> None:
        with os.fdopen(into, "wb", buffering=0) as file:
            for piece in ("workers = 3\n", "# " + "x" * 200_000 + "\n", 'data_dir = "/data"\n'):
                file.write(piece.encode())

    writer = threading.Thread(target=write)
    writer.start()
    try:
        settings = read(SIDECAR_CONFIG=f"/dev/fd/{out}")
    finally:
        os.close(out)
        writer.join()
    assert (settings.serve.workers, str(settings.data_dir)) == (3, "/data")
