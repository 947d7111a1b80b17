"""All mixtures stay addressable by digest, with their files as blobs, for as long as the rule says."""

from __future__ import annotations

from pathlib import Path

import pytest

from lutetia.coordinator.mixtures.archive import (
    HeldOutLosses,
    MixtureArchive,
    find_description,
    kept_mixtures,
    renew_signatures,
)
from lutetia.models.mixing.description import FILE, MixtureDocument, SignedMixture, signed_document
from lutetia.models.mixing.layout import WEIGHTS
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.identity import Identity
from lutetia.system.errors import AuthorisationError
from tests.coordinator.acceptance.judge_driver import COORDINATOR, make_manifest

MANIFEST = make_manifest()
EXPERT = f"expert_000/{WEIGHTS}"


def mixture(folder: Path, blobs: BlobStore, number: int) -> str:
    """A mixture with the weights of an accepted result, a config of its own and one that all share."""
    contents = {EXPERT: f"weights {number}", "transformer/config.json": f"config {number}", "pipeline.py": "same"}
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    document = MixtureDocument(
        name="run", run=MANIFEST.run_id, manifest=MANIFEST.run_id, manifest_version=1, latent=MANIFEST.latent,
        sampling=MANIFEST.sampling, experts=(), files={name: blobs.add_bytes(text.encode()) for name, text in contents.items()},
    )  # fmt: skip
    (folder / FILE).write_bytes(canonical(SignedMixture.sign(document, COORDINATOR.sign)))
    return document.digest


def archive_of(root: Path, most: int | None = None, stitched: list[str] | None = None) -> MixtureArchive:
    return MixtureArchive(root / "mixtures", BlobStore(root / "blobs"), stitched or [], most)


def add(archive: MixtureArchive, root: Path, number: int) -> str:
    digest = mixture(root / "mixture.next", archive.blobs, number)
    assert archive.add(root / "mixture.next") == digest
    return digest


def files_of(archive: MixtureArchive, digest: str) -> dict[str, bool]:
    """Which of the mixture's files are kept as blobs."""
    data = archive.find(digest)
    assert data
    document = SignedMixture.model_validate_json(data).mixture
    return {name: archive.blobs.has(ref.digest) for name, ref in document.files.items()}


def test_every_mixture_is_found_by_digest_and_its_blobs_are_named(tmp_path: Path):
    archive = archive_of(tmp_path)
    digests = [add(archive, tmp_path, number) for number in range(3)]
    archive.settle(digests[0])
    for digest in digests:
        assert archive.find(digest[:12]) == archive.find(digest)
        assert all(files_of(archive, digest).values())
    again = archive_of(tmp_path, stitched=digests)
    again.open(tmp_path / "none", digests[-1])
    assert set(again.named_blobs()) == set(archive.named_blobs())
    assert archive.blobs.add_bytes(b"weights 0").digest in again.named_blobs()


@pytest.mark.parametrize("name", ["", "0" * 64, "*", "a" * 11, "../ledger.sqlite", "A" * 64, "a" * 65])
def test_unknown_or_malformed_name_finds_nothing(tmp_path: Path, name: str):
    archive = archive_of(tmp_path)
    add(archive, tmp_path, 0)
    assert archive.find(name) is None


def test_ambiguous_name_finds_nothing(tmp_path: Path):
    for letter in "ab":
        (tmp_path / f"{'0' * 63}{letter}.json").write_bytes(letter.encode())
    assert find_description(tmp_path, "0" * 12) is None
    assert find_description(tmp_path, "0" * 63 + "b") == b"b"


def test_bounded_archive_drops_files_but_no_description_and_no_accepted_weights(tmp_path: Path):
    archive = archive_of(tmp_path, most=1)
    digests = [add(archive, tmp_path, number) for number in range(3)]
    archive.settle(digests[0])
    assert all(files_of(archive, digests[0]).values()), "the current one"
    assert all(files_of(archive, digests[2]).values()), "the newest one"
    assert files_of(archive, digests[1]) == {EXPERT: True, "transformer/config.json": False, "pipeline.py": True}
    assert archive.blobs.add_bytes(b"weights 1").digest not in archive.named_blobs(), "retention decides on it"


@pytest.mark.parametrize(("most", "kept"), [(None, {"a", "b", "c"}), (1, {"a", "c"}), (2, {"a", "b", "c"})])
def test_newest_mixtures_and_the_current_one_are_kept(most: int | None, kept: set[str]):
    assert kept_mixtures(["a", "b", "c"], "a", most) == kept


def test_mixture_of_an_earlier_version_is_taken_in(tmp_path: Path):
    archive = archive_of(tmp_path)
    digest = mixture(tmp_path / "mixture", BlobStore(tmp_path / "blobs"), 0)
    archive.open(tmp_path / "mixture", "f" * 64)
    assert archive.find(digest) is None, "the ledger names another"
    archive.open(tmp_path / "mixture", digest)
    assert archive.find(digest)


def test_losses_are_read_back_and_damage_means_none(tmp_path: Path):
    archive, losses = archive_of(tmp_path), HeldOutLosses(rows_of="x", losses=(0.5, 0.25))
    archive.write_losses("a" * 64, losses)
    assert archive.read_losses("a" * 64) == losses
    (tmp_path / "mixtures" / f"{'a' * 64}.losses").write_text("{")
    assert archive.read_losses("a" * 64) is None


def test_new_key_signs_every_description_again(tmp_path: Path):
    archive, new = archive_of(tmp_path), Identity.derived("next key")
    digest = add(archive, tmp_path, 0)
    renew_signatures(archive.folder, new)
    signed = SignedMixture.model_validate_json(archive.find(digest) or b"")
    assert signed_document(signed, [new.public_key], "it").digest == digest
    with pytest.raises(AuthorisationError):
        signed_document(signed, [COORDINATOR.public_key], "it")
