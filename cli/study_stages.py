"""A study from clips to tables, stage by stage; each stage keeps its result on disk and is skipped when it is there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..protocol.canonical import canonical
from ..system.errors import ConfigError
from ..system.files import disk_errors, write_atomic
from . import study_mixtures, study_swarm
from .study_comparisons import Comparisons
from .study_latents import own_latents
from .workspace import ready

if TYPE_CHECKING:
    from ..models.metrics.clips import ClipSet
    from ..models.study.bench import Bench, Judged
    from ..models.study.clips import ClipCounts
    from ..models.study.config import Prompts, StudyConfig
    from ..models.study.plan import Plan, Reading, Training
    from ..models.study.results import StudyResults

Progress = Callable[[str, int, int], None]
_MAY_CHANGE = {"seeds", "controls", "judging", "machines"}  # between calls: they add to a study, or only ask it otherwise
_HERE_ONLY = {"device", "workers", "cache"}  # of the data's settings: how this box builds them, not what they are
GRID_ROWS = 8


def carry_out(config: StudyConfig, home: Path, out: Path, cache: Path) -> StudyResults:
    """Do whatever of the study is not done yet and write its results into `out`. Raises LutetiaError, one sentence."""
    from .progress import progress

    with disk_errors(home), progress(f"study {config.name}") as on_progress:
        home.mkdir(parents=True, exist_ok=True)
        _remember(config, home)
        ready(out)
        stages = Stages.prepare(config, home, out, cache, on_progress)
        for training in stages.plan.trainings:
            study_swarm.check_budget(training, stages.folder(training))
        stages.recall()
        results = stages.write()
        for training in stages.plan.trainings:
            if stages.carry_on(training):
                results = stages.write()
    return results


def prepare_data(config: StudyConfig, home: Path, cache: Path) -> ClipCounts:
    """The stages that need no accelerator: clips, autoencoder, and the shards of every way of clustering."""
    from .progress import progress

    with disk_errors(home), progress(f"study {config.name}") as on_progress:
        home.mkdir(parents=True, exist_ok=True)
        _remember(config, home)
        stages = Stages.prepare(config, home, home / "results", cache, on_progress)
        for training in stages.plan.trainings:
            stages.data(training)
    return stages.counts


def _remember(config: StudyConfig, home: Path) -> None:
    """Keep the study's config, and refuse to go on with another one."""
    path = home / "study.json"
    fixed = canonical(config.model_dump(mode="json", exclude={**dict.fromkeys(_MAY_CHANGE, True), "data": _HERE_ONLY}))
    if path.is_file() and path.read_bytes() != fixed:
        raise ConfigError(
            f"{home} holds a study of another config; only {', '.join(sorted(_MAY_CHANGE))} may change, so name another --folder"
        )
    write_atomic(path, fixed)


