"""The manifest: the description of a run, signed by its owner. Peers refuse one that is expired, older or by another key."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from lutetia.protocol.schema.canonical import Frozen, WireDocument, canonical, digest_of
from lutetia.protocol.schema.capabilities import (
    ADAPTERS,
    CAPABILITIES,
    COMPACT,
    FIRST_FRAME,
    LANES,
    LOSS_WEIGHTS,
    NOISE_PARTS,
    PICTURES,
    Capabilities,
)
from lutetia.protocol.schema.fields import (
    MOST_SHARDS,
    Bytes,
    Count,
    Digest,
    Moment,
    Name,
    Positive,
    PublicKey,
    Rate,
    ShardIndex,
    Signature,
    Tally,
    added,
)
from lutetia.protocol.schema.identity import Identity, verify
from lutetia.protocol.schema.model.adapter import AdapterSpec
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.model.card_spec import CardSpec
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.protocol.schema.model.team_spec import TeamSpec
from lutetia.protocol.schema.model.training_spec import Optimisation, RouterSpec, SamplingSpec
from lutetia.protocol.schema.owner.orders import OwnerOrders
from lutetia.protocol.schema.problems import describe_problem
from lutetia.system.errors import AuthorisationError, ConfigError

MAX_MANIFEST_BYTES = 1 << 20
_SIGNING_DOMAIN = b"lutetia-manifest-1\n"


class ShardSpec(WireDocument):
    """One cluster's data."""

    index: ShardIndex = Field(description="Number of the shard, from 0")
    name: Name = Field(description="Name of the cluster, for people")
    train: BlobRef = Field(
        description="Index of the training clips' latents and text embeddings, or all of them where `data_bytes` is null"
    )
    holdout: BlobRef = Field(description="Held-out clips, on which results are scored: only the coordinator has them")
    clips: Count = Field(description="Training clips in the shard")
    holdout_clips: Count = Field(description="Held-out clips in the shard")
    prior: float = Field(gt=0, le=1, description="Share of the shard in the natural mixture of all data")
    expert: ExpertSpec | None = Field(default=None, description="Network of this shard's expert; null: the run's")
    data_bytes: Count | None = added(
        None, "Bytes of `train` and of the parts that it lists; null: `train` is no index but holds the clips itself"
    )

    @property
    def size(self) -> int:
        """Bytes of the training data."""
        return self.data_bytes or self.train.size


def lease_seconds(heartbeat: float) -> float:
    """How long a claim lives without renewal, in seconds: three heartbeats."""
    return 3 * heartbeat


class Timing(WireDocument):
    """The periods of a run."""

    heartbeat: Positive = Field(default=20.0, description="Seconds between renewals of a claim or node record")
    tenure: Positive = Field(
        default=600.0, description="Seconds after an acceptance in which its author keeps the shard while its claim lives"
    )
    maximum_clock_skew: Positive = Field(default=30.0, description="Seconds by which the clocks of peers may differ")

    @property
    def lease(self) -> float:
        """How long a claim lives without renewal, in seconds."""
        return lease_seconds(self.heartbeat)


class AuditPolicy(WireDocument):
    """Which results are audited and how far. With both `replay_steps` and `whole_epoch` 0 nothing is audited.

    BOINC's adaptive replication: every result until an author has `streak` valid ones in a row, then one in n at random, where n
    is its current streak.
    """

    streak: Count = Field(default=10, description="Valid results in a row after which not every result is audited")
    replay_steps: Tally = Field(
        default=4,
        description="Fewest first steps of an epoch that an audit replays: half as many more on average, how many is secret",
    )
    whole_epoch: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="Share of audits that replay the whole epoch, drawn by a lottery nobody can foresee; besides, each author's "
        "first two epochs are replayed whole",
    )

    @property
    def audits(self) -> bool:
        """Whether anything is audited."""
        return bool(self.replay_steps or self.whole_epoch)


class HardwareNeeds(WireDocument):
    """What a machine must have to train a shard."""

    memory_bytes: Bytes = Field(default=0, description="Memory of the device in bytes")
    disk_bytes: Bytes = Field(default=0, description="Free disk space in bytes")
    cuda: bool = Field(default=False, description="Whether the device must be a CUDA card")


CheckpointForm = Literal["float32", "compact"]


