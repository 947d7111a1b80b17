"""`lutetia init --from PIPELINE`: clips of a shape that the pipeline takes, and what its transformer costs to train here."""

from __future__ import annotations

from dataclasses import replace

from lutetia.cli.init.proposal import DataChoice, Measured
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.system.errors import ConfigError

_MORE_FRAMES, _SIDE_STEP, _LARGEST_SIDE = 16, 16, 512


def fit_pipeline(choice: DataChoice, ref: str) -> tuple[DataChoice, LatentSpec, ExpertSpec, str]:
    """The choice with frames and side that the pipeline takes, its latents, its transformer, and its reference for the settings.

    Of two transformers it is that for high noise.

    Raises ConfigError if the pipeline cannot be used, or takes none of the shapes that were tried.
    """
    from lutetia.models.data.encode.latents import load_latents
    from lutetia.models.experts.families import check_fits
    from lutetia.models.sources.pipeline import open_pipeline

    source = open_pipeline(ref, weights=("vae",))
    part = source.noise_part("high" if len(source.transformers) > 1 else None)
    latents, recipe, expert = load_latents(source.part("vae")), source.text, source.expert(choice.fps, part)
    width = int(source.config(recipe.encoder).get("d_model") or source.config(recipe.encoder).get("hidden_size") or 1)
    second = source.config(recipe.pooled_encoder) if recipe.pooled_encoder else {}
    pooled = int(second.get("hidden_size") or width)
    reason = "it takes no clips"
    for frames in range(choice.frames, choice.frames + _MORE_FRAMES):
        for side in range(choice.side, _LARGEST_SIDE, _SIDE_STEP):
            try:
                channels, *shape = latents.shape_of(frames, side, side)
                latent = LatentSpec(
                    channels=channels, frames=shape[0], height=shape[1], width=shape[2], vae=source.part("vae"),
                    pixel_frames=frames, pixel_height=side, pixel_width=side, fps=choice.fps, text_encoder=source.model.text,
                    text_tokens=source.tokens, text_width=width, pooled_width=pooled, text=recipe,
                    picture=source.picture,
                )  # fmt: skip
                check_fits(expert, latent)
            except ConfigError as error:
                reason = str(error)
                if "frames" in reason.partition(";")[0]:
                    break  # of no side
                continue
            why = {**choice.why, "frames": f"a length that {source.class_name} takes", "height": "a size that it takes"}
            return replace(choice, frames=frames, side=side, why=why), latent, expert, source.model.text
    raise ConfigError(f"pipeline {ref!r} takes no clips of {choice.frames} frames or some more: {reason}")


def cost_of(spec: ExpertSpec, latent: LatentSpec, batch: int, small: Measured) -> Measured:
    """What the expert costs on this machine, from what the small one took.

    The time is scaled by the operations of a training step, or by parameters where operations cannot be counted (Mochi).
    """
    from lutetia.coordinator.settings import small_expert
    from lutetia.models.experts.families import build_meta
    from lutetia.models.study.flops import expert_cost
    from lutetia.models.training.memory.activations import activations

    parameters = sum(parameter.numel() for parameter in build_meta(spec).parameters())
    try:
        ratio = expert_cost(spec, latent).training / expert_cost(small_expert(latent), latent).training
    except RuntimeError:
        ratio = parameters / small.parameters
    kept = activations(spec, latent, "float32", False)
    return Measured(parameters, kept.fixed + batch * kept.per_row, small.seconds_per_sample * ratio, small.device)
