"""JetStream, as far as we use it: a connection, the stream and whether it keeps what we need, a line for each fault.

A connection that ends is not mended but thrown away, and the next who asks gets a new one: who sends paces himself, so
there is no second loop of tries behind his back, and nothing waits in a buffer that nobody sees. Whoever waits for an
answer hears of the end at once.

What must always hold: nothing is sent into a stream but after `weaknesses` has found none, anew with each connection
and every `LOOK_AGAIN_S`; nothing here makes a stream but `provision`, and nothing changes one. No password, token or
key gets into a text.

The client is `nats-py`, of the extra `nats`; it is imported when a connection is made.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import math
import ssl
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit

from sidecar import __version__
from sidecar.model.grammar import UnfitSecret
from sidecar.model.http_url import can_be_looked_up
from sidecar.settings import Secret
from sidecar.storage.http_client import fault_of
from sidecar.storage.nats_keys import creds_problem, public_key

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.js import JetStreamContext
    from nats.js.api import StreamConfig

log = logging.getLogger(__name__)
T = TypeVar("T")

EXTRA: Final = "install it with: pip install 'metering-sidecar[nats]'"
PORT: Final = 4222
CONNECT_S: Final = 5.0  # to one server: name, connection, TLS and login
CLOSE_S: Final = 1.0  # for a server that does not read any more
LOOK_AGAIN_S: Final = 60.0  # a stream can be edited at any time; one question a minute
PING_S: Final = 10  # a server that is gone without a word is noticed after two of them
RECORD_BYTES_MAX: Final = 32_768  # a record with all that clients and upstreams choose has less than 24 KiB
WINDOW_S_MIN: Final = 3600.0  # a restart, an election and an operator's lunch are over by then
DAY_S: Final = 86_400.0


class NatsFault(Exception):
    """What keeps us from it. `reason`: one of a few fixed words; the text says what to do."""

    def __init__(self, reason: str, text: str, *, operator: bool = False) -> None:
        super().__init__(text)
        self.reason = reason
        self.operator = operator  # it goes on so until somebody acts


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """Where the servers are, and who we are there."""

    servers: tuple[str, ...]
    user: str | None = None
    password: Secret | None = None
    token: Secret | None = None
    nkey: Secret | None = None  # the seed
    creds: Secret | None = None  # the text of a `.creds` file
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    @property
    def tls(self) -> bool:
        """Whether nothing may be sent without."""
        return any(server.startswith("tls://") for server in self.servers)

    def problem(self) -> str | None:
        """What of these does not go together."""
        if (self.user is None) != (self.password is None):
            return "SIDECAR_NATS_USER and SIDECAR_NATS_PASSWORD belong together: set both, or neither"
        ways = [self.user, self.token, self.nkey, self.creds]
        if sum(one is not None for one in ways) > 1:
            return (
                "set one of SIDECAR_NATS_USER, SIDECAR_NATS_TOKEN_FILE, SIDECAR_NATS_NKEY_FILE and "
                "SIDECAR_NATS_CREDS_FILE"
            )
        if (self.cert_file is None) != (self.key_file is None):
            return "SIDECAR_NATS_CERT_FILE and SIDECAR_NATS_KEY_FILE belong together: set both, or neither"
        if importlib.util.find_spec("nats") is None:
            return f"the package nats-py is not there: {EXTRA}"
        if (self.creds or self.nkey) is not None and importlib.util.find_spec("nkeys") is None:
            return f"SIDECAR_NATS_NKEY and SIDECAR_NATS_CREDS need the package nkeys: {EXTRA}"
        return None

    def refused(self) -> str:
        """Why a server that knows no one like us may say so, with what to do."""
        if self.creds is not None and (problem := creds_problem(self.creds.reveal(), time.time())) is not None:
            return f"SIDECAR_NATS_CREDS_FILE: {problem}"
        if self.creds is not None:
            return "it does not know the user of SIDECAR_NATS_CREDS_FILE, or not any more: have a new one issued"
        if self.nkey is not None:
            ours = public_key(self.nkey.reveal())
            return f"it does not know the key of SIDECAR_NATS_NKEY_FILE: add {ours} to its users"
        ways = "SIDECAR_NATS_USER and …_PASSWORD_FILE, …_TOKEN_FILE, …_NKEY_FILE or …_CREDS_FILE"
        return f"it does not know us: check {ways}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The stream, and the least that it must keep to."""

    stream: str
    subject: str
    replicas: int
    window_s: float

    @property
    def max_age_s(self) -> float:
        """Of a stream that we make: a week, as a spool keeps what it delivered, and never less than the window."""
        return max(7 * DAY_S, self.window_s)


