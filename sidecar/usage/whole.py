"""Reading a call that is over, all of it at once: for whoever reads many of them, later and in batches.

The taps (see `readers`) read along and keep a state for each open call. Here everything is given at once, and what the
shape of a call decides (its path, its pins, its status, the types and codings of its heads) is worked out once by
`prepare` and kept by the caller. The result is the taps' to the letter, for every cutting; a property test holds the
two against each other.

    plan = prepare(taps, "POST", "/v1/chat/completions", request_headers, 200, response_headers)
    usage = plan.read(request_body, response_body)           if plan is not None; else there is no usage, ever

Three ways lead through `Plan.read`, each falling back to the next when anything is unusual:

1. lean, plain: OpenAI chat and responses, Anthropic messages, one `orjson.loads` of the body (decoded in one step where
   it is coded), then only dictionaries.
   Taken where the usage object has nothing but well-known members that are counts and add up. `Plan.row` takes it for
   records that need no `Usage`; there is a shorter one yet for what OpenAI itself sends (`Plan.usual`).
2. lean, streamed: the same families' server-sent events, split and parsed without a framing and without asking whose
   they are, and handed to the family's own reader.
3. the general one: the taps' own reader, fed once. All bounds (rations of steps, decoded size, unclaimed responses,
   estimates, custom fields) are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any

import orjson

from sidecar.model.call_group import TOKEN_FIELDS
from sidecar.model.exchange import USAGE_CHARS_MAX, Usage, UsageState, cut_usage, unread_usage
from sidecar.model.record import usage_of, usage_to_dict
from sidecar.usage import UNREAD_RESPONSE, RawHeaders
from sidecar.usage.endpoints import Endpoint
from sidecar.usage.formats.content_encoding import decoded
from sidecar.usage.formats.event_stream import MESSAGE_MAX_BYTES
from sidecar.usage.formats.json_body import DOCUMENT_MAX_BYTES
from sidecar.usage.providers.anthropic import Messages
from sidecar.usage.providers.base import Document, Reader, build
from sidecar.usage.providers.fields import INPUT_DETAILS, OUTPUT_DETAILS
from sidecar.usage.providers.openai import ChatCompletions, Responses, tools_used
from sidecar.usage.readers import RequestReadingTap, UsageTaps
from sidecar.usage.request_reader import BODY_MAX_BYTES
from sidecar.usage.response_headers import REQUEST_IDS, hinted_provider, request_id
from sidecar.usage.response_reader import (
    DEFAULT_PROVIDER,
    ResponseReader,
    plain_type,
)
from sidecar.usage.values import COUNT_MAX, name

CODED_PIECE_BYTES = 16_384  # of a coded body, handed to its decoder at a time; as it comes from a socket
DECODING_STEPS_MAX = 64  # of a coded body that is over: at half a MiB and more each, far beyond what is kept whole
EVENTS_MAX = 64  # of a stream that is read the lean way; kept ones are two to six

CHOICES_MAX = 128  # of one response that is read the lean way

Row = dict[str, Any]
"""The record's `usage` object, as `model.record.usage_to_dict` makes it."""

Counted = tuple[Row, tuple[str, ...], tuple[int, ...]]
"""A row, and of its members those of `TOKEN_FIELDS` that are there: their names and their counts, in one order."""

Usual = tuple[tuple[str, str, str, str, tuple[str, ...]], str, tuple[int, ...], Document]
"""A call as most are (`Plan.usual`): its key, which is (model, model asked for, reason of its end, service tier or "",
names of its counts); its id; its counts; and the vendor's usage object."""

_LEAN: tuple[type[Reader], ...] = (ChatCompletions, Responses, Messages)
_USUAL = frozenset((ChatCompletions, Responses))  # families that `Plan.usual` reads

