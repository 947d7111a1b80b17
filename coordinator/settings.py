"""What a run's owner chooses when creating it, and how its coordinator is served. Unknown keys are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator

from lutetia.coordinator.addresses import dialled_address, host_port
from lutetia.models.device import AUTO_DEVICE
from lutetia.protocol.schema.fields import Count, Name, Positive, PublicKey, Share
from lutetia.protocol.schema.manifest import AuditPolicy, HardwareNeeds, Timing
from lutetia.protocol.schema.model.adapter import BaseDtype, ModuleName
from lutetia.protocol.schema.model.card_spec import CardSpec
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.protocol.schema.model.pipeline_spec import Side
from lutetia.protocol.schema.model.team_spec import TeamSpec
from lutetia.protocol.schema.model.training_spec import Optimisation, RouterSpec, SamplingSpec
from lutetia.protocol.schema.ticket import Place

PageAddress = Annotated[str, AfterValidator(lambda value: value if value == "off" else host_port(value))]
"""`off`, or `host:port`; write an IPv6 address in brackets."""
DialledAddress = Annotated[str, AfterValidator(dialled_address)]
"""`host:port` where others reach this machine."""


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AdapterSettings(_Settings):
    """An adapter that is trained on a frozen base."""

    base: str = Field(
        description="Folder or hub id `owner/name[/folder][@revision]` of the transformer or pipeline that the experts adapt"
    )
    rank: int = Field(default=16, ge=1, le=1024, description="Rank of the adapter's matrices")
    alpha: Positive = Field(default=16.0, description="The adapter's product is multiplied by alpha / rank")
    targets: tuple[ModuleName, ...] = Field(
        default=("to_q", "to_k", "to_v", "to_out.0"), min_length=1, max_length=64,
        description="Linear layers that get an adapter, by the ends of their names",
    )  # fmt: skip
    dora: bool = Field(default=False, description="Train the length of each row of the weights, too (DoRA)")
    dtype: BaseDtype = Field(
        default="bfloat16",
        description="Data type in which the base's linear layers are kept: float32, bfloat16, fp8, or nf4 (needs bitsandbytes)",
    )
    serve: bool = Field(
        default=False, description="Serve the base's files to volunteers who do not have them; its licence must allow that"
    )


class AdaptedExpert(_Settings):
    """An expert whose network is that of its adapter's base."""

    adapter: AdapterSettings = Field(description="The adapter")
    prediction: Literal["velocity", "sample", "epsilon"] = Field(default="velocity", description="What the base predicts")
    noise_schedule: Literal["linear", "vp_cosine"] = Field(default="linear", description="The noise path of the base")


def _expert_kind(value: Any) -> str:
    """An expert of settings names its base by text; one of a manifest, with digests, is a whole description."""
    adapter = value.get("adapter") if isinstance(value, dict) else getattr(value, "adapter", None)
    by_name = isinstance(adapter, dict) and not isinstance(adapter.get("base"), dict)
    return "adapted" if by_name or isinstance(value, AdaptedExpert) else "whole"


Expert = Annotated[Annotated[ExpertSpec, Tag("whole")] | Annotated[AdaptedExpert, Tag("adapted")], Discriminator(_expert_kind)]


