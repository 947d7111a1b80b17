"""`mixture.json`: what a mixture folder holds, where it comes from, and the coordinator's signature over both. Without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.protocol.schema.canonical import Frozen, canonical, digest_of
from lutetia.protocol.schema.identity import verify
from lutetia.protocol.schema.manifest import BlobRef, Digest, LatentSpec, Name, SamplingSpec, Signature, first_problem
from lutetia.system.errors import AuthorisationError, ConfigError, IntegrityError

FILE = "mixture.json"
_SIGNING_DOMAIN = b"lutetia-mixture-1\n"


class ExpertEntry(Frozen):
    """One shard's expert. `folder` and `checkpoint` are None while none of its checkpoints has been accepted."""

    name: Name
    folder: str | None
    class_name: str
    prediction: Literal["velocity", "sample", "epsilon"]
    noise_schedule: Literal["linear", "vp_cosine"]
    prior: float
    epoch: int = Field(ge=0)
    samples: int = Field(ge=0)
    checkpoint: Digest | None = None


class MixtureDocument(Frozen):
    """`files` are all other files of the folder by relative path; `manifest` is the digest of the run's manifest."""

    format: Literal[1] = 1
    name: Name
    run: Digest
    manifest: Digest
    manifest_version: int
    latent: LatentSpec
    sampling: SamplingSpec
    experts: tuple[ExpertEntry, ...]
    files: dict[str, BlobRef]

    @property
    def digest(self) -> str:
        return digest_of(self)


class SignedMixture(Frozen):
    """A mixture's description and a coordinator's signature over its canonical bytes (None: unsigned, made by hand)."""

    mixture: MixtureDocument
    signature: Signature | None = None

    @classmethod
    def sign(cls, document: MixtureDocument, sign: Callable[[bytes], str] | None) -> SignedMixture:
        return cls(mixture=document, signature=sign(_SIGNING_DOMAIN + canonical(document)) if sign else None)


def read_mixture(folder: Path) -> SignedMixture:
    """The description of a mixture folder, unverified. Raises ConfigError when there is none or it is malformed."""
    try:
        return SignedMixture.model_validate_json((folder / FILE).read_bytes())
    except OSError as error:
        raise ConfigError(f"{folder} holds no mixture ({FILE} cannot be read); name the folder that was stitched") from error
    except ValidationError as error:
        raise ConfigError(f"{folder / FILE} is malformed: {first_problem(error)}; fetch the mixture again") from error


def signed_document(signed: SignedMixture, coordinators: Sequence[str], name: str) -> MixtureDocument:
    """What a coordinator signed; `name` is for the error. Raises AuthorisationError: unsigned, or signed by somebody else."""
    message = _SIGNING_DOMAIN + canonical(signed.mixture)
    if signed.signature is None or not any(verify(key, message, signed.signature) for key in coordinators):
        raise AuthorisationError(f"the mixture {name} is not signed by a coordinator of its run; fetch it from the run itself")
    return signed.mixture


def verify_mixture(folder: Path, coordinators: Sequence[str]) -> MixtureDocument:
    """Check the signature against the run's coordinators and every file against its digest.

    Raises AuthorisationError (unsigned, or signed by somebody else) or IntegrityError (file missing, changed or not listed).
    """
    document = signed_document(read_mixture(folder), coordinators, str(folder))
    for name, ref in document.files.items():
        path = folder / name
        if not path.is_file():
            raise IntegrityError(f"the mixture {folder} lacks {name}; fetch it again")
        if ChunkTable.of_file(path).ref != ref:
            raise IntegrityError(f"{name} of the mixture {folder} was changed or damaged; fetch it again")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    foreign = found - document.files.keys() - {FILE}
    if foreign:
        raise IntegrityError(f"the mixture {folder} holds {min(foreign)}, which its coordinator did not sign; fetch it again")
    return document
