"""What arrived at a stand-in, as a person wants to see it: one event in full, and all of it added up by customer.

Every vendor has calls and tokens elsewhere in its body; `_SHAPES` knows where, by a field that only that body has. What
is added up here comes from the bytes that were received, so it can be held against what the upstream reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import orjson

from sidecar.cli.output import Format, pairs, render

CALLS: Final = "api_calls"
INPUT: Final = "input_tokens"
OUTPUT: Final = "output_tokens"
COLUMNS: Final = ("customer", CALLS, INPUT, OUTPUT)
VALUE_CHARS_MAX: Final = 96

Body = Mapping[str, Any]
Amount = tuple[str, str, int]  # customer, name, value


def in_full(path: str, body: object) -> str:
    """The first event of one body, a line for each of its fields."""
    one = body[0] if isinstance(body, list) and body else body
    head = f"POST {path}\n"
    if not isinstance(one, dict):
        return head
    told = pairs([(name, _clipped(value)) for name, value in one.items()])
    return head + "".join(f"  {line}\n" for line in told.splitlines())


def totals(rows: Iterable[tuple[str, object]]) -> dict[str, dict[str, int]]:
    """Customer -> name -> sum, from the paths and bodies of what was taken."""
    found: dict[str, dict[str, int]] = {}
    for path, body in rows:
        for one in body if isinstance(body, list) else [body]:
            for customer, name, value in _amounts(path, one) if isinstance(one, dict) else ():
                sums = found.setdefault(customer, {})
                sums[name] = sums.get(name, 0) + value
    return dict(sorted(found.items()))


def as_table(sums: Mapping[str, Mapping[str, int]]) -> str:
    rows = [{"customer": customer, **values} for customer, values in sums.items()]
    return render(rows, COLUMNS, Format.TABLE)


def _amounts(path: str, body: Body) -> Iterator[Amount]:
    for sign, read in _SHAPES.items():
        if sign in body or sign in path:
            yield from ((customer, name, value) for customer, name, value in read(path, body) if name in COLUMNS)
            return


def _named(customer: object, names: Mapping[str, Any]) -> Iterator[Amount]:
    """Names with `-` or `_`, and numbers or texts of numbers."""
    for name, value in names.items():
        if isinstance(value, (int, str)) and str(value).isdigit():
            yield str(customer), name.replace("-", "_"), int(value)


def _meter(_: str, body: Body) -> Iterator[Amount]:
    return _named(body.get("application"), {CALLS: 1, **{one["name"]: one["value"] for one in body["elements"]}})


def _halves(_: str, body: Body) -> Iterator[Amount]:
    """The second half of a call has what was consumed."""
    if body["eventType"] != "RESPONSE":
        return iter(())
    said = dict(pair.split("=", 1) for pair in str(body.get("metadata", "")).split(",") if "=" in pair)
    return _named(body.get("application"), {CALLS: 1, **said})


def _ingest(path: str, body: Body) -> Iterator[Amount]:
    asked = parse_qs(urlsplit(path).query)
    return _named("".join(asked.get("subscriptionId", [])), body)


def _payload(_: str, body: Body) -> Iterator[Amount]:
    return _named(body.get("subscriberCredentialId") or body.get("subscriberCredential"), body["payload"])


def _completion(_: str, body: Body) -> Iterator[Amount]:
    told = {CALLS: 1, INPUT: body["inputTokenCount"], OUTPUT: body["outputTokenCount"]}
    return _named(body["subscriber"]["id"], told)


def _stripe(_: str, body: Body) -> Iterator[Amount]:
    payload = body["payload"]
    return _named(payload["stripe_customer_id"], {body["event_name"]: payload["value"]})


def _flexprice(_: str, body: Body) -> Iterator[Amount]:
    return _named(body["external_customer_id"], {CALLS: 1, **body["properties"]})


def _webhook(_: str, body: Body) -> Iterator[Amount]:
    usage = body.get("usage") or {}
    return _named(body["subscriber"]["id"], {CALLS: 1, INPUT: usage.get(INPUT), OUTPUT: usage.get(OUTPUT)})


# A field that only this body has (or a word of its path) -> how it is read; the first that fits.
_SHAPES: Final[Mapping[str, Callable[[str, Body], Iterator[Amount]]]] = {
    "/ingest?": _ingest,
    "elements": _meter,
    "eventType": _halves,
    "inputTokenCount": _completion,
    "identifier": _stripe,
    "meterName": lambda _, body: _named(body["customerId"], {body["meterName"]: body["value"]}),
    "external_subscription_id": lambda _, body: _named(
        body["external_subscription_id"], {body["code"]: body["properties"]["value"]}
    ),
    "external_customer_id": _flexprice,
    "specversion": lambda _, body: _named(body["subject"], {CALLS: 1, **body["data"]}),
    "instance": _webhook,
    "payload": _payload,
}


def _clipped(value: object) -> str:
    text = orjson.dumps(value).decode()
    return text if len(text) <= VALUE_CHARS_MAX else f"{text[:VALUE_CHARS_MAX]}…"