def read_servers(text: str) -> tuple[str, ...]:
    """Addresses with commas between. Raises `UnfitSecret`: there may be a password in one."""
    found = []
    for one in filter(None, (part.strip() for part in text.split(","))):
        try:
            parts = urlsplit(one)
            port = parts.port or PORT
        except ValueError:
            raise UnfitSecret("expected addresses such as nats://host:4222, separated by commas") from None
        if parts.username is not None or parts.password is not None:
            raise UnfitSecret(
                "expected no user or password in the address: set SIDECAR_NATS_USER and SIDECAR_NATS_PASSWORD_FILE"
            )
        if parts.scheme not in ("nats", "tls") or not parts.hostname or parts.path.strip("/") or parts.query:
            raise UnfitSecret("expected addresses such as nats://host:4222 or tls://host:4222, separated by commas")
        if not can_be_looked_up(parts.hostname):
            raise UnfitSecret("expected hosts whose labels have 1 to 63 characters")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        found.append(f"{parts.scheme}://{host}:{port}")
    if not found or len({server.partition(":")[0] for server in found}) > 1:
        raise UnfitSecret("expected one address or more, all nats:// or all tls://")
    return tuple(dict.fromkeys(found))


def read_stream(text: str) -> str:
    """The name of a stream, as the server takes it. Raises `ValueError`."""
    if not text.isprintable() or any(char in '>*. /\\"' for char in text) or not 0 < len(text) <= 255:
        raise ValueError
    return text


def read_subject(text: str) -> str:
    """One subject, without wildcards."""
    words = text.split(".")
    if not text.isascii() or not text.isprintable() or any(not word or " " in word or word in "*>" for word in words):
        raise ValueError
    return text


# --- the stream: pure --------------------------------------------------------------------------------------


def weaknesses(config: StreamConfig, wanted: Wanted) -> list[str]:
    """Why records are not safe in this stream: each with what to do. Pure."""
    name = wanted.stream
    edit = f"nats stream edit {name}"
    found = []

    def weak(when: bool, text: str) -> None:
        if when:
            found.append(f"stream {name}: {text}")

    covered = any(_covers(pattern, wanted.subject) for pattern in config.subjects or ())
    weak(config.mirror is not None, "it is a mirror, which takes nothing: name the stream that it mirrors")
    weak(config.sealed, "it is sealed, which cannot be undone: name another in SIDECAR_NATS_STREAM")
    weak(
        config.mirror is None and not covered,
        f"it does not take {wanted.subject}: add that to its subjects, or set SIDECAR_NATS_SUBJECT",
    )
    weak(config.subject_transform is not None, "it changes subjects: take its subject transform out")
    weak(
        config.retention != "limits",
        f"its retention is {_word(config.retention)}, and with a message goes what is known of its id, so that after a "
        "restart a record is taken twice: make it anew with retention limits",
    )
    weak(config.storage == "memory", "it is kept in memory, and a restart loses it: make it anew with storage file")
    weak(bool(config.no_ack), f"it acknowledges nothing: {edit} --ack")
    weak(
        _word(config.persist_mode) == "async",
        "it acknowledges before it has written (persist mode async): make it anew with the default",
    )
    weak(config.discard != "new", f"it drops the oldest when it is full: {edit} --discard new")
    weak((config.max_msgs_per_subject or 0) > 0, f"it keeps a few of a subject only: {edit} --max-msgs-per-subject=-1")
    size = config.max_msg_size or 0
    weak(
        0 < size < RECORD_BYTES_MAX,
        f"it takes messages up to {size} bytes, and records reach {RECORD_BYTES_MAX}: {edit} --max-msg-size=-1",
    )
    replicas = config.num_replicas or 1
    weak(
        replicas < wanted.replicas,
        f"it has {replicas} of the {wanted.replicas} replicas that SIDECAR_NATS_REPLICAS asks for: "
        f"{edit} --replicas {wanted.replicas}",
    )
    weak(
        config.duplicate_window < wanted.window_s,
        f"it knows an id for {_time(config.duplicate_window)}, less than SIDECAR_NATS_WINDOW: "
        f"{edit} --dupe-window {_time(wanted.window_s)}",
    )
    age_s = config.max_age or math.inf
    weak(
        age_s < max(wanted.window_s, config.duplicate_window),
        f"it keeps messages for {_time(age_s)}, less than it should know their ids: {edit} --max-age 7d",
    )
    return found


