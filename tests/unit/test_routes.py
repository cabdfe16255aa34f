"""Path patterns and the labels made of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.model.path_pattern import Patterns
from sidecar.proxy.route import FOUND_MAX, PATH_CHARS_MAX, Routes
from sidecar.usage.providers.table import ROWS, known_routes, render

ROUTES = Routes(["/v1/users/{id}", "GET /v1/users/{id}/keys", "/health"], known_routes())


@pytest.mark.parametrize(
    ("method", "path", "route"),
    [
        ("GET", "/v1/users/7", "/v1/users/{id}"),
        ("POST", "/v1/users/7?x=1", "/v1/users/{id}"),
        ("GET", "/v1/users/7/keys", "/v1/users/{id}/keys"),
        ("POST", "/v1/users/7/keys", None),
        ("GET", "/health/", "/health"),
        ("GET", "/v1/users/", None),
        ("POST", "/v1/chat/completions", "/v1/chat/completions"),
        ("POST", "/openai/deployments/x/chat/completions", "/openai/deployments/{deployment}/chat/completions"),
        ("POST", "/some/where/v1/messages", "*/v1/messages"),
        ("POST", "/model/a%3A0%2Fb/converse", "/model/{model}/converse"),
        ("POST", "/v1beta/models/gemini-3:generateContent", "*/models/{model}:generateContent"),
        ("GET", "/v1/chat/completions", None),
        ("GET", "/v1/responses/resp_1", "/v1/responses/{id}"),
        ("POST", "/v1/nothing/7", None),
        ("GET", "", None),
        ("GET", "*", None),
    ],
)
def test_labels(method: str, path: str, route: str | None) -> None:
    assert ROUTES.match(method, path) == route


@given(method=st.text(max_size=6), path=st.text(max_size=60))
def test_a_label_is_one_of_a_fixed_set(method: str, path: str) -> None:
    label = ROUTES.match(method, path)
    patterns = {route.partition(" ")[2] for route in known_routes()}
    assert label is None or label in patterns | {"/v1/users/{id}", "/v1/users/{id}/keys", "/health"}


def test_what_is_remembered_has_a_bound_and_changes_no_answer() -> None:
    routes = Routes(["/v1/users/{id}"])
    for _ in range(2):
        for number in range(FOUND_MAX + 10):
            assert routes.match("GET", f"/v1/users/{number}?q={number}") == "/v1/users/{id}"
            assert routes.match("GET", f"/v1/{number}") is None
    assert routes.match("GET", "/v1/users/" + "x" * PATH_CHARS_MAX) == "/v1/users/{id}"
    assert routes.remembered <= FOUND_MAX


@pytest.mark.parametrize("pattern", ["users", "", "/a/{b", "/a/*/b", "/a/", "/{a}/{a}/b", "/{a}/{b}", "/a}"])
def test_a_bad_pattern_is_refused_with_its_reason(pattern: str) -> None:
    with pytest.raises(ValueError, match="path pattern"):
        Patterns([("GET", pattern, 1)])


def test_places_are_what_stood_in_them() -> None:
    patterns = Patterns([("POST", "*/models/{model}:go", 1), ("POST", "/model/{id}/invoke", 2)])
    assert patterns.match("POST", "/v1/models/m-1:go") == (1, {"model": "m-1"})
    assert patterns.match("POST", "/models/m:1:go") == (1, {"model": "m:1"})
    assert patterns.match("POST", "/model/arn%3Aaws%2Fx/invoke") == (2, {"id": "arn%3Aaws%2Fx"})
    assert patterns.match("GET", "/model/x/invoke") is None


def test_every_row_has_a_readable_line_in_the_table() -> None:
    text = render()
    for row in ROWS:
        assert row.api in text
        assert row.unmetered or row.where
    assert len({row.api for row in ROWS}) == len(ROWS)
    assert text.count("\n") == len(ROWS) + 2
