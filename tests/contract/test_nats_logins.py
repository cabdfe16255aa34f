"""Who we are to a NATS server, and who it is to us: keys and `.creds` files, TLS with a CA of one's own; no secret in a
log, and each fault in a line."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from support.backend_fixtures import record
from support.nats_server import GOOD_STREAM, NatsServer, client, nats_server
from support.nats_users import Operator, key

from sidecar.backends import Context, backend_settings
from sidecar.backends.nats import NatsBackend, NatsSettings
from sidecar.model.delivery import Blocked, Delivered, Duplicate, Retry
from sidecar.settings import SettingsError, Unfit, load
from sidecar.storage.nats_keys import read_creds, read_seed

pytestmark = [pytest.mark.timeout(120), pytest.mark.server]
Made = Callable[..., NatsBackend]


@pytest.fixture
async def made(tmp_path: Path) -> AsyncIterator[Made]:
    """Makes a backend as the settings of a sidecar say it, each with its name in the environment."""
    backends = []

    def make(url: str, **texts: str) -> NatsBackend:
        backends.append(NatsBackend(NatsSettings(**given(tmp_path, url, **texts)), Context(data_dir=tmp_path)))
        return backends[-1]

    yield make
    for one in backends:
        await one.aclose()


def given(tmp_path: Path, url: str, **texts: str) -> dict[str, Any]:
    """Raises `SettingsError`."""
    env = {
        "SIDECAR_DATA_DIR": str(tmp_path / "data"),
        "SIDECAR_UPSTREAM_URL": "http://127.0.0.1:1",
        "SIDECAR_BACKENDS": "nats",
        "SIDECAR_NATS_URL": url,
        "SIDECAR_NATS_STREAM": "S",
        "SIDECAR_NATS_SUBJECT": "S.records",
        "SIDECAR_NATS_REPLICAS": "1",
        "SIDECAR_NATS_TIMEOUT": "5s",
        **{f"SIDECAR_NATS_{name}": text for name, text in texts.items()},
    }
    return dict(load(env, backend_settings=backend_settings()).backend("nats"))


def written(path: Path, text: str) -> str:
    path.write_text(text, newline="")
    return str(path)


async def make_stream(server: NatsServer, **login: Any) -> None:
    connection = await client(server.url, **login)
    await connection.jetstream().add_stream(name="S", subjects=["S.records"], **GOOD_STREAM)
    await connection.close()


async def verdict(backend: NatsBackend, number: int = 1) -> object:
    (sealed,) = backend.encode([record(number)]).sealed
    (found,) = await backend.send(sealed)
    return found


async def reason(backend: NatsBackend) -> str:
    """Why it is blocked, in a line; the same in `check --connect`."""
    found = await verdict(backend)
    assert isinstance(found, Blocked), found
    assert "\n" not in found.reason
    ok, said = await backend.reach()
    assert not ok
    assert found.reason.endswith(said)
    return found.reason


async def test_a_key_of_our_own(made: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = key(), key()
    with nats_server(options=f"authorization {{ users: [ {{ nkey: {ours.public} }} ] }}") as server:
        await make_stream(server, nkeys_seed_str=ours.seed)
        # As `nsc` and `nk` write it, and as an editor leaves it.
        for text in (ours.seed, f"{ours.seed}\n", f"# of the sidecars\r\n{ours.seed}\r\n"):
            known = made(server.url, NKEY_FILE=written(tmp_path / "seed.nk", text))
            assert await verdict(known) in (Delivered(), Duplicate())
        assert await verdict(made(server.url, NKEY=ours.seed)) == Duplicate()
        stranger = made(server.url, NKEY=theirs.seed)
        assert await reason(stranger) == (
            f"unauthorized: no login at {server.url}: it does not know the key of SIDECAR_NATS_NKEY_FILE: "
            f"add {theirs.public} to its users"
        )
    assert ours.seed not in caplog.text
    assert theirs.seed not in caplog.text


async def test_a_creds_file(made: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    operator, user = Operator(), key()
    good = operator.creds(user)
    with nats_server(options=operator.options) as server:
        (tmp_path / "their.creds").write_text(good)
        await make_stream(server, user_credentials=str(tmp_path / "their.creds"))
        texts = (good, good.strip(), operator.creds(user, line_end="\r\n"), operator.creds(exp=int(time.time()) + 600))
        for text in texts:
            known = made(server.url, CREDS_FILE=written(tmp_path / "our.creds", text))
            assert await verdict(known) in (Delivered(), Duplicate())
        for text, says in (
            (operator.creds(user, exp=int(time.time()) - 60), "its JWT has expired: have a new one issued"),
            (operator.creds(user, seed=key().seed), "its JWT is of another key than its seed: take both from one file"),
        ):
            refused = made(server.url, CREDS_FILE=written(tmp_path / "our.creds", text))
            assert await reason(refused) == f"unauthorized: no login at {server.url}: SIDECAR_NATS_CREDS_FILE: {says}"
        stranger = made(server.url, CREDS_FILE=written(tmp_path / "our.creds", Operator().creds()))
        assert "does not know the user of SIDECAR_NATS_CREDS_FILE" in await reason(stranger)
        assert "…_CREDS_FILE" in await reason(made(server.url))
    assert user.seed not in caplog.text
    assert good.splitlines()[1] not in caplog.text


async def test_a_user_that_expires_while_it_is_connected_is_said_and_another_goes_on(
    made: Made, tmp_path: Path
) -> None:
    operator, user = Operator(), key()
    with nats_server(options=operator.options) as server:
        (tmp_path / "their.creds").write_text(operator.creds())
        await make_stream(server, user_credentials=str(tmp_path / "their.creds"))
        # The server counts in whole seconds, and the first record takes a part of one.
        ends = made(server.url, CREDS=operator.creds(user, exp=int(time.time()) + 3))
        assert await verdict(ends) == Delivered()
        async with asyncio.timeout(20):
            while not isinstance(found := await verdict(ends, 2), Blocked):
                await asyncio.sleep(0.05)
        assert found.reason.endswith("SIDECAR_NATS_CREDS_FILE: its JWT has expired: have a new one issued")
        assert await verdict(made(server.url, CREDS=operator.creds(user)), 1) == Duplicate()


def test_a_file_that_cannot_be_used_is_a_line_without_what_is_in_it(tmp_path: Path) -> None:
    operator, user, account = Operator(), key(), key("ACCOUNT")
    good, seed = operator.creds(user), user.seed
    slip = seed[:20] + ("A" if seed[20] != "A" else "B") + seed[21:]
    names = {
        "NKEY_FILE": {
            "": "is empty",
            "hello": "one line of 58 letters",
            f"{seed}\n{seed}": "one line of 58 letters",
            seed[:-1]: "one line of 58 letters",
            slip: "a letter of this one is wrong",
            account.seed: "of an account or another",
            good: "one line of 58 letters",
        },
        "CREDS_FILE": {
            "": "is empty",
            seed: "between lines of dashes",
            good.partition("*")[0]: "between lines of dashes",
            good.replace(seed, slip): "a letter of this one is wrong",
            good.replace(".", ","): "between lines of dashes",
            good.replace(good.splitlines()[1], "a.b.c"): "what it has as NATS USER JWT is none",
            operator.creds(account): "of an account or another",
        },
    }
    for name, texts in names.items():
        for text, says in texts.items():
            with pytest.raises(SettingsError) as caught:
                given(tmp_path, "nats://a", **{name: written(tmp_path / "file", text)})
            line = str(caught.value)
            assert says in line, (name, text, line)
            assert seed[2:20] not in str(caught.value)
        for path, says in ((tmp_path / "none", "cannot be read: No such file"), (tmp_path, "Is a directory")):
            with pytest.raises(SettingsError, match=says):
                given(tmp_path, "nats://a", **{name: str(path)})
    with pytest.raises(Unfit):
        read_seed("S" + "A" * 57)
    assert read_creds(read_creds(good)) == read_creds(good)


def test_one_way_to_say_who_we_are_and_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed, creds = key().seed, Operator().creds()
    for both in (
        {"NKEY": seed, "CREDS": creds},
        {"TOKEN": "t", "NKEY": seed},
        {"USER": "u", "PASSWORD": "p", "CREDS": creds},
    ):
        settings = NatsSettings(**given(tmp_path, "nats://a", **both))
        with pytest.raises(ValueError, match="set one of SIDECAR_NATS_USER"):
            NatsBackend(settings, Context(data_dir=tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "nkeys" else object())
    for one in ({"NKEY": seed}, {"CREDS": creds}):
        settings = NatsSettings(**given(tmp_path, "nats://a", **one))
        with pytest.raises(ValueError, match=r"need the package nkeys: install it with: pip install 'metering-sidecar"):
            NatsBackend(settings, Context(data_dir=tmp_path))


async def test_a_signature_is_not_given_before_tls(made: Made) -> None:
    """Else who stands between could have us answer what a real server asked him."""
    said: list[bytes] = []

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b'INFO {"server_id":"x","version":"2.14.0","max_payload":1048576,"headers":true,"auth_required":true,'
            b'"nonce":"bm9uY2U"}\r\n'
        )
        said.append(await reader.read(10_000))
        writer.close()

    listener = await asyncio.start_server(plain, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    for texts in ({"NKEY": key().seed}, {"CREDS": Operator().creds()}):
        assert (await reason(made(f"tls://127.0.0.1:{port}", **texts))).startswith("tls: the server offers no TLS")
        assert not b"".join(said)
        assert isinstance(await verdict(made(f"nats://127.0.0.1:{port}", **texts)), Retry)
        assert b'"sig"' in said.pop()
        said.clear()
    listener.close()


class Certificates:
    """A CA of one's own, one that nobody knows, and what they issued."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.ca, self.other = trustme.CA(), trustme.CA()
        self.ca_file = str(root / "ca.pem")
        self.other_file = str(root / "other.pem")
        self.ca.cert_pem.write_to_path(self.ca_file)
        self.other.cert_pem.write_to_path(self.other_file)

    def issued(self, name: str, *identities: str, by: trustme.CA | None = None) -> dict[str, str]:
        cert = (by or self.ca).issue_cert(*identities)
        files = {"cert_file": str(self._root / f"{name}.pem"), "key_file": str(self._root / f"{name}.key")}
        cert.cert_chain_pems[0].write_to_path(files["cert_file"])
        cert.private_key_pem.write_to_path(files["key_file"])
        return files


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def strict_server(certificates: Certificates) -> Iterator[NatsServer]:
    """One that speaks TLS alone, and wants a certificate of everybody."""
    own = certificates.issued("server", "127.0.0.1")
    tls = (
        f'tls {{ cert_file: "{own["cert_file"]}", key_file: "{own["key_file"]}", ca_file: "{certificates.ca_file}", '
        "verify: true, timeout: 5 }"
    )
    with nats_server(options=tls) as server:
        yield server


