"""One way to run each backend: what the contract suites ask all of them, in one table.

A backend is added by a row in `TRIALS`.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.backend_fixtures import SECRET, T0_NS, ScriptedServer

from sidecar.backends import BACKENDS, Context
from sidecar.dev.mock_backends import Receiver, Terms
from sidecar.ledger import LedgerStore
from sidecar.meters.definition import DEFAULT_METERS, Meter
from sidecar.model.delivery import Backend
from sidecar.settings import Setting, settings_of


@dataclass(frozen=True)
class Trial:
    """One way to run one backend. `verdicts`: status -> what it must mean, where it differs from the common rule."""

    backend: str
    values: Mapping[str, str] = field(default_factory=dict)
    http: bool = True
    verdicts: Mapping[int, str] = field(default_factory=dict)


KEYED = {"api_key": SECRET}
NO_DEDUP = dict.fromkeys((502, 504, 520, 522, 524, 598, 599), "Unknown")  # a gateway's own
TRIALS = {
    "ledger": Trial("ledger", http=False),
    "file": Trial("file", http=False),
    "nats": Trial("nats", {"url": "nats://127.0.0.1:9"}, http=False),  # with a real server in test_nats_backend.py
    "meter": Trial("meter", KEYED),
    "webhook": Trial("webhook", {"secret": SECRET}),
    **{
        f"revenium-{mode}": Trial("revenium", {**KEYED, "mode": mode, "source_id": "s 1/ä"}, verdicts=NO_DEDUP)
        for mode in ("meter", "event", "rate", "ingest")
    },
    **{f"revenium-{mode}": Trial("revenium", {**KEYED, "mode": mode}) for mode in ("events", "completions")},
    "ledgerbee": Trial("ledgerbee", KEYED),
    "stripe-v1": Trial("stripe", KEYED, verdicts={409: "Retry"}),
    "stripe-v2": Trial("stripe", {**KEYED, "mode": "v2"}, verdicts={409: "Retry"}),
    "stripe-stream": Trial("stripe", {**KEYED, "mode": "stream"}, http=False),
    "flexprice": Trial("flexprice", KEYED),
    "openmeter": Trial("openmeter", KEYED),
    "openmeter-v3": Trial("openmeter", {**KEYED, "api": "v3"}),
    "openmeter-forgetful": Trial("openmeter", {**KEYED, "dedup_window": "0"}, verdicts=NO_DEDUP),
    "lago": Trial("lago", KEYED),
}
HTTP_TRIALS = [name for name, trial in TRIALS.items() if trial.http]


def values_of(row: tuple[Setting, ...], given_values: Mapping[str, str]) -> dict[str, Any]:
    values = {s.name: s.default_value() for s in row}
    for s in row:
        if s.name in given_values:
            values[s.name] = s.value(s.kind.parse(given_values[s.name]))
    return values


def build(
    name: str,
    tmp_path: Path,
    url: str = "http://127.0.0.1:9",
    **more: str,
) -> Backend:
    """A backend as the configuration would make it."""
    trial = TRIALS[name]
    row = BACKENDS[trial.backend]
    context = Context(
        data_dir=tmp_path,
        subscribers={"acme": {trial.backend: "cus_acme"}},
        open_ledger=lambda: LedgerStore(tmp_path / "ledger.db"),
    )
    urls = {"url": url, "stream_url": url}
    return row.make(values_of(row.settings, {**urls, **trial.values, **more}), context)


@contextlib.asynccontextmanager
async def at_a_server(trial_name: str, tmp_path: Path) -> AsyncIterator[tuple[ScriptedServer, Backend]]:
    """A backend that sends to a server which answers as told."""
    async with ScriptedServer().running() as server:
        backend = build(trial_name, tmp_path, server.url)
        try:
            yield server, backend
        finally:
            await backend.aclose()


@contextlib.asynccontextmanager
async def receiving(backend: str, key: str | None = SECRET) -> AsyncIterator[Receiver]:
    """A stand-in that knows one key, and whose clock is that of the records."""
    terms = Terms(key=key) if backend != "webhook" else Terms()
    receiver = Receiver(terms={backend: terms}, now=lambda: T0_NS / 1e9 + 60)
    await receiver.start()
    try:
        yield receiver
    finally:
        await receiver.aclose()


PATHS = {"meter": "/meter", "webhook": "/webhook"}  # where the stand-in has what has no path of its own
RECEIVED = [name for name, trial in TRIALS.items() if trial.backend not in ("ledger", "file", "nats")]


@dataclass(frozen=True, kw_only=True)
class Given(Context):
    """The surroundings of a backend as a test has them: mapped customers and meters that are read already."""

    mapped: Mapping[str, str] = field(default_factory=dict)
    read: tuple[Meter, ...] = DEFAULT_METERS

    def customers(self, backend: str) -> dict[str, str]:
        return dict(self.mapped)

    def definitions(self) -> tuple[Meter, ...]:
        return self.read


def made(
    kind: Any,
    *,
    customers: Mapping[str, str] | None = None,
    definitions: tuple[Meter, ...] = DEFAULT_METERS,
    clock: Callable[[], float] | None = None,
    data_dir: Path = Path("none"),
    open_ledger: Any = None,
    open_shared_ledger: Any = None,
    **texts: str,
) -> Any:
    """One backend, whose settings are written as an operator writes them."""
    context = Given(
        data_dir=data_dir,
        open_ledger=open_ledger,
        open_shared_ledger=open_shared_ledger,
        mapped=customers or {},
        read=definitions,
    )
    owned = kind.settings_type(**values_of(settings_of(kind.settings_type), texts))
    return kind(owned, context) if clock is None else kind(owned, context, clock=clock)
