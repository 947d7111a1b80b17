"""Compare the arms of a study, from clips that were sampled before. The results are kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from lutetia.protocol.schema.canonical import Frozen
from lutetia.system.files import write_atomic

if TYPE_CHECKING:
    from lutetia.cli.study.state import StudyState
    from lutetia.models.metrics.comparison import Comparison
    from lutetia.models.metrics.evaluator import MetricEntry
    from lutetia.models.metrics.stats.intervals import Figure
    from lutetia.models.study.config import Prompts
    from lutetia.models.study.trainings import Reading, Training

T = TypeVar("T", bound=Frozen)
MONOLITH = "monolith"


@dataclass(frozen=True)
class Comparisons:
    """Comparisons of the readings that are evaluated so far."""

    state: StudyState

    def headline(self, arm: str = MONOLITH) -> dict[str, tuple[Comparison, ...]]:
        """`arm` of the whole budget against the mixture, over all seeds of which both sides are evaluated."""
        from lutetia.models.study.results import Headline

        name = "headline" if arm == MONOLITH else f"headline-{arm}"
        return {
            prompts: compared.rows for prompts, compared in self._compared(name, Headline, self.state.evaluation.compare, arm)
        }

    def beyond(self, arm: str = MONOLITH) -> dict[str, tuple[Comparison, ...]]:
        """`arm` of the whole budget against the mixture by distance from real clips after encoding and decoding."""
        from lutetia.models.study.results import Headline

        compare_beyond = partial(self.state.evaluation.compare_beyond, self.state.latents)
        name = "beyond" if arm == MONOLITH else f"beyond-{arm}"
        return {prompts: compared.rows for prompts, compared in self._compared(name, Headline, compare_beyond, arm)}

    def kinds(self) -> dict[str, dict[str, tuple[Comparison, ...]]]:
        """The headline by distance within each kind, over the same seeds."""
        from lutetia.models.study.results import Kinds

        return {
            prompts: compared.rows for prompts, compared in self._compared("kinds", Kinds, self.state.evaluation.compare_kinds)
        }

    def _compared(
        self, name: str, shape: type[T], compare: Callable[..., Any], arm: str = MONOLITH
    ) -> Iterator[tuple[Prompts, T]]:
        """Yield (prompts, results of `compare`), read from the file `name` if it exists.

        Args:
            name: of the file, without prompts and seeds.
            shape: model of the file.
            compare: a comparison of `StudyEvaluation`.
            arm: the first side; the second is the mixture.
        """
        state = self.state
        for prompts in state.config.evaluation.prompts:
            pairs = [pair for pair in self.pairs(prompts, arm) if all(reading.name in state.evaluated for reading in pair)]
            if not pairs:
                continue
            seeds = tuple(state.plan.training(pair[0].training).seed for pair in pairs)
            path = state.figure(f"{name}-{prompts}-{'-'.join(map(str, seeds))}")
            if not path.is_file():
                sides = [[state.clips_of(pair[side]) for pair in pairs] for side in (0, 1)]
                rows = compare(prompts, pairs[0][0].clips, *sides, seeds)
                write_atomic(path, shape.model_validate({"rows": rows}).model_dump_json().encode())
            yield prompts, shape.model_validate_json(path.read_bytes())

    def pairs(self, prompts: str, arm: str = MONOLITH) -> list[tuple[Reading, Reading]]:
        """The final readings of `arm` and of the mixture, one pair per seed."""
        state = self.state

        def final(training: Training) -> Reading:
            readings = [reading for reading in state.plan.readings_of(training) if reading.prompts == prompts]
            return next(r for r in readings if r.epoch == training.epochs and r.clips == state.config.evaluation.clips)

        sides = state.plan.of("headline", arm), state.plan.of("headline", "mixture")
        return [(final(a), final(b)) for a, b in zip(*sides, strict=True)]

    def against(self) -> dict[str, Figure]:
        """Reading of a control to its main distance over that of the mixture with the same seed, sampled as a user would."""
        from lutetia.models.study.results import Against

        state = self.state
        rows = [(training, reading) for training, reading in state.plan.controls(state.config) if reading.name in state.evaluated]
        mixtures = {training.seed: reading for training, reading in rows if training.arm == "mixture" and reading.plain}
        ratios = {}
        for training, reading in rows:
            mixture = mixtures.get(training.seed)
            if mixture is None or mixture == reading:
                continue
            path = state.figure(f"against-{reading.name}")
            if not path.is_file():
                sides = state.clips_of(reading), state.clips_of(mixture)
                ratio = state.evaluation.ratio(reading.prompts, reading.clips, *sides, training.seed)
                write_atomic(path, Against(ratio=ratio).model_dump_json().encode())
            if ratio := Against.model_validate_json(path.read_bytes()).ratio:
                ratios[reading.name] = ratio
        return ratios

    def rebuilt(self, prompts: Prompts) -> tuple[MetricEntry, ...]:
        """The figures of real clips after encoding and decoding alone."""
        from lutetia.models.study.results import Rebuilt

        state = self.state
        path = state.figure(f"spare-rebuilt-{prompts}")
        if not path.is_file():
            rebuilt = Rebuilt(entries=state.evaluation.rebuilt(state.latents, prompts, state.config.evaluation.clips))
            write_atomic(path, rebuilt.model_dump_json().encode())
        return Rebuilt.model_validate_json(path.read_bytes()).entries