class RunSettings(_Settings):
    """Everything in the manifest that the data do not decide."""

    preset: Literal["tiny", "demo"] | None = Field(
        default=None, description="Defaults for the settings below: tiny, a run of seconds; demo, the run of `lutetia demo`"
    )
    name: Name = Field(default="run", description="Name of the run, shown to people")
    addresses: tuple[DialledAddress, ...] = Field(
        default=("127.0.0.1:41000",), min_length=1, max_length=8,
        description="host:port where nodes reach the coordinator, written into the ticket; it listens on the first one's port",
    )  # fmt: skip
    experts: Count | None = Field(
        default=None, description="Number of experts; refused if the data have another number of clusters"
    )
    expert: Expert | None = Field(
        default=None,
        description="Network of each expert, or expert.adapter: an adapter on a base; without it a small Wan transformer that "
        "fits the latents",
    )
    pipeline: str | None = Field(
        default=None,
        description="diffusers pipeline whose transformer every expert starts from, with its noise schedule, time shift, "
        "guidance and scheduler, a folder or a hub id owner/name@commit; the data must be built from it",
    )
    part: Side | None = Field(
        default=None,
        description="Part of the noise levels that the run trains, of a pipeline with two transformers (Wan 2.2 A14B): high or "
        "low; the other part needs a run of its own, or stays the pipeline's",
    )
    first_frame: Share | None = Field(
        default=None,
        description="Share of samples that are trained with their first latent frame given, so that clips can begin with a "
        "picture; for the transformers of Wan and LTX-Video. Default: 0.9 from an image-to-video pipeline, else no pictures",
    )
    warm_start: str | None = Field(
        default=None, description="Folder or hub id of a model from which the experts take their first weights"
    )
    optimisation: Optimisation = Field(default=Optimisation(), description="How every expert is trained")
    checkpoints: Literal["auto", "float32", "compact"] = Field(
        default="auto",
        description="Form of published checkpoints: float32 (16 bytes a trained number), compact (4 bytes), or auto: compact for "
        "experts of at least 250 million trained numbers",
    )
    samples_per_shard: Count = Field(default=64_000, description="Training budget of each expert, in samples")
    checkpoint_samples: Count = Field(
        default=3_200, description="Samples from one checkpoint of an expert to the next (one epoch)"
    )
    holdout_tolerance: float = Field(
        default=0.02, ge=0, description="Fraction by which a result's held-out loss may exceed its parent's"
    )
    raw_tolerance: float = Field(
        default=0.3, ge=0,
        description="Fraction by which the held-out loss of the raw parameters may exceed that of average and parent",
    )  # fmt: skip
    team: TeamSpec | None = Field(
        default=None, description="Lanes in which several nodes train one epoch of an expert; without it one node trains it"
    )
    router: RouterSpec = Field(default=RouterSpec(), description="The router")
    sampling: SamplingSpec = Field(default=SamplingSpec(), description="How the gallery is sampled from the mixture")
    timing: Timing = Field(default=Timing(), description="Heartbeat, tenure and clock skew")
    audit: AuditPolicy = Field(default=AuditPolicy(), description="Which results are audited and how far")
    hardware: HardwareNeeds = Field(default=HardwareNeeds(), description="What a machine must have to train a shard")
    allowlist: tuple[PublicKey, ...] | None = Field(
        default=None, description="Public keys that may take part besides the coordinators; without it anyone"
    )
    card: CardSpec | None = Field(default=None, description="What the mixture's model card says besides what the run knows")
    valid_days: Positive = Field(default=365.0, description="Days until the manifest expires")

    @field_validator("expert")
    @classmethod
    def _weights_by_name(cls, expert: ExpertSpec | AdaptedExpert | None) -> ExpertSpec | AdaptedExpert | None:
        if isinstance(expert, ExpertSpec) and expert.init:
            raise ValueError("expert.init is written by `run create`; set warm_start to the model to take the first weights from")
        return expert

    def resolved(self) -> RunSettings:
        """The settings with the preset's values where nothing was set."""
        if self.preset is None:
            return self
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return RunSettings(**{**preset(self.preset), **given})


def preset(name: Literal["tiny", "demo"]) -> dict[str, Any]:
    """The values of a named preset, as keyword arguments of RunSettings."""
    if name == "tiny":
        return dict(TINY)
    from lutetia.models.data import recipe

    return dict(recipe.RUN)


TINY: dict[str, Any] = {
    "optimisation": Optimisation(batch=2, learning_rate=1e-3, warmup_steps=2, ema_decay=0.5),
    "samples_per_shard": 24,
    "checkpoint_samples": 8,
    "holdout_tolerance": 1.0,
    "raw_tolerance": 1.0,
    "router": RouterSpec(hidden=16, layers=1, samples=64, batch=8),
    "sampling": SamplingSpec(steps=2, guidance=1.0, prompts=("a moving thing",)),
    "timing": Timing(heartbeat=2.0, tenure=60.0),
}
"""A run of seconds, to see that all parts work together; its clips are noise."""


def small_expert(latent: LatentSpec) -> ExpertSpec:
    """A Wan transformer of about 4 million parameters that takes `latent` and 18 channels with positions."""
    patch = [2 if size % 2 == 0 and size > 4 else 1 for size in (latent.frames, latent.height, latent.width)]
    config = {
        "patch_size": patch, "num_attention_heads": 4, "attention_head_dim": 48, "in_channels": latent.channels + 18,
        "out_channels": latent.channels, "text_dim": latent.text_width, "freq_dim": 128, "ffn_dim": 768, "num_layers": 6,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 128,
    }  # fmt: skip
    return ExpertSpec(config=config)


def tiny_expert(latent: LatentSpec) -> ExpertSpec:
    """One narrow block, for the tiny preset."""
    config = {
        **small_expert(latent).config, "num_attention_heads": 2, "attention_head_dim": 12, "freq_dim": 32, "ffn_dim": 32,
        "num_layers": 1,
    }  # fmt: skip
    return ExpertSpec(config=config)


class MailSettings(_Settings):
    """Where and how mail is sent."""

    server: str = Field(pattern=r"^[A-Za-z0-9.-]+:\d{1,5}$", description="host:port of the SMTP server, as mail.example.org:587")
    sender: str = Field(pattern=r"^[^\s@<>]+@[^\s@<>]+$", max_length=254, description="Address that the mail comes from")
    to: tuple[Annotated[str, Field(pattern=r"^[^\s@<>]+@[^\s@<>]+$", max_length=254)], ...] = Field(
        min_length=1, max_length=16, description="Addresses that the mail goes to"
    )
    security: Literal["starttls", "tls", "none"] = Field(
        default="starttls", description="How the connection is encrypted: starttls (usually port 587), tls (465) or none"
    )
    user: str | None = Field(default=None, description="Name to log in with; without it no login")
    password_file: Path | None = Field(default=None, description="File of the password; its first line is read for each mail")


