"""`lutetia init` and `lutetia data build|inspect|convert|train-autoencoder`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lutetia.cli.arguments import documented_by, given, read_config, require_device, same_config, setting, settings_of
from lutetia.cli.output import JsonFlag, emit
from lutetia.system.errors import ConfigError, plain

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lutetia.cli.init.run import InitReport
    from lutetia.models.data.build import BuildReport
    from lutetia.models.data.description import DataDescription

app = typer.Typer(help="Build shards from captioned clips, and inspect them.", no_args_is_help=True)


def register(top: typer.Typer) -> None:
    """Add `init` to the top level."""
    top.command("init")(init)


def init(
    clips: Annotated[Path, typer.Argument(help="Folder of captioned clips, as for `lutetia data build`.", metavar="CLIPS")],
    out: Annotated[Path, setting("INIT_OUT", "The file to write.", "--out")] = Path("lutetia.toml"),
    pipeline: Annotated[
        str | None, setting("PIPELINE", "Diffusers pipeline that the experts start from, a folder or a hub id.", "--from")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Look at clips and machine, and write the settings of a run.

    `data build`, `run create` and `coordinator serve` take the file as --config.
    """
    from lutetia.cli.init.run import write_settings
    from lutetia.cli.init.settings_file import commands
    from lutetia.cli.progress import progress

    with progress("looking at clips and machine") as on_progress:
        report = write_settings(clips, out, on_progress, pipeline)
    document = {
        "file": str(out), "data": vars(report.data), "budget": vars(report.budget), "measured": vars(report.measured),
        "bad": report.bad, "unused": report.unused, "next": commands(clips, out),
    }  # fmt: skip
    emit(document, as_json, lambda: _proposed(report, out, clips))


def _proposed(report: InitReport, out: Path, clips: Path) -> str:
    from lutetia.cli.init.settings_file import commands
    from lutetia.models.training.memory.needs import hours_text
    from lutetia.system.errors import plain

    data, budget = report.data, report.budget
    lines = [plain(f"cannot be used: {reason}") for reason in report.bad]
    lines += [f"{report.unused} other {'file is' if report.unused == 1 else 'files are'} not used"] if report.unused else []
    lines += [
        f"{out} proposes {data.experts} experts of {report.measured.parameters / 1e6:.1f} million parameters, a batch of "
        f"{data.batch}, {hours_text(budget.hours)} each on this machine ({report.measured.device}). Read it, then:",
        *(plain(f"  {command}") for command in commands(clips, out)),
    ]
    return "\n".join(lines)


