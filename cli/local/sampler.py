"""Samples clips from a mixture folder, and tells which experts made them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lutetia.cli.local.sampling_plan import SamplingPlan
from lutetia.system.errors import UsageError

if TYPE_CHECKING:
    from lutetia.models.video_files import Frames
    from lutetia.protocol.schema.model.latent_spec import LatentSpec


@dataclass(frozen=True)
class SampledClips:
    """`clips`: uint8 [F, H, W, 3] each. `experts`: for each clip and step, the weights of the experts that took part, by name."""

    clips: list[Frames]
    experts: list[list[dict[str, float]]]


@dataclass(frozen=True)
class SampledClip:
    """One clip, uint8 [F, H, W, 3], with the weights of the experts that took part in each step, by name."""

    frames: Frames
    experts: list[dict[str, float]]


class MixtureLoader:
    """A mixture, loaded once."""

    def __init__(self, folder: Path, hub: bool = False, plan: SamplingPlan | None = None, base: Path | None = None) -> None:
        """Load it.

        Args:
            folder: the mixture.
            hub: whether models that it names by a hub id may be downloaded.
            plan: device, dtype, experts in memory and tiling. None: the CPU in float32, with all experts in memory.
            base: folder of the base of a mixture of adapters. None: what was downloaded before.
        """
        import torch

        from lutetia.models.mixing.description import read_mixture
        from lutetia.models.pipeline import load_pipeline

        self.plan = plan or SamplingPlan("cpu", "float32", None, False)
        self.pipeline = load_pipeline(
            folder, hub=hub, device=self.plan.device, dtype=getattr(torch, self.plan.dtype),
            experts_in_memory=self.plan.experts_in_memory, base=base,
        )  # fmt: skip
        self.names = [expert.name for expert in read_mixture(folder).mixture.experts]

    @property
    def fps(self) -> float:
        return self.pipeline.fps

    def sample(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        expert: int | None = None,
        mode: Any = None,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> SampledClips:
        """One clip per prompt, all at once. What is None is the mixture's own choice.

        Args:
            prompts: what the clips show, in words.
            seed: clip i starts from noise of `seed + i`.
            expert: ask this expert alone, without the router.
            mode: how experts are chosen: top1, top2, full or sticky.
            steps: steps of the ODE solver.
            guidance: strength of the prompt.

        Raises:
            UsageError: a prompt or an option that the mixture cannot take.
        """
        from lutetia.models.video_files import to_uint8

        output = self.pipeline(list(prompts), steps, guidance, mode=mode, expert=expert, seed=seed)
        return SampledClips(list(to_uint8(output.frames)), [self._named(output.routing, clip) for clip in range(len(prompts))])

    def generate(
        self,
        prompts: Sequence[str],
        *,
        negative: str | None = None,
        seed: int = 0,
        batch: int = 8,
        bucket: LatentSpec | None = None,
        image: Any = None,
        on_cut: Callable[[str], None] = lambda problem: None,
        on_step: Callable[[int, int], None] = lambda done, steps: None,
        **options: Any,
    ) -> Iterator[SampledClip]:
        """One clip per prompt, with as little memory as possible: the text encoder, the experts and the autoencoder in turn.

        Args:
            prompts: what the clips show, in words.
            negative: what guidance leads away from. None: the null condition of training.
            seed: clip i starts from noise of `seed + i`.
            batch: clips sampled at once.
            bucket: of the mixture, whose size and length clips have; None: the first.
            image: first frame of all clips, as the pipeline takes it. None: they begin with what the prompt says.
            on_cut: called with a clause about each text that is longer than those of training, whose end is cut.
            on_step: called with (steps done, steps) of all batches together.
            options: those of `sample`.

        Raises:
            UsageError: a prompt or an option that the mixture cannot take.
        """
        from lutetia.models.pipeline_inputs import NEEDS_PICTURE, Texts
        from lutetia.models.video_files import to_uint8

        pipeline = self.pipeline
        if image is None and pipeline.spec.picture:
            raise UsageError(NEEDS_PICTURE.format("name one by --image"))
        if image is not None and not pipeline.transformer.takes_first_frames and not pipeline.spec.picture:
            raise UsageError("the experts of this mixture were not trained with first frames; leave --image out")
        for problem in Texts.of(list(prompts), negative).too_long(pipeline.text):
            on_cut(problem)
        names = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
        encoded = dict(zip(names, pipeline.encode_prompt(list(prompts), negative), strict=True))
        pipeline.free_text_encoder()
        sampled: list[tuple[Any, list[dict[str, float]]]] = []
        same: dict[str, Any] = {"image": image}
        if bucket:
            same |= {"num_frames": bucket.pixel_frames, "height": bucket.pixel_height, "width": bucket.pixel_width}
        batches = -(-len(prompts) // batch)
        for number in range(batches):

            def step_done(pipe: Any, step: int, timestep: Any, tensors: Any, number: int = number) -> dict[str, Any]:
                on_step(number * pipe.num_timesteps + step + 1, batches * pipe.num_timesteps)
                return {}

            rows = slice(number * batch, (number + 1) * batch)
            texts: dict[str, Any] = {name: vectors[rows] for name, vectors in encoded.items()}
            output = pipeline(
                **texts, num_inference_steps=options.get("steps"), guidance_scale=options.get("guidance"),
                mode=options.get("mode"), expert=options.get("expert"), seed=seed + rows.start, output_type="latent", **same,
                callback_on_step_end=step_done,
            )  # fmt: skip
            sampled += [(latents.cpu(), self._named(output.routing, clip)) for clip, latents in enumerate(output.frames)]
        pipeline.transformer.free_experts()
        if self.plan.tiling:
            pipeline.decoder.tile()
        for latents, experts in sampled:
            yield SampledClip(to_uint8(pipeline.decode_latents(latents[None]))[0], experts)

    def _named(self, routing: Any, clip: int) -> list[dict[str, float]]:
        """The experts that took part in each step of a clip, with their weights; `routing` [steps, N, K]."""
        return [
            {name: round(float(weight), 4) for name, weight in zip(self.names, step[clip], strict=True) if weight > 0}
            for step in routing
        ]
