"""The form of a kind of head: one pattern that reads every head of that kind, and what is forwarded in its place.

On one connection the same is said again and again, but for a trace, an id, a length. What may stand there is the same
as where a head is cut into lines and each of them is looked up (`plain_head`), which takes twice as long.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

LENGTH_DIGITS_MAX: Final = 9
# Printable ASCII, without a blank at either end: which of those belong to a value is read in two ways.
VALUE: Final = rb"[!-~](?:[ -~]*[!-~])?"

_WORD: Final = rb"[!-~]+"  # a value without blanks
_LENGTH: Final = rb"[0-9]{1,%d}" % LENGTH_DIGITS_MAX
_END: Final = rb"\r\n\r\n"
_PLACE: Final = b"%b"
_NO_PLACE: Final = b"%.0b"  # takes a value and writes nothing


@dataclass(slots=True, frozen=True, eq=False)
class Form:
    """How heads of one kind are read.

    `match`: of a message, to the end of its head; a group for each part that differs. `wire`: what is forwarded, with a
    place for each group, and two more: what the proxy adds, and the body. `first`: the number of their request lines,
    which are the first group; 0 where all have the same. `length`, `trace`, `beside`: which group is what
    `plain_head.PlainMessage` has of that name; -1 where there is none, and all say `trace_said`, `beside_said`.
    `told`: the same of what says for whom a request is forwarded, None where nothing does; empty where it is none.
    """

    match: Callable[[bytes], re.Match[bytes] | None]
    wire: bytes
    first: int
    length: int
    trace: int
    trace_said: bytes
    beside: int
    beside_said: bytes
    told: tuple[tuple[int, bytes | None], ...]


def form_of(
    lines: Sequence[bytes],
    *,
    loose: Collection[int],
    sent: Sequence[int],
    added: Sequence[bytes],
    first: int,
    length_at: int,
    trace_at: int,
    beside_at: int,
    told_at: Sequence[int] = (),
) -> Form:
    """`lines`: of one such head. `loose`: the places of fields that have other values in others. `sent`: the places of
    what is forwarded, in the order of the lines; those behind the last line are of `added`. `first`: as `Form` has it.
    The other places are 0 where there is no such line."""
    differ = sorted({*loose, *([length_at] if length_at else []), *([0] if first else [])})
    patterns = [re.escape(line) for line in lines]
    texts = [text.replace(b"%", b"%%") for text in (*lines, *added)]
    for at in differ:
        if not at:
            patterns[at], texts[at] = b"([ -~]+)", _PLACE
            continue
        name, _, said = lines[at].partition(b": ")
        # Of what has no blank here none is expected later: words are read quicker.
        value = _LENGTH if at == length_at else VALUE if b" " in said else _WORD
        patterns[at] = b"%b: (%b)" % (re.escape(name), value)
        texts[at] = b"%b: %b" % (name.replace(b"%", b"%%"), _PLACE)
    unsent = [at for at in differ if at not in sent]
    wire: list[bytes] = []
    for at in sent:
        ahead = [one for one in unsent if at in differ and one < at]
        unsent = unsent[len(ahead) :]
        wire.append(_NO_PLACE * len(ahead) + texts[at])

    def group(at: int) -> tuple[int, bytes | None]:
        if at in differ and at:
            return differ.index(at), None
        return -1, lines[at].partition(b": ")[2] if at else None

    trace, trace_said = group(trace_at)
    beside, beside_said = group(beside_at)
    return Form(
        match=re.compile(rb"\r\n".join(patterns) + _END).match,
        wire=b"\r\n".join(wire) + _NO_PLACE * len(unsent) + _PLACE * 2,
        first=first,
        length=differ.index(length_at) if length_at else -1,
        trace=trace,
        trace_said=trace_said or b"",
        beside=beside,
        beside_said=beside_said or b"",
        told=tuple(map(group, told_at)),
    )
