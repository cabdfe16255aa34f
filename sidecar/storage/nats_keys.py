"""Who we are at a NATS server that knows keys: the seed of a user's nkey, or a `.creds` file of JWT and seed.

A seed is base32 of two bytes (that it is a seed, and whose), the 32 of an Ed25519 key, and their CRC-16
(https://github.com/nats-io/nkeys); a `.creds` file has a JWT and a seed, each between lines of dashes. The client reads
both as they are: in a file without a JWT it looks for one without end, of a seed without a line end behind it drops a
letter, and a seed with a slip of the pen is a good one of somebody else. So both are read here, once, and handed over
anew.

No text of an error has anything of what was read. The package `nkeys` is needed to sign, and imported then.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from typing import Final

from sidecar.model.grammar import UnfitSecret

SEED: Final = re.compile(r"S[A-Z2-7]{57}")
_PART: Final = "-{3,}[ \t]*BEGIN %s[ \t]*-{3,}\\s+([\\w.=-]+)\\s+-{3,}[ \t]*END"
_JWT: Final = re.compile(_PART % "NATS USER JWT", re.ASCII)
_KEY: Final = re.compile(_PART % "USER NKEY SEED", re.ASCII)
_OF_SEED: Final = 18 << 3
_OF_USER: Final = 20 << 3


def read_seed(text: str) -> str:
    """The seed of a user's nkey. Raises `UnfitSecret`."""
    found = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if len(found) != 1 or not SEED.fullmatch(found[0]):
        raise UnfitSecret("expected the seed of a user's nkey: one line of 58 letters that begins with SU")
    raw = base64.b32decode(found[0] + "=" * (-len(found[0]) % 8))
    if binascii.crc_hqx(raw[:-2], 0) != int.from_bytes(raw[-2:], "little"):
        raise UnfitSecret("expected the seed of a user's nkey: a letter of this one is wrong, or missing")
    if raw[0] & 0xF8 != _OF_SEED or (raw[0] & 7) << 5 | raw[1] >> 3 != _OF_USER:
        raise UnfitSecret("expected the seed of a user's nkey: this one is of an account or another")
    return found[0]


def read_creds(text: str) -> str:
    """A `.creds` file, written as the client reads it. Raises `UnfitSecret`."""
    jwt, seed = _JWT.search(text), _KEY.search(text)
    if jwt is None or seed is None:
        raise UnfitSecret("expected a .creds file: a NATS USER JWT and a USER NKEY SEED, each between lines of dashes")
    if claims(jwt[1]) is None:
        raise UnfitSecret("expected a .creds file: what it has as NATS USER JWT is none")
    return (
        f"-----BEGIN NATS USER JWT-----\n{jwt[1]}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{read_seed(seed[1])}\n------END USER NKEY SEED------\n"
    )


def claims(jwt: str) -> dict[str, object] | None:
    """What a JWT says, unchecked: the server looks at the signature. None where it is no JWT."""
    parts = jwt.split(".")
    try:
        found = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (IndexError, ValueError):
        return None
    return found if isinstance(found, dict) and len(parts) == 3 and isinstance(found.get("sub"), str) else None


def creds_problem(text: str, now_s: float) -> str | None:
    """Why a server will not take what `read_creds` made, as far as it can be told here; `now_s` is Unix time."""
    jwt, seed = _JWT.search(text), _KEY.search(text)
    said = None if jwt is None else claims(jwt[1])
    if said is None or seed is None:
        return "it is no .creds file"
    if said["sub"] != public_key(seed[1]):
        return "its JWT is of another key than its seed: take both from one file"
    ends = said.get("exp")
    if isinstance(ends, (int, float)) and 0 < ends <= now_s:
        return "its JWT has expired: have a new one issued"
    return None


def public_key(seed: str) -> str:
    """Of the key that a seed is of. Needs the package `nkeys`."""
    import nkeys

    return str(nkeys.from_seed(bytearray(seed, "ascii")).public_key.decode())