_WHOLES = ("input_tokens", "output_tokens", "total_tokens")
_CHAT = ("prompt_tokens", "completion_tokens", "prompt_tokens_details", "completion_tokens_details")
_RESPONSES = ("input_tokens", "output_tokens", "input_tokens_details", "output_tokens_details")
_TOKENS = frozenset(TOKEN_FIELDS)
# Of a streamed call that is added up with others like it.
_MEMBERS = _TOKENS | {
    *("usage_state", "provider", "operation", "streamed", "model", "request_model", "response_id"),
    *("upstream_request_id", "finish_reasons", "service_tier", "time_to_first_token_ms", "raw_usage"),
}
_READ, _WRITTEN = "cache_read_input_tokens", "cache_write_input_tokens"
_SAID = "upstream_request_id"

KINDS_OF_DETAILS = 256  # remembered; vendors have a handful
_NO_DETAILS: Document = {}
_INTEGERS = {int}


def prepare(
    taps: UsageTaps,
    method: str,
    target: str,
    request_headers: RawHeaders,
    status: int,
    response_headers: RawHeaders,
) -> Plan | None:
    """What the shape of a call decides, for all calls of that shape; None where no such call can have usage.

    A plan may be used again for calls with the same method, target, status and fields of both heads; values may differ
    in the fields that `Plan.per_call` names, which `Plan.read` is given anew. Raises `ReaderFailedError` for a fault of
    ours, which may be one of this call alone: nothing is to be concluded for others.
    """
    request = taps.request(method, target, request_headers)
    response = None if request is None else taps.response(request, status, response_headers)
    if request is None or response is None:
        return None
    if response is UNREAD_RESPONSE or not isinstance(request, RequestReadingTap):
        raise ReaderFailedError
    return Plan(taps, request.endpoint, method, target, request_headers, status, response_headers)


class ReaderFailedError(Exception):
    """A usage reader could not be made, for a fault of ours. Why was told and counted."""


