"""Samples clips from a mixture folder, and tells which experts made them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lutetia.models.video_files import Frames


@dataclass(frozen=True)
class SampledClips:
    """`clips`: uint8 [F, H, W, 3] each. `experts`: for each clip and step, the weights of the experts that took part, by name."""

    clips: list[Frames]
    experts: list[list[dict[str, float]]]


class MixtureLoader:
    """A mixture, loaded once."""

    def __init__(self, folder: Path, hub: bool = False) -> None:
        """Load it; `hub` says whether models that it names by a hub id may be downloaded."""
        from lutetia.models.mixing.description import read_mixture
        from lutetia.models.pipeline import load_pipeline

        self.pipeline = load_pipeline(folder, hub=hub)
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
        """One clip per prompt. What is None is the mixture's own choice.

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
        experts = [[_named(self.names, step[clip]) for step in output.routing] for clip in range(len(prompts))]
        return SampledClips(list(to_uint8(output.frames)), experts)


def _named(names: Sequence[str], weights: Any) -> dict[str, float]:
    """The experts that took part in one step, with their weights."""
    return {name: round(float(weight), 4) for name, weight in zip(names, weights, strict=True) if weight > 0}
