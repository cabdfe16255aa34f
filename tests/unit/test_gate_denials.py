"""The response of a call that the gate turned away: whose shape, which status, and when to come back."""

from __future__ import annotations

import re
from typing import Any, cast

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.gate.denials import (
    RETRY_AFTER_S_MAX,
    TEXT_CHARS_MAX,
    Amounts,
    Denial,
    Denials,
    Family,
    Kind,
    denial,
    header_text,
    of_call,
)
from sidecar.settings import AskedSettings
from sidecar.usage.endpoints import Endpoints, Pin
from sidecar.usage.providers.table import ROWS

QUOTA_TYPE = "https://iana.org/assignments/http-problem-types#quota-exceeded"


def fields(found: Denial) -> dict[str, str]:
    return {name.lower(): value for name, value in found.headers}


def said(found: Denial) -> Any:
    return orjson.loads(found.body)


def test_what_is_used_up_is_said_in_each_shape() -> None:
    text = "The limit monthly is used up."
    made = {family: denial(family, limit="monthly", kind="quota") for family in (*Family, None)}
    assert {found.status for found in made.values()} == {402}
    for found in made.values():
        assert fields(found)["x-should-retry"] == "false"
        assert fields(found)["x-sidecar-limit"] == "monthly"
        assert "retry-after" not in fields(found)
    assert said(made[Family.OPENAI]) == {
        "error": {"message": text, "type": "insufficient_quota", "param": None, "code": "insufficient_quota"}
    }
    assert said(made[Family.ANTHROPIC])["error"] == {"type": "billing_error", "message": text}
    assert said(made[Family.ANTHROPIC])["type"] == "error"
    google = said(made[Family.GEMINI])["error"]
    assert (google["code"], google["status"], google["message"]) == (402, "RESOURCE_EXHAUSTED", text)
    assert fields(made[Family.BEDROCK])["x-amzn-errortype"] == "ServiceQuotaExceededException"
    assert said(made[Family.BEDROCK]) == {"message": text}
    assert fields(made[None])["content-type"] == "application/problem+json"
    assert said(made[None])["type"] == QUOTA_TYPE
    assert said(made[None])["violated-policies"] == ["monthly"]
    assert denial("cohere", limit="monthly", kind="quota") == made[None], "a family that nobody knows"


def test_a_rate_is_said_in_each_shape_and_may_be_waited_for() -> None:
    made = {family: denial(family, limit="burst", kind="rate", retry_after_s=4.2) for family in (*Family, None)}
    assert {found.status for found in made.values()} == {429}
    for found in made.values():
        assert fields(found)["retry-after"] == "5"
        assert "x-should-retry" not in fields(found)
    assert said(made[Family.OPENAI])["error"]["code"] == "rate_limit_exceeded"
    assert said(made[Family.ANTHROPIC])["error"]["type"] == "rate_limit_error"
    assert said(made[Family.GEMINI])["error"]["details"][1]["retryDelay"] == "5s"
    assert fields(made[Family.BEDROCK])["x-amzn-errortype"] == "ThrottlingException"


@pytest.mark.parametrize(
    ("wait_s", "jitter", "header"),
    [
        (0.0, 0.0, "1"), (0.2, 0.0, "1"), (1.0, 0.0, "1"), (1.01, 0.0, "2"), (59.5, 0.0, "60"), (120.0, 0.0, "120"),
        (120.0, 1.0, "120"), (119.5, 1.0, "120"), (3.0, 1.0, "4"), (60.0, 1.0, "66"), (60.0, 0.5, "63"),
        (120.5, 0.0, None), (3600.0, 0.0, None), (float("inf"), 0.0, None), (float("nan"), 0.0, None),
        (-1.0, 0.0, None), (None, 0.0, None),
    ],
)  # fmt: skip
def test_only_a_short_and_true_wait_is_asked_for(wait_s: float | None, jitter: float, header: str | None) -> None:
    found = fields(denial(Family.ANTHROPIC, limit="burst", kind="rate", retry_after_s=wait_s, jitter=jitter))
    assert found.get("retry-after") == header
    assert ("x-should-retry" in found) is (header is None), "without a wait to tell, no package is to try by itself"


