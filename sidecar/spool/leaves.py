"""Rows of a damaged chunk, read from its pages without SQLite.

A page that leads to others takes all of them with it when it is hit, and SQLite stops at the first frame of the
log whose checksum fails. But groups are only ever added, so every page image in the file and in its log, also an
older one, holds nothing but true rows; whether a row was hit tells its own checksum. So this reads every leaf there is,
in every version, along SQLite's published file format. It promises nothing about the rows: the caller checks them.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from sidecar.spool.chunk import PAGE_BYTES

_WAL_HEADER: Final = struct.Struct(">8I")  # magic, format, page size, checkpoint, salt-1, salt-2, checksum x 2
_FRAME_HEADER: Final = struct.Struct(">6I")  # page, size after commit, salt-1, salt-2, checksum x 2
_WAL_MAGIC: Final = (0x377F_0682, 0x377F_0683)  # its checksums are little-endian, big-endian
_TABLE_LEAF: Final = 0x0D
_INDEX_LEAF: Final = 0x0A
_TABLE_LOCAL_MAX: Final = PAGE_BYTES - 35
_INDEX_LOCAL_MAX: Final = (PAGE_BYTES - 12) * 64 // 255 - 23
_LOCAL_MIN: Final = (PAGE_BYTES - 12) * 32 // 255 - 23
_INTEGER_BYTES: Final = (0, 1, 2, 3, 4, 6, 8)  # by serial type
_BROKEN: Final = (IndexError, ValueError, struct.error, OSError)


@dataclass(slots=True, frozen=True)
class Frame:
    """A page image in the log."""

    page: int
    commit_pages: int  # the database's size after this commit; 0: no commit
    current: bool  # of the log's current run; others are left from before it was last reset
    offset: int  # of the page's bytes


def frames(wal: Path) -> list[Frame]:
    """The frames of a log, told by their salts alone; SQLite's checksums are not looked at."""
    heads: list[tuple[int, int, tuple[int, int], int]] = []
    try:
        with wal.open("rb") as file:
            salts = read_salts(file)
            offset = _WAL_HEADER.size
            file.seek(offset)
            while len(head := file.read(_FRAME_HEADER.size)) == _FRAME_HEADER.size:
                page, commit_pages, salt_1, salt_2, _, _ = _FRAME_HEADER.unpack(head)
                offset += _FRAME_HEADER.size
                heads.append((page, commit_pages, (salt_1, salt_2), offset))
                offset += PAGE_BYTES
                file.seek(offset)
    except FileNotFoundError:
        return []
    if salts is None and heads:  # the head is hit: a log is always written from its start, so the first frame knows
        salts = heads[0][2]
    return [Frame(page, commit, salt == salts, at) for page, commit, salt, at in heads]


def read_salts(wal: BinaryIO) -> tuple[int, int] | None:
    """The salts of a log's current run; None where its head does not match its own checksum."""
    head = wal.read(_WAL_HEADER.size)
    if len(head) < _WAL_HEADER.size:
        return None
    magic, _, page_bytes, _, salt_1, salt_2, sum_1, sum_2 = _WAL_HEADER.unpack(head)
    if magic not in _WAL_MAGIC or page_bytes != PAGE_BYTES:
        return None
    words = struct.unpack(("<" if magic == _WAL_MAGIC[0] else ">") + "6I", head[:24])
    a = b = 0
    for even, odd in zip(words[::2], words[1::2], strict=True):
        a = (a + even + b) & 0xFFFF_FFFF
        b = (b + odd + a) & 0xFFFF_FFFF
    return (salt_1, salt_2) if (a, b) == (sum_1, sum_2) else None


