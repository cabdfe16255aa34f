"""Keys in a header: the same key with the same request gets the first answer again.

What a stranger's key with another body means, and how long an answer is kept, differs by vendor and is theirs to say.
The caller's credential is part of the key's scope, as a digest: the store never holds it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from sidecar.dev.mock_backends.contract import Answer, Call, Memory

DAY_S: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class Stored:
    """An earlier answer; `same` tells whether its request was this one."""

    answer: Answer
    same: bool


class Replay:
    """The answers given under keys within the last `window_s`."""

    def __init__(self, memory: Memory, window_s: float | None = DAY_S) -> None:
        self._memory = memory
        self._window_s = window_s

    def recall(self, call: Call, credential: str, key: str) -> Stored | None:
        found = self._memory.recall(_name(credential, key), call.at_s, self._window_s)
        if found is None:
            return None
        answer = Answer(found["status"], found["body"].encode(), found["content_type"])
        return Stored(answer, found["fingerprint"] == call.fingerprint())

    def keep(self, call: Call, credential: str, key: str, answer: Answer) -> None:
        row = {
            "fingerprint": call.fingerprint(),
            "status": answer.status,
            "body": answer.body.decode(),
            "content_type": answer.content_type,
        }
        self._memory.keep(_name(credential, key), row, call.at_s)


def _name(credential: str, key: str) -> str:
    return f"replay:{hashlib.sha256(credential.encode()).hexdigest()[:16]}:{key}"
