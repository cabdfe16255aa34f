"""The sidecar's own `meter` contract at `/meter`: a JSON array of Revenium v1 `/meter` payloads.

The array is taken whole or not at all. `Idempotency-Key` is honoured for a day: the same bytes get the first answer
again, other bytes under the key are a mistake (409). Without one, repetitions count again. An API key is asked for
only where the receiver was given one, for collectors of the operator's own often have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson

from sidecar.dev.mock_backends.checks import is_json, parse_json, sentence
from sidecar.dev.mock_backends.contract import Answer, Call, Consumed, Memory, Route, Terms, Unit, Verdict
from sidecar.dev.mock_backends.replay import Replay
from sidecar.dev.mock_backends.vendors.revenium_v1 import meter_problems, without_key

ITEMS_MAX: Final = 10_000  # far above any batch setting; a body of more is a mistake worth a word


class Meter:
    """`POST /meter`."""

    def __init__(self, memory: Memory, terms: Terms) -> None:
        self._replay = Replay(memory)
        self._terms = terms
        self.routes = (Route(method="POST", path="/meter", handle=self._take, exclusive=_key_of, busy=_busy),)

    @staticmethod
    def settings(url: str) -> Mapping[str, str]:
        return {"url": f"{url}/meter"}

    @staticmethod
    def consumed(path: str, body: Mapping[str, Any]) -> Consumed | None:
        if "elements" not in body:
            return None
        return Consumed(
            body.get("application"), {"api_calls": 1, **{one["name"]: one["value"] for one in body["elements"]}}
        )

    def fault_body(self, status: int) -> bytes:
        return orjson.dumps({"error": f"told to answer {status}"})

    def _take(self, call: Call) -> Answer:
        if self._terms.key is not None and not self._terms.admits(call.header("x-api-key")):
            return Answer.json(403, {"error": "check your API key (header x-api-key)"})
        if not is_json(call):
            return Answer.json(415, {"error": "expected application/json"})
        key = _key_of(call)
        items = _items(call)
        if isinstance(items, str):
            return Answer.json(400, {"error": items})
        listed = [without_key(item) for item in items]
        if key is not None and (stored := self._replay.recall(call, call.header("x-api-key"), key)):
            if not stored.same:
                refusal = {"code": "idempotency_key_mismatch", "error": "this key came with another body before"}
                return Answer.json(409, refusal, Unit(key, listed, Verdict.REFUSED))
            unit = Unit(key, listed, Verdict.DUPLICATE)
            return Answer(
                stored.answer.status, stored.answer.body, headers={"Idempotent-Replayed": "true"}, units=(unit,)
            )
        for place, item in enumerate(items):
            if found := meter_problems(item):
                fault = {"error": f"item {place}: {sentence(found)}", "index": place}
                return Answer.json(400, fault, Unit(key, listed, Verdict.REFUSED))
        answer = Answer.json(200, {"accepted": len(items)}, Unit(key, listed, Verdict.DELIVERED))
        if key is not None:
            self._replay.keep(call, call.header("x-api-key"), key, answer)
        return answer


def _items(call: Call) -> list[dict[str, Any]] | str:
    """The payloads, or what is wrong."""
    try:
        body = parse_json(call)
    except ValueError:
        return "the body is no JSON"
    if not isinstance(body, list) or not all(isinstance(item, dict) for item in body):
        return "expected an array of objects"
    if not 1 <= len(body) <= ITEMS_MAX:
        return f"expected 1 to {ITEMS_MAX} items, not {len(body)}"
    return body


def _key_of(call: Call) -> str | None:
    return call.header("Idempotency-Key") or None


def _busy(call: Call) -> Answer:
    refusal = {"code": "idempotency_key_in_progress", "error": "the first call with this key is still running"}
    return Answer.json(409, refusal, Unit(_key_of(call), None, Verdict.RETRY), Retry_After="1")
