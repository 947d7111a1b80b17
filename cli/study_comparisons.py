"""A study's sides against each other, from clips that were sampled before; what is found is kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from ..protocol.canonical import Frozen
from ..system.files import write_atomic

if TYPE_CHECKING:
    from ..models.metrics.bootstrap import Figure
    from ..models.metrics.compare import Comparison
    from ..models.metrics.judges import Entry
    from ..models.study.config import Prompts
    from ..models.study.plan import Reading, Training
    from .study_stages import Stages

T = TypeVar("T", bound=Frozen)
MONOLITH = "monolith"


@dataclass(frozen=True)
class Comparisons:
    """What the readings that `stages` has judged so far say about each other."""

    stages: Stages

    def headline(self, arm: str = MONOLITH) -> dict[str, tuple[Comparison, ...]]:
        """`arm` of the whole budget against the mixture, over all seeds of which both sides are judged."""
        from ..models.study.results import Headline

        name = "headline" if arm == MONOLITH else f"headline-{arm}"
        return {prompts: found.rows for prompts, found in self._compared(name, Headline, self.stages.bench.compare, arm)}

    def beyond(self) -> dict[str, tuple[Comparison, ...]]:
        """The headline's distances beyond what the autoencoder costs both sides."""
        from ..models.study.results import Headline

        compare_beyond = partial(self.stages.bench.compare_beyond, self.stages.latents)
        return {prompts: found.rows for prompts, found in self._compared("beyond", Headline, compare_beyond)}

    def kinds(self) -> dict[str, dict[str, tuple[Comparison, ...]]]:
        """The headline's distance by kind, over the same seeds."""
        from ..models.study.results import Kinds

        return {prompts: found.rows for prompts, found in self._compared("kinds", Kinds, self.stages.bench.compare_kinds)}

    def _compared(
        self, name: str, shape: type[T], compare: Callable[..., Any], arm: str = MONOLITH
    ) -> Iterator[tuple[Prompts, T]]:
        """What `compare` finds between the sides, by kind of prompts; kept as `shape` under `name`."""
        stages = self.stages
        for prompts in stages.config.judging.prompts:
            pairs = [pair for pair in self.pairs(prompts, arm) if all(reading.name in stages.judged for reading in pair)]
            if not pairs:
                continue
            seeds = tuple(stages.plan.training(pair[0].training).seed for pair in pairs)
            path = stages.figure(f"{name}-{prompts}-{'-'.join(map(str, seeds))}")
            if not path.is_file():
                sides = [[stages.clips_of(pair[side]) for pair in pairs] for side in (0, 1)]
                rows = compare(prompts, pairs[0][0].clips, *sides, seeds)
                write_atomic(path, shape.model_validate({"rows": rows}).model_dump_json().encode())
            yield prompts, shape.model_validate_json(path.read_bytes())

    def pairs(self, prompts: str, arm: str = MONOLITH) -> list[tuple[Reading, Reading]]:
        """The final readings of `arm` and of the mixture, seed by seed."""
        stages = self.stages

        def final(training: Training) -> Reading:
            own = [reading for reading in stages.plan.readings_of(training) if reading.prompts == prompts]
            return next(r for r in own if r.epoch == training.epochs and r.clips == stages.config.judging.clips)

        sides = stages.plan.of("headline", arm), stages.plan.of("headline", "mixture")
        return [(final(a), final(b)) for a, b in zip(*sides, strict=True)]

    def against(self) -> dict[str, Figure]:
        """The distance of every judged control over that of the mixture of its seed, asked as a user would ask it."""
        from ..models.study.results import Against

        stages = self.stages
        rows = [(training, reading) for training, reading in stages.plan.controls(stages.config) if reading.name in stages.judged]
        mixtures = {training.seed: reading for training, reading in rows if training.arm == "mixture" and reading.plain}
        found = {}
        for training, reading in rows:
            mixture = mixtures.get(training.seed)
            if mixture is None or mixture == reading:
                continue
            path = stages.figure(f"against-{reading.name}")
            if not path.is_file():
                sides = stages.clips_of(reading), stages.clips_of(mixture)
                ratio = stages.bench.ratio(reading.prompts, reading.clips, *sides, training.seed)
                write_atomic(path, Against(ratio=ratio).model_dump_json().encode())
            if ratio := Against.model_validate_json(path.read_bytes()).ratio:
                found[reading.name] = ratio
        return found

    def rebuilt(self, prompts: Prompts) -> tuple[Entry, ...]:
        """Real clips through the autoencoder alone."""
        from ..models.study.results import Rebuilt

        stages = self.stages
        path = stages.figure(f"spare-rebuilt-{prompts}")
        if not path.is_file():
            found = Rebuilt(entries=stages.bench.rebuilt(stages.latents, prompts, stages.config.judging.clips))
            write_atomic(path, found.model_dump_json().encode())
        return Rebuilt.model_validate_json(path.read_bytes()).entries
