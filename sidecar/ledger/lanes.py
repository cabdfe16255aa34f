"""Lanes: what is delivered for a fleet is cut by customer, so that one sidecar at a time sends for each customer.

The records of one customer are all in one lane, in the order in which the shared ledger took them; so a vendor that
takes one request a customer at a time gets that, and lanes can be worked off beside each other. Which lane it is must
never change for a record that was numbered: neither the number of lanes nor the function is a setting.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Final

# As many as sidecars may deliver at once. Each costs a lease that is renewed, so not more than are of use.
LANES: Final = 16


def lane_of(key: str) -> int:
    """The lane, 0 to `LANES` - 1, of a customer's id; of a record without a customer, by the record's own id."""
    return zlib.crc32(key.encode("utf-8", "surrogatepass")) % LANES


def named(lanes: Iterable[int]) -> str:
    """Lanes in words: `lane 3`, `lanes 1, 4 to 6 and 9`."""
    runs: list[list[int]] = []
    for lane in sorted(lanes):
        if runs and lane == runs[-1][-1] + 1:
            runs[-1].append(lane)
        else:
            runs.append([lane])
    texts = [
        text for run in runs for text in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else [str(lane) for lane in run])
    ]
    many = sum(map(len, runs)) > 1
    return ("lanes " if many else "lane ") + " and ".join(filter(None, (", ".join(texts[:-1]), *texts[-1:])))
