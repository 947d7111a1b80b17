"""What a run will take of machines and disks, before anybody has trained a step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lutetia.models.experts.families import build_meta, family_of
from lutetia.models.experts.trained import trained_parameters
from lutetia.models.training.checkpoint_checks import published_schema, state_schema
from lutetia.models.training.memory.activations import expert_facts
from lutetia.models.training.memory.needs import RunNeeds, size_text
from lutetia.models.training.memory.plan import ladder, memory_need
from lutetia.protocol.schema.manifest import CheckpointForm, Manifest
from lutetia.protocol.schema.model.expert_spec import ExpertSpec

LARGE = 250_000_000
"""Trained numbers from which new runs publish compact checkpoints: 4 GB in the plain form."""


def checkpoint_form(wanted: str, expert: ExpertSpec) -> tuple[CheckpointForm, str]:
    """(form of a new run's published checkpoints, reason). `wanted`: float32, compact or auto. Raises like `build_expert`."""
    if wanted in ("float32", "compact"):
        return wanted, "as set"  # type: ignore[return-value]
    trained = sum(parameter.numel() for parameter in trained_parameters(build_meta(expert)).values())
    if trained < LARGE:
        return "float32", f"an expert trains {trained / 1e6:.1f} million numbers, fewer than {LARGE / 1e6:.0f}"
    return (
        "compact",
        f"an expert trains {trained / 1e6:.0f} million numbers; in float32 each checkpoint would have {size_text(16 * trained)}",
    )


@dataclass(frozen=True)
class Forecast:
    """What one shard of a run takes. Sizes in bytes."""

    needs: RunNeeds
    plain: int
    """On the device without any means against too little memory, one row at a time."""
    least: int
    """On an accelerator with all of them."""
    host: int
    """In main memory beside it, with all of them."""

    def lines(self, rate: float | None = None, *, base_here: bool = False) -> list[str]:
        """For people. `rate`: samples per second that a probe measured. `base_here`: the base's files are on this machine."""
        memory = (
            f"memory of a card: {size_text(self.plain)} as it is, {size_text(self.least)} with all that saves memory, "
            f"and then {size_text(self.host)} of main memory"
        )
        needs = self.needs
        lines = [needs.size_line(), memory, needs.disk_line(), needs.hours_line(rate), needs.base_line(here=base_here)]
        return [line for line in lines if line]


def run_needs(manifest: Manifest, shard: int = 0) -> RunNeeds:
    """What a shard's expert takes besides memory. Raises ConfigError where it cannot be built."""
    spec = manifest.expert_of(shard)
    model = build_meta(spec)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in trained_parameters(model).values())
    patch = family_of(spec.class_name).patch(model.config)
    tokens = math.prod(-(-size // step) for size, step in zip(manifest.latent.shape[1:], patch, strict=True))
    weights, state = result_bytes(manifest, shard)
    return RunNeeds(
        parameters=parameters, trained=trained, weights=weights, checkpoint=weights + state, local=16 * trained,
        data=manifest.shards[shard].data_bytes or manifest.shards[shard].train.size,
        base=manifest.adapter.base.size if manifest.adapter else 0, epochs=manifest.epochs, samples=manifest.samples_per_shard,
        flops=6.0 * parameters * tokens * manifest.samples_per_shard,
    )  # fmt: skip


def forecast(manifest: Manifest, shard: int = 0) -> Forecast:
    """Counts for a shard's expert; takes seconds for a large one. Raises ConfigError where it cannot be built."""
    facts = expert_facts(manifest, shard)
    steps = list(ladder("bfloat16", "cuda", manifest.optimisation.optimizer, narrower=True))
    last = memory_need(facts, steps[-1][0], steps[-1][1], 1, "cuda")
    plain = memory_need(facts, *steps[0][:2], 1, "cuda").device
    return Forecast(run_needs(manifest, shard), plain=plain, least=last.device, host=last.host)


def result_bytes(manifest: Manifest, shard: int) -> tuple[int, int]:
    """Bytes of the weights and of the training state of a shard's result."""
    spec = manifest.expert_of(shard)
    required, optional = state_schema(spec, manifest.optimisation, manifest.checkpoints)
    state = {name: form for name, form in (required | optional).items() if not name.startswith("ema.")}
    return _bytes(published_schema(spec, manifest.checkpoints)), _bytes(state)


def _bytes(schema: dict) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in schema.values() if -1 not in shape)
