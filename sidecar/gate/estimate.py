"""How much a call may consume, as far as its request says it.

Input by the size of the body (a token of English is about four bytes; prompts in JSON have some overhead, so this is
rather too much than too little), output by what the request allows for it. Where it allows anything, what the model's
last answers took is a better guess than its ceiling: 95 of 100 took no more.
"""

from __future__ import annotations

import json
from bisect import insort
from collections import deque
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import orjson

from sidecar.gate.limits import VALUE_CHARS_MAX, bounded
from sidecar.model.exchange import Exchange, RawHeaders
from sidecar.usage.formats.json_scanner import pruned
from sidecar.usage.providers.base import Tree
from sidecar.usage.request_reader import BODY_MAX_BYTES, WANTED, RequestReader
from sidecar.usage.response_headers import Heads

BYTES_A_TOKEN: Final = 4
OUTPUT_TOKENS_DEFAULT: Final = 1_000  # where neither the request nor the model's last answers say anything
# No model known gives more in one answer; a request that names a larger figure is after the others' allowance.
OUTPUT_TOKENS_MAX: Final = 1_000_000
# Likewise of what one takes, where its context is not known; the length of a body is what the client claims.
INPUT_TOKENS_MAX: Final = 10_000_000
INPUT_TOKENS_SURE: Final = 8_192  # every model of today takes so many: up to here none is looked up
CHOICES_MAX: Final = 128  # OpenAI takes no more
ANSWERS_KEPT: Final = 100  # of each model
MODELS_KEPT: Final = 1_000
READ_BYTES_MAX: Final = BODY_MAX_BYTES  # waited for and read before a decision; as the reader of usage has it

_WANTED: Final[Tree] = {
    "model": True,
    "max_tokens": True,
    "max_completion_tokens": True,
    "max_output_tokens": True,
    "n": True,
    "generationConfig": {"maxOutputTokens": True, "candidateCount": True},
    "inferenceConfig": {"maxTokens": True},
}


def tokens_of(size_bytes: int) -> int:
    """Of a text of that size, by our estimate."""
    return -(-size_bytes // BYTES_A_TOKEN)


_HEADS: Final = Heads(())


class Asked(NamedTuple):
    """What a request's body says of its size."""

    model: str | None
    input_tokens: int
    output_tokens: int | None  # of all choices; None: as many as the model likes
    members: Mapping[str, Any]  # of its top level
    choices: int = 1


NOTHING_ASKED: Final = Asked(None, 0, 0, {})


def read_request(
    body: bytes, length: int | None = None, *, fields: RawHeaders = (), members: tuple[str, ...] = ()
) -> Asked:
    """`body`: of it as much as has come. `length`: how long it is in all, where that is known. `fields`: of the head,
    by which one is read that does not begin as an object does; `members`: what else is asked of it. Never raises."""
    document: Any = None
    if body.startswith(b"{"):
        try:
            document = orjson.loads(body)
        except ValueError:
            document = _found(_in_utf8(body) or body, members)
    elif body and (text := _in_utf8(body)) is not None:
        document = _found(text, members)
    elif body:
        document = _as_its_record_will(body, fields, members)
    size = len(body)
    if length is not None and length > size:
        size = length
    input_tokens = tokens_of(size)
    if type(document) is not dict:
        return Asked(None, input_tokens, None, {})
    model = document.get("model")
    if type(model) is not str or not model:
        model = None
    elif len(model) > VALUE_CHARS_MAX:
        model = bounded(model)
    output_tokens, choices = _output(document)
    return Asked(model, input_tokens, output_tokens, document, choices)


def _found(body: bytes, members: tuple[str, ...]) -> Mapping[str, Any]:
    """What is looked for in a document that is not whole, or not to be read at once."""
    return pruned(body, {**_WANTED, **dict.fromkeys(members, True)} if members else _WANTED)


def _in_utf8(body: bytes) -> bytes | None:
    """An object in UTF-16 or UTF-32, which some servers take, in the spelling that we read; None: it is none."""
    coding = json.detect_encoding(body[:4])
    if coding.startswith("utf-8"):
        return None
    text = body.decode(coding, "ignore").lstrip()
    return text.encode() if text.startswith("{") else None


def _as_its_record_will(body: bytes, fields: RawHeaders, members: tuple[str, ...]) -> Mapping[str, Any]:
    """A form, what is coded, what has a byte order mark: no way to write a model's name is one around its limit."""
    reader = RequestReader((*(name for name in _WANTED if name not in WANTED), *members))
    try:
        reader.describe(_HEADS.pick(fields))
        reader.feed(body)
        return dict(reader.facts())
    except Exception:  # noqa: BLE001 - as where it is read along: a fault in a reader is no fault of the call
        return {}


def _output(document: Mapping[str, Any]) -> tuple[int | None, int]:
    find = document.get
    tokens = find("max_tokens")
    if type(tokens) is int and 0 <= tokens <= OUTPUT_TOKENS_MAX and "n" not in document:
        return tokens, 1
    if type(tokens) is not int:
        tokens = find("max_completion_tokens", find("max_output_tokens"))
    choices = find("n")
    if type(tokens) is not int:
        generation, inference = find("generationConfig"), find("inferenceConfig")
        if isinstance(generation, dict):
            tokens, choices = generation.get("maxOutputTokens"), generation.get("candidateCount")
        elif isinstance(inference, dict):
            tokens = inference.get("maxTokens")
    times = min(max(choices, 1), CHOICES_MAX) if type(choices) is int else 1
    if type(tokens) is not int or tokens < 0:
        return None, times
    return min(tokens, OUTPUT_TOKENS_MAX) * times, times


class Outputs:
    """How many tokens the last answers of each model had."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[deque[int], list[int]]] = {}

    def seen(self, model: str, tokens: int) -> None:
        """A response of this model had so many output tokens."""
        known = self._last.get(model)
        if known is None:
            if len(self._last) >= MODELS_KEPT:
                self._last.pop(next(iter(self._last)))
            known = self._last[model] = (deque(), [])
        order, ranked = known
        if len(order) >= ANSWERS_KEPT:
            ranked.remove(order.popleft())
        order.append(tokens)
        insort(ranked, tokens)

    def ended(self, call: Exchange) -> None:
        """What the response of a call had, where that is known."""
        usage = call.usage
        if usage is not None and usage.output_tokens is not None:
            model = usage.request_model or usage.model
            if model is not None:
                self.seen(model, usage.output_tokens)

    def follow(self, later: Outputs) -> None:
        """What others saw meanwhile comes after what is known here."""
        for model, (order, _) in later._last.items():
            for tokens in order:
                self.seen(model, tokens)

    def usual(self, model: str | None) -> int | None:
        """What 95 of 100 had no more than; None: nothing is known."""
        known = None if model is None else self._last.get(model)
        if known is None:
            return None
        ranked = known[1]
        return ranked[-(-len(ranked) * 95 // 100) - 1]