@given(st.floats(0, 120), st.floats(0, 1))
def test_a_wait_is_never_too_short_nor_too_long(wait_s: float, jitter: float) -> None:
    found = fields(denial(None, limit="l", kind="rate", retry_after_s=wait_s, jitter=jitter))
    assert wait_s <= int(found["retry-after"]) <= RETRY_AFTER_S_MAX


def test_a_quota_tells_no_wait_whatever_it_is_given() -> None:
    found = fields(denial(Family.OPENAI, limit="l", kind="quota", retry_after_s=5.0))
    assert "retry-after" not in found
    assert found["x-should-retry"] == "false"


def test_amounts_are_told_only_where_they_are_given() -> None:
    kinds: list[Kind] = ["quota", "rate"]
    for kind in kinds:
        plain = denial(Family.OPENAI, limit="monthly", kind=kind)
        assert not re.search(rb"\d", plain.body.replace(b"429", b"")), plain.body
    shown = denial(
        Family.OPENAI, limit="monthly", kind="quota", amounts=Amounts("49.98", "50", "USD", "2026-12-01T00:00:00Z")
    )
    assert said(shown)["error"]["message"] == (
        "The limit monthly is used up. 49.98 of 50 USD are used until 2026-12-01T00:00:00Z."
    )


def test_an_operators_text_and_status_stand_in_place_of_ours() -> None:
    found = denial(Family.OPENAI, limit="l", kind="quota", message='Ask "sales".', status=429)
    assert found.status == 429
    assert said(found)["error"]["message"] == 'Ask "sales".'
    assert fields(found)["x-should-retry"] == "false", "still nothing that a repeat would change"
    assert said(denial(Family.GEMINI, limit="l", kind="quota", status=403))["error"]["status"] == "PERMISSION_DENIED"
    assert len(said(denial(None, limit="l", kind="quota", message="x" * 9_999))["detail"]) == TEXT_CHARS_MAX


@given(st.text(max_size=200), st.text(max_size=50))
def test_no_name_and_no_text_breaks_a_response(name: str, text: str) -> None:
    for family in (*Family, None):
        found = denial(family, limit=name, kind="quota", message=text.encode("utf-8", "replace").decode())
        orjson.loads(found.body)
        head, _, body = found.encode(close=True).partition(b"\r\n\r\n")
        assert body == found.body
        assert head.count(b"\r\n") == len(found.headers) + 2
        assert all(re.fullmatch(r"[!-~]([ -~]*[!-~])?", value) for _, value in found.headers)


def test_a_name_is_cut_to_what_a_header_carries() -> None:
    assert header_text("Tokens für März\r\nX: y") == "Tokens f?r M?rz??X: y"
    assert header_text("\n") == "?"
    assert header_text(" ") == "limit"
    assert len(header_text("x" * 500)) == 120


def test_the_whole_response_is_written_as_the_others_of_ours_are() -> None:
    found = denial(None, limit="l", kind="quota")
    whole = found.encode(close=False, keep_alive_10=True, fields=b"X-Meter-Id: 7\r\n")
    assert whole.startswith(b"HTTP/1.1 402 Payment Required\r\nContent-Type: application/problem+json\r\n")
    assert b"\r\nConnection: keep-alive\r\n" in whole
    assert b"\r\nX-Meter-Id: 7\r\n" in whole
    assert f"Content-Length: {len(found.body)}\r\n".encode() in whole
    assert found.encode(close=True, head_only=True).endswith(b"\r\n\r\n")
    assert denial(None, limit="l", kind="quota", status=418).encode(close=True).startswith(b"HTTP/1.1 418 Denied\r\n")


GEMINI_STREAM = "/v1beta/models/gemini-3-pro:streamGenerateContent"


