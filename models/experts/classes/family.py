"""How one diffusers class is called. Every class of `registry.py` is described by one `Family`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lutetia.models.experts.pictures import Pictures, read_channels
from lutetia.protocol.schema.model.pipeline_spec import ExpertInputs
from lutetia.system.errors import UsageError

TIMESTEPS = 1000.0  # diffusers' transformers embed time as a timestep in [0, 1000]

Patch = tuple[int, int, int]
"""Frames, rows and columns of a patch."""


@dataclass(frozen=True)
class Asked:
    """What an expert is asked: one call, in the form that all classes share."""

    latents: Tensor
    """[B, C, F, H, W], noisy."""
    timestep: Tensor
    """[B], 0…1000 on the expert's own clock."""
    tokens: Tensor
    """[B, L, D]; a vector of zeros is padding."""
    pooled: Tensor | None
    """[B, P]"""
    inputs: ExpertInputs
    given: Tensor | None = None
    """Rows whose first latent frame is given, bool [B]; None: there are none, and the class need not be able to take them."""

    vision: Tensor | None = None
    """[B, T, D], embeddings of the rows' pictures; None: the expert takes none."""

    def timestep_of(self, patch: Patch) -> Tensor:
        """The timestep as a class takes it that can be given first frames: [B], or of each patch [B, F h w], 0 in such frames."""
        if self.given is None:
            return self.timestep
        grid = [size // step for size, step in zip(self.latents.shape[2:], patch, strict=True)]
        each = self.timestep.view(-1, 1, 1, 1).repeat(1, *grid)
        each[:, 0] = each[:, 0] * ~self.given.view(-1, 1, 1)
        return each.flatten(1)

    @property
    def mask(self) -> Tensor:
        """Which tokens the expert attends to, bool [B, L]: all, or if the expert is told its padding, those that are not zero."""
        if not self.inputs.masked:
            return torch.ones(self.tokens.shape[:2], dtype=torch.bool, device=self.tokens.device)
        return (self.tokens != 0).any(-1)


@dataclass(frozen=True)
class StockCall:
    """A call of a diffusers pipeline, read from the arguments of its transformer's `forward`."""

    latents: Tensor
    """[B, C, F, H, W]"""
    timestep: Tensor
    tokens: Tensor
    pooled: Tensor | None
    mask: Tensor | None
    """Which tokens are no padding, [B, L]; None: the class has no such argument."""
    changed: dict[str, Any]
    """Fields of ExpertInputs as this pipeline gives them."""
    pack: Callable[[Tensor], Tensor]
    """Turns a prediction [B, C, F, H, W] into what `forward` returns."""
    given: bool = False
    """Whether the first latent frame of all rows is given."""
    pictures: Pictures | None = None
    """Those that the rows' latents came with, in channels of their own."""


@dataclass(frozen=True)
class Family:
    """How one diffusers class is called, and the names of its config entries that must agree with the latents and the text."""

    call: Callable[[nn.Module, Asked], Tensor]
    """-> prediction like the latents."""
    patch: Callable[[Any], Patch]
    """The patch, from the config."""
    text_width: str
    pooled_width: str | None = None
    packed: bool = False
    """Whether in_channels counts a whole patch."""
    text_tokens: str | None = None
    takes_first_frame: bool = False
    """Whether it takes a timestep of each patch, and so a first frame at time 0."""
    takes_pictures: bool = False
    """Whether it may have channels for a picture."""
    on_meta: bool = True
    """Whether its forward pass can be rehearsed on the meta device."""
    inputs: ExpertInputs = ExpertInputs()
    """What experts of this class are given where the run does not say."""
    read_call: Callable[[Any, dict[str, Any]], StockCall] | None = None
    """(config, arguments of `forward` by name) -> the call of a stock pipeline; None: as Wan is called."""


def config_of(model: nn.Module) -> Any:
    return model.config  # diffusers' ConfigMixin


def read_usual_call(config: Any, arguments: Mapping[str, Any]) -> StockCall:
    """The call of a pipeline that gives latents `[B, C, F, H, W]` and names the other arguments as most classes do."""
    changed = {}
    if (guidance := arguments.get("guidance")) is not None:
        changed["guidance"] = float(guidance.flatten()[0]) / TIMESTEPS
    latents = arguments["hidden_states"]
    return StockCall(
        latents=latents,
        timestep=arguments["timestep"],
        tokens=arguments["encoder_hidden_states"],
        pooled=arguments.get("pooled_projections"),
        mask=arguments.get("encoder_attention_mask"),
        changed=changed,
        pack=lambda prediction: prediction,
    )


def with_pictures(call: StockCall, channels: int, vision: Tensor | None = None) -> StockCall:
    """The call with its pictures apart, where a pipeline gives more than `channels` of latents.

    Raises UsageError for other pictures than a first frame.
    """
    if call.latents.shape[1] <= channels:
        return call
    pictures = read_channels(call.latents[:, channels:], channels, vision)
    if pictures is None:
        raise UsageError("a mixture takes the first frame of a clip as a picture, and no other frames; use such a pipeline")
    return replace(call, latents=call.latents[:, :channels], pictures=pictures)


def with_one_time(call: StockCall, frames: int) -> StockCall:
    """The call with one timestep per row, where a pipeline gives one of each patch: in image-to-video 0 in the first frame.

    Args:
        call: with `timestep` [B], or of each patch [B, S], frame after frame.
        frames: frames of patches.

    Raises UsageError if the timesteps of a row differ in another way.
    """
    if call.timestep.ndim < 2:
        return call
    first, others = call.timestep.unflatten(1, (frames, -1)).split([1, frames - 1], dim=1)
    last = call.timestep[:, -1]
    given = frames > 1 and not first.any() and bool(last.any())
    if not (others == last.view(-1, 1, 1)).all() or not (given or (first == last.view(-1, 1, 1)).all()):
        raise UsageError("a mixture takes one timestep per clip, and 0 for a first frame that is given; use such a pipeline")
    return replace(call, timestep=last, given=given)