class Plan:
    """Made by `prepare`. Holds no state of a call, so one may serve many at once.

    `per_call`: lower-case names of response fields whose values `read` must be given for each call (`fields`).
    `request_id`: what the response says that it was made with. `lean`: the family whose plain and streamed responses
    are read the short way; None: none is.
    """

    __slots__ = (
        "_coding", "_endpoint", "_fields", "_five", "_has_usual", "_headers", "_method", "_nobodys", "_operation",
        "_provider", "_status", "_target", "_three", "lean", "per_call", "request_id", "taps",
    )  # fmt: skip

    def __init__(
        self,
        taps: UsageTaps,
        endpoint: Endpoint,
        method: str,
        target: str,
        request_headers: RawHeaders,
        status: int,
        response_headers: RawHeaders,
    ) -> None:
        self.taps = taps
        self._endpoint = endpoint
        self._method = method
        self._target = target
        self._headers = request_headers
        self._status = status
        self._fields = taps.endpoints.heads.pick(response_headers)
        self._coding = self._fields.get("content-encoding", "")
        row = endpoint.row
        by_header = taps.endpoints.row_by_header(self._fields)
        named = (row.reader.header_names if row is not None else ()) + (
            by_header.reader.header_names if by_header is not None else ()
        )
        custom = [element.header for element in endpoint.elements if element.header is not None]
        self.per_call = frozenset((*REQUEST_IDS, *named, *custom))
        self.lean = self._lean_family()
        self._has_usual = self.lean in _USUAL and not endpoint.path_decides
        known = row is not None or by_header is not None or endpoint.elements
        self._nobodys = not known and not self._coding and self.is_document
        self._provider = DEFAULT_PROVIDER
        self._operation = ""
        if row is not None and self.lean is not None:
            self._operation = row.operation
            self._provider = endpoint.provider or row.provider or hinted_provider(self._fields) or DEFAULT_PROVIDER
        self.request_id = request_id(self._fields)
        entered, said, *details = _RESPONSES if self.lean is Responses else _CHAT
        self._three = itemgetter(entered, said, "total_tokens")
        self._five = itemgetter(entered, said, "total_tokens", *details)

    @property
    def coded(self) -> bool:
        return bool(self._coding)

    @property
    def streams(self) -> bool:
        """Whether the head says that these are server-sent events."""
        return self._type == "text/event-stream"

    @property
    def is_document(self) -> bool:
        """Whether the head says that this is one document of JSON."""
        return self._type == "application/json" or self._type.endswith("+json")

    @property
    def _type(self) -> str:
        return self._fields.get("content-type", "").partition(";")[0].strip().lower()

    def _lean_family(self) -> type[Reader] | None:
        row, fields = self._endpoint.row, self._fields
        plain = row is not None and row.unmetered is None and 200 <= self._status < 300 and not self._endpoint.elements
        if row is None or not plain or not plain_type(fields.get("content-type", "")):
            return None
        if self.coded and not self.is_document:
            return None
        return row.reader if row.reader in _LEAN else None

    def nothing_in(self, response: bytes) -> bool:
        """Whether `read` would find no usage, and nothing odd, in this response, which is whole: on a path that nobody
        knows a document of JSON that no family's is like, and that does not speak of usage (`Mentions`). False: it is
        to be asked."""
        return (
            self._nobodys
            and response[:1] in (b"{", b"[")
            and b'"usage' not in response
            and b"oken" not in response
            and not self.taps.endpoints.everybody.may_hold(response)
        )

    def read(
        self,
        request_body: bytes,
        response: bytes | Sequence[bytes],
        *,
        whole: bool = True,
        opened_ns: int = 0,
        first_token_ns: int = 0,
        fields: Mapping[str, str] | None = None,
    ) -> Usage | None:
        """The usage of one call; None where it is no model call. Never raises.

        `request_body`: as on the wire. `response`: its body, or its pieces in order, as on the wire. `whole`: it ended
        as its framing (or its end mark) says. `opened_ns`, `first_token_ns`: of the monotonic clock; 0 where it is not
        known. `fields`: the response's fields of `per_call`, by lower-case name, where they differ from those that the
        plan was made with.
        """
        if self.lean is not None and whole:
            body = response if isinstance(response, bytes) else b"".join(response)
            said_id = self.request_id if fields is None else request_id(fields)
            try:
                if self._coding:
                    body = decoded(self._coding, body)
                if body[:1] == b"{":
                    document = _document(body)
                    if document is not None and (row := self._read_plain(request_body, document, said_id)) is not None:
                        return usage_of(row)
                elif not self._coding:
                    usage = self._read_events(request_body, body, said_id, opened_ns, first_token_ns)
                    if usage is not None:
                        return usage
            except Exception:  # noqa: BLE001 - the general way has a word for whatever is odd here
                pass
        return self.read_generally(
            request_body, response, whole=whole, opened_ns=opened_ns, first_token_ns=first_token_ns, fields=fields
        )

    def read_generally(
        self,
        request_body: bytes,
        response: bytes | Sequence[bytes],
        *,
        whole: bool = True,
        opened_ns: int = 0,
        first_token_ns: int = 0,
        fields: Mapping[str, str] | None = None,
    ) -> Usage | None:
        """As `read`, always by the taps' own reader."""
        reader = self.open(request_body, opened_ns, fields)
        if reader is None:
            return unread_usage()
        pieces = [response] if isinstance(response, bytes) else response
        if self.coded:
            pieces = [
                piece[at : at + CODED_PIECE_BYTES] for piece in pieces for at in range(0, len(piece), CODED_PIECE_BYTES)
            ]
        steps = DECODING_STEPS_MAX
        for piece in pieces:
            reader.feed(piece)
            while reader.behind and steps > 0:
                reader.feed(b"")
                steps -= 1
        if not self.coded:
            reader.first_token_at(first_token_ns)
        return reader.finish(whole)

    def open(
        self, request_body: bytes, opened_ns: int = 0, fields: Mapping[str, str] | None = None
    ) -> ResponseReader | None:
        """The taps' own reader for one call of this shape; None where something broke, which was counted."""
        request = RequestReadingTap(self.taps, self._endpoint, self._method, self._target, self._headers, opened_ns)
        request.feed(request_body)
        values = self._fields if fields is None else {**self._fixed_fields(), **fields}
        try:
            return ResponseReader(self.taps, request, self._status, values)
        except Exception:  # noqa: BLE001 - a fault in a reader must never become a fault of the call
            self.taps.anomaly("tap_failed")
            return None

    def _fixed_fields(self) -> dict[str, str]:
        return {field: value for field, value in self._fields.items() if field not in self.per_call}

    # The lean ways. None: something is unusual, and the general way decides.

    def row(
        self,
        request_body: bytes,
        response: bytes,
        said_id: str | None,
        opened_ns: int = 0,
        first_token_ns: int = 0,
    ) -> Counted | None:
        """The `usage` object of the record of one call, for most calls of the lean families that are not `usual`;
        None where `read` is to be asked. Never raises. `said_id`: the vendor's id of the call
        (`response_headers.request_id`). Times: as for `read`."""
        if self.lean is None:
            return None
        try:
            if self._coding:
                response = decoded(self._coding, response)
                if response[:1] != b"{":
                    return None
            if response[:1] != b"{":
                return _counted_row(self._read_events(request_body, response, said_id, opened_ns, first_token_ns))
            document = _document(response)
            row = None if document is None else self._read_plain(request_body, document, said_id)
        except Exception:  # noqa: BLE001 - the general way has a word for whatever is odd here
            return None
        if row is None:
            return None
        names, counts_of = _counts_in(tuple(row))
        return row, names, counts_of(row)

    def usual(self, request_body: bytes, response: bytes) -> Usual | None:
        """One call of OpenAI's whose model, id and end are all told, and whose usage object has its three counts and
        both details, or the counts alone; None where `row` or `read` is to be asked. Never raises.

        Most calls there are come through here, so it is one function without a loop: a question is put to all values
        at once where there is a function in C that answers it.
        """
        if not self._has_usual:
            return None
        try:
            if self._coding:
                response = decoded(self._coding, response)
            if response[:1] != b"{" or len(response) > DOCUMENT_MAX_BYTES:
                return None
            document = orjson.loads(response)
            asked = orjson.loads(request_body)["model"]
            if self.lean is Responses:
                reason = document["status"]
                used = "tool_usage" in document and tools_used(document)
                if reason != "completed" or document["object"] != "response" or used:
                    return None
            else:
                (choice,) = document["choices"]
                index, reason = choice["index"], choice["finish_reason"]
                if index != 0 or type(index) is not int or "usage" in choice:
                    return None
            get = document.get
            model, response_id, tier = document["model"], document["id"], get("service_tier") or ""
            chars = len("".join((model, response_id, asked, reason, tier)))  # raises where one is no text
            if (
                get("error")
                or not (model and response_id and asked and reason and request_body[:1] == b"{")
                or chars >= USAGE_CHARS_MAX
                or len(request_body) > BODY_MAX_BYTES
            ):
                return None
            raw = document["usage"]
            if len(raw) == 5:
                entered, said, stated, taken, given = self._five(raw)
            elif len(raw) == 3:
                entered, said, stated = self._three(raw)
                taken = given = _NO_DETAILS
            else:
                return None
            names, read_at, written_at = _usual_names(tuple(taken), tuple(given))
            counts = (entered, said, stated, *taken.values(), *given.values())
            if (
                set(map(type, counts)) != _INTEGERS  # a bool is none
                or min(counts) < 0
                or entered + said != stated
                or stated > COUNT_MAX
                or (taken and max(taken.values()) > entered)
                or (given and max(given.values()) > said)
                # What is read from a cache and what is written to it are two parts of the same.
                or (written_at and counts[written_at] and counts[written_at] + counts[read_at] > entered)
            ):
                return None
        except Exception:  # noqa: BLE001 - a member is missing, or another thing than usual
            return None
        return (model, asked, reason, tier, names), response_id, counts, raw

    def usual_row(self, usual: Usual, said_id: str | None) -> Row:
        """The `usage` object of its record. `said_id`: the vendor's id of the call."""
        (model, asked, reason, tier, names), response_id, counts, raw = usual
        row: Row = {
            "usage_state": "final",
            "provider": self._provider,
            "operation": self._operation,
            "streamed": False,
            "model": model,
            "request_model": asked,
            "response_id": response_id,
        }
        if said_id is not None:
            row[_SAID] = said_id
        row.update(zip(names, counts, strict=True))
        row["finish_reasons"] = [reason]
        if tier:
            row["service_tier"] = tier
        row["raw_usage"] = raw
        return row

    def usual_form(self, usual: Usual) -> bytes:
        """What `usual_row` is as JSON, of all calls with this one's key: a form for the id (JSON), the vendor's id of
        the call (`said_member`), the counts, and the vendor's usage object (JSON)."""
        members: list[bytes] = []
        for member, value in self.usual_row(usual, "").items():
            if member == _SAID:
                members[-1] += b"%b"
            elif member in usual[0][-1]:
                members.append(b'"%b":%%d' % member.encode())
            else:
                text = b"%b" if member in ("response_id", "raw_usage") else orjson.dumps(value).replace(b"%", b"%%")
                members.append(b'"%b":%b' % (member.encode(), text))
        return b"{%b}" % b",".join(members)

    def _read_plain(self, request_body: bytes, document: Document, said_id: str | None) -> Row | None:
        row: Row = {
            "usage_state": "final",
            "provider": self._provider,
            "operation": self._operation,
            "streamed": False,
            "model": None,
            "request_model": self._request_model(request_body),
            "response_id": None,
        }
        if said_id is not None:
            row[_SAID] = said_id
        return row if self._fill(row, document) else None

    def _fill(self, row: Row, document: Document) -> bool:
        family = self.lean
        if family is ChatCompletions:
            return _chat(row, document)
        return _response(row, document) if family is Responses else _anthropic_message(row, document)

    def _read_events(
        self, request_body: bytes, body: bytes, said_id: str | None, opened_ns: int, first_token_ns: int
    ) -> Usage | None:
        if b"\r" in body or not body.endswith(b"\n\n") or len(body) > MESSAGE_MAX_BYTES:
            return None
        messages = body.split(b"\n\n")
        asked = _object(request_body)
        if len(messages) > EVENTS_MAX or asked is None or asked.get("n") not in (None, 1):
            return None
        odd: list[str] = []
        reader = self._play(messages, odd)
        if reader is None or reader.raw is None or reader.error is not None:
            return None
        usage = build(reader, streamed=True, ended=False)
        if usage.usage_state is not UsageState.FINAL or odd:
            return None
        usage.provider = self._endpoint.provider or reader.provider or self._provider
        usage.operation = self._operation
        usage.request_model = self._endpoint.asked(name(asked.get("model")))
        usage.upstream_request_id = said_id
        if first_token_ns and opened_ns:
            usage.time_to_first_token_ms = (first_token_ns - opened_ns) / 1e6
        return usage

    def _play(self, messages: Sequence[bytes], odd: list[str]) -> Reader | None:
        """The family's reader after these events; None where one of them is none of the family's usual ones."""
        if self.lean is None:
            return None
        reader = self.lean(odd.append)
        known = False
        for message in messages:
            if not message or (known and reader.can_skip(message)):
                continue
            event, data = event_of(message)
            if data is None or (data == b"[DONE]" and not known):
                return None
            if data == b"[DONE]":
                if reader.done():
                    break
                continue
            document = orjson.loads(data)
            if not known and not reader.recognises(document, event):
                return None
            known = True
            if reader.message(document, event):
                break
        return reader if known else None

    def _request_model(self, body: bytes) -> str | None:
        asked = _object(body)
        if asked is None:
            raise ValueError("a request that the general way must read")
        return self._endpoint.asked(name(asked.get("model")))


