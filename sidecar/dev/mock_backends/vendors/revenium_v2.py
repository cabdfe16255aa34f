"""Revenium v2 (`/meter/v2`): `/events` and `/ai/completions`, one record a request, `Idempotency-Key` for a day.

The same key with the same bytes replays the first answer; with others it is `idempotency_key_mismatch`; while the
first call runs it is `idempotency_key_in_progress`. Without a key every repetition counts again. Only successes are
remembered: whether the service caches its refusals is not documented. Unknown fields are taken, as the service takes
those of newer clients.

Cost Controls are there to be read: a team that ends in `-limit-<n>` has one rule, n tokens a day for each subscriber,
counted from the completions that came; a team that begins with `none` has no rules (204), any other an empty list.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import orjson

from sidecar.dev.mock_backends.asked import allowed, is_unknown
from sidecar.dev.mock_backends.checks import (
    Field,
    Problem,
    boolean,
    integer,
    is_json,
    is_number,
    mapping,
    moment,
    number,
    one_of,
    parse_json,
    problems,
    rfc3339,
    sentence,
    text,
)  # fmt: skip
from sidecar.dev.mock_backends.contract import KEY, Answer, Call, Consumed, Memory, Route, Terms, Unit, Verdict
from sidecar.dev.mock_backends.replay import Replay

BASE: Final = "/meter/v2"
RULES: Final = "/v2/api/ai/enforcement-rules/{team}"
DAY_S: Final = 86_400.0
RETRY_AFTER_S: Final = 1

_KEY: Final = re.compile(r"[\x21-\x7e]{1,255}")  # printable ASCII without the space, as documented
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")

SOURCE_TYPES: Final = (
    "UNKNOWN", "AI", "SDK_PYTHON", "SDK_JS", "SDK_JVM", "SDK_SPRING", "SDK_DOTNET", "SDK_GOLANG", "SDK_RUST", "EBPF",
    "AWS", "AZURE", "SNOWFLAKE", "KONG", "GRAVITEE", "MULESOFT", "BOOMI", "REVENIUM", "INTERNAL",
)  # fmt: skip
STOP_REASONS: Final = (
    "END", "END_SEQUENCE", "TIMEOUT", "TOKEN_LIMIT", "COST_LIMIT", "COMPLETION_LIMIT", "ERROR", "CANCELLED",
)  # fmt: skip
OPERATIONS: Final = (
    "CHAT", "GENERATE", "EMBED", "CLASSIFY", "SUMMARIZE", "TRANSLATE", "TOOL_CALL", "RERANK", "SEARCH", "MODERATION",
    "VISION", "TRANSFORM", "GUARDRAIL", "AUDIO", "VIDEO", "IMAGE", "OTHER",
)  # fmt: skip
SKIP_REASONS: Final = (
    "FREE_TIER", "RATE_LIMITED", "QUOTA_EXCEEDED", "CONTENT_POLICY_VIOLATION", "CAPACITY_UNAVAILABLE",
    "SERVICE_UNAVAILABLE",
)  # fmt: skip

COSTS: Final = ("inputTokenCost", "outputTokenCost", "cacheCreationTokenCost", "cacheReadTokenCost", "totalCost")
COST_PLACES: Final = 10


def _is_cost(value: Any) -> bool:
    return is_number(value) and value >= 0 and round(value, COST_PLACES) == value


EVENT_FIELDS: Final[Mapping[str, Field]] = {
    "transactionId": text(required=True, empty=False),
    "payload": Field(
        lambda value: isinstance(value, dict) and all(_is_amount(v) for v in value.values()),
        "must be an object of numbers and strings",
        required=True,
    ),
    "sourceId": text(),
    "subscriberCredential": text(),
    "sourceType": one_of(*SOURCE_TYPES),
}

COMPLETION_FIELDS: Final[Mapping[str, Field]] = {
    "model": text(required=True, empty=False),
    "provider": text(required=True, empty=False),
    "inputTokenCount": integer(required=True),
    "outputTokenCount": integer(required=True),
    "totalTokenCount": integer(required=True),
    "stopReason": one_of(*STOP_REASONS, required=True),
    "requestTime": moment(required=True),
    "completionStartTime": moment(required=True),
    "responseTime": moment(required=True),
    "requestDuration": integer(required=True),
    "transactionId": text(), "costType": one_of("AI"), "isStreamed": boolean(),
    "operationType": one_of(*OPERATIONS), "skipReason": one_of(*SKIP_REASONS),
    "pricingTier": one_of("STANDARD", "BATCH"), "billingSkipped": boolean(),
    **{name: integer() for name in (
        "reasoningTokenCount", "cacheCreationTokenCount", "cacheCreation5mTokenCount", "cacheCreation1hTokenCount",
        "cacheReadTokenCount", "timeToFirstToken", "retryNumber", "promptLength",
    )},
    **{name: Field(_is_cost, "must be a number from 0, of at most 10 decimals") for name in COSTS},
    **{name: number() for name in (
        "costMultiplier", "mediationLatency", "temperature", "responseQualityScore",
    )},
    **{name: text() for name in (
        "organizationName", "organizationId", "productName", "productId", "subscriptionId", "subscriberEmailSource",
        "credentialAlias", "parentTransactionId", "transactionName", "environment", "region", "taskType",
        "operationSubtype", "agent", "modelSource", "modelHost", "middlewareSource", "systemFingerprint",
        "requestedServiceTier", "actualServiceTier", "subscriptionTier", "systemPrompt", "inputMessages",
        "outputResponse", "errorReason",
    )},
    **{name: text(max_chars=limit) for name, limit in (
        ("traceName", 256), ("ticketId", 256), ("subagentType", 128), ("querySource", 128), ("agentVersion", 64),
        ("promptId", 64), ("clientSurface", 64), ("entrypoint", 64), ("effort", 16), ("speed", 16),
    )},
    "traceId": text(),
    "traceType": Field(
        lambda value: isinstance(value, str) and bool(_NAME.fullmatch(value)),
        "must be letters, digits, - and _, at most 128",
    ),
    "subscriber": mapping(),
    "promptsTruncated": boolean(),
}  # fmt: skip


class ReveniumV2:
    """The two v2 calls that the sidecar makes, and the rules that its gate reads."""

    def __init__(self, memory: Memory, terms: Terms) -> None:
        self._replay = Replay(memory)
        self._memory = memory
        self._terms = terms
        self.routes = (
            *(
                Route(method="POST", path=f"{BASE}{path}", handle=handle, exclusive=_key_of, busy=_busy)
                for path, handle in (("/events", self._event), ("/ai/completions", self._completion))
            ),
            Route(method="GET", path=RULES, handle=self._rules, lies=self._rules),
        )

    @staticmethod
    def settings(url: str) -> Mapping[str, str]:
        return {"url": url, "api_key": KEY, "source_id": "demo"}

    @staticmethod
    def consumed(path: str, body: Mapping[str, Any]) -> Consumed | None:
        if "inputTokenCount" in body:
            tokens = {"input_tokens": body["inputTokenCount"], "output_tokens": body["outputTokenCount"]}
            return Consumed(body["subscriber"]["id"], {"api_calls": 1, **tokens}, own_counts=True)
        if "payload" not in body:
            return None
        return Consumed(body.get("subscriberCredentialId") or body.get("subscriberCredential"), body["payload"])

    def fault_body(self, status: int) -> bytes:
        return orjson.dumps({"message": "Too many requests" if status == 429 else "Something went wrong"})

    def _event(self, call: Call) -> Answer:
        return self._take(call, EVENT_FIELDS, lambda body: problems(body, EVENT_FIELDS))

    def _completion(self, call: Call) -> Answer:
        return self._take(call, COMPLETION_FIELDS, _completion_problems)

    def _take(self, call: Call, fields: Mapping[str, Field], check: Any) -> Answer:
        credential = call.header("x-api-key")
        if not self._terms.admits(credential):
            return _error(401, "invalid API key")
        if not is_json(call):
            return _error(415, "expected application/json")
        key = _key_of(call)
        if "Idempotency-Key" in call.headers and (key is None or not _KEY.fullmatch(key)):
            return _error(400, "Idempotency-Key must be 1 to 255 printable ASCII characters without a space")
        try:
            body = parse_json(call)
        except ValueError:
            return _error(400, "the body is no JSON")
        if not isinstance(body, dict):
            return _error(400, "expected one object: there is no list form")
        if key is not None and (stored := self._replay.recall(call, credential, key)):
            if not stored.same:
                unit = Unit(key, body, Verdict.REFUSED)
                return _error(409, "the key came with another body before", unit, code="idempotency_key_mismatch")
            first = stored.answer
            return Answer(first.status, first.body, first.content_type, units=(Unit(key, body, Verdict.DUPLICATE),))
        if found := check(body):
            return _error(400, "the record is not valid", Unit(key, body, Verdict.REFUSED), error=sentence(found))
        identity = body.get("transactionId")
        resource: dict[str, Any] = {
            "id": identity,
            "label": identity,
            "resourceType": "metering",
            "signature": call.fingerprint()[:32],
            "created": rfc3339(call.at_s),
            "_links": {},
        }
        answer = Answer.json(200, resource, Unit(key or identity, body, Verdict.DELIVERED))
        if key is not None:
            self._replay.keep(call, credential, key, answer)
        subscriber = body.get("subscriber")
        if isinstance(subscriber, dict) and isinstance(subscriber.get("id"), str):
            day = f"tokens:{int(call.at_s // DAY_S)}"
            spent: dict[str, int] = dict(self._memory.recall(day, call.at_s) or {})
            spent[subscriber["id"]] = spent.get(subscriber["id"], 0) + (body.get("totalTokenCount") or 0)
            self._memory.keep(day, spent, call.at_s)
        return answer

    def _rules(self, call: Call, lie: str | None = None) -> Answer:
        if not self._terms.admits(call.header("x-api-key")):
            return _error(401, "invalid API key")
        team = call.query["team"]
        if is_unknown(team):
            return _error(404, "no such team")
        if team.startswith("none"):
            return Answer(204)
        threshold = allowed(team, "limit")
        if threshold is None:
            return Answer.json(200, {"rules": []})
        day = int(call.at_s // DAY_S)
        spent: dict[str, int] = self._memory.recall(f"tokens:{day}", call.at_s) or {}
        total, end = sum(spent.values()), rfc3339((day + 1) * DAY_S)
        if lie is not None:
            threshold = total = -5
        rule = {
            "ruleId": "rule-receiver",
            "name": "tokens a day",
            "threshold": threshold,
            "currentValue": total,
            "percentUsed": total * 100 // max(threshold, 1),
            "periodType": "DAILY",
            "action": "BLOCK",
            "breached": any(tokens >= threshold for tokens in spent.values()),
            "shadowMode": False,
            "filters": [],
            "groupBy": "SUBSCRIBER",
            "windowEnd": end,
            "resetsAt": end,
            "denyMessage": None,
            "source": "RULE",
            "groupBreakdown": [
                {"groupValue": name, "currentValue": tokens, "breached": tokens >= threshold}
                for name, tokens in spent.items()
            ],
        }
        return Answer.json(200, {"rules": [rule], "departmentBudgetBlocks": {}})


def _completion_problems(body: Mapping[str, Any]) -> list[Problem]:
    found = problems(body, COMPLETION_FIELDS)
    subscriber = body.get("subscriber")
    if isinstance(subscriber, dict):
        fields = {"id": text(), "email": text(), "credential": mapping()}
        found += [(f"subscriber.{name}", what) for name, what in problems(subscriber, fields)]
    return found


def _is_amount(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _key_of(call: Call) -> str | None:
    return call.header("Idempotency-Key") or None


def _busy(call: Call) -> Answer:
    unit = Unit(_key_of(call), None, Verdict.RETRY)
    refusal = {"code": "idempotency_key_in_progress", "message": "the first call with this key is still running"}
    return Answer.json(409, refusal, unit, Retry_After=str(RETRY_AFTER_S))


def _error(status: int, message: str, *units: Unit, code: str | None = None, error: str | None = None) -> Answer:
    """`details` or `message`, and a `code` where one is documented."""
    body: dict[str, Any] = {"message": message}
    if code is not None:
        body["code"] = code
    if error is not None:
        body["details"] = {"error": error}
    return Answer.json(status, body, *units)
