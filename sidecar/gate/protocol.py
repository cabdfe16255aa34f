"""What a process that serves asks the owner of the limits, and what it is answered, as they go over the seam.

Both are tuples of plain values, because they are written with `marshal`: `plain` makes one of a question or a ruling,
`Question.read` and `Ruling.read` take it apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, Self

from sidecar.gate.counters import Need

LIMITS: Final = "limits"  # who said so: those defined here,
ON_FAILURE: Final = "on_failure"  # or nobody, so that `SIDECAR_GATE_ON_FAILURE` decides


class Asker(NamedTuple):
    """Who makes the call, for those who are asked outside.

    `id`: the call's, by which its end is known. `amounts`: how much it may use, by unit.
    """

    id: str
    subscriber: str | None
    provider: str | None
    dimensions: tuple[tuple[str, str], ...]
    amounts: Mapping[str, int]


class Question(NamedTuple):
    """Whether a call may be made. `at_ns`: when it came, Unix nanoseconds. `asker`: None: nobody is asked outside."""

    number: int
    at_ns: int
    model: str | None
    needs: Sequence[Need]
    asker: Asker | None = None

    @classmethod
    def read(cls, payload: Sequence[Any]) -> Self:
        number, at_ns, model, needs, asker = payload
        return cls(number, at_ns, model, [Need(*need) for need in needs], None if asker is None else Asker(*asker))

    def plain(self) -> tuple[Any, ...]:
        asker = None if self.asker is None else tuple(self.asker)
        return self.number, self.at_ns, self.model, [tuple(need) for need in self.needs], asker


class Spoken(NamedTuple):
    """What a client is told whose call somebody outside denied. `error`: what its record says."""

    limit: str
    kind: str
    retry_after_s: float | None
    message: str | None
    error: str


class Used(NamedTuple):
    """How much of a limit is used, as texts."""

    used: str
    amount: str
    unit: str
    until: str | None


class Ruling(NamedTuple):
    """The owner's answer to a question.

    `order`: which of its answers to this process it is. `usual`: how many output tokens the model mostly takes.
    `held`, `more`, `full`: as in `counters.Decision`. `spoken`: of a denial from outside. `amounts`: of a limit that
    denies, where clients are told. `shift_ns`: by how much the clock that calendars go by is ahead of the machine's.
    """

    order: int
    number: int
    usual: int | None
    decision: str
    limit: str | None = None
    source: str = LIMITS
    age_s: float = 0.0
    held: Mapping[str, int] = {}
    more: Mapping[str, int] = {}
    full: Sequence[str] = ()
    retry_after_s: float | None = None
    spoken: Spoken | None = None
    amounts: Used | None = None
    shift_ns: int = 0

    @classmethod
    def read(cls, payload: Sequence[Any]) -> Self:
        found = cls(*payload)
        spoken, amounts = found.spoken, found.amounts
        return found._replace(
            spoken=None if spoken is None else Spoken(*spoken), amounts=None if amounts is None else Used(*amounts)
        )

    def plain(self) -> tuple[Any, ...]:
        return (
            *self[:7],
            dict(self.held),
            dict(self.more),
            list(self.full),
            self.retry_after_s,
            None if self.spoken is None else tuple(self.spoken),
            None if self.amounts is None else tuple(self.amounts),
            self.shift_ns,
        )