def _document(body: bytes) -> Document | None:
    """A plain response's members; None where it is too large or an error. Raises `ValueError` where it is no JSON."""
    if len(body) > DOCUMENT_MAX_BYTES:
        return None
    document: Document = orjson.loads(body)
    return None if document.get("error") else document


def said_member(said_id: str | None) -> bytes:
    """The vendor's id of a call, as `Plan.usual_form` wants it."""
    return b"" if said_id is None else b',"%b":%b' % (_SAID.encode(), orjson.dumps(said_id))


@lru_cache(maxsize=KINDS_OF_DETAILS)
def _usual_names(taken: tuple[str, ...], given: tuple[str, ...]) -> tuple[tuple[str, ...], int, int]:
    """The record's names for the three counts and for the members of both details, in their order; and where what is
    read from a cache and written to it are among them, where both are: else 0. Raises `KeyError` where a member is not
    known, `ValueError` where two are one: that is not remembered, so what somebody made up takes no memory."""
    names = (*_WHOLES, *(INPUT_DETAILS[key] for key in taken), *(OUTPUT_DETAILS[key] for key in given))
    if len(set(names)) < len(names):
        raise ValueError("a count that is said twice")
    if _WRITTEN not in names or _READ not in names:  # alone, each is no more than what was entered
        return names, 0, 0
    return names, names.index(_READ), names.index(_WRITTEN)