class Leaves:
    """All leaf pages of a chunk and its log."""

    def __init__(self, path: Path, wal: Path) -> None:
        self._main = path.open("rb")
        self._wal = wal.open("rb") if wal.exists() else None
        self._pages = os.fstat(self._main.fileno()).st_size // PAGE_BYTES
        self._frames = [frame for frame in frames(wal) if frame.current]
        self._newest = {frame.page: frame.offset for frame in self._frames}

    def close(self) -> None:
        self._main.close()
        if self._wal is not None:
            self._wal.close()

    def rows(self, wanted: Callable[[int, int], bool]) -> Iterator[tuple[Any, ...]]:
        """Rows of tables, the key first, of whose columns' number and key `wanted` wants to see more."""
        for image in self._images():
            for cell in _cells(image, _TABLE_LEAF):
                try:
                    row = self._table_row(image, cell, wanted)
                except _BROKEN:
                    continue
                if row is not None:
                    yield row

    def pairs(self) -> Iterator[tuple[Any, ...]]:
        """Rows of the one table that is kept by name, newest image first."""
        for image in self._images():
            for cell in _cells(image, _INDEX_LEAF):
                try:
                    size, at = _varint(image, cell)
                    if size <= _INDEX_LOCAL_MAX:
                        yield _values(image[at : at + size])
                except _BROKEN:
                    continue

    def _images(self) -> Iterator[bytes]:
        """Every page, as it stands and as it stood in the log."""
        for number in range(1, self._pages + 1):
            self._main.seek((number - 1) * PAGE_BYTES)
            yield self._main.read(PAGE_BYTES)
        if self._wal is not None:
            for frame in reversed(self._frames):
                self._wal.seek(frame.offset)
                yield self._wal.read(PAGE_BYTES)

    def _table_row(self, image: bytes, cell: int, wanted: Callable[[int, int], bool]) -> tuple[Any, ...] | None:
        size, at = _varint(image, cell)
        key, at = _varint(image, at)
        types, _ = _types(image, at)
        if not wanted(len(types), key):
            return None
        if size <= _TABLE_LOCAL_MAX:
            payload = image[at : at + size]
        else:
            local = _LOCAL_MIN + (size - _LOCAL_MIN) % (PAGE_BYTES - 4)
            local = local if local <= _TABLE_LOCAL_MAX else _LOCAL_MIN
            overflow = int.from_bytes(image[at + local : at + local + 4], "big")
            payload = image[at : at + local] + self._chain(overflow, size - local)
        return (key, *_values(payload)[1:])  # the key's own column is stored as null

    def _chain(self, page: int, size: int) -> bytes:
        """The rest of a long row."""
        parts: list[bytes] = []
        while size > 0:
            image = self._page(page)
            parts.append(image[4 : 4 + size])
            size -= PAGE_BYTES - 4
            page = int.from_bytes(image[:4], "big")
        return b"".join(parts)

    def _page(self, number: int) -> bytes:
        offset = self._newest.get(number)
        if offset is not None and self._wal is not None:
            self._wal.seek(offset)
            return self._wal.read(PAGE_BYTES)
        if not 1 <= number <= self._pages:
            raise ValueError(f"there is no page {number}")
        self._main.seek((number - 1) * PAGE_BYTES)
        return self._main.read(PAGE_BYTES)


def has_rows(image: bytes) -> bool:
    """Whether a page is a leaf of a table with anything in it."""
    return next(_cells(image, _TABLE_LEAF), None) is not None


def _cells(image: bytes, kind: int) -> Iterator[int]:
    """Where the cells of a leaf begin."""
    if len(image) < PAGE_BYTES or image[0] != kind:  # page 1 lists the tables and holds none of our rows
        return
    count = int.from_bytes(image[3:5], "big")
    for at in range(8, min(8 + 2 * count, PAGE_BYTES - 1), 2):
        yield int.from_bytes(image[at : at + 2], "big")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of one to nine bytes, and where it ends."""
    value = 0
    for step in range(8):
        byte = data[at + step]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + step + 1
    return value << 8 | data[at + 8], at + 9


def _types(data: bytes, start: int) -> tuple[list[int], int]:
    """The serial types of a row, and where its values begin."""
    size, at = _varint(data, start)
    end = start + size
    if end > len(data):
        raise ValueError("a row's head is longer than its page")
    found: list[int] = []
    while at < end:
        kind, at = _varint(data, at)
        found.append(kind)
    return found, at


def _values(payload: bytes) -> tuple[Any, ...]:
    types, at = _types(payload, 0)
    found: list[Any] = []
    for kind in types:
        if kind >= 12:
            size = (kind - 12) // 2
            raw = payload[at : at + size]
            found.append(raw.decode() if kind % 2 else raw)
        elif kind in (8, 9):
            size = 0
            found.append(kind - 8)
        elif kind < len(_INTEGER_BYTES):
            size = _INTEGER_BYTES[kind]
            found.append(int.from_bytes(payload[at : at + size], "big", signed=True) if kind else None)
        else:
            raise ValueError(f"no column of ours has type {kind}")
        at += size
    if at != len(payload):
        raise ValueError("a row is shorter or longer than it says")
    return tuple(found)
