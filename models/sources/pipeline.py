"""A diffusers pipeline as a source: all that data and run take over from it, read from its folder or from a hub."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lutetia.models.experts.beta_table import betas_of, is_flow
from lutetia.models.mixing.stock.solvers import dynamic_shift
from lutetia.models.networks.model_ref import ModelRef, hub_errors, parse_ref, read_config, refuse_pickled, snapshot
from lutetia.models.networks.video_autoencoders import ltx_ratios
from lutetia.models.sources.conventions import CONVENTIONS, OTHER_TASKS, WAN_WITH_PICTURES, Convention
from lutetia.protocol.schema.manifest import first_problem
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.protocol.schema.model.pipeline_spec import ExpertInputs, NoisePart, PictureSpec, SchedulerSpec, Side, TextRecipe
from lutetia.protocol.schema.model.training_spec import SamplingSpec
from lutetia.system.errors import ConfigError

WHAT = "pipeline"
_INDEX = "model_index.json"
_FLOW = "FlowMatchEulerDiscreteScheduler"
_PREDICTIONS = {"v_prediction": "velocity", "epsilon": "epsilon", "sample": "sample"}

PARTS_OF_NOISE: Mapping[Side, str] = {"high": "transformer", "low": "transformer_2"}
"""Of a pipeline with two transformers: which of them has which noise levels."""

log = logging.getLogger(__name__)


def transformer_of(part: NoisePart | None) -> str:
    """The name of the transformer for a part of the noise levels; None: for all of them."""
    return PARTS_OF_NOISE[part.side if part else "high"]


@dataclass(frozen=True)
class PipelineSource:
    """A pipeline whose files are on this machine."""

    model: ModelRef
    """Where it is for everybody: its folder, or a hub id with the commit."""
    folder: Path
    """Where its files lie here."""
    index: Mapping[str, Any]
    convention: Convention

    @property
    def class_name(self) -> str:
        return str(self.index["_class_name"])

    def part(self, name: str) -> str:
        """The reference of a component, as other settings name it."""
        return self.model.part(name).text

    def config(self, name: str) -> dict[str, Any]:
        """The configuration of a component, without diffusers' own entries. Raises ConfigError."""
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        config = read_config(WHAT, ModelRef(self.model.text, str(self.folder / name)), file)
        return {key: value for key, value in config.items() if not key.startswith("_")}

    @property
    def text(self) -> TextRecipe:
        """How it turns captions into tokens."""
        if self.index.get("force_zeros_for_empty_prompt"):
            return self.convention.text.model_copy(update={"null": "zeros"})
        return self.convention.text

    @property
    def tokens(self) -> int:
        """Tokens of a caption: what the transformer's config fixes, else the default of the pipeline's call."""
        return int(self.config("transformer").get("max_text_seq_length") or self.convention.tokens)

    @property
    def picture(self) -> PictureSpec | None:
        """What its transformer is given of the first picture of each clip, in channels of its own. Raises ConfigError."""
        config, vae = self.config("transformer"), self.config("vae")
        if self.convention is WAN_WITH_PICTURES:
            mask = int(config.get("in_channels") or 0) - 2 * int(config.get("out_channels") or 0)
            return PictureSpec(frames="all", mask=min(max(mask, 0), 64), **self._vision(config.get("image_dim")))
        if self.class_name == "CogVideoXImageToVideoPipeline":
            scale = float(vae.get("scaling_factor") or 1.0) if vae.get("invert_scale_latents") else 1.0
            return PictureSpec(frames="first", scale=scale**-2)
        return None

    def _vision(self, width: int | None) -> dict[str, int]:
        """How many vectors of which width its image encoder gives a picture, if the transformer takes such."""
        if width is None:
            return {}
        for part in ("image_encoder", "image_processor"):
            if not _given(self.index.get(part)):
                raise ConfigError(
                    f"{WHAT} {self.model.text!r} has no {part}, but its transformer needs one; name a whole pipeline"
                )
        config = self.config("image_encoder")
        config = config.get("vision_config") or config
        side = int(config.get("image_size", 224)) // int(config.get("patch_size", 32))
        return {"vision_tokens": side**2 + 1, "vision_width": int(config.get("hidden_size", 768))}

    @property
    def transformers(self) -> tuple[str, ...]:
        """The names of its transformers: one, or those for high and for low noise."""
        return tuple(name for name in PARTS_OF_NOISE.values() if _given(self.index.get(name)))

    def noise_part(self, side: Side | None) -> NoisePart | None:
        """The part of the noise levels that is trained; None where one transformer has all. Raises ConfigError."""
        ref, boundary = self.model.text, self.index.get("boundary_ratio")
        if boundary is None:
            if side is not None:
                raise ConfigError(f"{WHAT} {ref!r} has one transformer for all noise levels; leave part (--part) out")
            return None
        if side is None:
            raise ConfigError(
                f"{WHAT} {ref!r} has two transformers, one for high and one for low noise, of which a run trains one; "
                "say which with part (--part high or --part low)"
            )
        return NoisePart(side=side, boundary=boundary)

    def expert(self, fps: float, part: NoisePart | None = None) -> ExpertSpec:
        """The expert that its transformer is, that of `part` where it has two, for clips of `fps` frames per second.

        Raises ConfigError.
        """
        name = transformer_of(part)
        config, scheduler = self.config(name), self.config("scheduler")
        betas = None if is_flow(self._scheduler_class, scheduler) else betas_of(scheduler)
        kind = str(scheduler.get("prediction_type", "epsilon"))
        if betas and kind not in _PREDICTIONS:
            raise ConfigError(f"{WHAT} {self.model.text!r} predicts {kind!r}, which is not supported; use another pipeline")
        try:
            return ExpertSpec(
                class_name=str(self.index[name][1]), config=config, betas=betas, inputs=self._inputs(fps, part),
                prediction=_PREDICTIONS[kind] if betas else "velocity",  # pyright: ignore[reportArgumentType]
            )  # fmt: skip
        except ValidationError as error:
            raise ConfigError(f"{WHAT} {self.model.text!r} cannot be used: {first_problem(error)}; use another") from error

    def _inputs(self, fps: float, part: NoisePart | None) -> ExpertInputs:
        scale = None
        if self.index["transformer"][1] == "LTXVideoTransformer3DModel":
            space, time = ltx_ratios(self.config("vae"))
            scale = (time / fps, float(space), float(space))
        reverse = bool(self.config("scheduler").get("invert_sigmas"))
        return ExpertInputs(
            masked=self.convention.masked, rope_scale=scale, reversed=reverse, first_frame=self.convention.first_frame,
            noise_part=part,
        )  # fmt: skip

    def sampling(self) -> dict[str, Any]:
        """Values of a SamplingSpec: steps, guidance and scheduler of the pipeline. Raises ConfigError."""
        convention = self.convention
        try:
            scheduler = SchedulerSpec(
                class_name=self._scheduler_class,  # pyright: ignore[reportArgumentType]
                config=self.config("scheduler"), grid=convention.grid,
            )  # fmt: skip
        except ValidationError as error:
            raise ConfigError(
                f"{WHAT} {self.model.text!r} samples by {self._scheduler_class}, which is not supported "
                f"({first_problem(error)}); save it with another scheduler"
            ) from error
        values = {"steps": convention.steps, "guidance": convention.guidance, "scheduler": scheduler}
        return values | ({"embedded_guidance": convention.embedded_guidance} if convention.embedded_guidance is not None else {})

    @property
    def _scheduler_class(self) -> str:
        return str(self.index["scheduler"][1])