class Manifest(WireDocument):
    """The description of a whole run."""

    format: Literal[1] = Field(default=1, description="Version of this document's format")
    name: Name = Field(description="Name of the run, for people")
    run: Digest | None = Field(default=None, description="Run id: the digest of version 1; null in version 1 itself")
    version: Count = Field(default=1, description="Version of the manifest; peers follow the highest one")
    owner: PublicKey = Field(description="Public key that signs the manifest")
    coordinators: tuple[PublicKey, ...] = Field(
        min_length=1, max_length=8, description="Public keys whose acceptances, resets and quarantines count"
    )
    created: Moment = Field(description="When the run was created, in Unix seconds")
    expires: Moment = Field(description="When this version stops being valid, in Unix seconds")
    latent: LatentSpec = Field(description="Latents and text embeddings of the data")
    expert: ExpertSpec = Field(description="Network of every expert whose shard names no other")
    shards: tuple[ShardSpec, ...] = Field(min_length=1, max_length=MOST_SHARDS, description="The data, one shard per cluster")
    optimisation: Optimisation = Field(default=Optimisation(), description="How experts are trained")
    samples_per_shard: Count = Field(description="Budget of each shard in training samples")
    checkpoint_samples: Count = Field(description="Training samples of one epoch: the interval between checkpoints")
    holdout_tolerance: Rate = Field(
        default=0.02, description="Fraction by which a result's held-out loss may exceed its parent's"
    )
    raw_tolerance: Rate = Field(
        default=0.3,
        description="Fraction by which the held-out loss of the raw parameters may exceed that of average and parent",
    )
    router: RouterSpec = Field(default=RouterSpec(), description="The router")
    sampling: SamplingSpec = Field(default=SamplingSpec(), description="How the mixture generates clips")
    timing: Timing = Field(default=Timing(), description="Heartbeat, tenure and clock skew")
    audit: AuditPolicy = Field(default=AuditPolicy(), description="Which results are audited and how far")
    hardware: HardwareNeeds = Field(default=HardwareNeeds(), description="What a machine must have to train a shard")
    allowlist: tuple[PublicKey, ...] | None = Field(
        default=None, max_length=16384, description="Public keys that may take part besides the coordinators; null: anyone"
    )
    card: CardSpec | None = added(None, "What the owner says in the mixture's model card; null: nothing")
    checkpoints: CheckpointForm = added(
        "float32",
        "Form of published checkpoints: float32, or compact: averages in bfloat16, differences and moments in 8 bits",
    )
    team: TeamSpec | None = added(None, "Lanes in which several nodes train one epoch of a shard; null: one node trains it")
    orders: OwnerOrders = added(OwnerOrders(), "What the owner orders of all peers: a pause, bans, names that are not shown")
    needs: Capabilities = added((), "Capabilities that a peer must have to take part; one that lacks any refuses the manifest")

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if [shard.index for shard in self.shards] != list(range(len(self.shards))):
            raise ValueError("shards must be numbered 0, 1, 2, … in order")
        if abs(sum(shard.prior for shard in self.shards) - 1) > 1e-6:
            raise ValueError("the priors of the shards must add up to 1")
        if (self.version == 1) != (self.run is None):
            raise ValueError("the first version has no run id; every later version carries it")
        if self.checkpoints == "compact" and COMPACT not in self.needs:
            raise ValueError(f"compact checkpoints need the capability {COMPACT}; add it to needs")
        if self.team and LANES not in self.needs:
            raise ValueError(f"a team needs the capability {LANES}; add it to needs")
        experts = (self.expert, *(shard.expert for shard in self.shards if shard.expert))
        if any(expert.first_frame is not None for expert in experts) and FIRST_FRAME not in self.needs:
            raise ValueError(f"experts that are given first frames need the capability {FIRST_FRAME}; add it to needs")
        if any(expert.noise_part != self.expert.noise_part for expert in experts):
            raise ValueError("all experts of a run must be for the same part of the noise levels")
        if self.expert.noise_part and NOISE_PARTS not in self.needs:
            raise ValueError(f"experts for a part of the noise levels need the capability {NOISE_PARTS}; add it to needs")
        if self.latent.picture and PICTURES not in self.needs:
            raise ValueError(f"data with pictures need the capability {PICTURES}; add it to needs")
        if self.latent.picture and self.sampling.prompts:
            raise ValueError("clips of the data begin with a picture, which sampling.prompts lack; leave the prompts out")
        if self.expires <= self.created:
            raise ValueError("expires must lie after created")
        if self.checkpoint_samples % self.optimisation.batch or self.samples_per_shard % self.checkpoint_samples:
            raise ValueError("batch must divide checkpoint_samples, which must divide samples_per_shard")
        if any(shard.expert and shard.expert.adapter != self.expert.adapter for shard in self.shards):
            raise ValueError("either no expert of a run is an adapter, or all are alike, on the same base")
        for shard in self.shards:
            if shard.clips < self.optimisation.batch:
                raise ValueError(
                    f"shard {shard.index} ({shard.name}) has {shard.clips} clips, fewer than a batch of "
                    f"{self.optimisation.batch}; use fewer experts or a smaller batch"
                )
        return self

    @property
    def adapter(self) -> AdapterSpec | None:
        """The adapter of every expert; None where experts are trained whole."""
        return self.expert.adapter

    @property
    def run_id(self) -> str:
        """The digest of version 1, which names the run."""
        return self.run or digest_of(self)

    @property
    def epochs(self) -> int:
        """Epochs in a shard's budget. An epoch is one accepted checkpoint, not a pass over the data."""
        return self.samples_per_shard // self.checkpoint_samples

    @property
    def steps_per_epoch(self) -> int:
        return self.checkpoint_samples // self.optimisation.batch

    @property
    def lanes(self) -> int:
        """Lanes of each shard; 1 where one node trains an epoch."""
        return self.team.lanes if self.team else 1

    def lane_steps(self, lane: int) -> int:
        """Steps that a lane trains of an epoch."""
        return max(1, round(self.steps_per_epoch * self.team.share(lane))) if self.team else self.steps_per_epoch

    def expert_of(self, shard: int) -> ExpertSpec:
        return self.shards[shard].expert or self.expert


