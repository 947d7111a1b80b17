"""What callers see of a call of the pipeline: its output, its progress, and the tensors that a callback may replace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.outputs import BaseOutput
from torch import Tensor

from lutetia.models.mixing.sampling import SamplingState

StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks
CALLBACK_TENSORS = {
    "latents": "latents",
    "prompt_embeds": "tokens",
    "pooled_prompt_embeds": "pooled",
    "negative_prompt_embeds": "negative_tokens",
    "negative_pooled_prompt_embeds": "negative_pooled",
}
"""diffusers' name of a callback's tensor: our name."""


@dataclass
class LutetiaPipelineOutput(BaseOutput):
    """Output of `LutetiaPipeline`.

    Args:
        frames (`np.ndarray`, `torch.Tensor` or `list[list[PIL.Image.Image]]`):
            N clips of F frames, values in 0…1: a float32 array `[N, F, H, W, 3]` ("np"), a float32 tensor `[N, F, 3, H, W]`
            ("pt"), N lists of F pictures ("pil"), or the latents, a float32 tensor `[N, C, f, h, w]` ("latent").
        routing (`torch.Tensor`):
            The experts' weights at every step, `[steps, N, K]`; 0 in steps that a model of the other part of the noise levels
            made.
    """

    frames: Any
    routing: Tensor


class CallProgress:
    """The properties of a diffusers pipeline that describe its current or last call."""

    _guidance_scale, _num_timesteps, _current_timestep, _interrupt = 1.0, 0, None, False

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


def state_after(
    callback: StepCallback | None, names: Sequence[str], pipeline: Any, step: int, timestep: Any, state: SamplingState
) -> SamplingState:
    """The state after a step, with the tensors that `callback` returns in the place of those it got.

    Args:
        callback: of the call; None changes nothing.
        names: diffusers' names of the tensors that it gets.
        pipeline: its first argument.
        step: number of the step, from 0.
        timestep: in 0…1000.
        state: after the step.
    """
    if callback is None:
        return state
    given = {name: getattr(state, CALLBACK_TENSORS[name]) for name in names}
    returned = callback(pipeline, step, timestep, given) or {}
    return replace(state, **{CALLBACK_TENSORS[name]: tensor for name, tensor in returned.items() if name in CALLBACK_TENSORS})