def config_of(wanted: Wanted) -> dict[str, Any]:
    """A stream as we make it."""
    return {
        "name": wanted.stream,
        "subjects": [wanted.subject],
        "retention": "limits",
        "discard": "new",
        "storage": "file",
        "num_replicas": wanted.replicas,
        "max_age": wanted.max_age_s,
        "duplicate_window": wanted.window_s,
    }


def _covers(pattern: str, subject: str) -> bool:
    """Whether a subject with wildcards stands for this one."""
    words, mine = pattern.split("."), subject.split(".")
    for index, word in enumerate(words):
        if word == ">":
            return len(mine) > index
        if index >= len(mine) or word not in ("*", mine[index]):
            return False
    return len(words) == len(mine)


def _word(value: object) -> str:
    """Of an enumeration that the client may or may not have made of it."""
    return str(getattr(value, "value", value))


def _time(seconds: float) -> str:
    for unit, length in (("d", DAY_S), ("h", 3600.0), ("m", 60.0)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:g}s"


# --- faults ------------------------------------------------------------------------------------------------


# By the number that OpenSSL has for what is wrong with a certificate (X509_V_ERR_…, `man verification_options`).
_OF_CERTIFICATE: Final = {
    9: "its time begins later than our clock says",
    10: "it has expired: renew it there, or set our clock",
    62: "call the server in SIDECAR_NATS_URL as its certificate does",
    64: "call the server in SIDECAR_NATS_URL as its certificate does",
}


def _tls_fault(error: BaseException, login: Login, wants_certificate: bool) -> str | None:
    """What is wrong with TLS, and what to set; None where it is something else. `wants_certificate`: the server said
    that it asks for ours. What it thinks of that it says after the handshake, or hangs up (TLS 1.3)."""
    if isinstance(error, ssl.SSLCertVerificationError):
        todo = _OF_CERTIFICATE.get(error.verify_code, "set SIDECAR_NATS_CA_FILE to the CA that issued it")
        return f"its certificate is not accepted ({error.verify_message.rstrip('.')}): {todo}"
    if wants_certificate and isinstance(error, (ssl.SSLError, ConnectionError, EOFError)):
        if login.cert_file is None:
            return "it wants our certificate: set SIDECAR_NATS_CERT_FILE and …_KEY_FILE"
        return "it does not take the certificate of SIDECAR_NATS_CERT_FILE: have one issued by a CA that it knows"
    return f"the TLS handshake failed ({error.reason})" if isinstance(error, ssl.SSLError) else None


def login_fault(error: BaseException, login: Login, *, wants_certificate: bool = False) -> NatsFault:
    """Why there is no connection. The server's own words are few and hold nothing of ours."""
    where = ", ".join(login.servers)
    if isinstance(error, NatsFault):
        return error
    if (text := _tls_fault(error, login, wants_certificate)) is not None:
        return NatsFault("tls", f"no connection to {where}: {text}", operator=True)
    if isinstance(error, TimeoutError):
        return NatsFault("timeout", f"no connection to {where} within {CONNECT_S:g} s")
    if isinstance(error, OSError):
        return NatsFault(fault_of(error), f"no connection to {where}: {fault_of(error)}")
    words = str(error).lower()
    if any(word in words for word in ("authorization", "authentication", "credential", "nonce", "nkey")):
        return NatsFault("unauthorized", f"no login at {where}: {login.refused()}", operator=True)
    if "secure connection" in words or "tls" in words:
        return NatsFault("tls", f"no connection to {where}: it wants TLS, and our certificate", operator=True)
    if "maximum" in words:
        return NatsFault("connections", f"no connection to {where}: it has as many as it takes")
    return NatsFault("no_connection", f"no connection to {where}: {type(error).__name__}")


