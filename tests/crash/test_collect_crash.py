"""The collector dies at a step, and begins again: each record is in the ledger once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.backend_fixtures import record, record_id
from support.collecting import Collector, CollectorHere, publish
from support.nats_server import NatsServer, client, make_stream, nats_server

pytestmark = pytest.mark.timeout(180)
COUNT = 40


@pytest.fixture(scope="module")
def server() -> Iterator[NatsServer]:
    with nats_server() as one:
        yield one


@pytest.mark.parametrize(
    "step",
    [
        "before Spool.submit 1", "after Segment.append 2", "before KnownIds.remember 1", "after KnownIds.remember 1",
        "before StreamReader.acknowledged 1", "after LedgerStore.apply_sums 1",
    ],
)  # fmt: skip
async def test_a_death_at_any_step_loses_and_doubles_nothing(server: NatsServer, tmp_path: Path, step: str) -> None:
    stream = "".join(word for word in step.title() if word.isalnum())
    await make_stream(server.url, stream, f"{stream}.records")
    await publish(server.url, [record(n) for n in range(1, COUNT + 1)], stream)
    dying = Collector(
        tmp_path / "data",
        server.url,
        stream,
        DIES_AT=step,
        DIES_MARK=str(tmp_path / "died"),
        SIDECAR_BACKENDS="ledger,file",
    )
    try:
        process = await dying.spawn()
        assert await dying.ended() == -9, dying.log.read_text()
        assert process.returncode == -9
    finally:
        await dying.kill()
    # What it had not acknowledged comes again at once: its time to do so is not waited for.
    connection = await client(server.url)
    await connection.jetstream().delete_consumer(stream, "metering-sidecar")
    await connection.close()
    again = CollectorHere(tmp_path / "data", server.url, stream, SIDECAR_BACKENDS="ledger,file")
    await again.start()
    try:
        await publish(server.url, [record(COUNT + 1), record(1)], stream, ids=False)
        balance = await again.until_recorded(COUNT + 1)
        assert balance["recorded"] == COUNT + 1
        assert balance["problems"] == []
    finally:
        await again.stop()
    assert sorted(again.ids()) == [record_id(n) for n in range(1, COUNT + 2)]
    assert again.ledger_calls() == COUNT + 1
    billed = (tmp_path / "data" / "records.ndjson").read_bytes().splitlines()
    assert sorted(billed) == sorted(record(n).json for n in range(1, COUNT + 2))
