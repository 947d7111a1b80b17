"""Clips from a mixture folder, and which experts made them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .gallery import Frames


@dataclass(frozen=True)
class Sampled:
    """Clips uint8 [F, H, W, 3], and for each of them the experts' weights (by name) in every step."""

    clips: list[Frames]
    experts: list[list[dict[str, float]]]


class Sampler:
    """A mixture, loaded once."""

    def __init__(self, folder: Path) -> None:
        from ..models.pipeline import load_pipeline

        self.pipeline = load_pipeline(folder)

    @property
    def fps(self) -> float:
        return self.pipeline.fps

    def sample(self, prompts: Sequence[str], *, seed: int = 0, expert: int | None = None, **chosen: Any) -> Sampled:
        """One clip per prompt; options that are None are the mixture's own. `expert` samples that expert alone."""
        options = {key: value for key, value in chosen.items() if value is not None}
        raise AssertionError(options)
