"""From settings to parts: the one place where a setting's name meets a part's argument.

Nothing here runs; what is made here is started and stopped by `serving`.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import re
import resource
import secrets
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Final

from sidecar.gate.admission import Admission
from sidecar.model.exchange import Exchange
from sidecar.model.exchange import Recorder as ProxyRecorder
from sidecar.model.grammar import Source, SourceKind
from sidecar.model.http_url import UpstreamAddress
from sidecar.model.record import record_of
from sidecar.model.seldom import Seldom
from sidecar.model.target import client_path
from sidecar.prices import PriceBook
from sidecar.proxy import Proxy
from sidecar.proxy.context import Reading
from sidecar.proxy.route import Routes
from sidecar.proxy.server import files_needed, within_files
from sidecar.proxy.subscriber import Attributor, is_hashed
from sidecar.runtime.hop_counts import HopCounts
from sidecar.runtime.logging import tell_fault
from sidecar.runtime.metrics import Metrics
from sidecar.runtime.names import with_own_threads
from sidecar.runtime.unclaimed import Unclaimed
from sidecar.settings import ProxySettings, Settings, UpstreamSettings
from sidecar.settings.loader import named
from sidecar.spool.files import translate
from sidecar.storage.files import write_once
from sidecar.usage.plain_calls import PlainReader
from sidecar.usage.providers.table import known_routes, row_providers
from sidecar.usage.readers import Pin, UsageTaps
from sidecar.usage.response_headers import known_providers, provider_of_host

log = logging.getLogger("sidecar.parts")

FEW_CONNECTIONS: Final = 2  # a share of what is set: where less than 1/2 of it fits, that is said
COLLECT_EVERY: Final = 20_000  # objects made and not yet let go of; Python's own figure is 700
IDLE_PIN: Final = (
    "paths are looked up in their normal form (escapes of letters decoded, no dot segments, no doubled slashes)"
)
READER_FAULTS: Final = frozenset({"reader_failed", "tap_failed"})  # anomalies that are exceptions
HASH_KEY_BYTES: Final = 32
HASH_KEY_FILE: Final = "hash.key"
HASHED: Final = re.compile(r"key_[0-9a-f]{32}")  # as `attribution` writes the keyed hash of a credential


def proxy(
    settings: Settings,
    recorder: ProxyRecorder,
    metrics: HopCounts | Metrics,
    key: bytes,
    gate: Admission | None = None,
) -> Proxy:
    """The hop with everything that reads along."""
    for setting, what in idle_names(settings):
        log.warning("%s", what, extra={"facts": {"setting": setting}})
    found = routes(settings)
    attribute = attributor(settings, key, WhoPays(metrics.attribution_anomaly))
    by_body = attribute.by_body if body_fields(settings) else None
    return Proxy(
        settings=settings.proxy,
        recorder=recorder,
        taps=telling_taps(settings, metrics, found),
        attribute=attribute,
        attribute_by_body=by_body,
        # Who pays by a member of the body is asked where the hash key is: in the process that serves.
        plainly=attribute if by_body is None else None,
        route=found.match,
        metrics=metrics,
        gate=gate,
        readings=readings(settings, metrics, key),
    )


def readings(settings: Settings, metrics: HopCounts | Metrics, key: bytes) -> dict[str, Reading]:
    """What reads along with the calls to each of several upstreams, by name."""
    plain = not body_fields(settings)
    return {one.name: _reading(settings, one, metrics, key, plain) for one in settings.proxy.upstreams}


def _reading(
    settings: Settings, one: UpstreamSettings, metrics: HopCounts | Metrics, key: bytes, plain: bool
) -> Reading:
    own = attributor(settings, key, WhoPays(metrics.attribution_anomaly), one.url)
    taps = telling_taps(settings, metrics, routes(settings), one.url)
    return Reading(taps=taps, attribute=own, plainly=own if plain else None)


def plain_readers(settings: Settings, metrics: Metrics, book: PriceBook) -> Callable[[str], PlainReader]:
    """What makes records of the plain calls of each process that serves, given the instance whose records they are."""
    taps = telling_taps(settings, metrics, routes(settings))
    each = book.charges or book.needs_record
    pricer = None if each else partial(book.pricer, host=priced_host(settings))
    others = {
        one.name: (
            telling_taps(settings, metrics, routes(settings), one.url),
            None if each else partial(book.pricer, host=_host_and_base(one.url)),
        )
        for one in settings.proxy.upstreams
    }
    one_by_one = any("expression" in (meter.get("aggregation") or ()) for meter in settings.meters)
    return lambda instance: PlainReader(
        taps, None, metrics.limit_reached, instance=instance, pricer=pricer, keep_numbers=one_by_one, others=others
    )


def pricing(settings: Settings, book: PriceBook) -> Callable[[Exchange], None]:
    """What fills in the costs of one call. It raises what is a fault of ours, with the costs set to unknown ones."""
    hosts = priced_hosts(settings)

    def price(exchange: Exchange) -> None:
        try:
            fill_in(exchange)
        except Exception:
            exchange.cost = exchange.cost or book.unknown()
            exchange.charge = book.unknown() if book.charges else None
            raise

    def fill_in(exchange: Exchange) -> None:
        host = hosts.get(exchange.upstream) or hosts[None]
        record = record_of(exchange, seq=0, instance="", line=b"") if book.needs_record else None
        started_s = exchange.started_ns / 1e9
        cost = book.cost(exchange.usage, started_s, host=host, record=record)
        exchange.cost = cost[0]
        if book.charges:
            exchange.charge = book.charge(exchange.usage, started_s, cost, host=host, record=record)[0]

    return price


def priced_host(settings: Settings) -> str:
    """Host and base path of the upstream: what its prices are found by."""
    return _host_and_base(settings.proxy.upstream_url)


def priced_hosts(settings: Settings) -> dict[str | None, str]:
    """The same by the name of each of several; None: of what matches no other."""
    found: dict[str | None, str] = {None: priced_host(settings)}
    return found | {one.name: _host_and_base(one.url) for one in settings.proxy.upstreams}


def _host_and_base(url: str | None) -> str:
    return "".join(part or "" for part in _upstream(url))


def routes(settings: Settings) -> Routes:
    """The patterns that calls are labelled by: those that were set, then those that are known."""
    return Routes([route.pattern for route in settings.proxy.routes], known_routes())


def telling_taps(settings: Settings, metrics: HopCounts | Metrics, routes: Routes, url: str | None = None) -> UsageTaps:
    """Taps that count what is odd, and tell of responses that nobody claims. `url`: of one of several upstreams."""
    url = url or settings.proxy.upstream_url
    taps = usage_taps(settings, metrics.usage_anomaly, url)
    _, base = _upstream(url)
    taps.unclaimed = Unclaimed(
        lambda method, target: routes.match(method, client_path(target, base)), taps.upstream_host, time.monotonic
    )
    return taps


def attributor(settings: Settings, key: bytes, anomaly: Callable[[str], None], url: str | None = None) -> Attributor:
    """`url`: of one of several upstreams."""
    sources = [Source.parse(text) for text in settings.attribution.subscriber]
    host, base = _upstream(url or settings.proxy.upstream_url)
    return Attributor(
        sources=sources,
        dimensions=settings.attribution.dimensions,
        hash_key=key,
        provider=provider_of_host(host),
        base=base,
        anomaly=anomaly,
    )


class WhoPays:
    """Counts what is odd about who pays, and says once in a while that somebody sends two credentials."""

    def __init__(self, count: Callable[[str], None]) -> None:
        self._count = count
        self._seldom = Seldom()

    def __call__(self, kind: str) -> None:
        self._count(kind)
        if kind == "credentials_conflict" and (since := self._seldom.due(kind, time.monotonic())) is not None:
            log.warning(
                "calls bear more than one credential: name the header that your API authenticates by in "
                "SIDECAR_SUBSCRIBER, or a client chooses by which it is billed",
                extra={"facts": {"kind": kind, "calls": since}},
            )


def pins_of(settings: Settings) -> list[Pin]:
    pins = dict(settings.usage.providers)
    pins |= {route.pattern: route.provider for route in settings.proxy.routes if route.provider is not None}
    return [Pin(pattern, provider) for pattern, provider in pins.items()]


def idle_names(settings: Settings) -> list[tuple[str, str]]:
    """Settings that name what there is not, or what no call can be: each with what is to be said of it. Somebody may
    mean it so, or not yet."""
    pins = pins_of(settings)
    found = [("SIDECAR_PROVIDERS", f"{pin.pattern} can match nothing: {IDLE_PIN}") for pin in pins if pin.idle]
    known = known_providers() | row_providers()
    priced = {table.get("provider") for table in settings.price_tables}  # who has a price for it has not mistyped it
    for name in sorted({pin.provider for pin in pins} - known - priced):
        near = get_close_matches(name.lower(), known, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        what = f"no provider is known as {name}{hint}: such calls are recorded under that name, and read as OpenAI's"
        found.append(("SIDECAR_PROVIDERS", what))
    if all(is_hashed(Source.parse(text)) for text in settings.attribution.subscriber):
        plain = [id_ for id_ in settings.subscribers if not HASHED.fullmatch(id_)]
        if plain:
            what = (
                f"no call is ever of {named(plain)}: here callers are known by the hash of their credential "
                "(SIDECAR_SUBSCRIBER), which `metering-sidecar subscriber` says of a key"
            )
            found.append(("[subscribers]", what))
    return found


def usage_taps(settings: Settings, anomaly: Callable[[str], None], url: str | None = None) -> UsageTaps:
    """`url`: of one of several upstreams."""

    def told(kind: str) -> None:
        anomaly(kind)
        if kind in READER_FAULTS:  # told where it was caught
            log.error(
                "a usage reader failed: the call's record lacks what it would have said", exc_info=sys.exception()
            )

    host, base = _upstream(url or settings.proxy.upstream_url)
    return UsageTaps(
        upstream_host=host,
        upstream_base=base,
        pins=pins_of(settings),
        elements=settings.usage.elements,
        estimate=settings.usage.estimate,
        ask_for_usage=settings.usage.ask_for_usage,
        body_fields=body_fields(settings),
        clock_ns=time.monotonic_ns,
        anomaly=told,
    )


def _upstream(url: str | None) -> tuple[str | None, str]:
    """The upstream's host, and the path of its URL."""
    if not url:
        return None, ""
    address = UpstreamAddress.parse(url)
    return address.host, address.base.decode("ascii")


