"""WebSocket sessions: one socket, many answers, one `Usage` for each.

The caller hands over every whole message of either side, text or bytes, with fragments joined and compression undone;
of one too large to keep, what was wanted of it. Sound is the bulk of them and is recognised by a byte search; only
messages that may hold usage (or the model's name) are parsed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol
from urllib.parse import parse_qs, unquote

from sidecar.model.exchange import Usage
from sidecar.usage.providers.base import Document, Reader, Tree, build
from sidecar.usage.providers.gemini import Gemini
from sidecar.usage.providers.openai import TERMINAL, Media, Responses
from sidecar.usage.values import lenient_loads, name, part

_SESSION: Tree = {
    "model": True,
    "audio": {"input": {"transcription": True}},
    "input_audio_transcription": True,
}


class Session(Protocol):
    """One socket. `request_model`: that its target names, or a message has since."""

    @property
    def provider(self) -> str | None: ...
    @property
    def request_model(self) -> str | None: ...

    client_places: ClassVar[Tree]
    """What is wanted of a message to the provider that is too large to keep; and of one from it."""
    server_places: ClassVar[Tree]
    client_signs: tuple[bytes, ...]
    """Bytes without one of which a message to the provider has nothing to say; and one from it."""
    server_signs: tuple[bytes, ...]

    def client(self, message: bytes | str | Document) -> None:
        """A message to the provider: it may name the model."""
        ...

    def server(self, message: bytes | str | Document) -> Usage | None:
        """A message from the provider, and the usage that it reports, if it does."""
        ...


class _Session:
    __slots__ = ("_anomaly", "model", "provider", "request_model")

    api: str = ""  # for the README, as is the next
    where: str = ""
    client_signs: tuple[bytes, ...] = ()
    server_signs: tuple[bytes, ...] = ()
    client_places: ClassVar[Tree] = {}
    server_places: ClassVar[Tree] = {}

    def __init__(self, target: str, provider: str | None, anomaly: Callable[[str], None]) -> None:
        self._anomaly = anomaly
        self.provider = provider
        self.request_model = model_of_query(target)
        self.model: str | None = None

    def client(self, message: bytes | str | Document) -> None:
        document = self._document(message, self.client_signs)
        if document is not None:
            self._asked(document)

    def server(self, message: bytes | str | Document) -> Usage | None:
        document = self._document(message, self.server_signs)
        try:
            return self._answered(document) if document is not None else None
        except Exception:  # noqa: BLE001 - a fault in a reader must never become a fault of the call
            self._anomaly("reader_failed")
            return None

    def _document(self, message: bytes | str | Document, signs: tuple[bytes, ...]) -> Document | None:
        if isinstance(message, dict):
            return message
        data = message.encode("utf-8", "replace") if isinstance(message, str) else bytes(message)
        if not any(sign in data for sign in signs):
            return None
        document = lenient_loads(data)
        return document if type(document) is dict else None

    def _asked(self, document: Document) -> None:
        """Note what the client's message says."""

    def _answered(self, document: Document) -> Usage | None:
        raise NotImplementedError

    def _usage(self, reader: Reader, operation: str) -> Usage:
        usage = build(reader, streamed=True, ended=True)
        usage.provider = self.provider
        usage.operation = operation
        usage.request_model = self.request_model
        return usage


class Realtime(_Session):
    """OpenAI realtime: every `response.done`, and every transcription, which another model does at its own price."""

    __slots__ = ("_asked_transcriber", "_transcriber")

    api = "OpenAI realtime"
    where = "`.response.usage` of each `response.done`, `usage` of each finished input transcription"
    client_places: ClassVar[Tree] = {"session": _SESSION}
    server_places: ClassVar[Tree] = {
        "type": True,
        "item_id": True,
        "usage": True,
        "session": _SESSION,
        "response": {"id": True, "model": True, "status": True, "status_details": True, "usage": True},
    }
    client_signs = (b"session.update",)  # a session for transcriptions alone has `transcription_` before it
    server_signs = (b"response.done", b"input_audio_transcription.completed", b"session.created", b"session.updated")

    def __init__(self, target: str, provider: str | None, anomaly: Callable[[str], None]) -> None:
        super().__init__(target, provider, anomaly)
        self._transcriber: str | None = None  # the model that writes down what was said, asked for and in use
        self._asked_transcriber: str | None = None

    def _asked(self, document: Document) -> None:
        session = part(document.get("session"))
        self.request_model = name(session.get("model")) or self.request_model
        self._asked_transcriber = _transcriber(session) or self._asked_transcriber

    def _answered(self, document: Document) -> Usage | None:
        kind = document.get("type")
        if type(kind) is str and kind.endswith(("session.created", "session.updated")):
            session = part(document.get("session"))
            self.model = name(session.get("model")) or self.model
            self._transcriber = _transcriber(session) or self._transcriber
            return None
        if kind == "response.done":
            return self._response(part(document.get("response")))
        if kind == "conversation.item.input_audio_transcription.completed":
            reader = Media(self._anomaly)
            reader.message({"type": "transcript.text.done", "usage": document.get("usage")}, "")
            reader.model = self._transcriber
            usage = self._usage(reader, "transcription")
            usage.request_model = self._asked_transcriber
            usage.response_id = name(document.get("item_id"))
            return usage
        return None

    def _response(self, response: Document) -> Usage:
        reader = Responses(self._anomaly)
        details = part(response.get("status_details"))
        reader.identify(response)
        reader.model = reader.model or self.model
        reader.report(response.get("usage"))
        reader.finished(0, details.get("reason") or response.get("status"))
        reader.fail(details.get("error"))
        if response.get("status") == "failed":
            reader.error = reader.error or "failed"
        reader.final = True
        return self._usage(reader, "realtime")


