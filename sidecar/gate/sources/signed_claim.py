"""A signed claim (JWS, RFC 7515, compact): who may be believed, and what it says.

Only RSA with SHA-2 (`RS256`, `RS384`, `RS512`) is taken, whether a key is there to check it with or not: a token that
says `none` was signed by nobody, and one that says `HS…` would be checked with a key that is public. Checking a
signature is arithmetic on public numbers, so that it needs no package of its own; that the padding is right to the
last bit is seen by building the whole block and comparing (RFC 8017, section 8.2.2, and why: CVE-2006-4339).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from dataclasses import dataclass
from typing import Any, Final

import orjson

from sidecar.storage.http_client import NoAnswer

CLAIM_CHARS_MAX: Final = 16_384  # a claim of the vendor's has 1,500
KEY_BITS_MIN: Final = 2048  # RFC 7518, section 3.3
KEY_BITS_MAX: Final = 8192  # a larger one would make each check a matter of milliseconds

_DIGESTS: Final = {"RS256": "sha256", "RS384": "sha384", "RS512": "sha512"}
_DIGEST_INFO: Final = {  # RFC 8017, section 9.2, note 1: what stands before the digest
    "sha256": bytes.fromhex("3031300d060960864801650304020105000420"),
    "sha384": bytes.fromhex("3041300d060960864801650304020205000430"),
    "sha512": bytes.fromhex("3051300d060960864801650304020305000440"),
}
_BASE64URL: Final = re.compile(r"[A-Za-z0-9_-]+")
_PEM: Final = re.compile(r"-----BEGIN (RSA )?PUBLIC KEY-----([A-Za-z0-9+/=\s]+)-----END (RSA )?PUBLIC KEY-----")
_RSA: Final = bytes.fromhex("300d06092a864886f70d0101010500")  # AlgorithmIdentifier: rsaEncryption, NULL
_EXPECTED: Final = f"expected an RSA public key (PEM) of {KEY_BITS_MIN} to {KEY_BITS_MAX} bits"


@dataclass(frozen=True, slots=True)
class PublicKey:
    """An RSA public key."""

    modulus: int
    exponent: int

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """From PEM, as `PUBLIC KEY` or `RSA PUBLIC KEY`. Raises `ValueError` with what was expected."""
        found = _PEM.search(text)
        if found is None or found[1] != found[3]:
            raise ValueError(_EXPECTED)
        try:
            outer = _Der(base64.b64decode("".join(found[2].split()), validate=True)).inside(0x30)
            if found[1] is None:
                if not outer.data.startswith(_RSA):
                    raise ValueError
                bits = _Der(outer.data[len(_RSA) :]).inside(0x03)
                if bits.data[:1] != b"\0":
                    raise ValueError
                outer = _Der(bits.data[1:]).inside(0x30)
            modulus, exponent = outer.integer(), outer.integer()
        except (ValueError, IndexError):
            raise ValueError(_EXPECTED) from None
        if not KEY_BITS_MIN <= modulus.bit_length() <= KEY_BITS_MAX or exponent % 2 == 0 or not 2 < exponent < 2**33:
            raise ValueError(_EXPECTED)
        return cls(modulus, exponent)

    def verifies(self, algorithm: str, message: bytes, signature: bytes) -> bool:
        """Whether the holder of the key signed `message` (RSASSA-PKCS1-v1_5)."""
        size = (self.modulus.bit_length() + 7) // 8
        number = int.from_bytes(signature)
        if len(signature) != size or number >= self.modulus:
            return False
        digest = _DIGESTS[algorithm]
        tail = _DIGEST_INFO[digest] + hashlib.new(digest, message).digest()
        block = b"\0\1" + b"\xff" * (size - len(tail) - 3) + b"\0" + tail
        return hmac.compare_digest(pow(number, self.exponent, self.modulus).to_bytes(size), block)


@dataclass(slots=True)
class _Der:
    """As much of DER as a public key needs."""

    data: bytes
    at: int = 0

    def inside(self, tag: int) -> _Der:
        """What is inside of the next value, which must be of this kind."""
        if self.data[self.at] != tag:
            raise ValueError
        length, start = self.data[self.at + 1], self.at + 2
        if length & 0x80:
            count = length & 0x7F
            if not 1 <= count <= 4:
                raise ValueError
            length, start = int.from_bytes(self.data[start : start + count]), start + count
        self.at = start + length
        if self.at > len(self.data):
            raise ValueError
        return _Der(self.data[start : self.at])

    def integer(self) -> int:
        return int.from_bytes(self.inside(0x02).data, signed=True)


def read_claim(token: object, key: PublicKey | None) -> dict[str, Any] | NoAnswer:
    """The claims of a token that may be believed. Without a key its signature is not checked, and TLS is trusted."""
    if not isinstance(token, str) or len(token) > CLAIM_CHARS_MAX:
        return NoAnswer("no_claim")
    parts = token.split(".")
    if len(parts) != 3:
        return NoAnswer("no_claim")
    header = _object(parts[0])
    claims = _object(parts[1])
    if header is None or claims is None:
        return NoAnswer("no_claim")
    algorithm = header.get("alg")
    if not isinstance(algorithm, str) or algorithm not in _DIGESTS or "crit" in header:
        return NoAnswer("claim_algorithm")
    if key is not None:
        signature = _bytes(parts[2])
        if signature is None or not key.verifies(algorithm, f"{parts[0]}.{parts[1]}".encode(), signature):
            return NoAnswer("claim_signature")
    return claims


def _bytes(part: str) -> bytes | None:
    if not _BASE64URL.fullmatch(part):
        return None
    try:
        return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
    except (binascii.Error, ValueError):
        return None


def _object(part: str) -> dict[str, Any] | None:
    raw = _bytes(part)
    try:
        found = None if raw is None else orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None