def body_fields(settings: Settings) -> tuple[str, ...]:
    """The members of a request's body that may say who pays."""
    sources = (Source.parse(text) for text in settings.attribution.subscriber)
    return tuple(source.name for source in sources if source.kind is SourceKind.BODY)


def hash_key(settings: Settings, made: bytes | None = None) -> bytes:
    """The key of the subscribers' hashes: as set, else made once and kept in the data directory.

    `made`: the one that is used already, and could not be kept before. Raises `OSError`, or `SpoolError` where it
    cannot be kept.
    """
    kept = kept_hash_key(settings)
    if kept is not None:
        return kept
    path = settings.data_dir / HASH_KEY_FILE
    _tell_new_key(settings, path)
    try:
        return _keep_hash_key(path, made or new_hash_key())
    except OSError as error:
        raise translate(error, f"cannot keep {path}") from error


def new_hash_key() -> bytes:
    return secrets.token_bytes(HASH_KEY_BYTES)


def kept_hash_key(settings: Settings) -> bytes | None:
    """The key that was set, condensed to 32 bytes so that any length of text will do, or the one in the data directory;
    None where there is none yet. Raises `OSError`."""
    if settings.attribution.hash_key is not None:
        return hashlib.blake2b(settings.attribution.hash_key.reveal().encode(), digest_size=HASH_KEY_BYTES).digest()
    path = settings.data_dir / HASH_KEY_FILE
    try:
        kept = bytes.fromhex(path.read_text("ascii").strip())
    except FileNotFoundError:
        return None
    except ValueError:
        kept = b""
    if len(kept) != HASH_KEY_BYTES:
        raise OSError(f"{path} is damaged: put its copy back, or remove it, after which credentials hash anew")
    return kept


