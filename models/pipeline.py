"""The mixture as a diffusers pipeline: text in, clips out, and which experts made them.

Loading, in any process where the package `lutetia` is installed (the folder's own `pipeline.py` only imports this module):

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained("path/to/mixture", trust_remote_code=True)

or without running any code from the folder: `load_pipeline("path/to/mixture")`. A mixture on a hub is fetched whole first, with
`huggingface_hub.snapshot_download`. Then `pipe(["a red digit three moves to the left"], seed=0).frames`.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.utils.outputs import BaseOutput
from PIL import Image
from torch import Tensor

from lutetia.models.data.encode.latents import Latents, load_latents
from lutetia.models.data.encode.text import TextEncoder, load_text_encoder
from lutetia.models.mixing.sampling import initial_noise, sample
from lutetia.models.mixture import MixtureTransformer, Mode
from lutetia.protocol.schema.manifest import LatentSpec
from lutetia.system.errors import ConfigError, UsageError

MAX_PROMPT_CHARACTERS = 2000
OutputType = Literal["np", "pil", "latent"]
log = logging.getLogger(__name__)


@dataclass
class LutetiaPipelineOutput(BaseOutput):
    """`frames`: uint8 array [N, F, H, W, 3], lists of PIL images, or latents [N, C, F, H, W]; `routing` [steps, N, K] weights."""

    frames: Any
    routing: Tensor


class LutetiaPipeline(DiffusionPipeline):
    """A text-to-video pipeline over a `MixtureTransformer`.

    `latent` is the run's LatentSpec as a dictionary: shapes, and which autoencoder and text encoder go with them; `sampling` the
    run's own `steps`, `guidance` and `mode`. `vae` is None where it is only referred to (a hub id) or frames are the latents.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]

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
            raise ConfigError("a mixture's model_index.json says what its latents are, this one does not; fetch it again")
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(latent=latent, sampling=sampling or {})
        self.spec = LatentSpec.model_validate(latent)
        self._defaults = {"steps": 25, "guidance": 3.0, "mode": "top1", **(sampling or {})}
        self._text: TextEncoder | None = None
        self._decoder: Latents | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> LutetiaPipeline:  # pyright: ignore
        """Load a mixture folder without running code from it; heeds diffusers' option `torch_dtype`. Raises ConfigError."""
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

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        *,
        mode: Mode | None = None,
        expert: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: OutputType = "np",
        return_dict: bool = True,
        cut_prompts: bool = False,
    ) -> Any:
        """One clip per prompt, by Euler steps over the scheduler's time grid.

        Prompt i starts from noise of `seed + i`, the same in any batch and on any device; or from `generator`, or from `latents`.
        `mode` routes (top1, top2, full, sticky); `expert` asks that one alone. What is None is the mixture's own choice.
        Returns LutetiaPipelineOutput, or its two fields as a tuple.
        Raises UsageError for empty prompts, for sizes that the mixture does not make, and for overlong prompts, unless they are
        to be cut as captions are in training (`cut_prompts`).
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        steps = self._defaults["steps"] if num_inference_steps is None else num_inference_steps
        guidance = self._defaults["guidance"] if guidance_scale is None else guidance_scale
        self._check(prompts, steps, expert, (num_frames, height, width), output_type)
        for number, text in enumerate([] if cut_prompts else prompts, 1):
            self._check_length(number, text)
        device, dtype = self._execution_device, self.transformer.dtype
        tokens, pooled = (tensor.to(device, dtype) for tensor in self.text.encode(prompts))
        seeds = self._seeds(len(prompts), seed)
        noise = self._noise(seeds, generator, latents).to(device)
        self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), device="cpu")
        with self.progress_bar(total=steps) as bar:  # pyright: ignore[reportCallIssue] (its decorator hides its type)
            sampled = sample(
                self.transformer, tokens, pooled, noise, times=self.scheduler.sigmas, guidance=guidance,
                mode=mode or self._defaults["mode"], expert=expert, seeds=seeds, on_step=lambda *_: bar.update(),
            )  # fmt: skip
        frames = sampled.latents if output_type == "latent" else self._frames(sampled.latents, output_type)
        self.maybe_free_model_hooks()
        return LutetiaPipelineOutput(frames, sampled.routing) if return_dict else (frames, sampled.routing)

    @property
    def text(self) -> TextEncoder:
        """The text encoder that the run's shards were built with, loaded at first use."""
        if self._text is None:
            self._text = load_text_encoder(self.spec.text_encoder, self.spec.text_tokens)
        return self._text

    @property
    def decoder(self) -> Latents:
        """The run's autoencoder, normalised as its latents are; shares its weights with `vae` where that is a component."""
        device = str(self._execution_device)
        if self._decoder is None or self._decoder.device != device:
            own = self.vae is not None
            ref = str(Path(str(self.config["_name_or_path"])) / "vae") if own else self.spec.vae
            self._decoder = load_latents(ref, self.spec, device=device)
            if own:
                vars(self._decoder).update(module=self.vae)  # instead of a second copy read from the folder
        return self._decoder

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """Copy the folder that this pipeline was loaded from: experts are not all in memory, and signatures stay valid."""
        import shutil

        shutil.copytree(str(self.config["_name_or_path"]), save_directory, dirs_exist_ok=True)

    def _frames(self, latents: Tensor, output_type: OutputType) -> np.ndarray | list[list[Image.Image]]:
        frames = self.decoder.decode(latents.float())
        return frames if output_type == "np" else [[Image.fromarray(frame) for frame in clip] for clip in frames]

    def _seeds(self, count: int, seed: int | None) -> list[int]:
        if seed is None:
            seed = secrets.randbits(31)
            log.info("no seed was given; sampling with seed %d", seed)
        return list(range(seed, seed + count))

    def _noise(self, seeds: Sequence[int], generator: torch.Generator | None, latents: Tensor | None) -> Tensor:
        shape = (len(seeds), *self.spec.shape)
        if latents is not None:
            if tuple(latents.shape) != shape:
                raise UsageError(f"latents must have shape {list(shape)}, not {list(latents.shape)}")
            return latents.float()
        if generator is not None:
            return torch.randn(shape, generator=generator, device=generator.device)
        return initial_noise(self.spec.shape, seeds)

    def _check(
        self,
        prompts: Sequence[str],
        steps: int,
        expert: int | None,
        size: tuple[int | None, int | None, int | None],
        output_type: str,
    ) -> None:
        if not prompts:
            raise UsageError("no prompt was given; give at least one")
        if steps < 1:
            raise UsageError(f"{steps} steps cannot make a clip; ask for at least 1")
        if output_type not in ("np", "pil", "latent"):
            raise UsageError(f"there is no output type {output_type!r}; use np, pil or latent")
        entries = self.transformer.config["experts"]
        if expert is not None and not (0 <= expert < len(entries) and entries[expert]["folder"]):
            there = [k for k, entry in enumerate(entries) if entry["folder"]]
            raise UsageError(f"this mixture has no expert {expert}; it has {there}")
        own = self.spec.pixel_frames, self.spec.pixel_height, self.spec.pixel_width
        for name, asked, makes in zip(("frames", "height", "width"), size, own, strict=True):
            if asked is not None and asked != makes:
                raise UsageError(f"this mixture makes clips of {name} {makes}, not {asked}; leave {name} out")
        for number, text in enumerate(prompts, 1):
            self._check_prompt(number, text)

    def _check_prompt(self, number: int, text: str) -> None:
        if not isinstance(text, str) or not text.strip():
            raise UsageError(f"prompt {number} is empty; say in words what the clip shows")
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise UsageError(f"prompt {number} has {len(text)} characters, more than {MAX_PROMPT_CHARACTERS}; shorten it")

    def _check_length(self, number: int, text: str) -> None:
        count = self.text.count([text])
        if count > self.spec.text_tokens:
            raise UsageError(f"prompt {number} has {count} tokens, but this mixture reads {self.spec.text_tokens}; shorten it")


def load_pipeline(
    folder: Path | str, *, device: str = "cpu", dtype: torch.dtype | None = None, experts_in_memory: int | None = None
) -> LutetiaPipeline:
    """The pipeline of a mixture folder on `device`, holding at most `experts_in_memory` experts at a time. Raises ConfigError."""
    pipeline = LutetiaPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipeline.transformer.experts_in_memory = experts_in_memory
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline, ConfigMixin)
    return pipeline.to(device)
