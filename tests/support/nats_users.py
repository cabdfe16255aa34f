"""Users of NATS that are known by a key: nkeys, and JWTs of an operator, an account and a user, made by hand.

A JWT of NATS is base64url of a header, of claims, and of an Ed25519 signature by its issuer's key
(https://docs.nats.io/running-a-nats-service/nats_admin/security/jwt). The package `nkeys` signs; a test that needs it
is skipped by name where it is missing.
"""

from __future__ import annotations

import base64
import json
import secrets
import time
from dataclasses import dataclass
from typing import Any

import pytest

NKEYS_PACKAGE = "nkeys"
_UNLIMITED = {
    "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": True, "conn": -1, "leaf": -1,
}  # fmt: skip
_JETSTREAM = {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1}


@dataclass(frozen=True)
class Key:
    """An nkey: its seed, which is secret, and what others know it by."""

    seed: str
    public: str

    def jwt(self, of: Key, name: str, said: dict[str, Any], **more: Any) -> str:
        """What this key says of another."""
        import nkeys

        claims = {
            "jti": secrets.token_hex(16),
            "iat": int(time.time()),
            "iss": self.public,
            "sub": of.public,
            "name": name,
            "nats": {"version": 2, **said},
            **more,
        }
        text = f"{_part({'typ': 'JWT', 'alg': 'ed25519-nkey'})}.{_part(claims)}"
        signature = nkeys.from_seed(bytearray(self.seed.encode())).sign(text.encode())
        return f"{text}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


def key(of: str = "USER") -> Key:
    """A new one, of a USER, an ACCOUNT or an OPERATOR."""
    nkeys = pytest.importorskip("nkeys", reason=f"the package {NKEYS_PACKAGE} is not installed")
    seed = nkeys.encode_seed(secrets.token_bytes(32), getattr(nkeys, f"PREFIX_BYTE_{of}"))
    return Key(seed.decode(), nkeys.from_seed(bytearray(seed)).public_key.decode())


class Operator:
    """Who says which accounts there are: one, which says who its users are."""

    def __init__(self) -> None:
        self._operator, self._account, self._system = key("OPERATOR"), key("ACCOUNT"), key("ACCOUNT")

    @property
    def options(self) -> str:
        """Lines of a server's configuration."""
        own = self._operator.jwt(self._operator, "operator", {"type": "operator"})
        accounts = {
            one.public: self._operator.jwt(one, name, {"type": "account", "limits": limits})
            for one, name, limits in (
                (self._account, "metering", _UNLIMITED | _JETSTREAM),
                (self._system, "system", _UNLIMITED),
            )
        }
        known = "\n".join(f"{public}: {jwt}" for public, jwt in accounts.items())
        # JetStream starts with a system account alone.
        return (
            f"operator: {own}\nsystem_account: {self._system.public}\nresolver: MEMORY\n"
            f"resolver_preload {{\n{known}\n}}\n"
        )

    def creds(self, user: Key | None = None, *, line_end: str = "\n", seed: str | None = None, **claims: Any) -> str:
        """A `.creds` file, as `nsc` writes it; `claims`: more of the JWT; `seed`: in place of the user's own."""
        user = key() if user is None else user
        said = {"type": "user", "pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1}
        jwt = self._account.jwt(user, "sidecar", said, **claims)
        lines = [
            "-----BEGIN NATS USER JWT-----",
            jwt,
            "------END NATS USER JWT------",
            "",
            "************************* IMPORTANT *************************",
            "NKEY Seed printed below ...",
            "",
            "-----BEGIN USER NKEY SEED-----",
            seed or user.seed,
            "------END USER NKEY SEED------",
            "",
        ]
        return line_end.join(lines)


def _part(said: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(said).encode()).rstrip(b"=").decode()
