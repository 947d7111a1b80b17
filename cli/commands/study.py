"""`lutetia study`: one model against a mixture on equal data and equal compute, with controls that could explain a gain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lutetia.cli.arguments import read_config, require_device, setting, settings_of
from lutetia.cli.output import JsonFlag, emit, say

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lutetia.models.study.config import StudyConfig
    from lutetia.models.study.estimate import Estimate
    from lutetia.models.study.plan import StudyPlan


def register(app: typer.Typer) -> None:
    """Add the command to the top level."""
    app.command()(study)


def study(
    config: Annotated[Path, typer.Argument(help="The study as TOML; see docs/studies for examples.", metavar="CONFIG")],
    folder: Annotated[
        Path | None, setting("STUDY_FOLDER", "Folder of clips, runs and figures; default: beside CONFIG.", "--folder")
    ] = None,
    out: Annotated[Path | None, setting("STUDY_OUT", "Folder for tables, curves and samples; default: FOLDER/results.")] = None,
    cache: Annotated[
        Path | None, setting("STUDY_CACHE", "Made clips, latents and features, shared by studies; default: FOLDER/cache.")
    ] = None,
    plan: Annotated[bool, setting("STUDY_PLAN", "Print arms, FLOPs and estimated hours, and stop.", "--plan")] = False,
    device: Annotated[str | None, setting("DEVICE", "Train and evaluate on this device instead of that in CONFIG.")] = None,
    tune: Annotated[bool, setting("STUDY_TUNE", "Evaluate on the clips for tuning, not on test.", "--tune")] = False,
    tables: Annotated[bool, setting("STUDY_TABLES", "Make the tables again from OUT/results.json.", "--tables")] = False,
    prepare: Annotated[bool, setting("STUDY_PREPARE", "Make clips, latents and shards, and stop.", "--prepare")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Carry out a study.

    Every training is a real swarm on this machine. An interrupted call resumes when
    repeated. The tables are updated after every training. Needs the extra `study`.
    """
    settings = load_study(config, device=device, tune=tune)
    home = (folder or config.with_suffix("")).absolute()
    if tables:
        from lutetia.cli.study.stages import rewrite_tables

        written = rewrite_tables(out or home / "results")
        emit({"out": str(written)}, as_json, lambda: f"the tables are in {written}")
        return
    if plan:
        from lutetia.models.study.estimate import estimate
        from lutetia.models.study.plan import plan_study, planned_latent

        latent = planned_latent(settings)
        planned = plan_study(settings, latent)
        hours = estimate(settings, planned, latent)
        document = {"plan": planned.model_dump(mode="json"), "core_hours": {**hours.model_dump(), "all": hours.hours}}
        emit(document, as_json, lambda: render_plan(planned, hours))
        return
    from lutetia.cli.study.stages import carry_out, prepare_data

    _require_packages(settings, prepare)
    for needed in {settings.data.device} if prepare else {settings.data.device, settings.machines.device}:
        require_device(needed)
    if prepare:
        counts = prepare_data(settings, home, cache or home / "cache")
        emit(counts, as_json, lambda: f"clips and shards are in {home}; run the same command without --prepare to train")
        return
    results = carry_out(settings, home, out or home / "results", cache or home / "cache")
    document = {"out": str(out or home / "results"), "headline": {key: [row.model_dump(mode="json") for row in rows]
                for key, rows in results.headline.items()}}  # fmt: skip
    emit(document, as_json, lambda: f"the study is done; read {Path(document['out']) / 'README.md'}")


def _require_packages(settings: StudyConfig, prepare: bool) -> None:
    """Raises ConfigError if a package of the extra `study` that this study needs is not installed."""
    from lutetia.models.data.ingest.synthetic import require_photographs
    from lutetia.models.metrics.motion import require_opencv
    from lutetia.models.study.report.pictures import require_matplotlib

    if settings.clips.kind == "drawn":
        require_photographs("study")
    if prepare:
        return
    require_matplotlib()
    if "motion" in settings.evaluation.evaluator.metrics:
        require_opencv()


def load_study(path: Path, device: str | None = None, tune: bool = False) -> StudyConfig:
    """Read the study from a TOML file.

    Args:
        path: the file.
        device: replaces the devices in the file.
        tune: evaluate on the clips for tuning.

    Raises ConfigError that names a wrong key.
    """
    from lutetia.models.study.config import StudyConfig

    values: dict[str, Any] = read_config(path)
    if device is not None:
        values["machines"] = {**values.get("machines", {}), "device": device}
        values["data"] = {**values.get("data", {}), "device": device}
    if tune:
        values["evaluation"] = {**values.get("evaluation", {}), "on": "tune"}
    settings = settings_of(StudyConfig, str(path), values)
    if tune:
        say("evaluating on the clips for tuning: these figures prove nothing")
    return settings


def render_plan(plan: StudyPlan, hours: Estimate) -> RenderableType:
    """Arms and budgets as a table, and the estimated hours."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    columns = "TRAINING", "EXPERTS", "BATCH", "SAMPLES EACH", "PARAMETERS", "FLOPS", "ROUTER", "READINGS"
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for each in plan.trainings:
        table.add_row(
            each.name, str(each.experts), str(each.batch), f"{each.samples_per_shard:,}", f"{each.parameters / 1e6:.2f} M",
            f"{each.flops:.4g}", f"{each.router_flops / each.flops:.1%}", str(len(plan.readings_of(each))),
        )  # fmt: skip
    network = "not measured (no weights)" if hours.network is None else f"{hours.network:.2f}"
    autoencoder = f"autoencoder {hours.autoencoder:.2f}, " if hours.autoencoder else ""
    parts = f"{autoencoder}training {hours.training:.2f}, sampling {hours.sampling:.2f}, I3D {network}"
    return Group(table, Text(f"\nhours of one core: {parts}; {hours.hours:.2f} in total"))