def _counted_row(usage: Usage | None) -> Counted | None:
    """None where more than tokens was reported, or a text is so long that it is cut. Raises where a core count is
    missing."""
    if usage is None:
        return None
    cut_usage(usage, _is_cut)
    row = usage_to_dict(usage)
    if not row.keys() <= _MEMBERS:
        return None
    names, counts_of = _counts_in(tuple(row))
    counts = counts_of(row)
    return (row, names, counts) if set(map(type, counts)) == _INTEGERS else None


def _is_cut(limit: str) -> None:
    raise ValueError(limit)


@lru_cache(maxsize=KINDS_OF_DETAILS)
def _counts_in(members: tuple[str, ...]) -> tuple[tuple[str, ...], Callable[[Row], tuple[int, ...]]]:
    """Of a row with these members, which has the three counts at least: the names of its counts, and what takes them
    out. No row of the lean ways has a count that is null."""
    names = tuple(name for name in members if name in _TOKENS)
    return names, itemgetter(*names)


def _object(body: bytes) -> Document | None:
    """A plain request's members; empty where there is no body, None where the general way must say what it holds."""
    if not body:
        return {}
    if body[0] != 0x7B or len(body) > BODY_MAX_BYTES:
        return None
    try:
        document: Document = orjson.loads(body)
    except ValueError:
        return None
    return document


