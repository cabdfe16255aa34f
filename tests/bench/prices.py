"""What a price costs: `python tests/bench/prices.py`. Load, memory, and µs a call with the price looked up and not.

CPU time of the quickest block. Nothing here is a test: no figure is asserted.
"""

from __future__ import annotations

import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import orjson

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from sidecar.model.exchange import Usage, UsageState
from sidecar.model.record import usage_to_dict
from sidecar.prices import PriceBook
from sidecar.prices.custom import read_prices
from sidecar.prices.table import builtin

BLOCKS = 40
CALLS = 1_000
NOW_S = 1_795_000_000.0


def usage(**more: object) -> Usage:
    facts = {"usage_state": UsageState.FINAL, "provider": "openai", "model": "gpt-5-mini-2025-08-07"}
    counts = {"request_model": "gpt-5-mini", "input_tokens": 1_234, "output_tokens": 321, "total_tokens": 1_555}
    return Usage(**{**facts, **counts, **more})  # type: ignore[arg-type]


def quickest(run: Callable[[], object]) -> float:
    """µs a call, of the quickest block."""
    best = float("inf")
    for _ in range(BLOCKS):
        begin = time.thread_time_ns()
        for _ in range(CALLS):
            run()
        best = min(best, time.thread_time_ns() - begin)
    return best / CALLS / 1_000


def main() -> None:
    began = time.perf_counter()
    table = builtin()
    load_ms = (time.perf_counter() - began) * 1_000
    tracemalloc.start()
    table = builtin()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"{'load the table':<44}{load_ms:9.1f} ms")
    print(f"{'the table in memory':<44}{kept / (1 << 20):9.2f} MiB")
    book = PriceBook(table)
    plain, cached = usage(), usage(cache_read_input_tokens=1_024)
    written = usage(
        provider="anthropic", model="claude-sonnet-4-5", cache_read_input_tokens=100, cache_write_input_tokens=900
    )
    searched = usage(units={"web_search_requests": 2})
    tiered = usage(provider="gcp.gemini", model="gemini-2.5-pro", request_model=None, input_tokens=250_000)
    unknown = usage(model="nothing-of-the-kind", request_model=None)
    quickest(lambda: book.cost(plain, NOW_S))  # the first blocks of a process are slow ones
    for name, each in {
        "input and output": plain,
        "with a cache read": cached,
        "with tiers": tiered,
        "with cache reads and writes": written,
        "with a web search (the long way)": searched,
        "without a price": unknown,
    }.items():
        print(f"{name:<44}{quickest(lambda each=each: book.cost(each, NOW_S)):9.2f} µs")  # type: ignore[misc]
    row = usage_to_dict(cached)
    print(f"{'a cache read, of a usage object':<44}{quickest(lambda: book.cost(row, NOW_S)):9.2f} µs")
    print(f"{'  and as JSON':<44}{quickest(lambda: orjson.dumps(book.cost(row, NOW_S)[0])):9.2f} µs")
    pricer = book.pricer(row)
    print(f"{'  and by a pricer of its kind':<44}{quickest(lambda: pricer.json(row, NOW_S)):9.2f} µs")
    loop = quickest(lambda: None)
    print(f"{'  (of which the loop)':<44}{loop:9.2f} µs")
    own = read_prices([{"for": "customer", "provider": "*", "model": "*", "markup": "1.2"}], ())
    marked = PriceBook(table, own)
    cost = marked.cost(plain, NOW_S)
    print(f"{'charge: a markup':<44}{quickest(lambda: marked.charge(plain, NOW_S, cost)):9.2f} µs")

    def cold() -> None:
        book._kept.clear()
        book.cost(plain, NOW_S)

    print(f"{'looked up anew':<44}{quickest(cold):9.1f} µs")


if __name__ == "__main__":
    main()
