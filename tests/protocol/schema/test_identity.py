from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lutetia.protocol.schema.identity import Identity, peer_id_of, public_key_of, verify
from lutetia.system.errors import IdentityError


def test_the_peer_id_is_the_one_that_libp2p_derives() -> None:
    from libp2p.crypto.ed25519 import Ed25519PrivateKey
    from libp2p.peer.id import ID

    identity = Identity.derived("x")
    theirs = ID.from_pubkey(Ed25519PrivateKey.from_bytes(identity.seed).get_public_key())
    assert identity.peer_id == str(theirs) == peer_id_of(identity.public_key)


@given(st.binary(max_size=64), st.binary(max_size=64))
def test_a_signature_holds_for_its_message_and_key_only(message: bytes, other: bytes) -> None:
    alice, bob = Identity.derived("alice"), Identity.derived("bob")
    signature = alice.sign(message)
    assert verify(alice.public_key, message, signature)
    assert verify(alice.public_key, other, signature) == (message == other)
    assert not verify(bob.public_key, message, signature)


@given(st.text(max_size=140), st.text(max_size=140))
def test_a_malformed_signature_is_refused(key: str, signature: str) -> None:
    assert not verify(key, b"message", signature)


def test_key_file_is_private_and_survives(tmp_path: Path) -> None:
    path = tmp_path / "state" / "identity.key"
    identity = Identity.load_or_create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Identity.load_or_create(path) == identity


@pytest.mark.parametrize(
    ("content", "mode", "says"),
    [("zz", 0o600, "it holds no key; restore"), ("abcd", 0o600, "2 bytes instead of 32"), ("00" * 32, 0o644, "chmod 600")],
)
def test_a_broken_or_public_key_file_is_refused_in_one_sentence(tmp_path: Path, content: str, mode: int, says: str) -> None:
    path = tmp_path / "identity.key"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(IdentityError, match=says):
        Identity.load(path)


def test_a_missing_key_file_is_reported_in_plain_words(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match=r"cannot read the identity \S+: no such file or directory; restore"):
        Identity.load(tmp_path / "identity.key")


def test_a_peer_id_holds_its_public_key() -> None:
    identity = Identity.derived("a peer")
    assert public_key_of(identity.peer_id) == identity.public_key
    for other in ("", "12D3KooW", identity.peer_id[:-1], identity.peer_id + "1", "0" * 52, "Qm" + "a" * 44, "é" * 10_000):
        assert public_key_of(other) is None
