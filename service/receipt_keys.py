"""Keys of receipts, and the signed form: a JSON Web Signature (RFC 7515), with Ed25519 or HMAC-SHA256."""

import base64
import hashlib
import hmac
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from service.settings import SettingsError, variable

Algorithm = Literal["EdDSA", "HS256"]
MIN_SECRET = 32
"""Bytes of a secret for HMAC."""
MAX_SECRET = 4096
PUBLIC = ".pub"
"""What the name of a key's file has more for the public half."""


class ReceiptError(ValueError):
    """A key or a receipt that cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Key:
    """What signs and verifies, or, with the public half alone, verifies."""

    private: Ed25519PrivateKey | None = None
    public: Ed25519PublicKey | None = None
    secret: bytes = b""

    @property
    def algorithm(self) -> Algorithm:
        """Its name in a receipt."""
        return "EdDSA" if self.public is not None else "HS256"

    @property
    def id(self) -> str:
        """The start of the SHA-256 of the public key, as its raw bytes; of a secret nothing is told."""
        if self.public is None:
            return "secret"
        return hashlib.sha256(self.public.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()[:16]

    def sign(self, content: dict[str, Any]) -> str:
        """`content` as a signed text. ReceiptError with the public half alone."""
        head = {"alg": self.algorithm, "kid": self.id, "typ": "fusion-receipt"}
        text = f"{_encode(_to_json(head))}.{_encode(_to_json(content))}"
        if self.private is not None:
            return f"{text}.{_encode(self.private.sign(text.encode()))}"
        if not self.secret:
            raise ReceiptError("the key is the public half, which signs nothing: expected the private one")
        return f"{text}.{_encode(hmac.digest(self.secret, text.encode(), 'sha256'))}"

    def verify(self, receipt: str) -> dict[str, Any]:
        """The content of a receipt that this key has signed; ReceiptError for any other text."""
        signed, _, signature = receipt.rpartition(".")
        head, content = read_receipt(receipt)
        if head.get("alg") != self.algorithm:
            raise ReceiptError(f"it is signed with {head.get('alg')!r:.40}, and this key is for {self.algorithm}")
        try:
            if self.public is not None:
                self.public.verify(_decode(signature), signed.encode())
            elif not hmac.compare_digest(hmac.digest(self.secret, signed.encode(), "sha256"), _decode(signature)):
                raise InvalidSignature
        except (InvalidSignature, ValueError) as error:
            raise ReceiptError("its signature is not by this key, or it was changed") from error
        return content


def read_receipt(receipt: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The head and the content of a receipt, whoever signed it; ReceiptError for what is none."""
    parts = receipt.split(".")
    try:
        if len(parts) != 3:
            raise ValueError("expected three parts, joined by '.'")
        head, content = (json.loads(_decode(part)) for part in parts[:2])
        if not isinstance(head, dict) or not isinstance(content, dict):
            raise ValueError("expected two JSON objects and a signature")
    except (ValueError, RecursionError) as error:
        raise ReceiptError(f"it is not a receipt: {error}") from error
    return head, content


def read_key(path: str | Path) -> Key:
    """The key in a file: a private or public key of Ed25519 in PEM, or the secret of HMAC. ReceiptError otherwise."""
    try:
        content = Path(path).read_bytes().strip()
    except OSError as error:
        raise ReceiptError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    if not content.startswith(b"-----BEGIN"):
        if not MIN_SECRET <= len(content) <= MAX_SECRET:
            expected = f"expected a PEM file, or a secret of {MIN_SECRET} to {MAX_SECRET} bytes"
            raise ReceiptError(f"{str(path)!r} holds no key: {expected}")
        return Key(secret=content)
    try:
        if b"PUBLIC KEY" in content:
            public = load_pem_public_key(content)
        else:
            private = load_pem_private_key(content, None)
            if isinstance(private, Ed25519PrivateKey):
                return Key(private, private.public_key())
            public = private.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ReceiptError(f"{str(path)!r} holds no key that can be read: {error}") from error
    if not isinstance(public, Ed25519PublicKey):
        raise ReceiptError(f"{str(path)!r} holds a key of another kind: expected Ed25519")
    return Key(public=public)


def read_receipt_key(path: str) -> Key | None:
    """The key that `FUSION_RECEIPT_KEY` names, if any; SettingsError when it cannot sign."""
    if not path:
        return None
    try:
        key = read_key(path)
        key.sign({})
    except ReceiptError as error:
        raise SettingsError(f"{variable('receipt_key')}: {error}") from error
    return key


def make_key(path: Path) -> tuple[Path, Path]:
    """Write a new pair: the private half to `path`, for its owner alone, the public one beside it. FileExistsError
    when there is one already.
    """
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    beside = path.with_name(path.name + PUBLIC)
    for file, content, mode in ((path, private, 0o600), (beside, public, 0o644)):
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as out:
            out.write(content)
    return path, beside


def _to_json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _encode(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    """The bytes of base64url without padding; ValueError for other characters, and for bits that say nothing."""
    content = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    if _encode(content) != text:
        raise ValueError("its base64url has other forms")
    return content
