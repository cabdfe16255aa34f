"""`webhook`: the records themselves, as lines of JSON, signed.

The signature follows the Standard Webhooks convention, so that receivers can check it with any of its
libraries:

    webhook-id: <key of the request, the same at every attempt>
    webhook-timestamp: <Unix seconds of this attempt>
    webhook-signature: v1,<base64 of HMAC-SHA256 over "id.timestamp.body">

A secret written `whsec_<base64>` is decoded, any other is taken as its UTF-8 bytes. Several secrets with
spaces between give several signatures, which is how one is replaced without a gap. Lines are the stored
bytes of the records, never made anew. A receiver that remembers `webhook-id` sees each batch once.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import time
from typing import Final

from sidecar.backends.answers import ANSWERS
from sidecar.backends.base import Context, RecordSettings
from sidecar.backends.batching import seal_lines
from sidecar.backends.http import BODY_BYTES_MAX, HEADER_TEXT, HttpBackend, HttpSettings
from sidecar.model.delivery import Abilities, Atomicity, Dedup, Encoded, Sealed, Verdict
from sidecar.model.grammar import UnfitSecret
from sidecar.model.record import Record
from sidecar.settings import Secret, required_setting, secret_setting, setting, types

BATCH_DEFAULT: Final = 100
SECRET_BYTES_MIN: Final = 16  # shorter ones can be guessed; the convention asks for 24 to 64


def _secret_text(value: str) -> str:
    read_secrets(value)
    return value


@dataclass(frozen=True, kw_only=True)
class WebhookSettings(RecordSettings, HttpSettings):
    url: str = required_setting(types.http_url_query, "where to POST the records, as it is")
    secret: Secret | None = secret_setting(
        types.Kind("signing secrets", _secret_text), "signs each request; several with spaces between"
    )
    api_key: Secret | None = secret_setting(HEADER_TEXT, "sent as `Authorization: Bearer …`")
    batch: int = setting(types.count(1, 10_000), str(BATCH_DEFAULT), "most records in one request")
    dedup_window: float = setting(types.duration(), "24h", "how long the receiver remembers a `webhook-id`")


class WebhookBackend(HttpBackend[WebhookSettings]):
    """Batches of records to an address of the operator's."""

    name = "webhook"
    settings_type = WebhookSettings

    def __init__(self, settings: WebhookSettings, context: Context, *, clock: Callable[[], float] = time) -> None:
        self.abilities = Abilities(
            events_max=settings.batch,
            bytes_max=BODY_BYTES_MAX,
            atomicity=Atomicity.ALL_OR_NOTHING,
            dedup=Dedup.REQUEST_KEY,
            dedup_window_s=settings.dedup_window,
            bills=False,
        )
        super().__init__(settings, context, clock=clock)
        self._secrets = [] if settings.secret is None else read_secrets(settings.secret.reveal())

    def encode(self, records: Sequence[Record]) -> Encoded:
        return seal_lines(records, self._policy, self.abilities)

    async def send(self, sealed: Sealed) -> list[Verdict]:
        stamp = int(self._clock())
        headers = {**self._headers, "webhook-id": sealed.key, "webhook-timestamp": str(stamp)}
        if self._secrets:
            signatures = (sign(secret, sealed.key, stamp, sealed.body) for secret in self._secrets)
            headers["webhook-signature"] = " ".join(signatures)
        return await self._client.offer(self._settings.url, sealed, headers, ANSWERS["webhook"])


def sign(secret: bytes, key: str, stamp: int, body: bytes) -> str:
    """One signature as the header has it."""
    digest = hmac.new(secret, f"{key}.{stamp}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode('ascii')}"


def read_secrets(text: str) -> list[bytes]:
    """The signing secrets; raises `UnfitSecret`, which does not repeat them."""
    secrets = [_read_secret(one) for one in text.split()]
    if not secrets or any(len(secret) < SECRET_BYTES_MIN for secret in secrets):
        raise UnfitSecret(f"expected at least {SECRET_BYTES_MIN} bytes in each secret, or whsec_ and their base64")
    return secrets


def _read_secret(text: str) -> bytes:
    if not text.startswith("whsec_"):
        return text.encode()
    try:
        return base64.b64decode(text.removeprefix("whsec_"), validate=True)
    except binascii.Error:
        raise UnfitSecret("expected base64 behind whsec_") from None
