"""The mixture as a diffusers pipeline: prompts in, clips out, with the experts' weights at every step.

Loading, in any process where the package `lutetia` is installed (the folder's own `pipeline.py` only imports this module):

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained("path/to/mixture", trust_remote_code=True)

or without running any code from the folder: `load_pipeline("path/to/mixture")`. Fetch a mixture from a hub as a whole first, with
`huggingface_hub.snapshot_download`. Then `pipe(["a red digit three moves to the left"], seed=0).frames`.

This module's path is part of the file format: the `pipeline.py` of every published mixture imports `LutetiaPipeline` from
`lutetia.models.pipeline`. Do not move or rename either.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.utils.outputs import BaseOutput
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from lutetia.models.data.encode.latents import Latents, load_latents
from lutetia.models.data.encode.text import TextEncoder, load_text_encoder
from lutetia.models.mixing.sampling import SamplingState, sample
from lutetia.models.mixture import MixtureTransformer, Mode
from lutetia.models.pipeline_inputs import (
    Generators,
    Texts,
    check_choices,
    check_expert,
    check_noise,
    check_numbers,
    check_size,
    draw_noise,
    draw_seeds,
)
from lutetia.protocol.schema.manifest import LatentSpec
from lutetia.system.errors import ConfigError

OutputType = Literal["np", "pt", "pil", "latent"]
StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks
_STATE_FIELDS = {
    "latents": "latents",
    "prompt_embeds": "tokens",
    "pooled_prompt_embeds": "pooled",
    "negative_prompt_embeds": "negative_tokens",
    "negative_pooled_prompt_embeds": "negative_pooled",
}  # diffusers' name of a callback's tensor: our name
log = logging.getLogger(__name__)


@dataclass
class LutetiaPipelineOutput(BaseOutput):
    """Output of `LutetiaPipeline`.

    Args:
        frames (`np.ndarray`, `torch.Tensor` or `list[list[PIL.Image.Image]]`):
            N clips of F frames, values in 0…1: a float32 array `[N, F, H, W, 3]` ("np"), a float32 tensor `[N, F, 3, H, W]`
            ("pt"), N lists of F pictures ("pil"), or the latents, a float32 tensor `[N, C, f, h, w]` ("latent").
        routing (`torch.Tensor`):
            The experts' weights at every step, `[steps, N, K]`.
    """

    frames: Any
    routing: Tensor


class LutetiaPipeline(DiffusionPipeline):
    r"""
    Pipeline for text-to-video generation using a mixture of experts.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods implemented for
    all pipelines (saving, running on a particular device, etc.).

    Args:
        transformer ([`MixtureTransformer`]):
            The experts and their router, which together denoise the latents.
        scheduler ([`FlowMatchEulerDiscreteScheduler`]):
            Gives the times of the Euler steps.
        vae ([`ModelMixin`], *optional*):
            The autoencoder; `None` where the run only refers to it (a hub id) or where frames are the latents.
        latent (`dict`):
            The run's LatentSpec: shapes of latents, text and clips, and which autoencoder and text encoder belong to them.
        sampling (`dict`, *optional*):
            The run's own `steps`, `guidance` and `mode`.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = list(_STATE_FIELDS)

    def __init__(
        self,
        transformer: MixtureTransformer,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: ModelMixin | None = None,
        latent: dict[str, Any] | None = None,
        sampling: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if latent is None:
            raise ConfigError("model_index.json of this mixture does not describe its latents; fetch the mixture again")
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(latent=latent, sampling=sampling or {})
        self.spec = LatentSpec.model_validate(latent)
        self.video_processor = VideoProcessor()
        self._defaults = {"steps": 25, "guidance": 3.0, "mode": "top1", **(sampling or {})}
        self._text: TextEncoder | None = None
        self._decoder: Latents | None = None
        self._interrupt, self._guidance_scale = False, 1.0
        self._num_timesteps, self._current_timestep = 0, None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> LutetiaPipeline:  # pyright: ignore
        """Load a mixture folder without running code from it. Honours diffusers' option `torch_dtype`. Raises ConfigError."""
        folder = Path(pretrained_model_name_or_path)
        try:
            index = json.loads((folder / "model_index.json").read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder} holds no mixture (no model_index.json); name a stitched or fetched folder") from error
        vae = None
        if index.get("vae", [None])[0]:
            vae = getattr(diffusers, index["vae"][1]).from_pretrained(folder / "vae")
        pipeline = cls(
            transformer=MixtureTransformer.from_pretrained(folder / "transformer", **options),
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),  # pyright: ignore[reportArgumentType]
            vae=vae,
            latent=index.get("latent"),
            sampling=index.get("sampling"),
        )
        pipeline.register_to_config(_name_or_path=str(folder))
        return pipeline

    @property
    def fps(self) -> float:
        """Frames per second of its clips."""
        return self.spec.fps

    @property
    def guidance_scale(self) -> float:
        """The guidance of the current or last call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the current or last call asks the experts for both branches."""
        return self._guidance_scale != 1

    @property
    def num_timesteps(self) -> int:
        """Steps of the current or last call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Any:
        """The timestep (0…1000) that is being computed; None outside of a call."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `_interrupt` to stop the call after its step."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        *,
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
    ) -> Any:
        r"""
        The call function to the pipeline for generation. What is `None` is the mixture's own choice.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                The prompt or prompts to guide the video generation. If not defined, pass `prompt_embeds` instead.
            num_inference_steps (`int`, *optional*):
                The number of denoising (Euler) steps, at least 1.
            guidance_scale (`float`, *optional*):
                Strength of the prompt, `w` in `v(negative) + w (v(prompt) - v(negative))`. At 1 the negative branch is left out.
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

        Examples:
            ```python
            >>> from diffusers.utils import export_to_video
            >>> from lutetia.models.pipeline import load_pipeline

            >>> pipe = load_pipeline("path/to/mixture")
            >>> clip = pipe("a purple star spins", seed=0).frames[0]
            >>> export_to_video(clip, "clip.mp4", fps=pipe.fps)
            ```

        Returns:
            [`LutetiaPipelineOutput`] or `tuple`:
                If `return_dict` is `True`, [`LutetiaPipelineOutput`] is returned, otherwise a tuple of its `frames` and
                `routing`.

        Raises:
            [`UsageError`]: before anything is computed, when the arguments contradict each other or do not fit the mixture.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        steps = self._defaults["steps"] if num_inference_steps is None else num_inference_steps
        guidance = self._defaults["guidance"] if guidance_scale is None else guidance_scale
        mode = mode or self._defaults["mode"]
        texts = Texts.of(
            prompt, negative_prompt, embeds=prompt_embeds, pooled=pooled_prompt_embeds, negative_embeds=negative_prompt_embeds,
            negative_pooled=negative_pooled_prompt_embeds,
        )  # fmt: skip
        check_numbers(steps, guidance, num_videos_per_prompt)
        texts.check(self.spec)
        check_expert(self.transformer.config["experts"], expert)
        check_size(self.spec, num_frames, height, width)
        shape = (len(texts) * num_videos_per_prompt, *self.spec.shape)
        check_noise(shape, generator, latents)
        check_choices(output_type, mode, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        if not cut_prompts and (texts.prompts or texts.negative):
            texts.check_lengths(self.text)

        tokens, pooled, negative_tokens, negative_pooled = self._encode(texts, num_videos_per_prompt)
        if seed is None and generator is None:
            seed = secrets.randbits(31)
            log.info("no seed was given; sampling with seed %d", seed)
        seeds = list(range(seed or 0, (seed or 0) + shape[0]))
        noise = latents.float() if latents is not None else draw_noise(shape, seeds, generator)
        if seed is None and generator is not None and mode == "sticky":
            seeds = draw_seeds(shape[0], generator)
        self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), device="cpu")
        self._interrupt, self._guidance_scale = False, guidance
        self._num_timesteps, self._current_timestep = steps, self.scheduler.timesteps[0]
        with self.progress_bar(total=steps) as bar:  # pyright: ignore[reportCallIssue] (its decorator hides its type)

            def step_done(step: int, state: SamplingState) -> SamplingState | None:
                bar.update()
                state = self._call_back(callback_on_step_end, callback_on_step_end_tensor_inputs, step, state)
                self._current_timestep = self.scheduler.timesteps[min(step + 1, steps - 1)]
                return None if self._interrupt else state

            sampled = sample(
                self.transformer, tokens, pooled, noise.to(tokens.device), times=self.scheduler.sigmas, guidance=guidance,
                negative=(negative_tokens, negative_pooled), mode=mode, expert=expert, seeds=seeds, on_step=step_done,
            )  # fmt: skip
        self._current_timestep = None
        frames: Any = sampled.latents
        if output_type != "latent":
            pictures = self.decoder.decode_pictures(sampled.latents.float())
            frames = self.video_processor.postprocess_video(pictures, output_type=output_type)
        self.maybe_free_model_hooks()
        return LutetiaPipelineOutput(frames, sampled.routing) if return_dict else (frames, sampled.routing)

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        num_videos_per_prompt: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r"""
        Encodes prompts as the experts and the router read them; texts that are too long lose their end.

        Args:
            prompt (`str` or `list[str]`):
                The prompt or prompts to encode.
            negative_prompt (`str` or `list[str]`, *optional*):
                The prompt or prompts that guidance leads away from. If not defined, the null condition (zeros) is returned.
            num_videos_per_prompt (`int`, defaults to 1):
                Every prompt's vectors are repeated so many times.

        Returns:
            `prompt_embeds [N, L, D]`, `pooled_prompt_embeds [N, P]`, `negative_prompt_embeds [N, L, D]` and
            `negative_pooled_prompt_embeds [N, P]`, in the dtype and on the device that the experts run in.
        """
        texts = Texts.of(prompt, negative_prompt)
        texts.check(self.spec)
        tokens, pooled, negative_tokens, negative_pooled = self._encode(texts, num_videos_per_prompt)
        return tokens, pooled, negative_tokens, negative_pooled

    @property
    def text(self) -> TextEncoder:
        """The text encoder that the run's shards were built with, loaded at first use."""
        if self._text is None:
            self._text = load_text_encoder(self.spec.text_encoder, self.spec.text_tokens)
        return self._text

    @property
    def decoder(self) -> Latents:
        """The run's autoencoder, normalised as the run's latents are. Shares its weights with `vae` where that is a component."""
        device = str(self._execution_device)
        if self._decoder is None or self._decoder.device != device:
            component = self.vae is not None
            ref = str(Path(str(self.config["_name_or_path"])) / "vae") if component else self.spec.vae
            self._decoder = load_latents(ref, self.spec, device=device)
            if component:
                vars(self._decoder).update(module=self.vae)  # instead of a second copy read from the folder
        return self._decoder

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """Copy the folder that this pipeline was loaded from: experts are not all in memory, and signatures stay valid."""
        import shutil

        shutil.copytree(str(self.config["_name_or_path"]), save_directory, dirs_exist_ok=True)

    def _encode(self, texts: Texts, repeats: int) -> tuple[Tensor, ...]:
        device, dtype = self._execution_device, self.transformer.dtype
        return tuple(rows.to(device, dtype) for rows in texts.encode(lambda captions: self.text.encode(captions), repeats))

    def _call_back(self, callback: StepCallback | None, names: Sequence[str], step: int, state: SamplingState) -> SamplingState:
        """The state after a step, with the tensors that `callback` returns in the place of those it got."""
        if callback is None:
            return state
        given = {name: getattr(state, _STATE_FIELDS[name]) for name in names}
        returned = callback(self, step, self.scheduler.timesteps[step], given) or {}
        return replace(state, **{_STATE_FIELDS[name]: tensor for name, tensor in returned.items() if name in _STATE_FIELDS})


def load_pipeline(
    folder: Path | str, *, device: str = "cpu", dtype: torch.dtype | None = None, experts_in_memory: int | None = None
) -> LutetiaPipeline:
    """The pipeline of a mixture folder.

    Args:
        folder: a stitched or fetched mixture.
        device: where router and experts run, in torch's words.
        dtype: of router and experts. None: float32.
        experts_in_memory: most experts held at a time; the least recently used one is dropped. None: no limit.

    Raises:
        ConfigError: the folder holds no whole mixture.
    """
    pipeline = LutetiaPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipeline.transformer.experts_in_memory = experts_in_memory
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline, ConfigMixin)
    return pipeline.to(device)
