"""Clips of the run's fixed prompts by the expert that is being trained: what it has learnt so far."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from lutetia.models.data.encode.latents import load_latents
from lutetia.models.data.encode.text import load_text_encoder
from lutetia.models.experts.objectives import schedule_of
from lutetia.models.mixing.denoisers import ExpertCall, module_denoiser
from lutetia.models.mixing.sampling import initial_noise, time_grid
from lutetia.models.training.kernels.use import uncompiled
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.system.errors import ConfigError

MOST_CLIPS = 4


class ProgressClips:
    """Samples from a trainer's own parameters (not their averages), by the run's sampling settings; changes nothing in it.

    The text encoder is used once and dropped. Nothing is downloaded.

    Raises ConfigError at the start if text encoder or autoencoder are not on this machine, or if the expert has a part of the
    noise levels alone or needs a picture.
    """

    def __init__(self, trainer: ExpertTrainer) -> None:
        manifest = trainer.manifest
        if manifest.latent.picture:
            raise ConfigError("the expert begins clips with a picture, which prompts lack; sample the mixture with one")
        if trainer.spec.noise_part:
            raise ConfigError("the expert has a part of the noise levels, so that it makes no clips alone; sample the mixture")
        self.prompts: tuple[str, ...] = manifest.sampling.prompts[:MOST_CLIPS]
        latent = manifest.latent
        encoder = load_text_encoder(latent.text_encoder, latent.text_tokens, latent.text, hub=False)
        self._tokens, self._pooled = encoder.encode(list(self.prompts))
        self._null = encoder.null() or (torch.zeros_like(self._tokens[0]), torch.zeros_like(self._pooled[0]))
        self._codec = load_latents(latent.vae, latent, hub=False)
        self._trainer = trainer

    @property
    def fps(self) -> float:
        return self._trainer.manifest.latent.fps

    @torch.no_grad()
    def sample(self) -> NDArray[Any]:
        """One clip for each of `prompts`, uint8 `[N, F, H, W, 3]`, always from the same noise."""
        trainer, sampling = self._trainer, self._trainer.manifest.sampling
        device = trainer.device
        tokens, pooled = self._tokens.to(device), self._pooled.to(device)
        nothing = tuple(vector.to(device).expand_as(rows) for vector, rows in zip(self._null, (tokens, pooled), strict=True))
        x = initial_noise(trainer.manifest.latent.shape, range(len(self.prompts))).to(device)
        spec = trainer.spec
        denoise = module_denoiser(trainer.model, spec.prediction, schedule_of(spec), lambda: ExpertCall(spec.inputs))
        trainer.model.eval()
        try:
            with uncompiled() if trainer.kernels.compiled else nullcontext():
                for now, then in _pairs(time_grid(sampling.steps, sampling.time_shift)):
                    t = torch.full((len(x),), now, device=device)
                    flow = denoise(x, t, tokens, pooled)
                    if sampling.guidance != 1:
                        null = denoise(x, t, *nothing)
                        flow = torch.lerp(null, flow, sampling.guidance)
                    x = x + (then - now) * flow
        finally:
            trainer.model.train()
        return self._codec.decode(x.cpu())


def _pairs(times: Tensor) -> Sequence[tuple[float, float]]:
    values = times.tolist()
    return list(zip(values[:-1], values[1:], strict=True))
