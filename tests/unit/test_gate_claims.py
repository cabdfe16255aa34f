"""A claim is believed only with the signature that its key makes: checked against another implementation."""

from __future__ import annotations

import base64
from typing import Any

import orjson
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from hypothesis import given
from hypothesis import strategies as st

from sidecar.dev.mock_backends.asked import PUBLIC_KEY, signed
from sidecar.gate.sources.base import NoAnswer
from sidecar.gate.sources.signed_claim import PublicKey, read_claim

PRIVATE = rsa.generate_private_key(65537, 2048)
OTHER = rsa.generate_private_key(65537, 2048)
PEM, RAW = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
HASHES: dict[str, hashes.HashAlgorithm] = {"RS256": hashes.SHA256(), "RS384": hashes.SHA384(), "RS512": hashes.SHA512()}


def pem(key: Any, form: serialization.PublicFormat = RAW) -> str:
    return str(key.public_key().public_bytes(PEM, form).decode())


KEY = PublicKey.parse(pem(PRIVATE))


def part(value: Any) -> str:
    return base64.urlsafe_b64encode(value if isinstance(value, bytes) else orjson.dumps(value)).decode().rstrip("=")


def token(claims: Any, *, alg: Any = "RS256", key: Any = PRIVATE, pad: Any = None, **header: Any) -> str:
    head = f"{part({'alg': alg, **header})}.{part(claims)}"
    digest = HASHES.get(alg if isinstance(alg, str) else "", hashes.SHA256())
    return f"{head}.{part(key.sign(head.encode(), pad or padding.PKCS1v15(), digest))}"


@pytest.mark.parametrize("alg", list(HASHES))
def test_what_another_implementation_signs_is_believed(alg: str) -> None:
    assert read_claim(token({"a": 1}, alg=alg), KEY) == {"a": 1}
    assert read_claim(token({"a": 1}, alg=alg, key=OTHER), KEY) == NoAnswer("claim_signature")


def test_both_forms_of_a_key_are_read() -> None:
    assert PublicKey.parse(pem(PRIVATE, serialization.PublicFormat.PKCS1)) == KEY
    assert PublicKey.parse("a comment\n" + pem(PRIVATE).replace("\n", "\r\n")) == KEY
    numbers = PRIVATE.public_key().public_numbers()
    assert (KEY.modulus, KEY.exponent) == (numbers.n, numbers.e)


def test_what_the_receiver_signs_another_implementation_believes() -> None:
    key = serialization.load_pem_public_key(PUBLIC_KEY.encode())
    assert isinstance(key, rsa.RSAPublicKey)
    head, claims, signature = signed({"a": 1}).split(".")
    raw = base64.urlsafe_b64decode(signature + "==")
    key.verify(raw, f"{head}.{claims}".encode(), padding.PKCS1v15(), hashes.SHA256())


@pytest.mark.parametrize(
    "text",
    [
        "", "no key", pem(PRIVATE)[:200], pem(rsa.generate_private_key(65537, 1024)),
        pem(ec.generate_private_key(ec.SECP256R1())),
        "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----",
        "-----BEGIN PUBLIC KEY-----\n!!!!\n-----END PUBLIC KEY-----",
        pem(PRIVATE).replace("BEGIN PUBLIC", "BEGIN RSA PUBLIC"),
        pem(PRIVATE).replace("PUBLIC", "RSA PUBLIC"),
    ],
)  # fmt: skip
def test_what_is_no_key_of_ours_is_said(text: str) -> None:
    with pytest.raises(ValueError, match="expected an RSA public key"):
        PublicKey.parse(text)


@given(st.binary(max_size=300))
def test_no_bytes_in_the_form_of_a_key_are_a_fault(body: bytes) -> None:
    text = f"-----BEGIN PUBLIC KEY-----\n{base64.b64encode(body).decode()}\n-----END PUBLIC KEY-----"
    with pytest.raises(ValueError, match="expected an RSA public key"):
        PublicKey.parse(text)


@pytest.mark.parametrize("alg", ["none", "None", "HS256", "HS512", "ES256", "PS256", "rs256", "", None, 7, ["RS256"]])
def test_no_other_algorithm_is_taken_with_a_key_or_without(alg: Any) -> None:
    for key in (KEY, None):
        assert read_claim(token({"a": 1}, alg=alg), key) == NoAnswer("claim_algorithm")


def test_an_extension_that_must_be_understood_is_not() -> None:
    assert read_claim(token({"a": 1}, crit=["exp"]), KEY) == NoAnswer("claim_algorithm")


def test_other_padding_is_not_taken() -> None:
    pss = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=32)
    assert read_claim(token({"a": 1}, pad=pss), KEY) == NoAnswer("claim_signature")


@pytest.mark.parametrize("signature", ["", "AA", "!", part(b"\0" * 256), part(b"\xff" * 256), part(b"\1" * 257)])
def test_what_is_no_signature_is_none(signature: str) -> None:
    head = token({"a": 1}).rpartition(".")[0]
    found = read_claim(f"{head}.{signature}", KEY)
    assert found in (NoAnswer("claim_signature"), NoAnswer("no_claim"))
    assert read_claim(f"{head}.{signature}", None) == {"a": 1}


def test_any_other_byte_breaks_the_signature() -> None:
    good = token({"a": 1})
    head, claims, signature = good.split(".")
    assert read_claim(f"{head}.{part({'a': 2})}.{signature}", KEY) == NoAnswer("claim_signature")
    assert read_claim(f"{part({'alg': 'RS256', 'x': 1})}.{claims}.{signature}", KEY) == NoAnswer("claim_signature")


def test_without_a_key_the_claims_are_read() -> None:
    assert read_claim(token({"a": 1}, key=OTHER), None) == {"a": 1}


@given(st.text(max_size=80) | st.integers() | st.none())
def test_no_text_is_a_fault(text: Any) -> None:
    assert isinstance(read_claim(text, KEY), NoAnswer)
