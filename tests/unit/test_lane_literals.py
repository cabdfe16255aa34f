"""Values that are written out in a lane's statements are what the server would have stored of bound ones."""

from __future__ import annotations

import random

import asyncpg
import pytest

from sidecar.delivery.lane_database import _written

ODD = "'\\\"?$;-\n\r\t%\u00e4\u00df\u6f22\U0001f600 aE{}\x01\x7f"
TYPES = {str: "text", bytes: "bytea", float: "double precision", int: "bigint", type(None): "text"}


@pytest.mark.parametrize("seed", range(3))
async def test_what_is_written_out_is_what_is_stored(postgres_database: str, seed: int) -> None:
    chance = random.Random(seed)
    makers = (
        lambda: "".join(chance.choice(ODD) for _ in range(chance.randrange(20))),
        lambda: chance.randbytes(chance.randrange(20)),
        lambda: chance.uniform(-1e18, 1e18) * 10.0 ** chance.randrange(-30, 30),
        lambda: chance.randrange(-(2**62), 2**62),
        lambda: None,
    )
    values = [chance.choice(makers)() for _ in range(300)]
    connection = await asyncpg.connect(postgres_database)
    try:
        asked = ", ".join(f"{_written(value)}::{TYPES[type(value)]}" for value in values)
        assert list(await connection.fetchrow(f"SELECT {asked}")) == values
    finally:
        await connection.close()