def event_of(message: bytes) -> tuple[str, bytes | None]:
    """The name and the data of an event of one `data:` line, with an `event:` line before it or none; else None."""
    event = ""
    if message.startswith(b"event:"):
        line, _, message = message.partition(b"\n")
        event = line[6:].strip().decode("utf-8", "replace")
    if not message.startswith(b"data:") or b"\n" in message:
        return event, None
    return event, message[5:].removeprefix(b" ")


def _named(row: Row, document: Document, tier: object) -> bool:
    """Fill in what the response calls itself; False where a text is none, or so long that it is cut."""
    model, response_id, request_model = document.get("model"), document.get("id"), row["request_model"]
    chars = 0
    if model:
        row["model"] = model
        chars += len(model)
    if response_id:
        row["response_id"] = response_id
        chars += len(response_id)
    if tier:
        row["service_tier"] = tier
        chars += len(tier)  # type: ignore[arg-type]
        if type(tier) is not str:
            return False
    if request_model:
        chars += len(request_model)
    return (
        chars < USAGE_CHARS_MAX and (type(model) is str or not model) and (type(response_id) is str or not response_id)
    )


def _chat(row: Row, document: Document) -> bool:
    choices = document.get("choices")
    if type(choices) is not list or not 0 < len(choices) <= CHOICES_MAX:
        return False
    reasons: list[str] = []
    for place, choice in enumerate(choices):
        index = choice.get("index")
        if type(index) is not int or index != place or "usage" in choice:
            return False
        if found := name(choice.get("finish_reason")):
            reasons.append(found)
    raw = document["usage"]
    if not _counted(row, raw, _CHAT):
        return False
    if reasons:
        row["finish_reasons"] = reasons
    if not _named(row, document, document.get("service_tier")):
        return False
    row["raw_usage"] = raw
    return True


