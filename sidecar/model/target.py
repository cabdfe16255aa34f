"""The normal form of a request target: what the upstream will take it to mean, whatever its spelling.

What is forwarded keeps every byte of the client's spelling. Whoever asks *which* resource is meant (the reader of
usage, a route, a subscriber in the path) asks with the normal form, so that `/v1/%6dessages` and `/v1/x/../messages`
are what the upstream takes them for: `/v1/messages`. The steps are those of RFC 3986, section 6.2.2 (escapes of
unreserved characters decoded, the others in upper case, dot segments removed), and doubled slashes count as one, as
nginx and most routers have it. What a lenient server does beyond that (letter case, `%2F` as a slash, `;parameters`)
is not assumed.
"""

from __future__ import annotations

import re
from typing import Final

_ABSOLUTE: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://([^/?#]*)")
_SPELLED: Final = re.compile(r"%|//|/\.|^(?!/)")  # a path without any of these is in its normal form
_ESCAPE: Final = re.compile(r"%([0-9A-Fa-f]{2})")
_SLASHES: Final = re.compile(r"/{2,}")
_AUTHORITY: Final = re.compile(rb"[A-Za-z0-9._~!$%&'()*+,;=:\[\]-]*")
_UNRESERVED: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


def normal_path(target: str, base: str = "") -> str:
    """The path of `target` in its normal form, without its query; `*` stays as it is.

    `target` is in origin form (`/v1/chat?x=1`) or absolute form (`http://any.host/v1/chat`, of which only the path
    counts: it is all that is forwarded). `base` is the upstream URL's own path, without a slash at its end; it goes in
    front *before* dot segments are removed, because the upstream sees them so.
    """
    path = base + path_of(target)
    if _SPELLED.search(path) is None or path == "*":
        return path
    path = _SLASHES.sub("/", _ESCAPE.sub(_decoded, path))
    return _without_dots(path) if "/." in path else path


def client_path(target: str, base: str = "") -> str:
    """The path below the upstream's `base`, in its normal form: which route it is, and whom it names.

    Dot segments are removed where the upstream removes them, behind its base. A target that climbs out of the base
    (`/../other`) is what the upstream sees, base and all: there is no path below.
    """
    return below(base, path_of(target))


def below(base: str, path: str) -> str:
    """`client_path` of a target that is taken apart already: `path` has no authority, query or fragment."""
    if path == "*" or _SPELLED.search(path) is None:
        return path
    if not base:
        return normal_path(path)
    whole, front = normal_path(path, base), normal_path(base)
    return (whole.removeprefix(front) or "/") if f"{whole}/".startswith(f"{front}/") else whole


def path_of(target: str) -> str:
    """The path of a target as it stands there, without authority, query and fragment."""
    return origin_form(target)[0].partition("?")[0].partition("#")[0]


def query_of(target: str) -> str:
    """The query of a target as it stands there. A `?` behind the fragment's `#` begins none."""
    return origin_form(target)[0].partition("#")[0].partition("?")[2]


def origin_form(target: str) -> tuple[str, str | None]:
    """The target as it goes upstream, and the authority that an absolute form named (without credentials).

    An absolute form loses its scheme and authority, which choose no upstream here; anything else stays as it is.
    """
    if target.startswith("/") or target == "*" or (match := _ABSOLUTE.match(target)) is None:
        return target, None
    rest = target[match.end() :]
    return rest if rest.startswith("/") else "/" + rest, match[1].rpartition("@")[2]


def is_authority(host: bytes) -> bool:
    """Whether it may stand in a `Host` field (RFC 9112, 3.2); empty, it may. As Go's server has it: `_` too, no `@`."""
    return _AUTHORITY.fullmatch(host) is not None


def _decoded(escape: re.Match[str]) -> str:
    character = chr(int(escape[1], 16))
    return character if character in _UNRESERVED else escape[0].upper()


def _without_dots(path: str) -> str:
    """RFC 3986, section 5.2.4, for an absolute path without doubled slashes."""
    kept: list[str] = []
    segments = path.split("/")[1:]
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    if segments[-1] in (".", ".."):
        kept.append("")
    return "/" + "/".join(kept)
