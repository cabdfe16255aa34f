"""The session of Stripe's event stream: a token for fifteen minutes, made when it is needed.

One request for a token at a time, whoever waits for it. No event has left when a session cannot be made, so
every failure here is a `Retry` or a `Blocked`, never an `Unknown`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Final

from sidecar.backends.http import Answer, HttpClient, verdict_of
from sidecar.model.delivery import Blocked, Dedup, Retry

SESSION: Final = "/v2/billing/meter_event_session"
MARGIN_S: Final = 60.0  # a token is not used in its last minute: clocks differ, and requests take time
LIFE_S: Final = 900.0  # documented; taken where the answer names no end


class StreamSession:
    """Hands out the token of the running session."""

    def __init__(
        self, client: HttpClient, address: str, headers: Mapping[str, str], clock: Callable[[], float]
    ) -> None:
        self._client = client
        self._url = address + SESSION
        self._headers = {**headers, "content-type": "application/json"}
        self._clock = clock
        self._token: str | None = None
        self._until_s = 0.0
        self._lock = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<StreamSession: {'none' if self._token is None else 'running'}>"

    async def token(self) -> str | Retry | Blocked:
        """A token that holds for a while yet, or why there is none."""
        async with self._lock:
            if self._token is None or self._clock() >= self._until_s - MARGIN_S:
                return await self._begin()
            return self._token

    def forget(self, token: str) -> None:
        """The stream turned this token down."""
        if self._token == token:
            self._token = None

    async def _begin(self) -> str | Retry | Blocked:
        began_s = self._clock()
        answer = await self._client.request("POST", self._url, b"{}", self._headers)
        if not isinstance(answer, Answer):
            return answer if isinstance(answer, Blocked) else Retry(f"session_{answer.reason}")
        if answer.ok and answer.cut is not None:
            return Retry(f"session_{answer.cut}")
        said = answer.json()
        token = said.get("authentication_token") if isinstance(said, dict) else None
        if answer.ok and isinstance(token, str) and token.isascii() and token.isprintable():
            self._token, self._until_s = token, began_s + LIFE_S
            ends = _seconds(said.get("expires_at"))
            if ends is not None:
                self._until_s = min(self._until_s, ends)
            return token
        verdict = verdict_of(answer, dedup=Dedup.EVENT_ID, now_s=self._clock())
        if isinstance(verdict, (Retry, Blocked)):
            return verdict
        return Blocked("no_session")


def _seconds(text: object) -> float | None:
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return None
