"""Clips from a mixture folder, and which experts made them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lutetia.cli.local.gallery import Frames


@dataclass(frozen=True)
class SampledClips:
    """Clips uint8 [F, H, W, 3], and for each of them the experts' weights (by name) in every step."""

    clips: list[Frames]
    experts: list[list[dict[str, float]]]


class MixtureLoader:
    """A mixture, loaded once."""

    def __init__(self, folder: Path) -> None:
        from lutetia.models.mixing.description import read_mixture
        from lutetia.models.pipeline import load_pipeline

        self.pipeline = load_pipeline(folder)
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
        """One clip per prompt, from the noise of `seed`, `seed + 1`, …; what is None is the mixture's own choice.

        `expert` samples that expert alone. Raises UsageError for prompts and options that the mixture cannot take.
        """
        output = self.pipeline(list(prompts), steps, guidance, mode=mode, expert=expert, seed=seed)
        experts = [[_named(self.names, step[clip]) for step in output.routing] for clip in range(len(prompts))]
        return SampledClips(list(output.frames), experts)


def _named(names: Sequence[str], weights: Any) -> dict[str, float]:
    """The experts that took part in one step, with their weights."""
    return {name: round(float(weight), 4) for name, weight in zip(names, weights, strict=True) if weight > 0}