@app.command("build", cls=documented_by("lutetia.models.data.build_settings:BuildSettings"))
def build(
    folder: Annotated[
        Path, typer.Argument(help="Clips with captions in metadata.jsonl, metadata.csv or .txt files.", metavar="CLIPS")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for shards/ and data.json.", metavar="OUT")],
    config: Annotated[Path | None, setting("DATA_CONFIG", "Settings as TOML; flags override them.")] = None,
    pipeline: Annotated[str | None, setting("PIPELINE", "", "--from")] = None,
    experts: Annotated[str | None, setting("EXPERTS", metavar="INTEGER|auto")] = None,
    budget: Annotated[int | None, setting("BUDGET", min=1)] = None,
    frames: Annotated[int | None, setting("FRAMES", min=1)] = None,
    fps: Annotated[float | None, setting("FPS", min=0.01)] = None,
    size: Annotated[int | None, setting("SIZE", "Height and width in pixels.", min=8)] = None,
    latents: Annotated[str | None, setting("LATENTS")] = None,
    text: Annotated[str | None, setting("TEXT")] = None,
    smallest: Annotated[int | None, setting("SMALLEST", min=1)] = None,
    features: Annotated[str | None, setting("FEATURES")] = None,
    skip_bad: Annotated[bool | None, setting("SKIP_BAD", "", "--skip-bad")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Decode, encode and cluster clips into shards.

    A repeated build computes only what changed.
    """
    from lutetia.cli.progress import progress
    from lutetia.models.data.build import build_data
    from lutetia.models.data.build_settings import BuildSettings

    flags = given(
        experts=_number_or_auto(experts), budget=budget, frames=frames, fps=fps, height=size, width=size, latents=latents,
        text=text, features=features, smallest=smallest, skip_bad=skip_bad, pipeline=pipeline,
    )  # fmt: skip
    settings = settings_of(BuildSettings, str(config or "options"), {**read_config(config, "data"), **flags})
    require_device(settings.device)
    with progress("building shards") as on_progress:
        report = build_data(folder, out, settings, on_progress)
    emit(report, as_json, lambda: _built(report, out, same_config(config, "run")))


def _number_or_auto(experts: str | None) -> int | str | None:
    """A whole number as such. Raises ConfigError for anything else but `auto`."""
    if experts is None or experts == "auto":
        return experts
    if not experts.isdecimal() or int(experts) < 1:
        raise ConfigError(f"--experts is {plain(experts)!r}; give a whole number of at least 1, or auto")
    return int(experts)


def _built(report: BuildReport, out: Path, more: str) -> str:
    left_out = [plain(f"left out: {reason}") for _, reason in report.skipped]
    buckets = [f"bucket {shape}: {clips} clips" for shape, clips in report.buckets]
    return "\n".join([*left_out, *buckets, f"shards are in {out}; next: lutetia run create {out} RUN{more}"])


@app.command("inspect")
def inspect(
    folder: Annotated[Path, typer.Argument(help="Folder made by `lutetia data build`.", metavar="DATA")],
    as_json: JsonFlag = False,
) -> None:
    """Show shards, their sizes and keywords."""
    from lutetia.models.data.description import read_data

    description = read_data(folder)
    emit(description, as_json, lambda: render_data(description))


def render_data(description: DataDescription) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from lutetia.cli.formatting import size

    latent = description.latent
    head = Text(
        f"{latent.pixel_frames} frames of {latent.pixel_width}×{latent.pixel_height} at {latent.fps:g}/s, "
        f"latents {latent.shape} by {latent.vae}, text by {latent.text_encoder}\n"
    )
    columns = "SHARD", "CLUSTER", "CLIPS", "HELD OUT", "TEST", "PRIOR", "SIZE", "WORDS"
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for shard in description.shards:
        table.add_row(
            f"{shard.index:03d}", plain(shard.name), str(shard.train.clips), str(shard.holdout.clips),
            str(shard.test.clips) if shard.test else "-", f"{shard.prior:.3f}", size(shard.train.bytes),
            plain(", ".join(shard.keywords[:6])),
        )  # fmt: skip
    return Group(head, table)


@app.command("convert")
def convert_data(
    folder: Annotated[Path, typer.Argument(help="Folder made by `lutetia data build` of release 0.1.", metavar="DATA")],
    out: Annotated[Path, typer.Argument(help="New folder.", metavar="OUT")],
    as_json: JsonFlag = False,
) -> None:
    """Convert data that release 0.1 built; the clips and their order stay."""
    from lutetia.cli.progress import progress
    from lutetia.models.data.parts.convert import convert

    with progress("converting shards") as on_progress:
        description = convert(folder, out, on_progress)
    emit(description, as_json, lambda: render_data(description))


@app.command("train-autoencoder")
def train_autoencoder(
    out: Annotated[Path, typer.Argument(help="New or empty folder for the weights.", metavar="OUT")],
    steps: Annotated[int, setting("AUTOENCODER_STEPS", "Training steps.", min=1)] = 5000,
    seed: Annotated[int, setting("AUTOENCODER_SEED", "Seed of weights and frames.")] = 0,
    clips: Annotated[
        Path | None, setting("AUTOENCODER_CLIPS", "Train on frames of these clips (split train) instead of drawn ones.")
    ] = None,
    channels: Annotated[int, setting("AUTOENCODER_CHANNELS", "Channels of a latent.", min=1)] = 8,
    scale: Annotated[Literal["4", "8"], setting("AUTOENCODER_SCALE", "Side of the square that one latent stands for, px.")] = "8",
    size: Annotated[int, setting("AUTOENCODER_SIZE", "Height and width of the frames in pixels, a multiple of 8.", min=8)] = 64,
    bfloat16: Annotated[bool, setting("AUTOENCODER_BFLOAT16", "Faster on processors that multiply bfloat16 (AMX).")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train a small autoencoder from scratch, like builtin:demo or for your own clips.

    It learns single frames only; the experts of the swarm learn motion and text.
    """
    from lutetia.cli.progress import progress
    from lutetia.models.data.encode import autoencoder_training

    with progress("training the autoencoder") as on_progress:
        report = autoencoder_training.train_autoencoder(
            out,
            seed,
            steps=steps,
            channels=channels,
            scale=4 if scale == "4" else 8,
            size=size,
            clips=clips,
            bfloat16=bfloat16,
            on_progress=lambda done, total, _: on_progress("steps", done, total),
        )
    emit(report, as_json, lambda: "\n".join(f"{key}: {value}" for key, value in report.items()))
