"""One attempt: a backend is asked once, and whatever it does comes back as one verdict for each event."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from sidecar.delivery.limits import Limits
from sidecar.verdict import Backend, Sealed, Unknown, Verdict

_LOG = logging.getLogger(__name__)


async def ask(backend: Backend, sealed: Sealed, limits: Limits) -> Sequence[Verdict]:
    count = len(sealed.events)
    try:
        async with asyncio.timeout(limits.send_limit_s):
            verdicts = await backend.send(sealed)
    except TimeoutError:
        return [Unknown("no_answer")] * count
    except Exception as error:  # noqa: BLE001 - a surprise in one backend is one unknown outcome
        _tell(backend, "a backend raised; the outcome is taken for unknown", error=type(error).__name__)
        return [Unknown(f"raised_{type(error).__name__}")] * count
    if len(verdicts) != count:
        _tell(backend, "a backend gave another number of verdicts than there are events")
        return [Unknown("verdicts_missing")] * count
    return verdicts


def _tell(backend: Backend, text: str, **facts: object) -> None:
    _LOG.error(text, extra={"facts": {"backend": backend.name, **facts}})