def api_fault(error: BaseException, wanted: Wanted) -> NatsFault:
    """Why JetStream did not answer a question as we asked it."""
    from nats.errors import ConnectionClosedError, ConnectionReconnectingError, NoRespondersError, StaleConnectionError
    from nats.js.errors import APIError, NotFoundError, ServiceUnavailableError

    name = wanted.stream
    if isinstance(error, NatsFault):
        return error
    if isinstance(error, NotFoundError) and getattr(error, "err_code", None) == 10059:
        make = "`metering-sidecar collect --provision` makes it"
        return NatsFault("no_stream", f"there is no stream {name}: {make}", operator=True)
    if isinstance(error, ServiceUnavailableError) and error.err_code in (10039, 10076):
        return NatsFault(
            "no_jetstream",
            "JetStream is not switched on there, or not for our account: set `jetstream` in its configuration",
            operator=True,
        )
    if isinstance(error, NoRespondersError) or (
        isinstance(error, ServiceUnavailableError) and error.code in (None, 503)
    ):
        return NatsFault(
            "no_leader", f"nobody answers for the stream {name} just now: an election, or no JetStream there"
        )
    if isinstance(error, TimeoutError):
        return NatsFault(
            "timeout", f"no answer for the stream {name} in time: a busy server, or no right to ask for it"
        )
    if isinstance(error, APIError):
        return NatsFault(f"nats_{error.err_code or error.code}", f"stream {name}: {error.description}")
    if isinstance(error, ConnectionClosedError | ConnectionReconnectingError | StaleConnectionError):
        return connection_lost()
    return NatsFault("connection_lost", f"the connection to NATS ended: {type(error).__name__}")


def connection_lost() -> NatsFault:
    """Whoever notices it first says the same."""
    return NatsFault("connection_lost", "the connection to NATS ended")


