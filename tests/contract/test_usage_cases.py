"""Answers that were once read wrongly or not at all, each in every way of cutting and coding.

One entry of `data/cases/usage/expected.json` is one answer: what was asked, where, and what must be read. `expected:
null` means that no token may be counted. `upstream_base` is the path of the upstream's URL. `policy` says why, where
the right answer was a choice.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from support.usage_samples import CASES, Sample, coded, differences, load, play, ways, wrong_in
from support.wsframes import Packer, frame

from sidecar.usage.readers import UsageTaps

ALL = load(CASES)
CODINGS = ("", "gzip", "br", "zstd", "deflate")
LARGE_BYTES = 65_536  # cases above this are played in fewer ways
FEWER = {("whole", ""), ("random pieces", ""), ("lines", "gzip"), ("random pieces", "br")}
AGREE = [(b"Upgrade", b"websocket"), (b"Connection", b"Upgrade")]
DEFLATE = (b"Sec-WebSocket-Extensions", b"permessage-deflate")
MASK = b"\x01\x02\x03\x04"


def by_name(cases: Iterable[Sample]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cases])


def test_there_are_as_many_as_ever() -> None:
    assert len(ALL) >= 106


@by_name(case for case in ALL.values() if not case.websocket)
def test_read_rightly_however_it_is_cut_and_coded(case: Sample) -> None:
    odd: list[str] = []
    taps = UsageTaps(upstream_base=case.upstream_base, anomaly=odd.append)
    wrong: dict[str, object] = {}
    for way, pieces in ways(case.body).items():
        for coding in CODINGS:
            if len(case.body) > LARGE_BYTES and (way, coding) not in FEWER:
                continue
            more = [(b"Content-Encoding", coding.encode())] if coding else []
            usage, _ = play(case, coded(pieces, coding) if coding else pieces, more_headers=more, taps=taps)
            if found := wrong_in(usage, case):
                wrong[f"{way} {coding}"] = found
    assert not wrong
    assert not odd


@by_name(case for case in ALL.values() if case.websocket)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_each_message_of_a_socket_is_read_rightly(case: Sample, packed: bool) -> None:
    taps = UsageTaps(upstream_base=case.upstream_base, anomaly=_no_anomaly)
    pack = Packer()
    lines = case.body.splitlines()
    wire = b"".join(frame(pack(line), reserved=0x40) if packed else frame(line) for line in lines)
    for way, pieces in ways(wire).items():
        socket = taps.websocket(case.path, [*AGREE, DEFLATE] if packed else AGREE)
        assert socket is not None, "no reader for the socket"
        for message in case.client_messages:
            socket.from_client(frame(message, mask=MASK))
        records = [usage for piece in pieces for usage in socket.from_server(piece)]
        assert case.records is not None
        assert len(records) == len(case.records), way
        for usage, expected in zip(records, case.records, strict=True):
            assert not differences(usage, expected), way


def _no_anomaly(kind: str) -> None:
    raise AssertionError(f"anomaly {kind} in a well-formed answer")
