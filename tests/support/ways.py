"""The two ways of a call: tests of what is forwarded and recorded run on both."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sidecar.proxy import plain_call, plain_head

plain_call.SIGHTS = 1  # so that the first call of a test takes the short way
plain_head.FORM_AFTER = 1  # and the second is read by the form of the first

short_open = True
"""Whether plain calls may take the short way."""


@pytest.fixture
def with_care() -> Iterator[None]:
    """No call of the test takes the short way."""
    global short_open
    short_open = False
    yield
    short_open = True


@pytest.fixture(params=["short", "careful"])
def both_ways(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once with the short way open and once without it."""
    global short_open
    short_open = request.param == "short"
    yield request.param
    short_open = True
