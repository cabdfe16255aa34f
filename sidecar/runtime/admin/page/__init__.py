"""The page that the admin port shows at `/`: files beside this one, sent as they are.

It is written by hand and needs no build. It asks this port alone (its policy forbids the browser anything else), for
what the commands say too; a name that came over the wire is only ever a text in it. The files show no customer, so they
are sent to whoever may call the port; what the page asks for then needs the token, and the page asks its reader for it.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from aiohttp import web
from aiohttp.helpers import ETag

HOME: Final = "index.html"
TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml; charset=utf-8",
}
# Nothing from elsewhere, no script or style in the page's own text, no frame around it, and no text that a browser
# would take for HTML: Trusted Types has it refuse `innerHTML`, which the page does not use.
POLICY: Final = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Asked for again each time and answered with 304: a newer sidecar has its own page at once.
    "Cache-Control": "no-cache",
    "Vary": "Accept-Encoding",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One file as it is sent. `tag`: of its content."""

    body: bytes
    packed: bytes
    tag: str
    content_type: str

    @classmethod
    def of(cls, path: Path) -> File:
        body = path.read_bytes()
        return cls(
            body=body,
            packed=gzip.compress(body, 9, mtime=0),
            tag=sha256(body).hexdigest()[:32],
            content_type=TYPES[path.suffix],
        )

    def response(self, request: web.Request) -> web.Response:
        headers = {**HEADERS, "Content-Type": self.content_type}
        tags = request.if_none_match or ()
        if any(tag.value in (self.tag, "*") for tag in tags):
            response = web.Response(status=304, headers=headers)
        elif "gzip" in request.headers.get("Accept-Encoding", ""):
            response = web.Response(body=self.packed, headers={**headers, "Content-Encoding": "gzip"})
        else:
            response = web.Response(body=self.body, headers=headers)
        # Weak: the packed form has other bytes and says the same.
        response.etag = ETag(self.tag, is_weak=True)
        return response


def files() -> dict[str, File]:
    """All of the page by name. Read once, when the port is opened: some 60 KB."""
    folder = Path(__file__).parent
    return {path.name: File.of(path) for path in sorted(folder.iterdir()) if path.suffix in TYPES}


def add(app: web.Application) -> None:
    """Answer `/` and what the page consists of."""
    known = files()

    async def home(request: web.Request) -> web.Response:
        return known[HOME].response(request)

    async def part(request: web.Request) -> web.Response:
        found = known.get(request.match_info["name"])
        if found is None:
            raise web.HTTPNotFound
        return found.response(request)

    app.router.add_get("/", home)
    app.router.add_get("/page/{name}", part)
