"""Every setting of the core, once: its name, kind, default and meaning. `check`, `--help` and the README read it.

The table is the fields of the sections: each carries its `Setting`, and the field's type is checked against the kind's.
A part is handed its section whole (`settings.proxy`), so a setting has one name and one default: it is declared here,
under its variable's name in lower case, and read where it is used. What a backend needs beyond that stands in the
backend's own file, as such a section, and arrives under `Settings.backend(name)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any, Final, TypeVar, cast, overload

from sidecar.model.grammar import Element
from sidecar.model.path_pattern import check_pattern
from sidecar.settings import types
from sidecar.settings.types import Address, Kind, Many, Secret
from sidecar.settings.upstreams import UpstreamSettings, from_items

T = TypeVar("T")
PREFIX: Final = "SIDECAR_"


class Durability(StrEnum):
    """What the last bytes of a response wait for."""

    COMMITTED = "committed"
    BUFFERED = "buffered"
    SHIPPED = "shipped"


class OnSpoolFull(StrEnum):
    """What becomes of calls that cannot be recorded: they pass uncounted, or are turned away."""

    PASS = "pass"
    REFUSE = "refuse"


class OnDisconnect(StrEnum):
    """What becomes of a response whose client left: it is read on for its usage, or not."""

    DRAIN = "drain"
    STOP = "stop"


class Forwarded(StrEnum):
    """In which fields the upstream is told who called."""

    X_FORWARDED = "x-forwarded"
    FORWARDED = "forwarded"
    NONE = "none"


class LogLevel(StrEnum):
    # As `logging` spells them.
    DEBUG = "DEBUG"
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"


class LogFormat(StrEnum):
    JSON = "json"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting. `name` is in lower case, without `SIDECAR_` and without the backend's name."""

    name: str
    kind: Kind[Any]
    default: str | None = None  # as one would write it; None: nothing is set
    help: str = ""
    secret: bool = False  # never shown, wrapped in `Secret`, also read from the file that `…_FILE` names
    required: bool = False  # of a backend that is switched on; the core's needs are `load`'s business
    also: tuple[str, ...] = ()  # the vendor's customary variables, read when ours is absent

    def variable(self, backend: str | None = None) -> str:
        """The environment's name for it."""
        return PREFIX + (f"{backend}_{self.name}" if backend else self.name).upper()

    def value(self, parsed: Any) -> Any:
        return Secret(parsed) if self.secret else parsed

    def default_value(self) -> Any:
        if self.default is not None:
            return self.value(self.kind.parse(self.default))
        return self.kind.parse_items(()) if isinstance(self.kind, Many) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What is different for the calls whose path fits a pattern. None: as everywhere."""

    pattern: str
    on_disconnect: OnDisconnect | None = None
    provider: str | None = None
    record: bool = True  # False: passed on and counted, and nothing else
    timeout_s: float | None = None  # to the head of the response; before that of an upstream


def _routes(items: Sequence[str]) -> tuple[Route, ...]:
    return tuple(Route(pattern=check_pattern(item)) for item in dict.fromkeys(items))


@dataclass(frozen=True, slots=True)
class Effective:
    """A line of `check`: what a setting is, where it was said, and no secret."""

    variable: str
    value: str
    origin: str  # "default", "environment", or the name of the file
    help: str


@overload
def _setting(kind: Many[T], default: None, text: str) -> T: ...
@overload
def _setting(kind: Kind[T], default: str, text: str) -> T: ...
@overload
def _setting(kind: Kind[T], default: None, text: str) -> T | None: ...
def _setting(kind: Kind[Any], default: str | None, text: str) -> Any:
    return _field(Setting("", kind, default, text))


def _secret(kind: Kind[str], text: str) -> Secret | None:
    return cast("Secret | None", _field(Setting("", kind, None, text, secret=True)))


def _field(setting: Setting) -> Any:
    return field(default_factory=setting.default_value, metadata={"setting": setting})


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxySettings:
    """How calls are passed on, who is believed, and where it ends."""

    upstream_url: str | None = _setting(
        types.upstream_url, None, "the API behind: `http(s)://host[:port][/base]` or `unix:/path[:/base]`"
    )
    upstreams: tuple[UpstreamSettings, ...] = _setting(
        types.many("/prefix=url or host=url, separated by commas", from_items), None,
        "several APIs behind one port, chosen by the path's beginning, which is taken off, or by the host called; "
        "`SIDECAR_UPSTREAM_URL` gets all other calls, else they get 404; headers and more in `[[upstreams]]`",
    )  # fmt: skip
    upstream_connect_timeout_s: float = _setting(types.duration(0.001), "10", "to connect to the upstream; then 504")
    upstream_timeout_s: float = _setting(  # long model calls think for minutes
        types.duration(0.001), "600", "to the head of the response; then 504"
    )
    upstream_keepalive_s: float = _setting(  # uvicorn and Node close theirs after 5 s
        types.duration(), "4",
        "an idle upstream connection is kept; less where the upstream's `Keep-Alive: timeout`, less a second, is less",
    )  # fmt: skip
    upstream_connection_age_s: float = _setting(
        types.duration(), "300", "an older upstream connection is not used again, so that a name that moved is followed"
    )
    idle_timeout_s: float = _setting(types.duration(0.001), "600", "between two pieces of a body; then cut")
    head_timeout_s: float = _setting(  # first to last byte (slow-loris); Apache allows 20 to 40 s
        types.duration(0.001), "30", "for a client to send its request's head"
    )
    keepalive_timeout_s: float = _setting(
        types.duration(), "75", "an idle client connection is kept"
    )  # as nginx has it
    on_disconnect: OnDisconnect = _setting(
        types.one_of(OnDisconnect), "drain",
        "the client left mid-stream: `drain` (read on while usage is still to come) or `stop`; per route in TOML",
    )  # fmt: skip
    disconnect_drain_s: float = _setting(types.duration(), "30", "the longest such reading on")
    drains: int = _setting(  # each holds an upstream connection that nobody reads
        types.count(0, 100_000), "256", "calls read on after their client left, at once; a quarter for each subscriber"
    )
    head_bytes: int = _setting(  # Envoy allows 60 KiB, and tokens in cookies grow
        types.size(1024, 1 << 20), "65536", "largest head of a request; then 431"
    )
    target_bytes: int = _setting(  # signed URLs reach 8 KiB
        types.size(256, 1 << 20), "16384", "longest request target; then 414"
    )
    connections: int = _setting(  # each costs a descriptor here and one upstream
        types.count(1, 1_000_000), "10240", "client connections at once, for each worker"
    )

    preserve_host: bool = _setting(types.flag, "false", "send the client's `Host` upstream, not the upstream's own")
    rewrite_redirects: bool = _setting(
        types.flag, "true", "redirects to the upstream's own address lead back through here, so that they are metered"
    )
    trusted_proxies: tuple[IPv4Network | IPv6Network, ...] = _setting(
        types.networks, None, "networks whose `X-Forwarded-For` is believed"
    )
    forwarded: Forwarded = _setting(
        types.one_of(Forwarded), "x-forwarded", "tell the upstream of the client: `x-forwarded`, `forwarded` or `none`"
    )
    via: str | None = _setting(types.header_token, None, "add `Via` both ways under this name")
    meter_id_header: bool = _setting(types.flag, "false", "tell the client its record's id in `X-Meter-Id`")
    public_url: str | None = _setting(types.http_url, None, "the base of `url` in records, if not the upstream's")
    query_values: tuple[str, ...] = _setting(
        types.texts, None, "query parameters whose values may be recorded; of all others only the names are"
    )
    routes: tuple[Route, ...] = _setting(
        types.many("path patterns, separated by commas", _routes), None,
        "path patterns to group calls by: `/v1/things/{id}`; more per route in TOML",
    )  # fmt: skip

    upstream_ca_file: Path | None = _setting(
        types.readable_file, None, "CA certificates to trust upstream (PEM); SIGHUP rereads"
    )
    upstream_cert_file: Path | None = _setting(
        types.readable_file, None, "our certificate for the upstream (PEM); SIGHUP rereads"
    )
    upstream_key_file: Path | None = _setting(types.readable_file, None, "its key (PEM)")
    upstream_server_name: str | None = _setting(  # SNI as well
        types.text, None, "the name expected in the upstream's certificate, if not the URL's host"
    )
    tls_cert_file: Path | None = _setting(types.readable_file, None, "serve TLS with this chain (PEM); SIGHUP rereads")
    tls_key_file: Path | None = _setting(types.readable_file, None, "its key (PEM)")

    # Limits that nobody has to set; tests make them small.
    calls_max: int = 20_000  # calls open at once, streams included
    head_fields_max: int = 128  # aiohttp's figure; Envoy allows 100
    retry_body_bytes_max: int = 65_536  # a request kept at hand for the one retry
    linger_s: float = 5.0  # an unwanted upload is read and dropped, so that the answer can be read: until this silence,
    linger_total_s: float = 30.0  # but no longer than this (both are nginx's figures),
    linger_bytes_max: int = 268_435_456  # and no more of it: 2 s of a fast client's sending


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """The processes: where they listen, how many they are, and how they stop."""

    listen: Address = _setting(types.address, "0.0.0.0:8080", "where clients call; also `unix:/path`")
    admin_listen: Address = _setting(
        types.address,
        "127.0.0.1:9464",
        "the page, `/healthz` `/readyz` `/metrics` `/balance` `/times`, `/usage` `/records` `/parked` `/limits`; "
        "it only reads",
    )
    admin_token: Secret | None = _secret(
        types.bearer, "`Authorization: Bearer` of what shows customers; without it that needs loopback"
    )
    admin_hosts: tuple[str, ...] = _setting(
        types.hosts, None, "further names by which the admin port may be called; its own addresses always may"
    )
    metrics_subscribers: int = _setting(
        types.count(0, 10_000), "0",  # each is four series, and Prometheus keeps them for weeks
        "how many subscribers `/metrics`, which asks for no token, tells apart: the first to call; others are `other`",
    )  # fmt: skip
    workers: int = _setting(types.count(1, 256), "1", "processes that serve, on one port")
    stop_s: float = _setting(types.duration(), "30", "how long open calls may finish after SIGTERM and the delay")
    stop_delay_s: float = _setting(
        types.duration(),
        "0",
        "calls are taken so long after SIGTERM, each its connection's last; `/readyz` says 503; a second one ends it",
    )
    log_level: LogLevel = _setting(types.one_of(LogLevel), "info", "`debug`, `info`, `warning` or `error`")
    log_format: LogFormat | None = _setting(
        types.one_of(LogFormat), None, "`json` or `text`; if not set, text on a terminal and JSON elsewhere"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoolSettings:
    """What is promised of a record, and how much of the disk it may take."""

    durability: Durability = _setting(
        types.one_of(Durability), "committed",
        "`committed`: the last byte of a response leaves after its record is on disk; `buffered`: within 20 ms after; "
        "`shipped`: after JetStream or the ledger of `SIDECAR_LEDGER_URL` has it too",
    )  # fmt: skip
    on_spool_full: OnSpoolFull = _setting(
        types.one_of(OnSpoolFull), "pass",
        "neither disk nor memory takes a record: `pass` (served, counted as lost, alarm) or `refuse` (503)",
    )  # fmt: skip
    commit_wait_s: float = _setting(
        types.duration(0.01, 60), "1", "how long a response waits for its commit before the spool counts as failing"
    )
    spool_memory_bytes: int = _setting(
        types.size(1 << 20), "67108864", "records kept in memory while the disk takes none"
    )
    retention: float = _setting(types.duration(), "7d", "how long delivered records are kept")
    retention_bytes: int = _setting(types.size(), "10737418240", "room for delivered records; the oldest go first")
    disk_low_bytes: int = _setting(
        types.size(), "1073741824", "less free disk than this is an alarm; below half of it delivered records go early"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectSettings:
    """Of `metering-sidecar collect`, which reads what the backend `nats` of others has sent."""

    collect_consumer: str = _setting(
        types.consumer, "metering-sidecar", "the durable consumer by which the stream remembers what was read"
    )
    collect_remember: float = _setting(  # longer than any stream or spool keeps what it may send again
        types.duration(86_400.0), "30d", "how long the ids of records are known, so that one that comes again is told"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AttributionSettings:
    """Who pays for a call, and what it is filed under."""

    subscriber: tuple[str, ...] = _setting(
        types.sources, "credential",
        "who pays, the first source that knows: `header:` `jwt:` `query:` `body:` `path:`, or `credential`: the one "
        "that the upstream's API asks for; credentials are hashed",
    )  # fmt: skip
    hash_key: Secret | None = _secret(
        types.key_text, "key of those hashes, equal across a fleet; made and kept in the data directory if not set"
    )
    dimensions: Mapping[str, str] = _setting(
        types.dimensions, None,
        "header values to file calls under: `feature=x-feature,team=x-team`; `feature` alone: the header of that name",
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageSettings:
    """How usage is read."""

    providers: Mapping[str, str] = _setting(
        types.pins, None, "pin the reader of usage: `/my/path=openai` (pattern=provider)"
    )
    elements: tuple[Element, ...] = _setting(
        types.elements, None, "own fields to record: `rows=header:x-rows,pages=json:meta.pages`"
    )
    estimate: bool = _setting(types.flag, "false", "estimate tokens where the response reports none; marked as such")
    ask_for_usage: bool = _setting(
        types.flag, "false", "ask for usage in OpenAI-shaped streams that lack it, and take the extra chunk out again"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceSettings:
    """What a call cost."""

    prices: str = _setting(  # a path, where it is none of the words
        types.path_or_word, "builtin",
        "the providers' prices: `builtin`, `none`, or a file: genai-prices' data (v2) or LiteLLM's",
    )  # fmt: skip
    cost: str = _setting(
        types.word_of("table", "declared"), "table",
        "where a provider states the cost of a call itself, and it has a price too: which of them is the total",
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedSettings:
    """Those outside that `SIDECAR_GATE` names, and how old an answer may be (docs/gate-sources.md)."""

    gate_amounts: bool = _setting(types.flag, "false", "tell a denied client how much of the limit is used")
    gate_timeout: float = _setting(  # it is waited for once a subscriber, before its first call
        types.duration(0.05, 30), "2s", "how long an answer may take"
    )
    gate_age: float = _setting(  # renewed at four fifths of it while calls come
        types.duration(1, 3600), "60s", "how long an answer is believed that lets calls through"
    )
    gate_denied_age: float = _setting(types.duration(1, 3600), "5s", "how long one that denies them")
    gate_last_age: float = _setting(types.duration(), "1h", "how long `last` goes on with an old answer")
    gate_subscribers: int = _setting(  # of each some 2 KiB
        types.count(10, 1_000_000), "10000", "subscribers whose answers are remembered, for each of those asked"
    )
    gate_revenium_unit: str | None = _setting(
        types.unit, "calls", "what the quota of a product key counts: `calls`, `total_tokens`, … or `none`"
    )
    gate_revenium_public_key_file: Path | None = _setting(
        types.readable_file, None, "the key (PEM) that the claims of a product key are checked with"
    )
    gate_revenium_team: str | None = _setting(types.text, None, "whose Cost Controls hold; for `revenium_controls`")
    gate_openmeter_feature: str | None = _setting(types.text, None, "the feature that gives access; for `openmeter`")
    gate_openmeter_unit: str | None = _setting(
        types.unit, None, "what that feature's meter counts; set it where its limit is a hard one"
    )
    gate_lago_id: str = _setting(
        types.word_of("subscription", "customer"), "subscription", "what a subscriber's id at Lago is the id of"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSettings:
    """Whether a call may be made."""

    limits: tuple[str, ...] = _setting(
        types.limits,
        None,
        "of each subscriber: `calls=600/minute,cost_usd=50/month,concurrent=20`; more: `[[limits]]`",
    )
    gate: tuple[str, ...] = _setting(
        types.names,
        "limits",
        "who is asked before a call is sent on: `limits` (those defined here), `revenium`, `revenium_controls`, "
        "`openmeter`, `flexprice`, `lago`, or `none`",
    )
    gate_on_failure: str = _setting(
        types.word_of("open", "closed", "last"), "open",
        "who has to be asked does not answer: `open` (the call goes), `closed`, or `last` (as it was last)",
    )  # fmt: skip
    gate_dry_run: bool = _setting(types.flag, "false", "deny nothing; records say what would have been")
    gate_unknown: str = _setting(
        types.word_of("reserve", "observed", "zero"), "reserve",
        "a call whose usage stays unknown counts as what was set aside for it, as what was seen of it, or as nothing",
    )  # fmt: skip
    gate_unpriced: str = _setting(
        types.word_of("allow", "deny"), "allow",
        "a call whose price is not known, where a limit is of money: `allow` (it counts as nothing) or `deny`",
    )  # fmt: skip
    gate_status: Mapping[str, int] = _setting(
        types.statuses, None, "other statuses than `quota=402,rate=429` for what is used up and what comes back soon"
    )


class Deliver(StrEnum):
    """Who tells the vendors of a fleet's records."""

    OWN = "own"
    ELECTED = "elected"


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    """What many sidecars share."""

    ledger_url: Secret | None = _secret(
        types.postgres_url, "the database that all sidecars share: `postgresql://user:password@host/database`"
    )
    instance: str | None = _setting(
        types.instance_name,
        None,
        "what this sidecar is called there; by itself an id that is kept in the data directory",
    )
    deliver: Deliver = _setting(
        types.one_of(Deliver), "own",
        "who tells the vendors: each sidecar its `own` records, or of each customer one sidecar at a time, `elected` "
        "among those that share the ledger",
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The configuration, read and checked. Made by `load`."""

    data_dir: Path = _setting(
        types.path, "./sidecar-data", "spool and ledger; locked by one running instance, on a disk that stays"
    )
    backends: tuple[str, ...] = _setting(types.names, "ledger", "who is told of each call, separated by commas")
    backend_gaps: str = _setting(
        types.word_of("deliver", "skip"), "deliver", "records made while a backend was left out: `deliver` or `skip`"
    )

    # Each is handed to the part that it is of.
    proxy: ProxySettings = field(default_factory=ProxySettings)
    serve: ServeSettings = field(default_factory=ServeSettings)
    spool: SpoolSettings = field(default_factory=SpoolSettings)
    collect: CollectSettings = field(default_factory=CollectSettings)
    attribution: AttributionSettings = field(default_factory=AttributionSettings)
    usage: UsageSettings = field(default_factory=UsageSettings)
    prices: PriceSettings = field(default_factory=PriceSettings)
    asked: AskedSettings = field(default_factory=AskedSettings)
    gate: GateSettings = field(default_factory=GateSettings)
    fleet: FleetSettings = field(default_factory=FleetSettings)

    # Structured, from TOML only:
    subscribers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # our id -> backend -> its customer id
    subscriber_names: Mapping[str, str] = field(default_factory=dict)  # our id -> what people call it
    meters: tuple[Mapping[str, Any], ...] = ()  # checked by `meters`
    price_tables: tuple[Mapping[str, Any], ...] = ()  # checked by `prices`
    limits: tuple[Mapping[str, Any], ...] = ()  # checked by `gate`

    # The file that `SIDECAR_PRICES` names as it was when all this was read, or why it could not be read; None: it names
    # none. A process that is started again finds what the others have, whatever the file is by then.
    price_file: bytes | OSError | None = field(default=None, repr=False, compare=False)
    # Likewise, of `SIDECAR_GATE_REVENIUM_PUBLIC_KEY_FILE`.
    gate_public_key: bytes | OSError | None = field(default=None, repr=False, compare=False)

    backend_values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    effective: tuple[Effective, ...] = field(default=(), repr=False, compare=False)

    def backend(self, name: str) -> Mapping[str, Any]:
        """A backend's own settings by their short names, defaults included; secrets are `Secret`."""
        return self.backend_values.get(name, {})


# The sections in the order of the README; "": the settings that stand in no section.
SECTIONS: Final[Mapping[str, type[Any]]] = {
    "proxy": ProxySettings,
    "serve": ServeSettings,
    "": Settings,
    "spool": SpoolSettings,
    "collect": CollectSettings,
    "attribution": AttributionSettings,
    "usage": UsageSettings,
    "prices": PriceSettings,
    "asked": AskedSettings,
    "gate": GateSettings,
    "fleet": FleetSettings,
}


def section_settings(section: type[Any]) -> tuple[Setting, ...]:
    """A section's table, in the order of its fields."""
    return tuple(replace(f.metadata["setting"], name=f.name) for f in fields(section) if "setting" in f.metadata)


def core_settings() -> tuple[Setting, ...]:
    """The core's table, section by section."""
    return tuple(setting for section in SECTIONS.values() for setting in section_settings(section))


def settings_from(values: Mapping[str, Any], **structured: Any) -> Settings:
    """`values` by the names of `core_settings`, each put into its section."""
    made = {name: {s.name: values[s.name] for s in section_settings(kind)} for name, kind in SECTIONS.items()}
    core = made.pop("")
    return Settings(**core, **{name: SECTIONS[name](**own) for name, own in made.items()}, **structured)


@overload
def setting(kind: Many[T], default: str | None, text: str) -> T: ...
@overload
def setting(kind: Kind[T], default: str, text: str) -> T: ...
@overload
def setting(kind: Kind[T], default: None, text: str, *, also: tuple[str, ...] = ()) -> T | None: ...
def setting(kind: Kind[Any], default: str | None, text: str, *, also: tuple[str, ...] = ()) -> Any:
    """A setting as a field of a backend's frozen dataclass; the field's name is the setting's."""
    return _field(Setting("", kind, default, text, also=also))


def required_setting(kind: Kind[T], text: str) -> T:
    """One that a backend cannot do without; until it is set it is None."""
    return cast("T", _field(Setting("", kind, None, text, required=True)))


def secret_setting(kind: Kind[str], text: str) -> Secret | None:
    """As `setting`, for what is never shown."""
    return cast("Secret | None", _field(Setting("", kind, None, text, secret=True)))


def required_secret(kind: Kind[str], text: str, *, also: tuple[str, ...] = ()) -> Secret:
    """As `required_setting`, for what is never shown."""
    return cast("Secret", _field(Setting("", kind, None, text, secret=True, required=True, also=also)))


def settings_of(owner: type[Any]) -> tuple[Setting, ...]:
    """The table of a backend's settings: its own fields, then those that it has in common with others.

    A field stands where it was first declared, also where a class between gives it another default.
    """
    declared = {f.name: f.metadata["setting"] for f in fields(owner)}
    seen: list[str] = []  # the bases' fields come first here, each class's last one first
    for base in reversed(owner.__mro__):
        own = [f.name for f in fields(base)] if is_dataclass(base) else []
        seen += [name for name in reversed(own) if name not in seen]
    return tuple(replace(declared[name], name=name) for name in reversed(seen))