def open_pipeline(ref: str, hub: bool = True, weights: tuple[str, ...] = ()) -> PipelineSource:
    """Open the pipeline that `ref` names.

    Args:
        ref: a folder, or a hub id `owner/name[@commit]`.
        hub: whether a hub id may be downloaded; otherwise only what was downloaded before is used.
        weights: components whose weights are needed. The files of others are not downloaded, but for their configurations.

    Raises ConfigError: there is no such pipeline; its class, or that of a part, is not supported; or its weights are pickled
    only.
    """
    model = parse_ref(ref, WHAT, (), hub)
    if model.folder is None:
        folder, model = snapshot(WHAT, model, weights)
    else:
        folder = model.folder
        model = ModelRef(str(folder), str(folder))
    with hub_errors(WHAT, ModelRef(ref, str(folder))):
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        class_name = str(index["_class_name"])
    _check(ref, class_name, index)
    channels = class_name == "WanImageToVideoPipeline" and not index.get("expand_timesteps")
    source = PipelineSource(model, folder, index, WAN_WITH_PICTURES if channels else CONVENTIONS[class_name])
    for part in weights:
        _check_weights(ref, folder / part)
    return source


def _check(ref: str, class_name: str, index: Mapping[str, Any]) -> None:
    if class_name in OTHER_TASKS:
        raise ConfigError(f"{WHAT} {ref!r} is a {class_name}, which is not supported: {OTHER_TASKS[class_name]}")
    if class_name not in CONVENTIONS:
        known = ", ".join(sorted(CONVENTIONS))
        raise ConfigError(f"{WHAT} {ref!r} is a {class_name}, which is not supported; use one of {known}")
    boundary, transformers = index.get("boundary_ratio"), ["transformer"]
    if boundary is not None or _given(index.get("transformer_2")):
        transformers.append("transformer_2")
        if not (isinstance(boundary, float) and 0 < boundary < 1):
            raise ConfigError(f"{WHAT} {ref!r} has a boundary_ratio of {boundary} between its two transformers; name another")
    for part in (*transformers, "scheduler", "vae", "text_encoder", "tokenizer"):
        if not _given(index.get(part)):
            raise ConfigError(f"{WHAT} {ref!r} has no {part}; name a whole pipeline")