def needed_capabilities(expert: ExpertSpec, optimisation: Optimisation) -> tuple[str, ...]:
    """What a peer must be able to do to take part in a run of such experts that are trained so."""
    needed = (
        (ADAPTERS, expert.adapter), (LOSS_WEIGHTS, optimisation.weighting), (FIRST_FRAME, expert.first_frame is not None),
        (NOISE_PARTS, expert.noise_part),
    )  # fmt: skip
    return tuple(capability for capability, used in needed if used)


class SignedManifest(Frozen):
    """A manifest and its signature."""

    manifest: Manifest = Field(description="The manifest")
    signature: Signature = Field(description="The owner's Ed25519 signature over the canonical bytes (hex)")

    @classmethod
    def sign(cls, manifest: Manifest, owner: Identity) -> SignedManifest:
        if owner.public_key != manifest.owner:
            raise AuthorisationError("the manifest names another owner; sign it with that owner's identity")
        return cls(manifest=manifest, signature=owner.sign(_SIGNING_DOMAIN + canonical(manifest)))

    def to_bytes(self) -> bytes:
        return canonical(self)


def open_manifest(
    data: bytes, *, now: float, run: str | None = None, owner: str | None = None, at_least_version: int = 1,
    known: Collection[str] = CAPABILITIES,
) -> SignedManifest:  # fmt: skip
    """Parse and verify a signed manifest.

    Args:
        data: Its bytes.
        now: Unix seconds, to tell whether it has expired.
        run: The run id that it must have; None: any.
        owner: The public key that must have signed it; None: the one that it names.
        at_least_version: Older versions are refused.
        known: Capabilities that it may need.

    Raises ConfigError (malformed, expired, another run, too old, needs what this version lacks) or AuthorisationError (another
    owner, wrong signature).
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise ConfigError(f"manifest of {len(data)} bytes is larger than {MAX_MANIFEST_BYTES}; refused")
    try:
        signed = SignedManifest.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise ConfigError(f"manifest is malformed: {first_problem(error)}") from error
    manifest = signed.manifest
    if owner is not None and manifest.owner != owner:
        raise AuthorisationError(f"manifest is signed by {manifest.owner[:16]}…, the ticket pins {owner[:16]}…; refused")
    if not verify(manifest.owner, _SIGNING_DOMAIN + canonical(manifest), signed.signature):
        raise AuthorisationError("the manifest's signature is wrong; refused")
    if run is not None and manifest.run_id != run:
        raise ConfigError(f"manifest is of run {manifest.run_id[:12]}, not of {run[:12]}; check the ticket")
    if manifest.version < at_least_version:
        raise ConfigError(f"manifest version {manifest.version} is older than {at_least_version}, seen before; refused")
    if missing := sorted({*manifest.needs} - {*known}):
        raise ConfigError(f"the run needs {', '.join(missing)}, which this version of lutetia cannot do; install a newer one")
    if manifest.expires <= now:
        raise ConfigError(f"the manifest of run {manifest.run_id[:12]} has expired; ask its owner for a new version")
    return signed


def first_problem(error: ValidationError) -> str:
    """The first problem that pydantic found, as `field: problem`."""
    return describe_problem(error)