# --- the connection ----------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Connected:
    """A connection that lives, until `ended` says why it does not."""

    client: Client
    stream: JetStreamContext
    ended: asyncio.Future[NatsFault]
    looked_s: float = 0.0  # monotonic: when the stream was last found to be good

    async def unless_ended(self, waiting: Coroutine[Any, Any, T]) -> T:
        """What it gives; raises the connection's fault where that comes first."""
        task = asyncio.ensure_future(waiting)
        try:
            await asyncio.wait((task, self.ended), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise self.ended.result()
        finally:
            task.cancel()
            task.add_done_callback(_heard)

    def end(self, fault: NatsFault) -> None:
        if not self.ended.done():
            self.ended.set_result(fault)


def _heard(task: asyncio.Task[Any]) -> None:
    """The client makes an error of its own of a cancellation, which nobody waits for any more."""
    if not task.cancelled():
        task.exception()


@dataclass(slots=True, kw_only=True)
class NatsConnection:
    """The way to one stream: made when it is asked for, and again after it ended."""

    login: Login
    wanted: Wanted
    timeout_s: float = 5.0  # for a question about the stream
    reads: bool = False  # weak or not: what is in it is nowhere safer than with who has read it
    weak: str = field(default="", init=False)  # why it is, where it `reads` all the same
    said: str = field(default="", init=False)  # the fault that was logged last, until it goes on
    clock: Callable[[], float] = time.monotonic
    _now: Connected | None = field(default=None, init=False)
    _making: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)
    _closed: bool = field(default=False, init=False)

    @property
    def connected(self) -> bool:
        return self._now is not None and not self._now.ended.done()

    async def get(self) -> Connected:
        """A connection whose stream is good, or is read. Raises `NatsFault`."""
        try:
            async with self._making:
                found = await self.open()
                if not found.looked_s or self.clock() - found.looked_s > LOOK_AGAIN_S:
                    await self._look(found)
                    found.looked_s = self.clock()
        except NatsFault as fault:
            self._say(fault)
            raise
        if self.said:
            log.info("nats: it goes on", extra={"facts": {"stream": self.wanted.stream}})
            self.said = ""
        return found

    async def look_again(self) -> None:
        """The stream did not take what it should: why, if it can be seen. Raises `NatsFault`."""
        async with self._making:
            if self._now is not None:
                self._now.looked_s = 0.0
        await self.get()

    async def weaknesses(self) -> list[str]:
        """What is wrong with the stream as it is now. Raises `NatsFault`."""
        async with self._making:
            return await self._weaknesses(await self.open())

    async def provision(self) -> bool:
        """Make the stream where there is none; True where it was made. Changes nothing. Raises `NatsFault`."""
        async with self._making:
            found = await self.open()
            try:
                await self._ask(found, found.stream.stream_info(self.wanted.stream))
            except NatsFault as fault:
                if fault.reason != "no_stream":
                    raise
            else:
                return False
            try:
                await found.unless_ended(found.stream.add_stream(**config_of(self.wanted)))
            except Exception as error:  # noqa: BLE001 - the client raises its own, asyncio's and the system's
                if getattr(error, "err_code", None) in (10005, 10074):  # too few servers, or none that fits
                    text = f"there are not enough servers for {self.wanted.replicas} replicas: SIDECAR_NATS_REPLICAS"
                    raise NatsFault("no_servers", text, operator=True) from None
                raise api_fault(error, self.wanted) from None
            return True

    async def _look(self, found: Connected) -> None:
        weak, before = await self._weaknesses(found), self.weak
        more = f" (and {len(weak) - 1} more: `metering-sidecar check --connect`)" if len(weak) > 1 else ""
        self.weak = weak[0] + more if weak else ""
        if weak and not self.reads:
            raise NatsFault("weak_stream", self.weak, operator=True)
        if weak and self.weak != before:
            log.error("nats: %s; what is in it is read", self.weak)
        elif before and not weak:
            log.info("nats: the stream is as it should be again", extra={"facts": {"stream": self.wanted.stream}})

    async def _weaknesses(self, found: Connected) -> list[str]:
        info = await self._ask(found, found.stream.stream_info(self.wanted.stream))
        weak = weaknesses(info.config, self.wanted)
        if found.client.max_payload < RECORD_BYTES_MAX:
            weak.append(
                f"the server takes messages up to {found.client.max_payload} bytes, and records reach "
                f"{RECORD_BYTES_MAX}: raise its max_payload"
            )
        return weak

    async def _ask(self, found: Connected, question: Coroutine[Any, Any, T]) -> T:
        try:
            return await found.unless_ended(question)
        except Exception as error:  # noqa: BLE001 - likewise
            raise api_fault(error, self.wanted) from None

    async def open(self) -> Connected:
        """A connection; what its stream is like is not asked. Raises `NatsFault`."""
        if self._closed:
            raise NatsFault("closed", "we are stopping")
        if self._now is not None and self._now.ended.done():
            await self._drop()
        if self._now is None:
            self._now = await self._connect()
        return self._now

    async def _connect(self) -> Connected:
        import nats.errors
        from nats.aio.client import Client

        loop = asyncio.get_running_loop()
        client = Client()
        ended: asyncio.Future[NatsFault] = loop.create_future()
        last: list[Exception] = []

        async def failed(error: Exception) -> None:
            last[:] = [error]
            if "permissions violation" in str(error).lower() and not ended.done():
                ended.set_result(
                    NatsFault(
                        "forbidden", f"{', '.join(self.login.servers)} does not let us: {_denied(error)}", operator=True
                    )
                )

        async def closed() -> None:
            if not ended.done():
                error = last[-1] if last else None
                unauthorized = isinstance(error, nats.errors.AuthorizationError)
                fault = login_fault(error, self.login) if error is not None and unauthorized else None
                ended.set_result(fault or connection_lost())

        self._guard(client)
        try:
            async with asyncio.timeout(CONNECT_S * len(self.login.servers) + 1):
                await client.connect(
                    list(self.login.servers),
                    name=f"metering-sidecar/{__version__}",
                    error_cb=failed,
                    closed_cb=closed,
                    allow_reconnect=False,
                    connect_timeout=int(CONNECT_S),
                    reconnect_time_wait=0,
                    max_reconnect_attempts=1,
                    ping_interval=PING_S,
                    max_outstanding_pings=1,
                    pending_size=-1,  # nothing waits for a connection that is not there
                    **self._login_options(),
                )
                if self.login.tls and not _encrypted(client):
                    raise NatsFault("tls", _PLAIN, operator=True)
        except (OSError, TimeoutError, nats.errors.Error, ValueError, EOFError) as error:
            await _close(client)
            # "No servers" says nothing of why.
            cause = last[-1] if last and isinstance(error, nats.errors.NoServersError) else error
            raise login_fault(cause, self.login, wants_certificate=_said(client, "tls_verify")) from None
        except NatsFault:
            await _close(client)
            raise
        except BaseException:
            await _close(client)
            raise
        return Connected(client, client.jetstream(timeout=self.timeout_s), ended)

    def _login_options(self) -> dict[str, Any]:
        """For `connect`. What is secret is handed over to be read when it is said."""
        login = self.login
        options: dict[str, Any] = {"tls": self._tls()}
        if login.user is not None and login.password is not None:
            options |= {"user": login.user, "password": login.password.reveal}
        if login.token is not None:
            options["token"] = login.token.reveal
        if login.nkey is not None:
            options["nkeys_seed_str"] = login.nkey.reveal()  # signs; it stays here
        if login.creds is not None:
            from nats.aio.client import RawCredentials

            options["user_credentials"] = RawCredentials(login.creds.reveal())  # likewise, beside its JWT
        return options

    def _guard(self, client: Client) -> None:
        """Nothing of who we are is said before TLS was agreed on, where it has to be. A server that offers none would
        be told a password in the clear; and a signature too lets whoever passed a real server's question on log in."""
        say = client._connect_command

        def guarded() -> bytes:
            if self.login.tls and not _encrypted(client):
                raise NatsFault("tls", _PLAIN, operator=True)
            return say()

        client._connect_command = guarded  # type: ignore[method-assign]

    def _tls(self) -> ssl.SSLContext:
        login = self.login
        try:
            context = ssl.create_default_context(cafile=login.ca_file)
            if login.cert_file is not None:
                context.load_cert_chain(login.cert_file, login.key_file)
        except (OSError, ssl.SSLError) as error:
            text = f"SIDECAR_NATS_CA_FILE, …_CERT_FILE or …_KEY_FILE cannot be used: {error.strerror or error}"
            raise NatsFault("tls", text, operator=True) from None
        return context

    def _say(self, fault: NatsFault) -> None:
        if str(fault) != self.said and fault.reason != "closed":
            self.said = str(fault)
            log.log(logging.ERROR if fault.operator else logging.WARNING, "nats: %s", fault)

    async def _drop(self) -> None:
        gone, self._now = self._now, None
        if gone is not None:
            await _close(gone.client)

    async def aclose(self) -> None:
        self._closed = True
        async with self._making:
            if self._now is not None:
                self._now.end(NatsFault("closed", "we are stopping"))
            await self._drop()


_PLAIN: Final = "the server offers no TLS, and SIDECAR_NATS_URL asks for it: switch it on there, or write nats://"


def _encrypted(client: Client) -> bool:
    """Whether what is said now goes over TLS: `nats-py` agrees on it wherever the server asks, and only there."""
    return _said(client, "tls_required")


def _said(client: Client, word: str) -> bool:
    """What the server said of itself when it was connected to."""
    return bool(getattr(client, "_server_info", {}).get(word))


def _denied(error: Exception) -> str:
    """What is not allowed, out of `nats: 'Permissions Violation for Publish to "a.b"'`."""
    words = str(error).replace("'", "").partition("for ")[2].strip().lower()
    return f"no permission for {words or 'what we asked'}: give our user it"


async def _close(client: Client) -> None:
    with contextlib.suppress(Exception):
        async with asyncio.timeout(CLOSE_S):
            await client.close()
    transport = getattr(client, "_transport", None)
    if transport is not None:
        with contextlib.suppress(Exception):
            transport.close()
