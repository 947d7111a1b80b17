"""The signed description of a run. Its owner signs it; peers refuse what is expired, older or signed by another key."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from lutetia.protocol.schema.canonical import Frozen, canonical, digest_of
from lutetia.protocol.schema.identity import Identity, verify
from lutetia.system.errors import AuthorisationError, ConfigError

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$")]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]

MAX_MANIFEST_BYTES = 1 << 20
_SIGNING_DOMAIN = b"lutetia-manifest-1\n"


class BlobRef(Frozen):
    """Bytes by name: `digest` is the SHA-256 over the table of 1 MiB chunk hashes, `size` in bytes."""

    digest: Digest
    size: int = Field(ge=0, le=1 << 40)


class ExpertSpec(Frozen):
    """One expert: a diffusers transformer by class name and config, and what it predicts."""

    class_name: str = Field(default="WanTransformer3DModel", pattern=r"^[A-Z][A-Za-z0-9]{2,63}$")
    config: dict[str, Any]
    prediction: Literal["velocity", "sample", "epsilon"] = "velocity"
    noise_schedule: Literal["linear", "vp_cosine"] = "linear"
    init: BlobRef | None = None


class LatentSpec(Frozen):
    """Shape of one clip's latent (C, F, H, W) and of its text embedding (tokens, width), and what made them.

    The network's latents are (raw - mean) / std per channel, with `mean` and `std` measured on the data; empty means 0 and 1.
    """

    channels: Count
    frames: Count
    height: Count
    width: Count
    vae: str
    pixel_frames: Count
    pixel_height: Count
    pixel_width: Count
    fps: Positive = 8.0
    text_encoder: str
    text_tokens: Count
    text_width: Count
    pooled_width: Count
    mean: tuple[float, ...] = ()
    std: tuple[Positive, ...] = ()

    @model_validator(mode="after")
    def _one_statistic_per_channel(self) -> LatentSpec:
        if len(self.mean) != len(self.std) or len(self.mean) not in (0, self.channels):
            raise ValueError("mean and std must both be empty or have one entry per channel")
        return self

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.channels, self.frames, self.height, self.width


class ShardSpec(Frozen):
    """One cluster's data. `prior` is its share N_k/N of the natural mixture; `expert` overrides the run's default."""

    index: int = Field(ge=0, le=4095)
    name: Name
    train: BlobRef
    holdout: BlobRef
    clips: Count
    holdout_clips: Count
    prior: float = Field(gt=0, le=1)
    expert: ExpertSpec | None = None


class TimeSampling(Frozen):
    """t = shift*s / (1 + (shift-1)*s), s = sigmoid(N(mean, std)) (Open-Sora 2.0; SD3 shift)."""

    mean: float = 0.0
    std: Positive = 1.0
    shift: Positive = 1.0


class Optimisation(Frozen):
    """How every expert is trained."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: Positive = 1e-3
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.99, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=20, ge=0)
    schedule: Literal["constant", "cosine"] = "cosine"
    gradient_clip: Positive = 1.0
    batch: Count = 16
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    text_dropout: float = Field(default=0.1, ge=0, le=1)
    time: TimeSampling = TimeSampling()


class RouterSpec(Frozen):
    """The cluster classifier over (noisy latent, t, pooled text), trained on the natural mixture."""

    hidden: Count = 96
    layers: Count = 3
    text_conditioned: bool = True
    samples: Count = 6000
    batch: Count = 32
    learning_rate: Positive = 2e-3


class SamplingSpec(Frozen):
    """How the gallery is sampled."""

    mode: Literal["top1", "top2", "full", "sticky"] = "top1"
    steps: Count = 25
    guidance: float = Field(default=3.0, ge=0)
    time_shift: Positive = 1.0
    prompts: tuple[Annotated[str, Field(min_length=1, max_length=400)], ...] = Field(default=(), max_length=64)


def lease_seconds(heartbeat: float) -> float:
    """A lease is three heartbeats without renewal."""
    return 3 * heartbeat


class Timing(Frozen):
    """Seconds."""

    heartbeat: Positive = 20.0
    tenure: Positive = 600.0
    maximum_clock_skew: Positive = 30.0

    @property
    def lease(self) -> float:
        return lease_seconds(self.heartbeat)


