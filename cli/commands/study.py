"""`lutetia study`: one model against a mixture on equal data and equal compute, with everything that could explain the gap."""

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
    config: Annotated[Path, typer.Argument(help="The study as TOML; docs/studies has some.", metavar="CONFIG")],
    folder: Annotated[
        Path | None, setting("STUDY_FOLDER", "Where clips, runs and figures are kept; beside CONFIG without.", "--folder")
    ] = None,
    out: Annotated[
        Path | None, setting("STUDY_OUT", "Folder for tables, curves and sample grids; FOLDER/results without.")
    ] = None,
    cache: Annotated[
        Path | None, setting("STUDY_CACHE", "Made clips, latents and features, shared between studies; FOLDER/cache without.")
    ] = None,
    plan: Annotated[bool, setting("STUDY_PLAN", "Print arms, FLOPs and estimated hours; run nothing.", "--plan")] = False,
    device: Annotated[str | None, setting("DEVICE", "Train and judge on this device instead of the config's.")] = None,
    tune: Annotated[bool, setting("STUDY_TUNE", "Judge on the clips for tuning, never on test.", "--tune")] = False,
    prepare: Annotated[
        bool, setting("STUDY_PREPARE", "Make clips, latents and shards only; train nothing.", "--prepare")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Carry out a study.

    Every training is a real swarm on this machine. Cut anywhere, the same call goes
    on where it was; the tables are written anew after every training.
    """
    settings = load_study(config, device=device, tune=tune)
    if plan:
        from lutetia.models.study.estimate import estimate
        from lutetia.models.study.plan import plan_study, planned_latent

        latent = planned_latent(settings)
        planned = plan_study(settings, latent)
        guess = estimate(settings, planned, latent)
        document = {"plan": planned.model_dump(mode="json"), "core_hours": {**guess.model_dump(), "all": guess.hours}}
        emit(document, as_json, lambda: render_plan(planned, guess))
        return
    from lutetia.cli.study.stages import carry_out, prepare_data

    for needed in {settings.data.device} if prepare else {settings.data.device, settings.machines.device}:
        require_device(needed)
    home = (folder or config.with_suffix("")).absolute()
    if prepare:
        counts = prepare_data(settings, home, cache or home / "cache")
        emit(counts, as_json, lambda: f"clips and shards are in {home}; the same command without --prepare trains")
        return
    results = carry_out(settings, home, out or home / "results", cache or home / "cache")
    document = {"out": str(out or home / "results"), "headline": {key: [row.model_dump(mode="json") for row in rows]
                for key, rows in results.headline.items()}}  # fmt: skip
    emit(document, as_json, lambda: f"the study is done; read {Path(document['out']) / 'README.md'}")


def load_study(path: Path, device: str | None = None, tune: bool = False) -> StudyConfig:
    """The study that the file describes. Raises ConfigError naming the wrong key."""
    from lutetia.models.study.config import StudyConfig

    values: dict[str, Any] = read_config(path)
    if device is not None:
        values["machines"] = {**values.get("machines", {}), "device": device}
        values["data"] = {**values.get("data", {}), "device": device}
    if tune:
        values["judging"] = {**values.get("judging", {}), "on": "tune"}
    settings = settings_of(StudyConfig, str(path), values)
    if tune:
        say("judging on the clips for tuning: these figures claim nothing")
    return settings


def render_plan(plan: StudyPlan, guess: Estimate) -> RenderableType:
    """Arms and budgets as a table, then the hours."""
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
    network = "no weights to probe" if guess.network is None else f"{guess.network:.2f}"
    own = f"autoencoder {guess.autoencoder:.2f}, " if guess.autoencoder else ""
    parts = f"{own}training {guess.training:.2f}, sampling {guess.sampling:.2f}, I3D {network}"
    words = f"\nhours of one core: {parts}; {guess.hours:.2f} in all"
    return Group(table, Text(words))
