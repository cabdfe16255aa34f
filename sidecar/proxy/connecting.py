"""How either way of a call comes by a new connection to the upstream, and what is to be said where it does not."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

from sidecar.gate.admission import Response
from sidecar.proxy import local_responses
from sidecar.proxy.context import Hop
from sidecar.proxy.local_responses import LocalResponse
from sidecar.proxy.upstream import NO_RESOURCES, TIMEOUT, UnreachableError, Upstream, UpstreamConnection

SHORTAGE_WAIT_S: Final = 0.1  # between two looks whether there are descriptors again


@dataclass(frozen=True, slots=True)
class Why:
    """What is to be said of an event. The texts are ours and fixed."""

    own: LocalResponse | Response | None = None
    error: str | None = None
    reason: str | None = None  # one of the words of `upstream`
    clean: bool = True  # the connection ended in good order


NOTHING: Final = Why()


class NotConnectedError(Exception):
    """There is no connection to the upstream, and why."""

    def __init__(self, why: Why) -> None:
        super().__init__(why.error)
        self.why = why


async def connect(hop: Hop, upstream: Upstream) -> UpstreamConnection:
    """A new connection. A short want of descriptors (a burst of clients that are just being refused) is waited out, not
    answered. Raises `NotConnectedError`."""
    timeout_s = patience_s = hop.settings.upstream_connect_timeout_s
    while True:
        try:
            return await upstream.connect()
        except TimeoutError:
            within = f"no connection within {timeout_s:g} s"
            raise NotConnectedError(Why(local_responses.CONNECT_TIMEOUT, within, TIMEOUT)) from None
        except UnreachableError as error:
            patience_s -= SHORTAGE_WAIT_S
            if error.reason != NO_RESOURCES or patience_s < 0:
                raise NotConnectedError(Why(local_responses.UNREACHABLE, error.words, error.reason)) from error
        await asyncio.sleep(SHORTAGE_WAIT_S)
