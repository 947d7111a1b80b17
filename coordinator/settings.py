"""What a run's owner chooses when creating it, and what its operator chooses when serving it. Unknown keys are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from lutetia.protocol.schema.manifest import (
    AuditPolicy,
    Count,
    ExpertSpec,
    HardwareNeeds,
    LatentSpec,
    Name,
    Optimisation,
    Positive,
    PublicKey,
    RouterSpec,
    SamplingSpec,
    Timing,
)
from lutetia.protocol.schema.ticket import Place

HostPort = Annotated[str, Field(pattern=r"^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+):\d{1,5}$")]
"""`host:port`; an IPv6 address stands in brackets."""


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RunSettings(_Settings):
    """Everything of the manifest that the data do not decide. `preset` gives the defaults; what is set here wins.

    `addresses` are where volunteers reach the coordinator, fixed in the ticket; the first one's port is listened on.
    `experts` only asserts the number of clusters in the data. Without `expert` a small Wan transformer is fitted to the latents.
    `warm_start`: the folder or hub id of what the experts' first weights are taken from (`models.warm_start`).
    """

    preset: Literal["tiny", "demo"] | None = None
    name: Name = "run"
    addresses: tuple[HostPort, ...] = Field(default=("127.0.0.1:41000",), min_length=1, max_length=8)
    experts: Count | None = None
    expert: ExpertSpec | None = None
    warm_start: str | None = None
    optimisation: Optimisation = Optimisation()
    samples_per_shard: Count = 64_000
    checkpoint_samples: Count = 3_200
    holdout_tolerance: float = Field(default=0.02, ge=0)
    raw_tolerance: float = Field(default=0.3, ge=0)
    router: RouterSpec = RouterSpec()
    sampling: SamplingSpec = SamplingSpec()
    timing: Timing = Timing()
    audit: AuditPolicy = AuditPolicy()
    hardware: HardwareNeeds = HardwareNeeds()
    allowlist: tuple[PublicKey, ...] | None = None
    valid_days: Positive = 365.0

    @field_validator("expert")
    @classmethod
    def _weights_by_name(cls, expert: ExpertSpec | None) -> ExpertSpec | None:
        if expert and expert.init:
            raise ValueError("expert.init is written by run create; name the weights to begin with by warm_start")
        return expert

    def resolved(self) -> RunSettings:
        """With the preset's values where nothing was set."""
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
"""A run of seconds that shows that the parts work together; its clips are noise."""


def small_expert(latent: LatentSpec) -> ExpertSpec:
    """A Wan transformer of about 4 million parameters that takes `latent`, shown where it is by 18 position channels."""
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


class ServeSettings(_Settings):
    """How the coordinator runs. `threads` and `nice` are those of the workshop, so that it leaves room for workers beside it.

    `stitch`: after acceptances, at most every `refresh_seconds` ("refresh"), or only once all budgets are done ("end").
    `http` adds an HTTP server with the status page, status.json, metrics and blobs.
    """

    listen: Annotated[str, Field(pattern=r"^/(ip4|ip6)/[0-9a-fA-F:.]+/tcp/\d{1,5}$")] | None = None
    announce: tuple[Place, ...] = Field(default=(), max_length=8)
    http: HostPort | None = None
    threads: Count = 1
    nice: int = Field(default=5, ge=0, le=19)
    stitch: Literal["refresh", "end"] = "refresh"
    refresh_seconds: Positive = 60.0
    gallery: bool = True
    exit_when_done: bool = False
    recover: bool = Field(default=False, description="Take acceptances back from peers that the ledger lacks")
    offers_per_minute: Count = 30
    checks_at_once: Count = 4
    kept_states: int = Field(default=4, ge=1, description="Epochs of each shard whose training states are kept, for roll-backs")
    blob_bytes_per_second: Positive | None = None
    slowest_bytes_per_second: Positive = Field(default=65536.0, description="A checkpoint that arrives slower is inconclusive")