async def test_tls_with_a_ca_of_ones_own_and_certificates_on_both_sides(
    strict_server: NatsServer, certificates: Certificates, made: Made
) -> None:
    url = f"tls://127.0.0.1:{strict_server.port}"
    ours = certificates.issued("sidecar", "sidecar")
    login = {"CERT_FILE": ours["cert_file"], "KEY_FILE": ours["key_file"]}
    known = made(url, CA_FILE=certificates.ca_file, **login)
    assert (await known.reach())[0]
    # `nats://` is TLS too where the server wants it.
    assert (await made(strict_server.url, CA_FILE=certificates.ca_file, **login).reach())[0]


@pytest.mark.parametrize("scheme", ["tls", "nats"])
async def test_each_fault_of_tls_says_what_to_set(
    scheme: str, strict_server: NatsServer, certificates: Certificates, made: Made
) -> None:
    url = f"{scheme}://127.0.0.1:{strict_server.port}"
    ours = certificates.issued("sidecar", "sidecar")
    forged = certificates.issued("forged", "sidecar", by=certificates.other)
    login = {"CERT_FILE": ours["cert_file"], "KEY_FILE": ours["key_file"]}
    for texts, says in (
        (login, "unable to get local issuer certificate): set SIDECAR_NATS_CA_FILE"),
        ({"CA_FILE": certificates.other_file, **login}, "set SIDECAR_NATS_CA_FILE to the CA that issued it"),
        ({"CA_FILE": certificates.ca_file}, "it wants our certificate: set SIDECAR_NATS_CERT_FILE and …_KEY_FILE"),
        (
            {"CA_FILE": certificates.ca_file, "CERT_FILE": forged["cert_file"], "KEY_FILE": forged["key_file"]},
            "it does not take the certificate of SIDECAR_NATS_CERT_FILE",
        ),
        ({"CA_FILE": certificates.ca_file, **login, "KEY_FILE": forged["key_file"]}, "cannot be used"),
        ({"CA_FILE": ours["key_file"], **login}, "cannot be used"),
    ):
        found = await reason(made(url, **texts))
        assert found.startswith("tls: "), found
        assert says in found, found
