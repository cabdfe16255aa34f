"""What of new settings comes into force at once: each member is taken over, or waits and is named by its variable."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from sidecar.settings import Route, Secret, Settings
from sidecar.settings.renewal import TAKEN, TAKEN_OF, renewed
from sidecar.settings.schema import SECTIONS
from sidecar.settings.upstreams import SetHeader, UpstreamSettings


class Other:
    """Another value, whatever the member is."""


OTHER: Any = Other()
SECTION_NAMES = [name for name in SECTIONS if name]


def members() -> list[tuple[str | None, str]]:
    found: list[tuple[str | None, str]] = [(None, each.name) for each in fields(Settings)]
    return [pair for pair in found if pair[1] not in SECTION_NAMES] + [
        (section, each.name) for section in SECTION_NAMES for each in fields(SECTIONS[section])
    ]


@pytest.mark.parametrize(("section", "member"), members())
def test_a_member_is_taken_over_or_waits_and_is_named(section: str | None, member: str) -> None:
    old = Settings()
    if section is None:
        new, taken = replace(old, **{member: OTHER}), member in TAKEN
    else:
        new = replace(old, **{section: replace(getattr(old, section), **{member: OTHER})})
        taken = section in TAKEN or member in TAKEN_OF.get(section, ())
    found, waiting = renewed(old, new)
    place = found if section is None else getattr(found, section)
    assert (getattr(place, member) is OTHER) == taken
    assert waiting == ([] if taken else [f"SIDECAR_{member.upper()}"])


def test_what_is_equal_waits_for_nothing() -> None:
    old = Settings(subscribers={"a": {"stripe": "cus_a"}})
    found, waiting = renewed(old, replace(old, proxy=replace(old.proxy, routes=(Route(pattern="/x"),))))
    assert (found.proxy.routes, waiting) == ((Route(pattern="/x"),), [])
    assert found.subscribers == old.subscribers


def test_the_names_that_are_taken_are_members() -> None:
    assert {each.name for each in fields(Settings)} >= TAKEN
    for section, some in TAKEN_OF.items():
        assert some <= {each.name for each in fields(SECTIONS[section])}


def test_another_upstream_and_what_one_is_sent_out_of_a_file_need_no_restart() -> None:
    def settings(key: str, url: str = "http://a") -> Settings:
        header = SetHeader(name="authorization", value=Secret(key), file="/run/secrets/key")
        one = UpstreamSettings(name="a", prefix="/a", url=url, set_headers=(header,))
        return replace(Settings(), proxy=replace(Settings().proxy, upstreams=(one,)))

    for new in (settings("new"), settings("new", "http://b"), Settings()):
        found, waiting = renewed(settings("old"), new)
        assert (found.proxy.upstreams, waiting) == (new.proxy.upstreams, [])