def _given(component: Any) -> bool:
    return isinstance(component, list) and len(component) == 2 and component[1] is not None


def _check_weights(ref: str, folder: Path) -> None:
    what = f"the {folder.name} of {WHAT} {ref!r}"
    if folder.is_dir():
        refuse_pickled(what, folder)
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"{what} has no weights (*.safetensors); name a whole pipeline")


def mismatch(source: PipelineSource, latent: LatentSpec) -> str | None:
    """What of the data was not made by this pipeline, as a sentence; None if all was."""
    for what, made, own in (
        ("latents", latent.vae, source.part("vae")),
        ("text embeddings", latent.text_encoder, source.model.text),
    ):
        if made != own:
            return f"the data's {what} were made by {made}, but the {WHAT} has {own}"
    if latent.picture != source.picture:
        held = "no first pictures of clips" if latent.picture is None else f"first pictures of clips as {latent.picture}"
        return f"the data hold {held}, but {source.class_name} needs {source.picture or 'none'}"
    if latent.text != source.text:
        return f"the data's text embeddings were made in another way than {source.class_name} makes them"
    return None


def time_shift(source: PipelineSource, latent: LatentSpec) -> float:
    """The shift of the pipeline's noise levels towards noise, for latents of this shape; 1 where it has none."""
    config = source.config("scheduler")
    if config.get("use_dynamic_shifting"):
        return math.exp(dynamic_shift(config, math.prod(latent.shape[1:])))
    return float(config.get("flow_shift" if config.get("use_flow_sigmas") else "shift") or 1.0)


def sampling_of(source: PipelineSource, chosen: SamplingSpec) -> SamplingSpec:
    """The run's sampling: the pipeline's own, where nothing else was chosen."""
    given = {name: getattr(chosen, name) for name in chosen.model_fields_set}
    return SamplingSpec(**{**source.sampling(), **given})
