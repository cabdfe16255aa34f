"""What goes wrong in a crash test, drawn by seed, and a receiver that watches how the sidecar bears it.

The receiver notes a digest of every request under its key, before any fault: two requests of one key that differ are
found whatever became of the first. It can be told to refuse one record for good (a poison).
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qs

import orjson

from sidecar.dev.mock_backends import Receiver
from sidecar.dev.mock_backends.contract import Answer, Call, Unit, Verdict
from sidecar.dev.mock_backends.faults import Do, Fault

RECORD_ID = re.compile(rb'"(?:id|event_id|correlationId|transactionId)":"([0-9a-f-]{36})"')
POISONED = ("webhook", "meter", "flexprice")  # their bodies name records, and a refusal of a batch is split


class Watching(Receiver):
    """The stand-in backends, and an eye on what they are sent."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.digests: dict[tuple[str, str], set[str]] = defaultdict(set)
        self.requests: Counter[str] = Counter()
        self.repeats: Counter[str] = Counter()
        self.poison: set[tuple[str, str]] = set()  # a backend, and the id of a record that it never takes
        self.keyed: set[str] = set()  # backends that were sent an Idempotency-Key
        self.maybe: Counter[str] = Counter()  # requests for which nobody can say whether they were taken
        self._wanted: set[str] = set()
        self._offered: set[tuple[str, str]] = set()

    def poison_one(self, backend: str) -> None:
        """One record of the next request that was never offered before is refused from now on."""
        self._wanted.add(backend)

    def disturb(self, *rules: Fault) -> None:
        """New faults in the place of the old ones, whose doubtful answers are counted."""
        for row in self.faults.status():
            if row["do"] in (Do.CUT_BEFORE, Do.CUT_AFTER) or row["status"] in (502, 504):
                self.maybe[row["backend"]] += row["hits"]
        self.faults.set(*rules)

    def _find(self, call: Call) -> Any:
        stand, call = super()._find(call)
        if stand is not None and call.method == "POST":
            self._note(stand.backend, call)
        return stand, call

    def _note(self, backend: str, call: Call) -> None:
        self.requests[backend] += 1
        if call.header("Idempotency-Key"):
            self.keyed.add(backend)
        named = {_key_of(backend, call): call.fingerprint()}
        if backend == "flexprice":  # no key for a request: each event has its own
            named = {e["event_id"]: hashlib.sha256(orjson.dumps(e)).hexdigest() for e in _json(call)["events"]}
        for key, digest in named.items():
            known = self.digests[backend, key]
            self.repeats[backend] += bool(known)
            known.add(digest)

    def _ask(self, call: Call, stand: Any) -> Answer:
        backend, ids = stand.backend, [found.decode() for found in RECORD_ID.findall(call.body)]
        name = (backend, _key_of(backend, call) or call.fingerprint())
        if backend in self._wanted and name not in self._offered and ids:
            self._wanted.discard(backend)
            self.poison.add((backend, ids[len(ids) // 2]))
        self._offered.add(name)
        if any((backend, one) in self.poison for one in ids):
            return Answer.json(400, {"error": "not this one"}, Unit(None, None, Verdict.REFUSED))
        return super()._ask(call, stand)


@asynccontextmanager
async def watching() -> AsyncIterator[tuple[Watching, str]]:
    """The watching receiver in the test's own loop, and its address."""
    receiver = Watching()
    try:
        yield receiver, await receiver.start()
    finally:
        await receiver.aclose()


def _key_of(backend: str, call: Call) -> str:
    if backend == "stripe":
        return parse_qs(call.body.decode())["identifier"][0]
    if backend == "revenium":
        return revenium_id(_json(call))
    return call.header("webhook-id") or call.header("Idempotency-Key")


def revenium_id(body: dict[str, Any]) -> str:
    """The record's id, as v1 and v2 carry it."""
    return str(body.get("correlationId") or body["transactionId"])


def _json(call: Call) -> Any:
    return orjson.loads(call.body)


def draw_faults(chance: random.Random, backends: list[str]) -> list[Fault]:
    """Nothing, or one fault for some of the backends."""
    return [_draw(chance, backend) for backend in backends if chance.random() < 0.4]


def _draw(chance: random.Random, backend: str) -> Fault:
    share, seed = chance.choice((0.1, 0.25, 0.5)), chance.randrange(1 << 30)
    # Where nothing de-duplicates, an error after taking is told from one before only by these two.
    errors = (502, 504) if backend == "revenium" else (500, 502, 503, 504)
    match chance.choice(("slow", "busy", "error", "error_after", "cut_before", "cut_after", "down")):
        case "slow":
            return Fault(do=Do.DELAY, share=share, seed=seed, backend=backend, delay_s=chance.uniform(0.02, 0.4))
        case "busy":
            after_s = chance.choice((None, 1))
            return Fault(do=Do.STATUS, share=share, seed=seed, backend=backend, status=429, retry_after_s=after_s)
        case "error":
            status = chance.choice((500, 502, 503, 504))
            return Fault(do=Do.STATUS, share=share, seed=seed, backend=backend, status=status)
        case "error_after":
            return Fault(do=Do.STATUS_AFTER, share=share, seed=seed, backend=backend, status=chance.choice(errors))
        case "cut_before":
            return Fault(do=Do.CUT_BEFORE, share=share, seed=seed, backend=backend)
        case "cut_after":
            return Fault(do=Do.CUT_AFTER, share=share, seed=seed, backend=backend)
        case _:
            return Fault(do=Do.STATUS, share=1.0, seed=seed, backend=backend, status=503)


def kill_one(pids: list[int], chance: random.Random) -> None:
    os.kill(chance.choice(pids), signal.SIGKILL)