@dataclass
class Stages:
    """A study under way."""

    config: StudyConfig
    home: Path
    out: Path
    cache: Path
    on_progress: Progress
    plan: Plan
    counts: ClipCounts
    bench: Bench
    latents: str
    autoencoder_psnr: dict[str, float]
    judged: dict[str, Judged] = field(default_factory=dict)

    @classmethod
    def prepare(cls, config: StudyConfig, home: Path, out: Path, cache: Path, on_progress: Progress) -> Stages:
        """Clips in their roles, and the plan."""
        from ..models.study.bench import Bench
        from ..models.study.clips import split_clips
        from ..models.study.plan import plan_study, planned_latent

        plan = plan_study(config, planned_latent(config))
        key = hashlib.sha256(canonical(config.clips)).hexdigest()[:12]
        counts = split_clips(config.clips, home / "clips", config.tune_share, cache / f"made-{key}", on_progress)
        latents, psnr = own_latents(config, home / "clips" / "train", cache, on_progress)
        bench = Bench(config, home / "clips", cache / "metrics", on_progress)
        return cls(config, home, out, cache, on_progress, plan, counts, bench, latents, psnr)

    def carry_on(self, training: Training) -> bool:
        """Build its data, train it, judge its readings. False when all that was known already."""
        data, start = self.data(training), self._start(training)
        if not (self.folder(training) / "run").is_dir():
            self.forget(training)
        study_swarm.train(training, data, self.folder(training), self.config, self.on_progress, start)
        missing = [reading for reading in self.plan.readings_of(training) if reading.name not in self.judged]
        for reading in missing:
            self._judge(reading, training)
        return bool(missing)

    def forget(self, training: Training) -> None:
        """The run was removed to train it anew: drop what the old one was found to be, and all comparisons."""
        if not any(self._figures.glob(f"{training.name}-*")):
            return
        others = tuple(f"{other.name}-" for other in self.plan.trainings if other != training)
        for path in self._figures.iterdir():
            if not path.name.startswith(others):
                path.unlink()

    def _start(self, training: Training) -> Path | None:
        """The mixture that it begins with; the plan trains it before."""
        if training.begin is None:
            return None
        base = self.plan.training(training.begin.training)
        return study_mixtures.mixture_at(training.begin.epoch, base, self.folder(base))

    def recall(self) -> None:
        """Read the figures that earlier calls left, so that a report after a cut is not emptier than the last before it."""
        from ..models.study.bench import Judged

        for training in self.plan.trainings:
            for reading in self.plan.readings_of(training):
                path = self.figure(reading.name)
                if path.is_file() and study_swarm.finished(self.folder(training) / "run"):
                    self.judged[reading.name] = Judged.model_validate_json(path.read_bytes())

    def folder(self, training: Training) -> Path:
        return self.home / "runs" / training.name

    def data(self, training: Training) -> Path:
        """The built data of a training, shared by all that cluster alike."""
        from ..models.data.balance import balance
        from ..models.data.build import build_data

        target = self.home / "data" / training.data
        if (target / "data.json").is_file():
            return target
        if training.method == "balanced":
            balance(self.data(self.plan.of("headline", "mixture")[0]), target)
        else:
            update = {"experts": training.experts, "method": training.method, "cache": self.cache / "data"}
            update["latents"] = self.latents
            build_data(self.home / "clips", target, self.config.data.model_copy(update=update), self.on_progress)
        return target

    def mixture(self, reading: Reading) -> Path:
        training = self.plan.training(reading.training)
        return study_mixtures.mixture_of(reading, training, self.folder(training))

    def _judge(self, reading: Reading, training: Training) -> None:
        from ..models.study.bench import cluster_labels

        labels = cluster_labels(self.data(training))
        self.judged[reading.name] = found = self.bench.judge(reading, self.mixture(reading), training.seed, labels)
        write_atomic(self.figure(reading.name), found.model_dump_json().encode())

    def clips_of(self, reading: Reading) -> ClipSet:
        """The clips of a judged reading, as they were kept."""
        training = self.plan.training(reading.training)
        from ..models.study.bench import cluster_labels

        return self.bench.sample(reading, self.mixture(reading), training.seed, cluster_labels(self.data(training)))[0]

    def figure(self, name: str) -> Path:
        """Where figures are kept: under their name and the way of judging."""
        how = hashlib.sha256(canonical(self.config.judging)).hexdigest()[:8]
        return self._figures / f"{name}-{how}.json"

    @property
    def _figures(self) -> Path:
        return self.home / "figures"

    def write(self) -> StudyResults:
        """Tables, curves and grids of what is known by now."""
        from ..models.study.pictures import draw_curves
        from ..models.study.tables import report

        results = self._results()
        with disk_errors(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            pictures = []
            if results.judged:
                draw_curves(results, self.out / "curves.png")
                pictures.append("curves.png")
            if results.headline:
                self._grid(self.out / "samples.png")
                pictures.append("samples.png")
            slim = results.model_copy(update={"judged": {k: v.model_copy(update={"values": {}, "labels": ()})
                                                         for k, v in results.judged.items()}})  # fmt: skip
            write_atomic(self.out / "results.json", slim.model_dump_json(indent=1).encode())
            write_atomic(self.out / "README.md", report(results, pictures, self._sheets()).encode())
        return results

    def _results(self) -> StudyResults:
        from ..models.data.description import read_data
        from ..models.metrics.report import hardware
        from ..models.study.results import StudyResults, Trained

        trainings, clusters, whole = {}, {}, 0.0
        for training in self.plan.trainings:
            run = self.folder(training) / "run"
            if not study_swarm.finished(run):
                continue
            spent = study_swarm.seconds(self.folder(training))
            losses, router = study_mixtures.accepted_losses(run), study_mixtures.router_figures(run)
            trainings[training.name] = Trained(seconds=spent, losses=losses, router=router)
            whole += spent
            clusters[training.data] = read_data(self.data(training)).clustering.model_dump(mode="json")
        config: dict[str, Any] = self.config.model_dump(mode="json")
        comparisons = Comparisons(self)
        compared = comparisons.headline()
        encoded: list[Prompts] = [each for each in self.config.judging.prompts if each in compared and self.latents != "pixels"]
        return StudyResults(
            name=self.config.name, config=config, plan=self.plan, clips=self.counts, clusters=clusters, trainings=trainings,
            judged=dict(self.judged), headline=compared, hardware=hardware(), seconds=whole,
            autoencoder_psnr=self.autoencoder_psnr,
            rebuilt={str(each): comparisons.rebuilt(each) for each in encoded}, kinds=comparisons.kinds(),
            beyond=comparisons.beyond() if encoded else {},
            rivals={arm: comparisons.headline(arm) for arm in self.config.controls.full}, against=comparisons.against(),
        )  # fmt: skip

    def _sheets(self) -> list[str]:
        """Copy the contact sheets of the headline's clusters into the results; their names relative to those."""
        built = self.home / "data" / self.plan.of("headline", "mixture")[0].data / "sheets"
        for sheet in (found := sorted(built.glob("*.png"))):
            write_atomic(self.out / "clusters" / sheet.name, sheet.read_bytes())
        return [f"clusters/{sheet.name}" for sheet in found]

    def _grid(self, path: Path) -> None:
        """Real, monolith and mixture for the first prompts, of the first seed."""
        from ..models.study.pictures import write_grid

        prompts = self.config.judging.prompts[-1]  # stratified, where asked for: every kind is seen
        first = next(pair for pair in Comparisons(self).pairs(prompts) if all(reading.name in self.judged for reading in pair))
        real = self.bench.judges(prompts, first[0].clips).reference
        rows = range(min(GRID_ROWS, len(real)))
        columns = {"real": real, "monolith": self.clips_of(first[0]), "mixture": self.clips_of(first[1])}
        shown = {name: [clips.frames[row].numpy() for row in rows] for name, clips in columns.items()}
        write_grid(path, real.captions[: len(rows)], shown)
