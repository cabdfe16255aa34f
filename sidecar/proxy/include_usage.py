"""Asking for usage on a client's behalf (`SIDECAR_ASK_FOR_USAGE`): the one place where the hop changes a message.

Off unless it is switched on, and then only for small plain JSON bodies whose usage would otherwise not be stated.
The body is gathered before it leaves, because its length changes; what nobody may change (a signed or digested body,
one that waits for a 100) is passed on as ever.
"""

from __future__ import annotations

import logging
from typing import Final

from sidecar.proxy.request_body import Upload
from sidecar.usage import RawHeaders, RequestTap
from sidecar.usage.include_usage import BODY_MAX_BYTES

log = logging.getLogger(__name__)

# With one of these in its head a body is to arrive as it was sent, or is not plain JSON of a known length.
_HANDS_OFF: Final = frozenset({
    b"content-encoding", b"transfer-encoding", b"expect", b"content-md5", b"digest", b"content-digest",
    b"repr-digest", b"signature", b"signature-input", b"x-amz-content-sha256", b"x-signature",
})  # fmt: skip


def may_change(method: str, fields: RawHeaders) -> bool:
    """Whether this head leaves room for another body than the client's."""
    if method != "POST":
        return False
    length = -1
    for name, value in fields:
        lower = name.lower()
        if lower in _HANDS_OFF or (lower == b"content-type" and b"json" not in value.lower()):
            return False
        if lower == b"content-length":
            if length >= 0 or not value.isdigit():
                return False
            length = int(value)
    return 0 < length <= BODY_MAX_BYTES


def head_of(fields: RawHeaders, size_bytes: int) -> RawHeaders:
    """The head of a body that was changed. The answer has to come plain, or the extra chunk could not be taken out."""
    own = {b"content-length": b"%d" % size_bytes, b"accept-encoding": b"identity"}
    return [(name, own.get(name.lower(), value)) for name, value in fields]


class Gathering:
    """A body that is kept back until it is whole, because asking for usage changes its length."""

    __slots__ = ("_pieces", "_tap", "asked", "upload")

    def __init__(self, upload: Upload, tap: RequestTap) -> None:
        self.upload = upload
        self._tap = tap
        self._pieces: list[bytes] = []
        self.asked = False

    def take(self) -> bytes | None:
        """Take what has come; once that is all, the body that goes upstream. The tap is shown that one."""
        self._pieces.append(self.upload.take())
        if not self.upload.done:
            return None
        body = b"".join(self._pieces)
        try:
            changed = self._tap.with_usage_asked(body)
            self._tap.feed(body if changed is None else changed)
        except Exception:
            log.exception("the request tap failed; the body goes on as it is")
            return body
        self.asked = changed is not None
        return body if changed is None else changed