def _tell_new_key(settings: Settings, path: Path) -> None:
    """A lost key makes another customer of everybody; mapped ids that begin so show that there was one."""
    mapped = sum(HASHED.fullmatch(name) is not None for name in settings.subscribers)
    if mapped:
        log.warning(
            "%s was not there and a new one is made: %d of [subscribers] are hashes of another key and match nobody; "
            "put the old file back, or map the new ids (`metering-sidecar spool parked` shows them)",
            path,
            mapped,
        )


def _keep_hash_key(path: Path, key: bytes) -> bytes:
    # Two workers that start at once both end up with the one that was first.
    return key if write_once(path, key.hex().encode() + b"\n") else bytes.fromhex(path.read_text("ascii").strip())


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop where it is available: half the cost of the standard loop. What it catches is told without its text, and
    a name that is looked up holds up nothing else."""
    new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    with suppress(ImportError):
        import uvloop

        new_loop = uvloop.new_event_loop

    def make() -> asyncio.AbstractEventLoop:
        loop = new_loop()
        loop.set_exception_handler(tell_fault)
        return with_own_threads(loop)

    return make


def calm_collector() -> None:
    """Let the garbage collector look rarely: a call leaves no cycles (measured over 1,000 calls), and a full look
    at everything that was imported is a pause of 20 ms in somebody's answer."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_EVERY, 20, 50)


def raise_file_limit(settings: Settings) -> None:
    """Take all the file descriptors that we may have: an open call needs two, and a soft limit of 1,024 is common."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wished = settings.proxy
    wanted = files_needed(wished)
    top = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < top:
        resource.setrlimit(resource.RLIMIT_NOFILE, (top, hard))
    if hard != resource.RLIM_INFINITY and hard < wanted:
        left = within_files(hard, wished).connections
        # Somewhat less of what nobody asked for is no news; much less may be why calls are refused one day.
        asked = wished.connections != ProxySettings().connections
        log.log(
            logging.WARNING if asked or left * FEW_CONNECTIONS < wished.connections else logging.DEBUG,
            "SIDECAR_CONNECTIONS=%d needs %d file descriptors and this process may have %d: %d connections are taken "
            "at once, and further ones are refused with 503; raise `ulimit -n`, or lower the setting",
            wished.connections,
            wanted,
            hard,
            left,
        )