class AlertSettings(_Settings):
    """Whom to tell when something does not go on. Each cause is told once; one that goes away and comes back, again."""

    command: str | None = Field(
        default=None, description="Command that gets the text on its standard input and in the variable LUTETIA_ALERT; no shell"
    )
    webhook: Annotated[str, Field(pattern=r"^https?://[^\s]+$", max_length=2048)] | None = Field(
        default=None, description="Address that gets a POST with JSON: text, content (the same) and causes"
    )
    mail: MailSettings | None = Field(default=None, description="Mail; without it none is sent")


class ServeSettings(_Settings):
    """How the coordinator of a run is served."""

    listen: Annotated[str, Field(pattern=r"^/(ip4|ip6)/[0-9a-fA-F:.]+/tcp/\d{1,5}$")] | None = Field(
        default=None, description="Multiaddress to listen on, as /ip4/0.0.0.0/tcp/41000; without it the run's own"
    )
    announce: tuple[Place, ...] = Field(
        default=(), max_length=8, description="Further multiaddresses to announce to peers; without any those of the run"
    )
    http: PageAddress = Field(
        default="127.0.0.1:0",
        description="host:port of the HTTP server with the run's page, its API, metrics and blobs; port 0: a free one, whose "
        "address is printed; off: none",
    )
    about: str = Field(default="", max_length=300, description="One sentence about the run, for its page")
    threads: Count = Field(default=1, description="CPU threads of each worker process, for checks, audits, router and samples")
    nice: int = Field(
        default=5, ge=0, le=19,
        description="How much lower the priority of the worker processes is, so that trainers on the same machine go first",
    )  # fmt: skip
    device: str = Field(
        default="cpu", pattern=AUTO_DEVICE,
        description="Where the worker processes compute: auto, cpu, mps, cuda, cuda:N, xpu or xpu:N",
    )  # fmt: skip
    check_seconds: Positive = Field(
        default=900.0,
        description="Seconds that scoring one result on held-out clips may take, its parent's score included; where all rows "
        "would take longer, fewer are scored, but at least 8",
    )
    base: Path | None = Field(
        default=None, description="Folder of the weights that the run's adapters are trained on; without it where they were found"
    )
    lend_checks: bool = Field(
        default=False,
        description="Have nodes that stand by check results, replay epochs and train the router, and start no worker process",
    )
    checkers: tuple[PublicKey, ...] = Field(
        default=(), max_length=1024,
        description="Public keys of the nodes that may see held-out clips, with lend_checks; only these are asked. Without any, "
        "every node may be asked, and each check uses up clips of the reserve that `lutetia coordinator reserve` draws",
    )  # fmt: skip
    stitch: Literal["refresh", "end"] = Field(
        default="refresh", description="When to make the mixture: refresh, after acceptances; end, once all budgets are done"
    )
    refresh_seconds: Positive = Field(default=60.0, description="Least seconds between two mixtures before the end")
    gallery: bool = Field(default=True, description="Sample the manifest's prompts from each mixture")
    gallery_bytes: Count = Field(
        default=512 << 20,
        description="Most bytes of galleries that are kept, one per mixture; when they have more, those between the nearest "
        "neighbours in time go first, and the newest stays",
    )
    exit_when_done: bool = Field(default=False, description="Exit when all budgets are done and the last mixture is made")
    alerts: AlertSettings = Field(default=AlertSettings(), description="Whom to tell when something does not go on")
    recover: bool = Field(
        default=False, description="Add acceptances that the ledger has lost from the DHT, instead of refusing to start"
    )
    offers_per_minute: Count = Field(default=30, description="Results that one peer may offer per minute")
    checks_at_once: Count = Field(default=4, description="Results that are checked at the same time")
    kept_states: int = Field(
        default=4, ge=1, description="Epochs of each shard for which training states are kept, in case of a rollback"
    )
    keep_all_weights: bool = Field(
        default=False,
        description="Keep weights and traces of all accepted epochs for good, not only of each shard's last 64, which may still "
        "be audited or rolled back to",
    )
    mixture_seconds: Positive = Field(
        default=120.0,
        description="Seconds that the experts' passes may take when a mixture is scored on held-out clips; at least 8 clips are "
        "scored however long they take",
    )
    routing: Literal["measured", "manifest"] = Field(
        default="measured",
        description="How a mixture's routing mode and temperature are chosen: measured, on held-out clips, where another way is "
        "better than the manifest's beyond the noise; manifest, as it says",
    )
    kept_mixtures: Count | None = Field(
        default=None,
        description="Mixtures whose files are kept, the newest ones and the current one; without it those of all mixtures that "
        "were ever made. Descriptions of all are kept",
    )
    blob_bytes_per_second: Positive | None = Field(
        default=None,
        description="Most bytes of blobs sent per second, to peers and HTTP clients together; without it no limit",
    )
    slowest_bytes_per_second: Positive = Field(
        default=65536.0,
        description="Bytes per second; a checkpoint that arrives slower, or of which no MiB came for 10 s and the time that "
        "this rate gives it, is inconclusive",
    )
