"""The sidecar's `webhook` at `/webhook`: records as NDJSON, signed by the rules of Standard Webhooks.

`webhook-signature` holds `v1,<base64>` entries, each an HMAC-SHA256 over `<webhook-id>.<webhook-timestamp>.<body>`.
With a secret the signature must be right and the timestamp within five minutes; without one neither is looked at.
The id (or `Idempotency-Key` where there is none) makes a repetition harmless.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping
from typing import Any, Final

import orjson

from sidecar.dev.mock_backends.checks import media_type
from sidecar.dev.mock_backends.contract import (
    SECRET,
    Answer,
    Call,
    Consumed,
    Memory,
    Route,
    Terms,
    Unit,
    Verdict,
    bearer,
)

TOLERANCE_S: Final = 300.0  # the specification's own suggestion
WINDOW_S: Final = 86_400.0  # how long ids are remembered; a day, as at the paid vendors
MEDIA_TYPES: Final = ("application/x-ndjson", "application/ndjson", "application/jsonl")


class Webhook:
    """`POST /webhook`."""

    def __init__(self, memory: Memory, terms: Terms) -> None:
        self._memory = memory
        self._terms = terms
        self._secret = None if terms.secret is None else secret_bytes(terms.secret)
        self.routes = (Route(method="POST", path="/webhook", handle=self._take, exclusive=_key_of, busy=_busy),)

    @staticmethod
    def settings(url: str) -> Mapping[str, str]:
        return {"url": f"{url}/webhook", "secret": SECRET}

    @staticmethod
    def consumed(path: str, body: Mapping[str, Any]) -> Consumed | None:
        usage = body.get("usage") or {}
        amounts = {"api_calls": 1} | {name: usage.get(name) for name in ("input_tokens", "output_tokens")}
        return Consumed(body["subscriber"]["id"], amounts, is_mapped=False)

    def fault_body(self, status: int) -> bytes:
        return orjson.dumps({"error": f"told to answer {status}"})

    def _take(self, call: Call) -> Answer:
        if self._terms.key is not None and not self._terms.admits(bearer(call)):
            return Answer.json(401, {"error": "check the token (Authorization: Bearer)"})
        if self._secret is not None and (reason := self._distrust(call, self._secret)):
            return Answer.json(401, {"error": reason})
        if media_type(call) not in MEDIA_TYPES:
            return Answer.json(415, {"error": f"expected {MEDIA_TYPES[0]}"})
        records = _records(call.body)
        if isinstance(records, str):
            return Answer.json(400, {"error": records})
        key = _key_of(call)
        if key is None:
            return Answer(204, units=(Unit(None, records, Verdict.DELIVERED),))
        before = self._memory.recall(key, call.at_s, WINDOW_S)
        digest = hashlib.sha256(call.body).hexdigest()
        if before is not None and before != digest:
            refusal = {"code": "idempotency_key_mismatch", "error": "this id came with another body before"}
            return Answer.json(409, refusal, Unit(key, records, Verdict.REFUSED))
        if before is None:
            self._memory.keep(key, digest, call.at_s)
        verdict = Verdict.DELIVERED if before is None else Verdict.DUPLICATE
        return Answer(204, units=(Unit(key, records, verdict),))

    def _distrust(self, call: Call, secret: bytes) -> str | None:
        """Why this call is not from who it should be."""
        identity, sent_at = call.header("webhook-id"), call.header("webhook-timestamp")
        if not identity or not sent_at or not call.header("webhook-signature"):
            return "webhook-id, webhook-timestamp and webhook-signature are required"
        if not sent_at.isascii() or not sent_at.isdigit() or abs(call.at_s - int(sent_at)) > TOLERANCE_S:
            return f"webhook-timestamp must be Unix seconds, at most {TOLERANCE_S:.0f} s off"
        wanted = signature(secret, identity, sent_at, call.body)
        entries = call.header("webhook-signature").split(" ")
        if not any(hmac.compare_digest(entry.encode(), wanted.encode()) for entry in entries):
            return "webhook-signature does not fit: check the secret on both sides"
        return None


def secret_bytes(secret: str) -> bytes:
    """`whsec_` and base64 as the specification has it; any other text stands for its own bytes."""
    if secret.startswith("whsec_"):
        try:
            return base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        except binascii.Error:
            raise ValueError("the webhook secret begins with whsec_ but goes on with no base64") from None
    return secret.encode()


def signature(secret: bytes, identity: str, sent_at: str, body: bytes) -> str:
    """One entry of `webhook-signature`."""
    digest = hmac.new(secret, f"{identity}.{sent_at}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def _records(body: bytes) -> list[Any] | str:
    lines = body.split(b"\n")
    if lines and lines[-1] == b"":
        lines.pop()
    if not lines:
        return "expected at least one record"
    try:
        records = [orjson.loads(line) for line in lines]
    except orjson.JSONDecodeError:
        return "a line is no JSON"
    if not all(isinstance(record, dict) and isinstance(record.get("id"), str) for record in records):
        return "a line is no record: expected an object with an id"
    return records


def _key_of(call: Call) -> str | None:
    return call.header("webhook-id") or call.header("Idempotency-Key") or None


def _busy(call: Call) -> Answer:
    return Answer.json(
        409, {"error": "this id is under way"}, Unit(_key_of(call), None, Verdict.RETRY), Retry_After="1"
    )
