"""The mixture as a diffusers pipeline: prompts in, clips out, with the experts' weights at every step.

    from lutetia.models.pipeline import LutetiaPipeline
    pipe = LutetiaPipeline.from_pretrained("path/to/mixture")
    frames = pipe(["a red digit three moves to the left"], seed=0).frames

This compares every part with the folder's description before it is read, and runs no code of the folder. A hub id
(`owner/name`) is downloaded as a whole first. `DiffusionPipeline.from_pretrained` loads the folder, too, but only with
`trust_remote_code=True`, which runs whatever `pipeline.py` lies there.

This module's path is part of the file format: the `pipeline.py` of every published mixture imports `LutetiaPipeline` from here.
Do not move or rename either.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from lutetia.models import pipeline_inputs as inputs
from lutetia.models.mixing.adapter_experts import GivenBase
from lutetia.models.mixing.folder import MixtureFolder, refused_options
from lutetia.models.mixing.layout import parse_shapes
from lutetia.models.mixing.sampling import SamplingState, sample, solver_noise
from lutetia.models.mixing.stock.solvers import EulerSolver, SchedulerSolver, Solver
from lutetia.models.mixture import MixtureTransformer, Mode
from lutetia.models.pipeline_hub import HUB_OPTIONS, PushesMixtures, mixture_place
from lutetia.models.pipeline_inputs import Generators, Texts, named_dtype
from lutetia.models.pipeline_parts import PromptsAndPictures, read_parts
from lutetia.models.pipeline_state import CALLBACK_TENSORS, CallProgress, LutetiaPipelineOutput, StepCallback, state_after
from lutetia.system.errors import ConfigError

OutputType = Literal["np", "pt", "pil", "latent"]
_OPTIONS = ("torch_dtype", "dtype", "hub", "base", "use_safetensors", "trust_remote_code", "low_cpu_mem_usage", *HUB_OPTIONS)
log = logging.getLogger(__name__)


class LutetiaPipeline(CallProgress, PromptsAndPictures, PushesMixtures, DiffusionPipeline):
    r"""
    Pipeline for text-to-video and image-to-video generation using a mixture of experts.

    Check the documentation of [`DiffusionPipeline`] for the generic methods of all pipelines.

    Args:
        transformer ([`MixtureTransformer`]):
            The experts and their router, which together denoise the latents.
        scheduler ([`SchedulerMixin`]):
            Gives the steps: Euler's by default, or those of the scheduler that the run's pipeline has.
        vae ([`ModelMixin`], *optional*):
            The autoencoder; `None` where the run only refers to it (a hub id) or where frames are the latents.
        latent (`dict`):
            The run's LatentSpec: shapes of latents, text and clips, and which autoencoder and text encoder belong to them.
        sampling (`dict`, *optional*):
            The run's own `steps`, `guidance` and `mode`.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = list(CALLBACK_TENSORS)

    def __init__(
        self,
        transformer: MixtureTransformer,
        scheduler: Any,
        vae: ModelMixin | None = None,
        latent: dict[str, Any] | None = None,
        sampling: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.spec, self._defaults = parse_shapes({"latent": latent, "sampling": sampling})
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(latent=latent, sampling=sampling or {})
        self.video_processor = VideoProcessor()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> LutetiaPipeline:  # pyright: ignore
        """Load a mixture without running code from it.

        Args:
            pretrained_model_name_or_path: its folder, or its hub id `owner/name`. What was downloaded before is used when the hub
                cannot be reached, and with `local_files_only=True` nothing else.
            revision, token, cache_dir: of the hub id, as in diffusers.
            torch_dtype: of router, experts and autoencoder, float32 by default; `dtype` means the same.
            hub: sets `allow_hub`, and allows to download the base of a mixture of adapters.
            base: folder of that base; None: what was downloaded before.

        Raises:
            ConfigError: the folder holds no mixture, or an option is not one of these.
            IntegrityError: a part of the mixture is missing, damaged or of a class that mixtures do not have.
        """
        refused_options(options, _OPTIONS)
        folder = MixtureFolder(mixture_place(pretrained_model_name_or_path, options))
        dtype, hub = named_dtype(options.get("dtype") or options.get("torch_dtype")), bool(options.get("hub"))
        pipeline = cls(**read_parts(folder, dtype, options.get("base"), hub))
        pipeline.register_to_config(_name_or_path=str(folder.path))
        pipeline.allow_hub = hub
        return pipeline

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        *,
        embedded_guidance: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_videos_per_prompt: int = 1,
        mode: Mode | None = None,
        expert: int | None = None,
        seed: int | None = None,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: OutputType = "np",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        cut_prompts: bool = False,
        image: Any = None,
    ) -> Any:
        r"""
        The call function to the pipeline for generation. What is `None` is the mixture's own choice.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                The prompt or prompts to guide the video generation. If not defined, pass `prompt_embeds` instead.
            num_inference_steps (`int`, *optional*):
                The number of denoising steps, at least 1.
            guidance_scale (`float`, *optional*):
                Strength of the prompt, `w` in `v(negative) + w (v(prompt) - v(negative))`. At 1 the negative branch is left out.
            embedded_guidance (`float`, *optional*):
                The guidance that experts with embedded guidance (HunyuanVideo) are told; others pass it over.
            negative_prompt (`str` or `list[str]`, *optional*):
                The prompt or prompts that guidance leads away from; one serves all prompts. If not defined, guidance leads away
                from the null condition that the experts were trained with, as for `""`. Ignored when `guidance_scale` is 1.
                The router reads the prompt alone.
            num_videos_per_prompt (`int`, defaults to 1):
                The number of clips per prompt. Clips of one prompt follow each other.
            mode (`str`, *optional*):
                How experts are chosen at every step: "top1", "top2" (the best, weighted by the router), "full" (all), or "sticky"
                (one expert per clip, drawn by the router's probabilities).
            expert (`int`, *optional*):
                Ask this expert alone, without the router.
            seed (`int`, *optional*):
                Clip `i` starts from noise of `seed + i`, which is the same in any batch and on any device. If neither `seed`
                nor `generator` is defined, a random seed is drawn and logged.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One generator for all clips, or one per clip, to draw the noise from instead.
            latents (`torch.Tensor`, *optional*):
                Pre-generated noise `[N, C, f, h, w]`, used before `generator` and `seed`.
            prompt_embeds (`torch.Tensor`, *optional*):
                Pre-generated token vectors `[number of prompts, L, D]`, instead of `prompt`; see `encode_prompt`.
            pooled_prompt_embeds (`torch.Tensor`, *optional*):
                Pre-generated pooled vectors `[number of prompts, P]`, which the router reads. Required with `prompt_embeds`.
            negative_prompt_embeds (`torch.Tensor`, *optional*):
                Pre-generated token vectors of negative prompts, instead of `negative_prompt`.
            negative_pooled_prompt_embeds (`torch.Tensor`, *optional*):
                Pre-generated pooled vectors of negative prompts. Required with `negative_prompt_embeds`.
            num_frames (`int`, *optional*):
                Frames per clip. A mixture makes clips of one size; any other is refused.
            height (`int`, *optional*):
                Height of the clips in pixels.
            width (`int`, *optional*):
                Width of the clips in pixels.
            output_type (`str`, defaults to `"np"`):
                The output format of the clips: "np", "pt", "pil" or "latent"; see `LutetiaPipelineOutput`.
            return_dict (`bool`, defaults to `True`):
                Whether or not to return a [`LutetiaPipelineOutput`] instead of a plain tuple.
            callback_on_step_end (`Callable`, `PipelineCallback` or `MultiPipelineCallbacks`, *optional*):
                A function that is called at the end of each denoising step with `callback_on_step_end(self, step: int,
                timestep: torch.Tensor, callback_kwargs: dict)`. Tensors in the dictionary that it returns replace the
                pipeline's own. Setting `pipe._interrupt = True` in it ends the sampling after this step.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                The tensors in `callback_kwargs`, of those in `_callback_tensor_inputs`.
            cut_prompts (`bool`, defaults to `False`):
                Cut prompts that have more tokens than the experts read, as captions are in training, instead of refusing them.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them, *optional*):
                The first frame of the clips, one for all prompts or one each, resized to the size of the clips. Only of a
                mixture whose experts were trained with first frames, and required where they know no others.

        Examples:
            ```python
            >>> from diffusers.utils import export_to_video
            >>> from lutetia.models.pipeline import load_pipeline

            >>> pipe = load_pipeline("path/to/mixture")
            >>> clip = pipe("a purple star spins", seed=0).frames[0]
            >>> export_to_video(clip, "clip.mp4", fps=pipe.fps)  # needs the extra `export`
            ```

        Returns:
            [`LutetiaPipelineOutput`] or `tuple`:
                If `return_dict` is `True`, [`LutetiaPipelineOutput`] is returned, otherwise a tuple of its `frames` and
                `routing`.

        Raises:
            [`UsageError`]: before anything is computed, when the arguments contradict each other or do not fit the mixture.
            [`ConfigError`]: likewise, when the model of the other part of the noise levels is not on this machine.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        embedded = self._defaults.embedded_guidance if embedded_guidance is None else embedded_guidance
        steps = self._defaults.steps if num_inference_steps is None else num_inference_steps
        guidance = self._defaults.guidance if guidance_scale is None else guidance_scale
        mode = mode or self._defaults.mode
        texts = Texts.of(
            prompt, negative_prompt, embeds=prompt_embeds, pooled=pooled_prompt_embeds, negative_embeds=negative_prompt_embeds,
            negative_pooled=negative_pooled_prompt_embeds,
        )  # fmt: skip
        inputs.check_numbers(steps, guidance, num_videos_per_prompt)
        texts.check(self.spec)
        inputs.check_expert(self.transformer.config["experts"], expert)
        bucket = inputs.find_size(self.spec, num_frames, height, width)
        shape = (len(texts) * num_videos_per_prompt, *bucket.shape)
        inputs.check_noise(shape, generator, latents)
        pictures = inputs.pictures_of(image, len(texts), bucket, self.transformer.takes_first_frames, self.video_processor)
        looks = inputs.images_of(image, pictures) if self.spec.picture and self.spec.picture.vision_tokens else None
        inputs.check_choices(output_type, mode, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        if not cut_prompts and (texts.prompts or texts.negative):
            texts.check_lengths(self.text)

        other = self.other_part
        tokens, pooled, negative_tokens, negative_pooled = self._encode(texts, num_videos_per_prompt, guidance != 1)
        if seed is None and generator is None:
            seed = secrets.randbits(31)
            log.info("no seed was given; sampling with seed %d", seed)
        seeds = list(range(seed or 0, (seed or 0) + shape[0]))
        noise = latents.float() if latents is not None else inputs.draw_noise(shape, seeds, generator)
        if seed is None and generator is not None and mode == "sticky":
            seeds = inputs.draw_seeds(shape[0], generator)
        solver = self._solver(steps, bucket.shape, seeds, generator)
        steps = len(solver.times)
        self._interrupt, self._guidance_scale = False, guidance
        self._num_timesteps, self._current_timestep = steps, self.scheduler.timesteps[0]
        with self.progress_bar(total=steps) as bar:  # pyright: ignore[reportCallIssue] (its decorator hides its type)

            def step_done(step: int, state: SamplingState) -> SamplingState | None:
                bar.update()
                timestep = self.scheduler.timesteps[step]
                state = state_after(callback_on_step_end, callback_on_step_end_tensor_inputs, self, step, timestep, state)
                self._current_timestep = self.scheduler.timesteps[min(step + 1, steps - 1)]
                return None if self._interrupt else state

            first, shown = self._begin(pictures, looks, bucket, num_videos_per_prompt, tokens)
            changed: dict[str, Any] = {} if embedded is None else {"guidance": embedded}
            with ExitStack() as told:
                for each in filter(None, (self.transformer, other)):
                    told.enter_context(each.told(changed, first is not None))
                sampled = sample(
                    self.transformer, tokens, pooled, noise.to(tokens.device), times=solver, guidance=guidance,
                    negative=(negative_tokens, negative_pooled), mode=mode, expert=expert, seeds=seeds, on_step=step_done,
                    first_frame=first, other=other, pictures=shown,
                )  # fmt: skip
        self._current_timestep = None
        inputs.check_finite(sampled.latents, guidance, tokens.dtype)
        frames: Any = sampled.latents if output_type == "latent" else self.decode_latents(sampled.latents, output_type)
        self.maybe_free_model_hooks()
        return LutetiaPipelineOutput(frames, sampled.routing) if return_dict else (frames, sampled.routing)

    def _solver(self, steps: int, shape: Sequence[int], seeds: Sequence[int], generator: Generators | None) -> Solver:
        """The solver of a call: Euler steps over the scheduler's noise levels, or what the run names or a caller has set.

        A scheduler that adds noise draws it from `generator`, else for each clip by its seed.
        """
        if self._defaults.scheduler is None and type(self.scheduler) is FlowMatchEulerDiscreteScheduler:
            self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), device="cpu")
            return EulerSolver(torch.as_tensor(self.scheduler.sigmas))
        grid = self._defaults.scheduler.grid if self._defaults.scheduler else "own"
        return SchedulerSolver(self.scheduler, steps, math.prod(shape[1:]), grid, solver_noise(seeds, generator))

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, output_type: OutputType = "np") -> Any:
        """Clips of latents `[N, C, f, h, w]`, as `output_type` says. Raises UsageError if they are not finite."""
        pictures = self.decoder.decode_pictures(latents.float())
        inputs.check_finite(pictures, self._guidance_scale, self.transformer.dtype)
        return self.video_processor.postprocess_video(pictures, output_type=output_type)

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """Copy the mixture that this pipeline was loaded from: experts are not all in memory, and signatures stay valid.

        Onto its own folder this changes nothing. An earlier mixture in `save_directory` is replaced.

        Raises:
            ConfigError: the pipeline was not loaded from a folder.
            UsageError: `save_directory` holds something else.
            DiskError: it cannot be written.
        """
        refused_options(options, ("safe_serialization",))
        if self.transformer.folder is None:
            raise ConfigError("this pipeline was not loaded from a mixture's folder; stitch one, and load that")
        self.transformer.folder.copy(Path(save_directory))


def load_pipeline(
    folder: Path | str,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    experts_in_memory: int | None = None,
    hub: bool = False,
    base: GivenBase = None,
) -> LutetiaPipeline:
    """The pipeline of a mixture folder.

    Args:
        folder: a stitched or fetched mixture, or the hub id of one.
        device: where router and experts run, in torch's words.
        dtype: of router, experts and autoencoder. None: float32.
        experts_in_memory: most experts held at a time; the least recently used one is dropped. None: no limit.
        hub: whether a text encoder, autoencoder or base that the mixture names by a hub id may be downloaded.
        base: of a mixture of adapters: its folder. None: what was downloaded before.

    Raises:
        ConfigError: the folder holds no mixture.
        IntegrityError: a part of the mixture is missing or damaged.
    """
    pipeline = LutetiaPipeline.from_pretrained(folder, torch_dtype=dtype, hub=hub, base=base)
    pipeline.transformer.experts_in_memory = experts_in_memory
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline, ConfigMixin)
    return pipeline.to(device)