@pytest.mark.parametrize(
    ("host", "method", "target", "family", "in_array"),
    [
        (None, "POST", "/v1/chat/completions", Family.OPENAI, False),
        (None, "POST", "/v1/responses", Family.OPENAI, False),
        (None, "POST", "/openai/deployments/d/embeddings?api-version=1", Family.OPENAI, False),
        (None, "POST", "/v1/messages", Family.ANTHROPIC, False),
        (None, "POST", "/v1/%6dessages", Family.ANTHROPIC, False),
        (None, "POST", "/v1/messages/count_tokens", Family.ANTHROPIC, False),
        (None, "POST", "/v1beta/models/gemini-3-pro:generateContent", Family.GEMINI, False),
        (None, "POST", "/v1beta/models/gemini-3-pro:countTokens", Family.GEMINI, False),
        (None, "POST", GEMINI_STREAM, Family.GEMINI, True),
        (None, "POST", f"{GEMINI_STREAM}?alt=sse", Family.GEMINI, False),
        (None, "POST", f"{GEMINI_STREAM}?alt=json&key=k", Family.GEMINI, True),
        (None, "POST", "/model/anthropic.claude/converse", Family.BEDROCK, False),
        (None, "POST", "/model/anthropic.claude/invoke-with-response-stream", Family.BEDROCK, False),
        (None, "POST", "/v1/projects/p/locations/l/publishers/anthropic/models/m:rawPredict", Family.ANTHROPIC, False),
        (None, "POST", "/v2/chat", None, False),
        (None, "POST", "/orders", None, False),
        (None, "GET", "/orders", None, False),
        ("api.openai.com", "GET", "/v1/models", Family.OPENAI, False),
        ("api.openai.com", "POST", "/v1/videos", Family.OPENAI, False),
        ("api.anthropic.com", "GET", "/v1/models", Family.ANTHROPIC, False),
        ("generativelanguage.googleapis.com", "GET", "/v1beta/models", Family.GEMINI, False),
        ("bedrock-runtime.eu-west-1.amazonaws.com", "POST", "/model/m/count-tokens", Family.BEDROCK, False),
        ("api.cohere.com", "POST", "/v2/chat", None, False),
    ],
)  # fmt: skip
def test_the_family_is_the_apis_that_was_called(
    host: str | None, method: str, target: str, family: Family | None, in_array: bool
) -> None:
    endpoints = Endpoints(ROWS, (), (), host)
    assert of_call(endpoints, method, target) == (family, in_array)


def test_a_pinned_path_has_its_providers_shape() -> None:
    pins = (Pin("/llm/{x}", "openai"), Pin("/claude", "anthropic"))
    endpoints = Endpoints(ROWS, pins, (), None)
    assert of_call(endpoints, "POST", "/llm/ask") == (Family.OPENAI, False)
    assert of_call(endpoints, "POST", "/claude") == (Family.ANTHROPIC, False)


def test_what_the_operator_has_set_is_in_every_denial() -> None:
    endpoints, amounts = Endpoints(ROWS, (), (), None), Amounts("1", "2", "calls")
    plain = Denials(endpoints, AskedSettings())
    own = Denials(endpoints, AskedSettings(gate_amounts=True), statuses={"quota": 403, "rate": 420}, chance=lambda: 1.0)
    call: dict[str, Any] = {"limit": "l", "retry_after_s": 3.0, "message": None, "amounts": amounts}
    target = GEMINI_STREAM
    assert plain("POST", target, kind="quota", **call) == denial("gemini", limit="l", kind="quota", streamed=True)
    assert own("POST", target, kind="quota", **call) == denial(
        "gemini", limit="l", kind="quota", streamed=True, status=403, amounts=amounts
    )
    assert fields(own("POST", "/orders", kind="rate", **call))["retry-after"] == "4"
    assert own("POST", "/orders", kind="rate", **call).status == 420


def test_an_array_holds_the_one_error() -> None:
    found = denial(Family.GEMINI, limit="l", kind="quota", streamed=True)
    (only,) = cast("list[Any]", said(found))
    assert only == said(denial(Family.GEMINI, limit="l", kind="quota"))
    assert isinstance(said(denial(Family.OPENAI, limit="l", kind="quota", streamed=True)), dict)
