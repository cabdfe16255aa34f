"""`nats`: the records themselves into a JetStream stream, each a message that bears its id.

The body of a message is the record as it is stored, its header `Nats-Msg-Id` the record's id. What there is to know:

- The stream answers each message with its number there, and for an id that it knows with `duplicate: true`. It knows
  ids for `duplicate_window`, and from its messages: a stream that forgets messages when they are read (work queue,
  interest) forgets ids with them after a restart, so only retention `limits` is taken.
- A yes means "a majority of the replicas has it", and each of them writes it to its disk within `sync_interval`, which
  is two minutes unless the servers are set to `always`, and no client can see it. So the spool keeps its own copy as
  long as `SIDECAR_RETENTION` says, also after the yes.
- An answer that is lost is asked for again without end: `metering-sidecar collect`, which reads the stream, knows every
  id for longer than any window, so a repeat beyond the window is no double there. Others who read the stream have to
  look at the id as well.
- No answer at all may mean that nobody leads the stream just now; it is told from a stream that is not there by asking.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Final

from sidecar.backends.base import Context, RecordSettings
from sidecar.backends.batching import seal_lines
from sidecar.model.delivery import (
    Abilities,
    Atomicity,
    Blocked,
    Dedup,
    Delivered,
    Duplicate,
    Encoded,
    Event,
    Refused,
    Retry,
    Sealed,
    Unknown,
    Verdict,
)
from sidecar.model.record import Record
from sidecar.settings import Secret, required_setting, secret_setting, setting, types
from sidecar.storage import nats, nats_keys
from sidecar.storage.nats import Connected, Login, NatsConnection, NatsFault, Wanted

BATCH_DEFAULT: Final = 100
REQUESTS: Final = 4  # at once, of a batch each: what one connection has under way stays below a MiB
BODY_BYTES_MAX: Final = 1 << 20
HEADER_BYTES_MAX: Final = 512  # of a message: the id, and the stream's name
FULL: Final = "stream_full"
NO_ACK: Final = "no_ack"  # an answer that is not the stream's: whoever else listens to the subject may come first

# What the server says of a message that it did not store, by its own number.
_FULL: Final = frozenset({10077, 10122})  # the stream's limits, with `discard new`
_NO_ROOM: Final = frozenset({10023, 10028, 10047})  # the account's, or the disk's
_TOO_LARGE: Final = 10054
_OTHER_STREAM: Final = 10060  # the subject belongs to another one
_SEALED: Final = 10109


def _line(text: str) -> str:
    if not text.isprintable() or not text:
        raise ValueError
    return text


@dataclass(frozen=True, kw_only=True)
class NatsSettings(RecordSettings):
    url: tuple[str, ...] = required_setting(
        types.Kind("addresses such as nats://host:4222, separated by commas", nats.read_servers),
        "the servers, separated by commas; `tls://` where nothing may go without TLS",
    )
    stream: str = setting(
        types.Kind("the name of a stream, without spaces, dots and wildcards", nats.read_stream), "METERING",
        "the stream; it has to be there, `metering-sidecar collect --provision` makes it",
    )  # fmt: skip
    subject: str = setting(
        types.Kind("a subject such as metering.records, without wildcards", nats.read_subject), "metering.records",
        "what records are published as",
    )  # fmt: skip
    replicas: int = setting(
        types.count(1, 5), "3", "a stream with fewer is refused: with one, a lost disk loses what only it had"
    )
    window: float = setting(
        types.duration(nats.WINDOW_S_MIN), "1h", "a stream that knows ids for less (`duplicate_window`) is refused"
    )
    user: str | None = setting(types.Kind("a name", _line), None, "who we are there, with the password")
    password: Secret | None = secret_setting(types.Kind("a password", _line), "of that user")
    token: Secret | None = secret_setting(types.Kind("a token", _line), "instead of user and password")
    nkey: Secret | None = secret_setting(
        types.Kind("the seed of a user's nkey", nats_keys.read_seed), "likewise: the seed of an nkey, by `…_FILE`"
    )
    creds: Secret | None = secret_setting(
        types.Kind("the text of a .creds file", nats_keys.read_creds),
        "likewise: JWT and seed, a `.creds` file by `…_FILE`",
    )
    ca_file: Path | None = setting(types.readable_file, None, "CA certificates to trust (PEM), else the system's")
    cert_file: Path | None = setting(types.readable_file, None, "our certificate (PEM)")
    key_file: Path | None = setting(types.readable_file, None, "its key (PEM)")
    batch: int = setting(types.count(1, 1000), str(BATCH_DEFAULT), "most messages under way in one request")
    timeout: float = setting(
        types.duration(0.1, 600),
        "10s",
        "how long the answer to a message may take; an election takes up to five seconds",
    )

    @property
    def login(self) -> Login:
        """Raises `ValueError` for what does not go together."""
        login = Login(
            servers=self.url,
            user=self.user,
            password=self.password,
            token=self.token,
            nkey=self.nkey,
            creds=self.creds,
            ca_file=self.ca_file,
            cert_file=self.cert_file,
            key_file=self.key_file,
        )
        if (problem := login.problem()) is not None:
            raise ValueError(problem)
        return login

    @property
    def wanted(self) -> Wanted:
        return Wanted(stream=self.stream, subject=self.subject, replicas=self.replicas, window_s=self.window)


class NatsBackend:
    """Publishes records to one stream."""

    name = "nats"
    settings_type = NatsSettings

    def __init__(
        self, settings: NatsSettings, context: Context, *, clock: Callable[[], float] = time, by_id: bool = True
    ) -> None:
        """`by_id`: the stream tells repeats apart. Without, it takes each message: it knows ids of what was purged too,
        and who sends that again would only be told "duplicate".

        Raises `ValueError` for settings that do not go together, and without the client."""
        self._by_id = by_id
        self.abilities = Abilities(
            events_max=settings.batch,
            bytes_max=BODY_BYTES_MAX,
            atomicity=Atomicity.PER_ITEM,
            dedup=Dedup.EVENT_ID,
            dedup_window_s=None,  # beyond the stream's own, who reads it knows the ids
            concurrency=REQUESTS,
            knows_duplicates=True,
            knows_records=True,
            bills=False,
        )
        self._settings = settings
        self._policy = settings.policy
        self._connection = NatsConnection(login=settings.login, wanted=settings.wanted, timeout_s=settings.timeout)

    def encode(self, records: Sequence[Record]) -> Encoded:
        return seal_lines(records, self._policy, self.abilities)

    async def send(self, sealed: Sealed) -> list[Verdict]:
        try:
            there = await self._connection.get()
        except NatsFault as fault:
            return [_verdict(fault, maybe_taken=False)] * len(sealed.events)
        lines = sealed.body.split(b"\n")
        sending = [
            asyncio.ensure_future(self._publish(there, event, line))
            for event, line in zip(sealed.events, lines[: len(sealed.events)], strict=True)
        ]
        try:
            await asyncio.wait(
                (asyncio.gather(*sending, return_exceptions=True), there.ended), return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            for one in sending:
                one.cancel()
        lost = _verdict(there.ended.result(), maybe_taken=True) if there.ended.done() else Unknown("connection_lost")
        verdicts = [one.result() if one.done() and not one.cancelled() else lost for one in sending]
        if _NOBODY in verdicts:
            nobody = await self._why_nobody()
            verdicts = [nobody if verdict == _NOBODY else verdict for verdict in verdicts]
        return verdicts

    async def _publish(self, there: Connected, event: Event, line: bytes) -> Verdict:
        from nats import errors
        from nats.js.errors import APIError, NoStreamResponseError

        settings = self._settings
        if len(line) + HEADER_BYTES_MAX > there.client.max_payload:
            return Refused("too_large")  # the server would close the connection, with all that is under way
        try:
            ack = await there.stream.publish(
                settings.subject,
                line,
                timeout=settings.timeout,
                stream=settings.stream,
                headers={"Nats-Msg-Id": event.event_id} if self._by_id else {},
            )
        except NoStreamResponseError:
            return _NOBODY
        except (errors.ConnectionClosedError, errors.OutboundBufferLimitError, errors.ConnectionDrainingError):
            return Retry("connection_lost")  # said before anything was written
        except TimeoutError:
            return Unknown("timeout")
        except APIError as error:
            return _refused(error.err_code, error.code)
        except (errors.Error, OSError):
            return Unknown("connection_lost")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return Unknown(NO_ACK)  # the client reads what it takes for an answer without a look at its form
        if ack.stream != settings.stream or type(ack.seq) is not int or ack.seq < 1:
            return Unknown(NO_ACK)
        return Duplicate() if ack.duplicate is True else Delivered()

    async def _why_nobody(self) -> Verdict:
        """Nobody took the message: no stream of that subject, or nobody who leads it just now."""
        try:
            await self._connection.look_again()
        except NatsFault as fault:
            return _verdict(fault, maybe_taken=False)
        return Retry("no_leader")

    async def reach(self) -> tuple[bool, str]:
        """Connect and log in, and ask for nothing."""
        try:
            there = await self._connection.open()
        except NatsFault as fault:
            return False, str(fault)
        url, version = there.client.connected_url, there.client.connected_server_version
        return True, f"{'' if url is None else url.netloc}, NATS {version.major}.{version.minor}.{version.patch}"

    async def examine(self) -> list[str]:
        """What is wrong with the stream."""
        try:
            return await self._connection.weaknesses()
        except NatsFault as fault:
            return [str(fault)]

    async def aclose(self) -> None:
        await self._connection.aclose()


_NOBODY: Final = Retry("no_stream")


def _verdict(fault: NatsFault, *, maybe_taken: bool) -> Verdict:
    """What it means for a record. `maybe_taken`: it was under way."""
    if fault.operator:
        # The text says what to do, and is one of few; it stands in `/readyz` and in the log.
        return Blocked(f"{fault.reason}: {fault}")
    return Unknown(fault.reason) if maybe_taken else Retry(fault.reason)


def _refused(err_code: object, code: object) -> Verdict:
    """What the server says of a message that it did not store."""
    if not isinstance(err_code, int | None) or not isinstance(code, int | None):
        return Unknown(NO_ACK)
    if err_code in _FULL:
        return Retry(FULL)
    if err_code in _NO_ROOM:
        return Retry("storage_full")
    if err_code == _TOO_LARGE:
        return Refused("too_large")
    if err_code == _OTHER_STREAM:
        return Blocked(
            "other_stream: the subject belongs to another stream than SIDECAR_NATS_STREAM: set one of the two"
        )
    if err_code == _SEALED:
        return Blocked("sealed: the stream is sealed, which cannot be undone: name another in SIDECAR_NATS_STREAM")
    word = f"nats_{err_code or code}"
    # A new version may say what we do not know: that is no refusal.
    return Blocked(word) if code is not None and 400 <= code < 500 else Retry(word)