class AuditPolicy(Frozen):
    """BOINC's adaptive replication: always until `streak` valid results in a row, then with probability 1/n.

    An audit replays the first `replay_steps` steps of an epoch; a share `whole_epoch` of all audits, drawn by a lottery that
    nobody can foresee, replays all of them and compares the end. Both 0: nothing is audited.
    """

    streak: Count = 10
    replay_steps: int = Field(default=4, ge=0)
    whole_epoch: float = Field(default=0.05, ge=0, le=1)


class HardwareNeeds(Frozen):
    """What a device must have to take a shard."""

    memory_bytes: int = Field(default=0, ge=0)
    disk_bytes: int = Field(default=0, ge=0)
    cuda: bool = False


class Manifest(Frozen):
    """The whole run. `run` is None in the first version, whose digest is the run id that later versions carry."""

    format: Literal[1] = 1
    name: Name
    run: Digest | None = None
    version: Count = 1
    owner: PublicKey
    coordinators: tuple[PublicKey, ...] = Field(min_length=1, max_length=8)
    created: float
    expires: float
    latent: LatentSpec
    expert: ExpertSpec
    shards: tuple[ShardSpec, ...] = Field(min_length=1, max_length=4096)
    optimisation: Optimisation = Optimisation()
    samples_per_shard: Count
    checkpoint_samples: Count
    holdout_tolerance: float = Field(default=0.02, ge=0)
    raw_tolerance: float = Field(default=0.3, ge=0)
    router: RouterSpec = RouterSpec()
    sampling: SamplingSpec = SamplingSpec()
    timing: Timing = Timing()
    audit: AuditPolicy = AuditPolicy()
    hardware: HardwareNeeds = HardwareNeeds()
    allowlist: tuple[PublicKey, ...] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if [shard.index for shard in self.shards] != list(range(len(self.shards))):
            raise ValueError("shards must be numbered 0, 1, 2, … in order")
        if abs(sum(shard.prior for shard in self.shards) - 1) > 1e-6:
            raise ValueError("the priors of the shards must add up to 1")
        if (self.version == 1) != (self.run is None):
            raise ValueError("the first version has no run id; every later version carries it")
        if self.expires <= self.created:
            raise ValueError("expires must lie after created")
        if self.checkpoint_samples % self.optimisation.batch or self.samples_per_shard % self.checkpoint_samples:
            raise ValueError("batch must divide checkpoint_samples, which must divide samples_per_shard")
        for shard in self.shards:
            if shard.clips < self.optimisation.batch:
                raise ValueError(
                    f"shard {shard.index} ({shard.name}) has {shard.clips} clips, fewer than a batch of "
                    f"{self.optimisation.batch}; use fewer experts or a smaller batch"
                )
        return self

    @property
    def run_id(self) -> str:
        return self.run or digest_of(self)

    @property
    def epochs(self) -> int:
        """Accepted checkpoints after which a shard's budget is done."""
        return self.samples_per_shard // self.checkpoint_samples

    @property
    def steps_per_epoch(self) -> int:
        return self.checkpoint_samples // self.optimisation.batch

    def expert_of(self, shard: int) -> ExpertSpec:
        return self.shards[shard].expert or self.expert


class SignedManifest(Frozen):
    """A manifest and its owner's signature over the canonical bytes."""

    manifest: Manifest
    signature: Signature

    @classmethod
    def sign(cls, manifest: Manifest, owner: Identity) -> SignedManifest:
        if owner.public_key != manifest.owner:
            raise AuthorisationError("the manifest names another owner than the signing key; use the owner's identity")
        return cls(manifest=manifest, signature=owner.sign(_SIGNING_DOMAIN + canonical(manifest)))

    def to_bytes(self) -> bytes:
        return canonical(self)


def open_manifest(
    data: bytes, *, now: float, run: str | None = None, owner: str | None = None, at_least_version: int = 1
) -> SignedManifest:
    """Parse and verify a signed manifest against what the reader has pinned.

    Raises ConfigError (malformed, expired, another run, older than `at_least_version`) or AuthorisationError (signature).
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
    if manifest.expires <= now:
        raise ConfigError(f"the manifest of run {manifest.run_id[:12]} has expired; ask its owner for a new version")
    return signed


def first_problem(error: ValidationError) -> str:
    """`where: what` of the first thing that pydantic found wrong."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"]) or "document"
    return f"{where}: {problem['msg']}"
