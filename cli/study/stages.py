"""Carry out a study from clips to tables. Each stage keeps its result on disk, and a later call skips it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lutetia.cli.study import mixtures
from lutetia.cli.study import training as study_training
from lutetia.cli.study.comparisons import Comparisons
from lutetia.cli.study.state import StudyState
from lutetia.cli.workspace import ready
from lutetia.protocol.schema.canonical import canonical
from lutetia.system.errors import ConfigError, plain
from lutetia.system.files import disk_errors, write_atomic

if TYPE_CHECKING:
    from lutetia.models.study.clips import ClipCounts
    from lutetia.models.study.config import Prompts, StudyConfig
    from lutetia.models.study.results import StudyResults

Progress = Callable[[str, int, int], None]
_MAY_CHANGE = {
    "seeds",
    "controls",
    "evaluation",
    "machines",
}  # may differ between calls: they add to a study, or only change its evaluation
_HERE_ONLY = {"device", "workers", "cache"}  # settings of the data that do not change its content
GRID_ROWS = 8


def carry_out(config: StudyConfig, home: Path, out: Path, cache: Path) -> StudyResults:
    """Do what is missing of the study, and write its results into `out` after every training.

    Args:
        config: the study.
        home: folder of clips, data, runs and figures.
        out: folder of the results.
        cache: folder that several studies can share.

    Raises LutetiaError.
    """
    from lutetia.cli.progress import progress

    with disk_errors(home), progress(f"study {config.name}") as on_progress:
        home.mkdir(parents=True, exist_ok=True)
        _remember(config, home)
        ready(out)
        state = StudyState.prepare(config, home, out, cache, on_progress)
        for training in state.plan.trainings:
            study_training.check_budget(training, state.folder(training))
        state.recall()
        results = write_results(state)
        for training in state.plan.trainings:
            if state.carry_on(training):
                results = write_results(state)
    return results


def prepare_data(config: StudyConfig, home: Path, cache: Path) -> ClipCounts:
    """Do the stages that need no accelerator: clips, autoencoder, and the shards of every clustering."""
    from lutetia.cli.progress import progress

    with disk_errors(home), progress(f"study {config.name}") as on_progress:
        home.mkdir(parents=True, exist_ok=True)
        _remember(config, home)
        state = StudyState.prepare(config, home, home / "results", cache, on_progress)
        for training in state.plan.trainings:
            state.data(training)
    return state.counts


def _remember(config: StudyConfig, home: Path) -> None:
    """Save the config of the study. Raises ConfigError if `home` holds a study with another one."""
    path = home / "study.json"
    fixed = canonical(config.model_dump(mode="json", exclude={**dict.fromkeys(_MAY_CHANGE, True), "data": _HERE_ONLY}))
    if path.is_file() and path.read_bytes() != fixed:
        raise ConfigError(
            f"{home} holds a study of another config; only {', '.join(sorted(_MAY_CHANGE))} may change, so name another --folder"
        )
    write_atomic(path, fixed)


def write_results(state: StudyState) -> StudyResults:
    """Write tables, curves and sample grids of everything that is evaluated so far."""
    from lutetia.models.study.report.pictures import draw_curves
    from lutetia.models.study.report.tables import report
    from lutetia.models.study.results import specialisation

    results = collect_results(state)
    with disk_errors(state.out):
        state.out.mkdir(parents=True, exist_ok=True)
        pictures = []
        if results.evaluated:
            draw_curves(results, state.out / "curves.png")
            pictures.append("curves.png")
        if results.headline:
            _grid(state, state.out / "samples.png")
            pictures.append("samples.png")
        short = {name: each.model_copy(update={"values": {}, "labels": ()}) for name, each in results.evaluated.items()}
        public = results.model_copy(update={"evaluated": short, "alone": tuple(specialisation(results))})
        write_atomic(state.out / "results.json", public.model_dump_json(indent=1).encode())
        write_atomic(state.out / "README.md", report(results, pictures, _sheets(state)).encode())
    return results


def rewrite_tables(out: Path) -> Path:
    """Make the tables again from `out/results.json`. Show the pictures that lie in `out`. Returns the path of the page.

    Raises ConfigError if there are no results or they cannot be read.
    """
    from pydantic import ValidationError

    from lutetia.models.study.report.tables import report
    from lutetia.models.study.results import StudyResults
    from lutetia.protocol.schema.manifest import first_problem

    path = out / "results.json"
    try:
        results = StudyResults.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {plain(str(error.strerror))}; name a folder of results with --out") from error
    except ValidationError as error:
        raise ConfigError(f"{path} is not the results of a study: {first_problem(error)}; carry the study out again") from error
    pictures = [name for name in ("curves.png", "samples.png") if (out / name).is_file()]
    sheets = [f"clusters/{sheet.name}" for sheet in sorted((out / "clusters").glob("*.png"))]
    page = out / "README.md"
    write_atomic(page, report(results, pictures, sheets).encode())
    return page


def collect_results(state: StudyState) -> StudyResults:
    """All figures of the finished trainings and evaluated readings."""
    from lutetia.models.data.description import read_data
    from lutetia.models.metrics.report import hardware
    from lutetia.models.study.results import StudyResults, Trained

    trainings, clusters, seconds = {}, {}, 0.0
    for training in state.plan.trainings:
        run = state.folder(training) / "run"
        if not study_training.finished(run):
            continue
        spent = study_training.seconds(state.folder(training))
        losses, router = mixtures.accepted_losses(run), mixtures.router_figures(run)
        trainings[training.name] = Trained(seconds=spent, losses=losses, router=router)
        seconds += spent
        clusters[training.data] = read_data(state.data(training)).clustering.model_dump(mode="json")
    config: dict[str, Any] = state.config.model_dump(mode="json")
    comparisons = Comparisons(state)
    compared = comparisons.headline()
    encoded: list[Prompts] = [each for each in state.config.evaluation.prompts if each in compared and state.latents != "pixels"]
    return StudyResults(
        name=state.config.name, config=config, plan=state.plan, clips=state.counts, clusters=clusters, trainings=trainings,
        evaluated=dict(state.evaluated), headline=compared, hardware=hardware(), seconds=seconds,
        autoencoder_psnr=state.autoencoder_psnr,
        rebuilt={str(each): comparisons.rebuilt(each) for each in encoded}, kinds=comparisons.kinds(),
        beyond=comparisons.beyond() if encoded else {},
        rivals={arm: comparisons.headline(arm) for arm in state.config.controls.full}, against=comparisons.against(),
        rivals_beyond={arm: comparisons.beyond(arm) for arm in state.config.controls.full} if encoded else {},
    )  # fmt: skip


def _sheets(state: StudyState) -> list[str]:
    """Copy the contact sheets of the clusters of the headline into the results; returns their relative paths."""
    built = state.home / "data" / state.plan.of("headline", "mixture")[0].data / "sheets"
    sheets = sorted(built.glob("*.png"))
    for sheet in sheets:
        write_atomic(state.out / "clusters" / sheet.name, sheet.read_bytes())
    return [f"clusters/{sheet.name}" for sheet in sheets]


def _grid(state: StudyState, path: Path) -> None:
    """Draw real clips and those of monolith and mixture for the first prompts, of the first seed."""
    from lutetia.models.study.report.pictures import write_grid

    prompts = state.config.evaluation.prompts[-1]  # stratified if configured, so that every kind is shown
    first = next(pair for pair in Comparisons(state).pairs(prompts) if all(reading.name in state.evaluated for reading in pair))
    real = state.evaluation.evaluator(prompts, first[0].clips).reference
    rows = range(min(GRID_ROWS, len(real)))
    columns = {"real": real, "monolith": state.clips_of(first[0]), "mixture": state.clips_of(first[1])}
    shown = {name: [clips.frames[row].numpy() for row in rows] for name, clips in columns.items()}
    write_grid(path, real.captions[: len(rows)], shown)
