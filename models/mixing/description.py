"""`mixture.json`: what a mixture folder holds, where it comes from, and the coordinator's signature. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from lutetia.models.mixing.layout import EXPERT_FOLDER, INDEX, known_files, read_index
from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.protocol.schema.canonical import Frozen, WireDocument, canonical, digest_of
from lutetia.protocol.schema.fields import (
    MOST_SHARDS,
    Count,
    Digest,
    EpochCount,
    MeasuredLoss,
    Name,
    Positive,
    Sentence,
    Share,
    Signature,
    Tally,
    added,
)
from lutetia.protocol.schema.identity import verify
from lutetia.protocol.schema.manifest import first_problem
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.protocol.schema.model.pipeline_spec import BetaSchedule, ExpertInputs
from lutetia.protocol.schema.model.training_spec import SamplingSpec
from lutetia.system.errors import AuthorisationError, ConfigError, IntegrityError

FILE = "mixture.json"
_SIGNING_DOMAIN = b"lutetia-mixture-1\n"


class ExpertKind(WireDocument):
    """What the mixture must know to ask an expert."""

    folder: str | None = Field(
        pattern=EXPERT_FOLDER, description="its folder in the mixture; null while the shard has no accepted checkpoint"
    )
    class_name: str = Field(max_length=64, description="diffusers class of the expert")
    prediction: Literal["velocity", "sample", "epsilon"] = Field(description="what the expert predicts")
    noise_schedule: Literal["linear", "vp_cosine"] = Field(description="the noise path that it was trained on")
    betas: BetaSchedule | None = added(None, "that path as a table, in place of `noise_schedule`; null: `noise_schedule`")
    inputs: ExpertInputs | None = added(None, "what the expert is given besides latents and text; null: as its class needs")

    @property
    def entry(self) -> dict[str, Any]:
        """The fields of this class alone, as JSON, as the config of the mixture's transformer holds them."""
        return self.model_dump(mode="json", include=set(ExpertKind.model_fields))


class ExpertEntry(ExpertKind):
    """One shard's expert."""

    name: Name = Field(description="name of the shard")
    prior: Share = Field(description="the shard's share of all clips, 0 to 1")
    epoch: EpochCount = Field(description="the accepted epoch that its weights are of; 0 without one")
    samples: Tally = Field(description="samples that it was trained on")
    checkpoint: Digest | None = Field(default=None, description="digest of the accepted checkpoint; null without one")


class MixtureRouting(WireDocument):
    """How the mixture chooses experts, as measured on held-out clips when it was stitched. `sampling.mode` has the mode, too."""

    mode: Literal["top1", "top2", "full", "sticky"] = Field(description="the mode, as `sampling.mode`")
    temperature: Positive = Field(description="by which the router's logits are divided")
    loss: MeasuredLoss = Field(description="mean held-out loss of the mixture's velocity in that way")
    rows: Count = Field(description="held-out rows that it was measured on")
    text: Sentence = Field(description="why this way, in words")


class MixtureDocument(WireDocument):
    """A mixture's contents and origin."""

    format: Literal[1] = Field(default=1, description="version of this format")
    name: Name = Field(description="name of the run")
    run: Digest = Field(description="id of the run")
    manifest: Digest = Field(description="digest of the run's manifest")
    manifest_version: Count = Field(description="version of that manifest")
    latent: LatentSpec = Field(description="shapes of latents, text and clips, and the models that make them")
    sampling: SamplingSpec = Field(description="how the run samples clips")
    experts: tuple[ExpertEntry, ...] = Field(max_length=MOST_SHARDS, description="one entry per shard, in the shards' order")
    network: ExpertSpec | None = added(None, "where experts are adapters: their network, its adapter and the base; else null")
    routing: MixtureRouting | None = added(None, "how experts are chosen and why; null: not measured, then `sampling.mode` alone")
    files: dict[Annotated[str, Field(max_length=256)], BlobRef] = Field(
        max_length=65536, description="digest and size in bytes of all other files of the folder, by relative path"
    )

    @model_validator(mode="after")
    def _adapters_have_a_base(self) -> MixtureDocument:
        if self.network and (self.network.adapter is None or {e.class_name for e in self.experts} != {self.network.class_name}):
            raise ValueError("network must be that of adapters, and of the class of all experts")
        return self

    @property
    def digest(self) -> str:
        return digest_of(self)

    @property
    def known_files(self) -> dict[str, BlobRef]:
        """The files that a mixture needs. Raises IntegrityError if one is not listed, or if one could run other code."""
        return known_files(self.files, [expert.folder for expert in self.experts if expert.folder], self.network is not None)


class SignedMixture(Frozen):
    """A mixture's description with its signature: the contents of `mixture.json`."""

    mixture: MixtureDocument = Field(description="the mixture's contents and origin")
    signature: Signature | None = Field(
        default=None, description="a coordinator's, over the canonical bytes of `mixture`; null for a mixture made by hand"
    )

    @classmethod
    def sign(cls, document: MixtureDocument, sign: Callable[[bytes], str] | None) -> SignedMixture:
        return cls(mixture=document, signature=sign(_SIGNING_DOMAIN + canonical(document)) if sign else None)


def read_mixture(folder: Path) -> SignedMixture:
    """The description of a mixture folder, not verified. Raises ConfigError if it is missing, IntegrityError if malformed."""
    try:
        return SignedMixture.model_validate_json((folder / FILE).read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{folder} holds no mixture ({FILE} cannot be read); name the folder that was stitched or fetched"
        ) from error
    except ValidationError as error:
        raise IntegrityError(f"{folder / FILE} is malformed: {first_problem(error)}; fetch the mixture again") from error


def signed_document(signed: SignedMixture, coordinators: Sequence[str], name: str) -> MixtureDocument:
    """The description, if one of `coordinators` (public keys) signed it; else raises AuthorisationError, naming `name`."""
    message = _SIGNING_DOMAIN + canonical(signed.mixture)
    if signed.signature is None or not any(verify(key, message, signed.signature) for key in coordinators):
        raise AuthorisationError(f"the mixture {name} is not signed by a coordinator of its run; fetch it from the run itself")
    return signed.mixture


def verify_mixture(folder: Path, coordinators: Sequence[str]) -> MixtureDocument:
    """The description of a mixture folder whose signature and files have been checked.

    Args:
        folder: the mixture.
        coordinators: public keys of the run's coordinators.

    Raises:
        AuthorisationError: unsigned, or signed with another key.
        IntegrityError: a file is missing, changed or not listed, or could run other code than the pipeline of this package.
    """
    document = signed_document(read_mixture(folder), coordinators, str(folder))
    needed = document.known_files
    for name, ref in document.files.items():
        path = folder / name
        if not path.is_file() and name not in needed:
            continue  # was not fetched
        if not path.is_file():
            raise IntegrityError(f"the mixture {folder} lacks {name}; fetch it again")
        if ChunkTable.of_file(path).ref != ref:
            raise IntegrityError(f"{name} of the mixture {folder} was changed or damaged; fetch it again")
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    unsigned = present - document.files.keys() - {FILE}
    if unsigned:
        raise IntegrityError(f"the mixture {folder} holds {min(unsigned)}, which its coordinator did not sign; fetch it again")
    read_index((folder / INDEX).read_bytes())
    return document
