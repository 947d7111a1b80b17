"""How fast this machine trains the expert that a run would have, and what that takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from lutetia.cli.init.proposal import DataChoice, Measured
from lutetia.coordinator.settings import small_expert
from lutetia.protocol.schema.model.latent_spec import LatentSpec

if TYPE_CHECKING:
    from torch import Tensor

_TOKENS = 32
_STEPS = 3
_GAIN = 0.75  # of each further core


def latent_of(choice: DataChoice) -> LatentSpec:
    """The latents that `data build` makes by default of clips of this shape."""
    from lutetia.models.data.encode.latents import load_latents
    from lutetia.models.data.encode.text import load_text_encoder

    text = load_text_encoder("builtin:words", _TOKENS)
    channels, frames, height, width = load_latents("builtin:demo").shape_of(choice.frames, choice.side, choice.side)
    return LatentSpec(
        channels=channels, frames=frames, height=height, width=width, vae="builtin:demo", pixel_frames=choice.frames,
        pixel_height=choice.side, pixel_width=choice.side, fps=choice.fps, text_encoder=text.ref, text_tokens=_TOKENS,
        text_width=text.width, pooled_width=text.pooled_width, mean=(0.0,) * channels, std=(1.0,) * channels,
    )  # fmt: skip


def measure(latent: LatentSpec, batch: int, device: str) -> Measured:
    """Do some training steps of the default expert on random latents."""
    import torch

    from lutetia.models.experts.families import build_expert, call_expert

    model = build_expert(small_expert(latent), 0).to(device)
    x, t = torch.randn(batch, *latent.shape, device=device), torch.rand(batch, device=device)
    tokens = torch.randn(batch, latent.text_tokens, latent.text_width, device=device)
    pooled = torch.randn(batch, latent.pooled_width, device=device)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def step() -> float:
        loss = call_expert(model, x, t, tokens, pooled).square().mean()
        loss.backward()
        return loss.item()  # waits for the accelerator

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    seconds = _seconds(step, device) / batch
    return Measured(sum(parameter.numel() for parameter in model.parameters()), sum(kept.values()), seconds, device)


def _seconds(step: Callable[[], object], device: str) -> float:
    """Seconds of a step. On the CPU from the processor time of one thread, which does not depend on other load."""
    import torch

    threads, clock = torch.get_num_threads(), time.monotonic
    if device == "cpu":
        torch.set_num_threads(1)
        clock = time.process_time
    try:
        started = clock()
        for _ in range(_STEPS):
            step()
        taken = (clock() - started) / _STEPS
    finally:
        torch.set_num_threads(threads)
    return taken / (1 + _GAIN * (threads - 1)) if device == "cpu" else taken