def _response(row: Row, document: Document) -> bool:
    status = document.get("status")
    if document.get("object") != "response" or status not in ("completed", "incomplete") or tools_used(document):
        return False
    if not _counted(row, document["usage"], _RESPONSES):
        return False
    details = document.get("incomplete_details")
    said = name(details.get("reason")) if status == "incomplete" and type(details) is dict else None
    row["finish_reasons"] = [said or status]
    if not _named(row, document, document.get("service_tier")):
        return False
    row["raw_usage"] = document["usage"]
    return True


def _counted(row: Row, raw: Document, names: tuple[str, str, str, str]) -> bool:
    """OpenAI's usage object where it is as documented; the rest of `fields.fill_tokens` is for what is not."""
    get = raw.get
    entered, said = get(names[0]), get(names[1])
    if type(entered) is not int or type(said) is not int or not 0 <= entered <= COUNT_MAX or not 0 <= said <= COUNT_MAX:
        return False
    total = entered + said
    stated = get("total_tokens")
    if type(stated) is not int or stated != total:
        return False
    row["input_tokens"], row["output_tokens"], row["total_tokens"] = entered, said, total
    members = len(raw)
    if members == 3:
        return True
    for key, known, most in ((names[2], INPUT_DETAILS, entered), (names[3], OUTPUT_DETAILS, said)):
        if key in raw:
            members -= 1
            details = raw[key]
            if details is not None and not _take(row, details, known, most):
                return False
    # What is read from a cache and what is written to it are two parts of the same.
    written = row.get(_WRITTEN)
    return members == 3 and not (written and written + (row.get(_READ) or 0) > entered)


def _take(row: Row, details: Document, known: Mapping[str, str], most: int) -> bool:
    """The parts of a whole; False where one is no count, more than the whole, or not known."""
    for key, value in details.items():
        if value is None:
            if key not in known:
                return False
            continue
        if type(value) is not int or not 0 <= value <= most:
            return False
        field = known.get(key)
        if field is None:
            return False
        if value or field not in row:
            if row.get(field):
                return False  # said twice
            row[field] = value
    return True


_ANTHROPIC = frozenset(
    (
        *("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "cache_creation"),
        *("service_tier", "server_tool_use", "inference_geo"),
    )
)


def _anthropic_message(row: Row, document: Document) -> bool:
    raw: dict[str, Any] = document["usage"]
    if document.get("type") != "message" or not raw.keys() <= _ANTHROPIC or raw.get("server_tool_use") is not None:
        return False
    region = raw.get("inference_geo")  # the one member of any form: whatever is kept of `raw` is small and flat
    if region is not None and (type(region) is not str or len(region) >= USAGE_CHARS_MAX):
        return False
    counts = [
        raw.get("input_tokens"),
        raw.get("output_tokens"),
        raw.get("cache_read_input_tokens"),
        raw.get("cache_creation_input_tokens"),
    ]
    for value in counts:
        if value is not None and (type(value) is not int or not 0 <= value <= COUNT_MAX):
            return False
    plain, said, read, written = counts
    if not plain or not said:
        return False
    entered = plain + (read or 0) + (written or 0)
    row["input_tokens"], row["output_tokens"], row["total_tokens"] = entered, said, entered + said
    if read is not None:
        row["cache_read_input_tokens"] = read
    if written is not None:
        row["cache_write_input_tokens"] = written
    split = raw.get("cache_creation")
    if split is not None:
        if len(split) != 2 or written is None:
            return False
        short, long = split["ephemeral_5m_input_tokens"], split["ephemeral_1h_input_tokens"]
        if type(short) is not int or type(long) is not int or short < 0 or long < 0 or short + long != written:
            return False
        row["cache_write_5m_input_tokens"], row["cache_write_1h_input_tokens"] = short, long
    if found := name(document.get("stop_reason")):
        row["finish_reasons"] = [found]
    if not _named(row, document, raw.get("service_tier")):
        return False
    row["raw_usage"] = raw
    return True
