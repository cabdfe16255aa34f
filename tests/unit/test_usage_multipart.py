"""Short fields of a form, found while the files in it pass by."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.usage.formats.multipart import FIELD_MAX_BYTES, HEAD_MAX_BYTES, FormFields

TYPE = 'multipart/form-data; boundary="--frontier x"'
DELIMITER = b"----frontier x"


def part(head: bytes, content: bytes) -> bytes:
    return DELIMITER + b"\r\nContent-Disposition: form-data; " + head + b"\r\n\r\n" + content + b"\r\n"


FILE = part(b'name="file"; filename="a.wav"\r\nContent-Type: audio/wav', b"\r\n--\x00RIFF" * 2000)
BODY = (
    FILE
    + part(b'name="model"', b"whisper-1")
    + part(b"name=stream", b"true")
    + part(b'name="other"', b"secret")
    + part(b'name="n"', b"")
    + DELIMITER
    + b"--\r\nepilogue"
)
FOUND = {"model": "whisper-1", "stream": "true", "n": ""}


def read(body: bytes, cuts: list[int], content_type: str = TYPE) -> dict[str, str]:
    form = FormFields(content_type, ("model", "stream", "n"))
    places = sorted(cut % (len(body) + 1) for cut in cuts)
    for a, b in zip([0, *places], [*places, len(body)], strict=True):
        form.feed(body[a:b])
    return form.fields


@given(st.lists(st.integers(0, len(BODY)), max_size=12))
def test_where_it_is_cut_cannot_matter(cuts: list[int]) -> None:
    assert read(BODY, cuts) == FOUND


def test_byte_by_byte() -> None:
    assert read(BODY, list(range(len(BODY)))) == FOUND


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary=", "multipart/x; b=1"])
def test_without_a_boundary_there_are_no_fields(content_type: str) -> None:
    assert read(BODY, [], content_type) == {}


@pytest.mark.parametrize(
    "body",
    [
        part(b'name="model"; filename="m"', b"evil"),
        part(b'name="model"', b"x" * (FIELD_MAX_BYTES + 1)) + DELIMITER + b"--",
        DELIMITER + b"\r\n" + b"x" * (HEAD_MAX_BYTES + 1) + b'name="model"\r\n\r\nm\r\n' + DELIMITER,
        part(b'name="model"', b"cut off")[:-9],
        DELIMITER + b"--" + part(b'name="model"', b"after the end"),
    ],
)
def test_files_long_fields_and_malformed_forms_give_nothing(body: bytes) -> None:
    assert "model" not in read(body, [10, 50])


@given(st.binary(max_size=200))
def test_garbage_is_endured(data: bytes) -> None:
    read(data, [3, 9])
    read(BODY[:14500] + data + BODY[14500:], [3, 9])