class MistralTranscriptions(_Session):
    """Mistral's realtime transcription: one `transcription.done` at the end (its package; the seconds that it states
    are reported to be unreliable)."""

    __slots__ = ()

    api = "Mistral realtime transcription"
    where = "`usage` of `transcription.done`"
    server_signs = (b"transcription.done", b"session.created", b"session.updated")
    server_places: ClassVar[Tree] = {**Media.wanted, "session": _SESSION}

    def _answered(self, document: Document) -> Usage | None:
        if document.get("type") != "transcription.done":
            self.model = name(part(document.get("session")).get("model")) or self.model
            return None
        reader = Media(self._anomaly)
        reader.model = self.model
        reader.message(document, "")
        return self._usage(reader, "transcription")


class ResponsesSocket(_Session):
    """OpenAI responses over a WebSocket: the same events as in a stream, many responses a socket."""

    __slots__ = ()

    api = "OpenAI responses over a WebSocket"
    where = "`.response.usage` of each terminal event"
    client_places: ClassVar[Tree] = {"model": True, "response": {"model": True}}
    server_places: ClassVar[Tree] = Responses.wanted
    client_signs = (b"response.create",)
    server_signs = tuple(kind.encode() for kind in TERMINAL)

    def _asked(self, document: Document) -> None:
        inner = part(document.get("response"))
        self.request_model = name(document.get("model")) or name(inner.get("model")) or self.request_model

    def _answered(self, document: Document) -> Usage | None:
        reader = Responses(self._anomaly)
        return self._usage(reader, "chat") if reader.message(document, "") else None


class GeminiLive(_Session):
    """Gemini Live: `usageMetadata` on server messages, once a turn."""

    __slots__ = ()

    api = "Gemini Live"
    where = "`usageMetadata` of each message that has it"
    client_places: ClassVar[Tree] = {"setup": {"model": True}}
    server_places: ClassVar[Tree] = Gemini.wanted
    client_signs = (b'"setup"',)
    server_signs = (b"usageMetadata",)

    def _asked(self, document: Document) -> None:
        model = name(part(document.get("setup")).get("model"))
        if model is not None:
            self.request_model = model.rpartition("/")[2]

    def _answered(self, document: Document) -> Usage | None:
        if not part(document.get("usageMetadata")):
            return None
        reader = Gemini(self._anomaly)
        reader.document(document)
        reader.final = True
        return self._usage(reader, "realtime")


SESSIONS: tuple[tuple[str, type[_Session], str], ...] = (
    ("/transcriptions/realtime", MistralTranscriptions, "mistral_ai"),
    ("/realtime", Realtime, "openai"),
    ("/responses", ResponsesSocket, "openai"),
    (".BidiGenerateContent", GeminiLive, "gcp.gemini"),
    (".BidiGenerateContentConstrained", GeminiLive, "gcp.gemini"),  # with a token made for one session
    (".LlmBidiService/BidiGenerateContent", GeminiLive, "gcp.vertex_ai"),
)
"""The end of the path, the reader, the provider; `openai` also where Azure stands behind, unless pinned."""


def _transcriber(session: Document) -> str | None:
    """The model of the input's transcription: nested in the sound's settings, or beside them in the beta's spelling."""
    given = part(part(part(session.get("audio")).get("input")).get("transcription"))
    return name(given.get("model")) or name(part(session.get("input_audio_transcription")).get("model"))


def session(
    target: str, provider: str | None, anomaly: Callable[[str], None], path: str | None = None
) -> Session | None:
    """The reader of a WebSocket to this target, whose path means `path`; None where its messages are nobody's."""
    path = (target.partition("?")[0] if path is None else path).rstrip("/")
    for end, reader, default in SESSIONS:
        if path.endswith(end):
            return reader(target, provider or default, anomaly)
    return None


def render() -> str:
    """The rows of the README's table: each message with usage is a record of its own, whatever ends the socket."""
    rows = []
    for reader in dict.fromkeys(reader for _, reader, _ in SESSIONS):
        ends = ", ".join(f"`…{end}`" for end, known, _ in SESSIONS if known is reader)
        rows.append(f"| {reader.api} | {ends} (WebSocket) | {reader.where} | each message is a record |")
    return "\n".join(rows) + "\n"


def model_of_query(target: str) -> str | None:
    """Realtime names the model (Azure: the deployment) in the query."""
    query = target.partition("?")[2]
    if not query or len(query) > 4096:
        return None
    try:
        values = parse_qs(query, max_num_fields=64)
    except ValueError:
        return None
    for key in ("model", "deployment"):
        if found := values.get(key):
            return name(unquote(found[0]))
    return None
