"""The state of a running study: its plan, its folders, and the readings that are evaluated."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lutetia.cli.study import mixtures
from lutetia.cli.study import training as study_training
from lutetia.cli.study.autoencoder import own_latents
from lutetia.protocol.schema.canonical import canonical
from lutetia.system.files import write_atomic

if TYPE_CHECKING:
    from lutetia.models.metrics.clips import ClipSet
    from lutetia.models.study.clips import ClipCounts
    from lutetia.models.study.config import StudyConfig
    from lutetia.models.study.evaluation import EvaluatedReading, StudyEvaluation
    from lutetia.models.study.plan import StudyPlan
    from lutetia.models.study.trainings import Reading, Training


Progress = Callable[[str, int, int], None]


@dataclass
class StudyState:
    """A running study.

    Attributes:
        config: the study.
        home: folder of clips, data, runs and figures.
        out: folder of the results.
        cache: folder that several studies can share.
        on_progress: called with stage, done and total.
        plan: trainings and readings.
        counts: number of clips by role.
        evaluation: samples and measures readings.
        latents: reference of the autoencoder.
        autoencoder_psnr: kind to PSNR of the study's autoencoder, dB.
        evaluated: name to figures of each evaluated reading.
    """

    config: StudyConfig
    home: Path
    out: Path
    cache: Path
    on_progress: Progress
    plan: StudyPlan
    counts: ClipCounts
    evaluation: StudyEvaluation
    latents: str
    autoencoder_psnr: dict[str, float]
    evaluated: dict[str, EvaluatedReading] = field(default_factory=dict)

    @classmethod
    def prepare(cls, config: StudyConfig, home: Path, out: Path, cache: Path, on_progress: Progress) -> StudyState:
        """Make the plan, split the clips, and train the autoencoder if the study has its own."""
        from lutetia.models.study.clips import split_clips
        from lutetia.models.study.evaluation import StudyEvaluation
        from lutetia.models.study.plan import plan_study, planned_latent

        plan = plan_study(config, planned_latent(config))
        key = hashlib.sha256(canonical(config.clips)).hexdigest()[:12]
        counts = split_clips(config.clips, home / "clips", config.tune_share, cache / f"made-{key}", on_progress)
        latents, psnr = own_latents(config, home / "clips" / "train", cache, on_progress)
        evaluation = StudyEvaluation(config, home / "clips", cache / "metrics", on_progress)
        return cls(config, home, out, cache, on_progress, plan, counts, evaluation, latents, psnr)

    def carry_on(self, training: Training) -> bool:
        """Build the data of `training`, train it, evaluate its readings. Returns False if there was nothing to evaluate."""
        data, start = self.data(training), self._start(training)
        if not (self.folder(training) / "run").is_dir():
            self.forget(training)
        study_training.train(training, data, self.folder(training), self.config, self.on_progress, start)
        missing = [reading for reading in self.plan.readings_of(training) if reading.name not in self.evaluated]
        for reading in missing:
            self._evaluate(reading, training)
        return bool(missing)

    def forget(self, training: Training) -> None:
        """Delete the figures of `training`, whose run was removed, and all comparisons."""
        if not any(self._figures.glob(f"{training.name}-*")):
            return
        others = tuple(f"{other.name}-" for other in self.plan.trainings if other != training)
        for path in self._figures.iterdir():
            if not path.name.startswith(others):
                path.unlink()

    def _start(self, training: Training) -> str | None:
        """The weights that `training` starts from: another training's, which the plan carries out first, or the base's."""
        if training.begin is not None:
            other = self.plan.training(training.begin.training)
            return str(mixtures.mixture_at(training.begin.epoch, other, self.folder(other)))
        if self.config.base is None or training.tier == "base":
            return None
        if self.config.base.kind == "weights":
            return self.config.base.weights
        (frames,) = self.plan.of("base", "frames")
        return str(mixtures.mixture_at(frames.epochs, frames, self.folder(frames)))

    def recall(self) -> None:
        """Read the figures of earlier calls, so that the first report of this call contains them."""
        from lutetia.models.study.evaluation import EvaluatedReading

        for training in self.plan.trainings:
            for reading in self.plan.readings_of(training):
                path = self.figure(reading.name)
                if path.is_file() and study_training.finished(self.folder(training) / "run"):
                    self.evaluated[reading.name] = EvaluatedReading.model_validate_json(path.read_bytes())

    def folder(self, training: Training) -> Path:
        return self.home / "runs" / training.name

    def data(self, training: Training) -> Path:
        """The built data of a training, built if missing; trainings with the same clustering share it."""
        from lutetia.models.data.build import build_data
        from lutetia.models.data.cluster.balance import balance

        target = self.home / "data" / training.data
        if (target / "data.json").is_file():
            return target
        if training.method == "balanced":
            balance(self.data(self.plan.of("headline", "mixture")[0]), target)
        else:
            update = {"experts": training.experts, "method": training.method, "cache": self.cache / "data"}
            update["latents"] = self.latents
            if training.tier == "base":  # single frames cannot have features of motion
                update |= {"frames": 1, "features": "text"}
            build_data(self.home / "clips", target, self.config.data.model_copy(update=update), self.on_progress)
        return target

    def mixture(self, reading: Reading) -> Path:
        training = self.plan.training(reading.training)
        return mixtures.mixture_of(reading, training, self.folder(training))

    def _evaluate(self, reading: Reading, training: Training) -> None:
        from lutetia.models.study.evaluation import cluster_labels

        labels = cluster_labels(self.data(training))
        self.evaluated[reading.name] = evaluated = self.evaluation.evaluate(reading, self.mixture(reading), training.seed, labels)
        write_atomic(self.figure(reading.name), evaluated.model_dump_json().encode())

    def clips_of(self, reading: Reading) -> ClipSet:
        """The clips of an evaluated reading, from the cache."""
        training = self.plan.training(reading.training)
        from lutetia.models.study.evaluation import cluster_labels

        return self.evaluation.sample(reading, self.mixture(reading), training.seed, cluster_labels(self.data(training)))[0]

    def figure(self, name: str) -> Path:
        """The file of the figures `name`; its name depends on the settings of the evaluation."""
        settings = hashlib.sha256(canonical(self.config.evaluation)).hexdigest()[:8]
        return self._figures / f"{name}-{settings}.json"

    @property
    def _figures(self) -> Path:
        return self.home / "figures"
