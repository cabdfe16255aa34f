"""Makes the table of the wheel from the data of genai-prices: `python -m sidecar.prices.convert` (`make prices`).

Run at release, where that package is installed (it is one of the tests'); nothing of it is needed afterwards. The order
of providers and models is kept, since the first that matches is taken; keys are sorted, so that two editions can be
compared. The package's text fields (descriptions, addresses of price pages) are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import date, time
from decimal import Decimal
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import orjson

from sidecar.prices.table import TABLE_FILE, checked, digest_of

PACKAGE: Final = "genai-prices"
# A rule that stands in that package's code, not in its data: Groq bills at least ten seconds of a transcription.
SECONDS_LEAST: Final = {("groq", "whisper-large-v3"): 10, ("groq", "whisper-large-v3-turbo"): 10}


def providers() -> list[dict[str, Any]]:
    """The package's data as plain values, checked as a file would be."""
    from genai_prices.data import providers as rows

    made = [_plain(row) for row in rows]
    for provider in made:
        for model in provider["models"]:
            if (least := SECONDS_LEAST.get((provider["id"], model["id"]))) is not None:
                model["seconds_least"] = least
    return checked(made, PACKAGE)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    fields: Mapping[str, Any] = value if isinstance(value, Mapping) else vars(value)
    # `or_` and `and_` are the package's spelling of words that Python keeps for itself; extractors are not prices.
    kept = {key.rstrip("_"): each for key, each in fields.items() if each is not None and not key.startswith("_")}
    return {key: _plain(each) for key, each in kept.items() if key != "extractors"}


def table() -> bytes:
    """The file, byte for byte the same for the same edition."""
    rows = providers()
    head = {"source": f"{PACKAGE}/{metadata.version(PACKAGE)}", "sha256": digest_of(rows)}
    return (
        b'{"source":'
        + orjson.dumps(head["source"])
        + b',"sha256":'
        + orjson.dumps(head["sha256"])
        + b',"providers":['
        + b",".join(b"\n" + orjson.dumps(row, option=orjson.OPT_SORT_KEYS) for row in rows)
        + b"\n]}\n"
    )


def main() -> int:
    path = Path(__file__).parent / TABLE_FILE
    made = table()
    if path.exists() and path.read_bytes() == made:
        print(f"{path.name} is as {PACKAGE} {metadata.version(PACKAGE)} has it")  # noqa: T201
        return 0
    path.write_bytes(made)
    print(f"{path.name} written from {PACKAGE} {metadata.version(PACKAGE)}: {len(made):,} bytes")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
