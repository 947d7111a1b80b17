"""A peer's Ed25519 key. It signs records and determines the libp2p peer id."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from lutetia.system.errors import IdentityError, disk_reason
from lutetia.system.files import write_atomic

_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_PEER_ID_LETTERS = 64  # more than any Ed25519 peer id has
_PROTOBUF_ED25519 = b"\x08\x01\x12"  # field 1 (key type) = 1 (Ed25519), field 2 (data), length follows


def _base58(data: bytes) -> str:
    number, text = int.from_bytes(data, "big"), ""
    while number:
        number, remainder = divmod(number, 58)
        text = _BASE58[remainder] + text
    return "1" * (len(data) - len(data.lstrip(b"\0"))) + text


def peer_id_of(public_key: str) -> str:
    """The libp2p peer id of an Ed25519 public key (hex): base58 of the identity multihash of its protobuf (libp2p spec)."""
    encoded = _PROTOBUF_ED25519 + b"\x20" + bytes.fromhex(public_key)
    return _base58(b"\x00" + bytes([len(encoded)]) + encoded)


def public_key_of(peer_id: str) -> str | None:
    """The public key (hex) that an Ed25519 peer id holds; None for other peer ids and for text that is none."""
    number = 0
    for letter in peer_id[:_PEER_ID_LETTERS]:
        if letter not in _BASE58:
            return None
        number = number * 58 + _BASE58.index(letter)
    key = f"{number % (1 << 256):064x}"
    return key if peer_id_of(key) == peer_id else None


def verify(public_key: str, message: bytes, signature: str) -> bool:
    """Whether `public_key` (hex) made `signature` (hex) of `message`. False for malformed input."""
    with contextlib.suppress(InvalidSignature, ValueError):
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(bytes.fromhex(signature), message)
        return True
    return False


@dataclass(frozen=True)
class Identity:
    """A private key. `seed` is its 32 secret bytes."""

    seed: bytes

    @cached_property
    def _private(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self.seed)

    @cached_property
    def public_key(self) -> str:
        """32 bytes as hex. It names the owner of records."""
        return self._private.public_key().public_bytes_raw().hex()

    @cached_property
    def peer_id(self) -> str:
        return peer_id_of(self.public_key)

    def sign(self, message: bytes) -> str:
        return self._private.sign(message).hex()

    def secret_for(self, purpose: str) -> bytes:
        """32 secret bytes for one purpose, by HMAC-SHA256. Whoever learns them learns nothing of the key or of other purposes."""
        return hmac.new(self.seed, purpose.encode(), hashlib.sha256).digest()

    def libp2p_bytes(self) -> bytes:
        """The key as libp2p's protobuf `PrivateKey`, the format of p2pd's identity file."""
        data = self.seed + bytes.fromhex(self.public_key)
        return _PROTOBUF_ED25519 + bytes([len(data)]) + data

    @classmethod
    def generate(cls) -> Identity:
        return cls(os.urandom(32))

    @classmethod
    def derived(cls, text: str) -> Identity:
        """A reproducible identity for simulations and tests. Never use it on a real network."""
        return cls(hashlib.sha256(text.encode()).digest())

    @classmethod
    def load(cls, path: Path) -> Identity:
        """Read a key file written by `save`. Raises IdentityError if it is missing, malformed or readable by others."""
        try:
            mode, text = path.stat().st_mode, path.read_text().strip()
            seed = bytes.fromhex(text)
        except (OSError, ValueError) as error:
            reason = disk_reason(error) if isinstance(error, OSError) else "it holds no key"
            raise IdentityError(f"cannot read the identity {path}: {reason}; restore it from a backup") from error
        if len(seed) != 32:
            raise IdentityError(f"identity {path} holds {len(seed)} bytes instead of 32; restore it from a backup")
        if mode & 0o077:
            raise IdentityError(f"identity {path} can be read by other users; run chmod 600 {path}")
        return cls(seed)

    def save(self, path: Path) -> None:
        write_atomic(path, self.seed.hex().encode() + b"\n", mode=0o600)

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        if path.exists():
            return cls.load(path)
        identity = cls.generate()
        identity.save(path)
        return identity
