"""Who a data directory is among those that share a ledger: its name, and a secret of its last start.

The name is `SIDECAR_INSTANCE`, or an id that is made with the directory. A name alone cannot tell a directory from its
copy. So each start makes up a nonce and puts it in the place of the one before, here and in the shared ledger
(`metering.instances`), and every write there is made with it. Of a directory and its copy the one that started last
has the ledger's nonce; the other finds a foreign one at its next write or start, and is refused until somebody decides.

What must always hold: a nonce is in the file before it is sent. A start that dies between the ledger's commit and the
file's is known again by it, and never taken for a copy of itself.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from sidecar.storage.files import replacing

NAME: Final = "instance"
ID_BYTES: Final = 6
NONCE_BYTES: Final = 16
_MAKING: Final = threading.Lock()  # the ledger and the limits of a process make the same file at their first start
TRIED_MAX: Final = 16  # starts in a row whose claim was sent and not answered; the oldest of more were never committed


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    id: str
    nonce: str | None = None  # that the ledger is known to have
    tried: Sequence[str] = ()  # that it may have
    take: bool = False  # somebody said that this is the original: whatever the ledger has is replaced


class Identity:
    """Of one data directory. Blocks; its owner has the directory's lock."""

    def __init__(self, data_dir: Path, name: str | None = None, *, file: str = NAME) -> None:
        """`name`: SIDECAR_INSTANCE. `file`: of another table of nonces than the ledger's. Changes nothing before
        `begin`."""
        self._path = data_dir / file
        self._name = name
        self._file = _read(self._path)
        self.nonce = secrets.token_hex(NONCE_BYTES)  # of this start

    def __repr__(self) -> str:
        return f"<Identity {self.name}>"

    @property
    def name(self) -> str:
        """What the directory is called; empty where it has neither name nor id yet."""
        return self._name or (self._file.id if self._file is not None else "")

    @property
    def confirmed(self) -> str | None:
        """The nonce that the ledger is known to have had last of this directory."""
        return None if self._file is None else self._file.nonce

    @property
    def is_decided(self) -> bool:
        """Whether somebody said that this is the original, and it was not carried out yet."""
        return self._file is not None and self._file.take

    def is_known(self, nonce: str) -> bool:
        """Whether the ledger's nonce is one that this directory gave it, or is to be replaced whatever it is."""
        file = self._made()
        return file.take or nonce == file.nonce or nonce in file.tried

    def begin(self) -> None:
        """Before this start's nonce is sent. Raises `OSError`."""
        file = self._made()
        if self.nonce not in file.tried:
            self._write(replace(file, tried=(*file.tried, self.nonce)[-TRIED_MAX:]))

    def confirm(self) -> None:
        """The ledger has it: nothing before it counts. Raises `OSError`."""
        self._write(_File(id=self._made().id, nonce=self.nonce))

    def ensure(self) -> str:
        """The name, made where there is none, by whoever comes first. Raises `OSError`."""
        with _MAKING:
            if self._file is None:
                self._file = _read(self._path)
            if self._file is None:
                self._write(self._made())
        return self.name

    def take_over(self) -> None:
        """This is the original, whatever the ledger says: the next claim replaces what is there. Raises `OSError`."""
        self._write(replace(self._made(), take=True))

    def become_new(self) -> None:
        """This is a copy: it gets an id of its own. Raises `OSError`."""
        self._write(_File(id=secrets.token_hex(ID_BYTES)))

    def _made(self) -> _File:
        if self._file is None:
            self._file = _File(id=secrets.token_hex(ID_BYTES))
        return self._file

    def _write(self, file: _File) -> None:
        with replacing(self._path) as out:
            out.write(json.dumps(asdict(file)).encode("ascii"))
        self._file = file


def _read(path: Path) -> _File | None:
    """None where there is none, or one that cannot be read: the directory is a new one to the ledger then."""
    try:
        row = json.loads(path.read_bytes())
        return _File(id=str(row["id"]), nonce=row["nonce"], tried=tuple(row["tried"]), take=bool(row["take"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
