"""The asked side of the stand-ins: whom a name stands for, and claims that are signed.

Nobody can be registered here, so a customer is what its id says: one that begins with `unknown` is not there, and one
that ends in `-quota-<n>` may use n of whatever is counted, in `-balance-<n>` has n dollars. What was delivered for it
counts against that, so that a sidecar that meters here is turned away by what it has reported itself.

Claims are signed with a key that is worth nothing: both halves of it are below. `GET /_claim_key` gives the public
one, as an operator would have it from the vendor.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Final

import orjson

from sidecar.dev.mock_backends.contract import Memory
from sidecar.dev.mock_backends.faults import GateLie

UNKNOWN: Final = "unknown"
PRICE: Final = Decimal("0.01")  # of each event, where a wallet pays
WALLET: Final = 100  # dollars of a customer whose id says nothing else

_ENDS: Final = re.compile(r"-(quota|balance|limit)-(\d{1,9})$")
_DIGEST_INFO: Final = bytes.fromhex("3031300d060960864801650304020105000420")  # SHA-256, as in RFC 8017
_MODULUS: Final = int(
    "b4eea27c74e873bed17f2bb07261b496f7db91bd9fc701b97a0d30d4d472f1b47c981a78b3a9a1230e8d2591db2c82d7"
    "9d2c15cdb02f6b1a8bac3438889d7a86f0a5e51492758684dd45928325dcbf12cc8c89fe24dd2043b0a354946ba3521d"
    "cdf08198afd8cb17206e9a3e002814ad62ff70cf7db70e441e7b33e46d3e6c409bd6270eac7e900ed3777f635474a7a3"
    "34574b698f7751df42183f6a0a4f08717ce14188a5f9e2d89c2d0c8e2129e4befcb80a4cc04f35e809bed9c1095e37f4"
    "54b31ec95194f2b35bef7bc6a4d6db6322c1f2d5c5c3a1755d2e6672945e8b8b1a14253951340729b8b851eb894d76da"
    "03110a98ef25adce2de4b5b33028ee63",
    16,
)
_PRIVATE: Final = int(
    "06e39ca9221e6de4b5a8171f7f9ce497229c50d379cf8077090492a6695de481f2e14305dc3f38c38dc577b1ed0a33a6"
    "a3af7d662175829207ba85a680523f6e5c14a2129a8b8dc3663e2d75ae2dd65e1bb1bc64ce0f6f2fe1b68942e803c03a"
    "c56171f51216741bb7c62424ca925f067427b5f02f21226403f6eb51b8460b8eb7eb2075bab9cc63a57f9986be4d404f"
    "225428536a154530af6c3e3718cf583aab182d547ef11e81537e78bd6b09098e7891ab9751cbc1f8e45af27f5441f87a"
    "a40df16b8b32d678da7bb7b7401a5e4596ed86a1b6ce329fa7c91e3dfc93e7f1dfa54237fccb121a8668ff243aef4386"
    "1c9fa25f2b6090599cb1e1a4f23f7611",
    16,
)
PUBLIC_KEY: Final = """\
-----BEGIN PUBLIC KEY-----
MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEAtO6ifHToc77RfyuwcmG0
lvfbkb2fxwG5eg0w1NRy8bR8mBp4s6mhIw6NJZHbLILXnSwVzbAvaxqLrDQ4iJ16
hvCl5RSSdYaE3UWSgyXcvxLMjIn+JN0gQ7CjVJRro1IdzfCBmK/Yyxcgbpo+ACgU
rWL/cM99tw5EHnsz5G0+bECb1icOrH6QDtN3f2NUdKejNFdLaY93Ud9CGD9qCk8I
cXzhQYil+eLYnC0MjiEp5L78uApMwE816Am+2cEJXjf0VLMeyVGU8rNb73vGpNbb
YyLB8tXFw6F1XS5mcpRei4saFCU5UTQHKbi4UeuJTXbaAxEKmO8lrc4t5LWzMCju
YwIDAQAB
-----END PUBLIC KEY-----
"""


def allowed(name: str, word: str) -> int | None:
    """What a name ends in: the n of `-<word>-<n>`; None where it says nothing of the kind."""
    found = _ENDS.search(name)
    return int(found[2]) if found is not None and found[1] == word else None


def is_unknown(name: str) -> bool:
    return name.startswith(UNKNOWN)


def consume(memory: Memory, customer: object, amounts: Mapping[str, int], now_s: float) -> None:
    """Count what an event says that a customer used."""
    if not isinstance(customer, str):
        return
    used: dict[str, int] = dict(memory.recall(f"consumed:{customer}", now_s) or {})
    for name, amount in amounts.items():
        used[name] = used.get(name, 0) + amount
    memory.keep(f"consumed:{customer}", used, now_s)


def consumed(memory: Memory, customer: str, name: str, now_s: float) -> int:
    return int((memory.recall(f"consumed:{customer}", now_s) or {}).get(name, 0))


def dollars_left(memory: Memory, customer: str, now_s: float) -> Decimal:
    """What a wallet has left: of what the customer's id says, each event took the same price."""
    given = allowed(customer, "balance")
    return Decimal(WALLET if given is None else given) - PRICE * consumed(memory, customer, "events", now_s)


def signed(claims: Mapping[str, Any], lie: str | None = None) -> str:
    """A token with these claims (JWS, compact), or one that nobody should believe."""
    algorithm = {GateLie.CLAIM_UNSIGNED: "none", GateLie.CLAIM_SHARED_KEY: "HS256"}.get(GateLie(lie)) if lie else None
    parts = (orjson.dumps({"alg": algorithm or "RS256", "typ": "JWT"}), orjson.dumps(claims))
    message = b".".join(map(_base64, parts))
    if lie == GateLie.CLAIM_UNSIGNED:
        return message.decode() + "."
    signature = _signature(message)
    if lie == GateLie.CLAIM_FORGED:
        signature = signature[:-1] + bytes([signature[-1] ^ 1])
    return f"{message.decode()}.{_base64(signature).decode()}"


def _signature(message: bytes) -> bytes:
    """RSASSA-PKCS1-v1_5 with SHA-256."""
    size = (_MODULUS.bit_length() + 7) // 8
    tail = _DIGEST_INFO + hashlib.sha256(message).digest()
    block = b"\0\1" + b"\xff" * (size - len(tail) - 3) + b"\0" + tail
    return pow(int.from_bytes(block), _PRIVATE, _MODULUS).to_bytes(size)


def _base64(part: bytes) -> bytes:
    return base64.urlsafe_b64encode(part).rstrip(b"=")
