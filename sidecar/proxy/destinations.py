"""Which upstream a call is for: by the host that was called, else by the beginning of its path, else the one for all
the rest. Pure: what stands behind a name is the caller's.

The path is compared as it is spelled, at the border of a segment (`/openai` is no beginning of `/openaix`), and the
longest beginning wins. It is taken off: what comes behind is what the upstream gets, and what routes, subscribers and
readers of usage look at. A spelling that an upstream would take for another path (`/openai/../other`, `/%6fpenai`)
chooses as it stands, so that no spelling gets a call to one upstream with another's key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

from sidecar.model.target import origin_form
from sidecar.settings.upstreams import called_host
from sidecar.usage import RawHeaders

T = TypeVar("T")


class Destinations(Generic[T]):
    """`hosts`: lower case, without ports. `prefixes`: without a slash at their end. `rest`: what matches none."""

    def __init__(self, *, hosts: Mapping[str, T], prefixes: Mapping[str, T], rest: T) -> None:
        self._hosts = dict(hosts)
        self._prefixes = sorted(prefixes.items(), key=lambda pair: -len(pair[0]))
        self._rest = rest

    @property
    def by_host(self) -> bool:
        """Whether the host that was called may choose."""
        return bool(self._hosts)

    def choose(self, target: str, fields: RawHeaders) -> tuple[T, str]:
        """(the upstream, the target as it gets it, below its own base). An absolute form keeps its authority, which
        stands above the `Host` field (RFC 9112, 3.2.2)."""
        origin, authority = origin_form(target)
        if self._hosts:
            found = self._hosts.get(called_host(_host(fields) if authority is None else authority))
            if found is not None:
                return found, target
        for prefix, found in self._prefixes:
            if origin.startswith(prefix):
                rest = origin[len(prefix) :]
                if rest[:1] in ("", "/", "?", "#"):
                    before = target[: len(target) - len(origin)]
                    return found, before + (rest if rest.startswith("/") else "/" + rest)
        return self._rest, target


def _host(fields: RawHeaders) -> str:
    return next((value.decode("latin-1") for name, value in fields if name.lower() == b"host"), "")
