"""`lutetia data build|inspect|train-autoencoder`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lutetia.cli.arguments import given, read_config, require_device, setting, settings_of
from lutetia.cli.output import JsonFlag, emit

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lutetia.models.data.build import BuildReport
    from lutetia.models.data.description import DataDescription

app = typer.Typer(help="Turn captioned clips into shards, and look at them.", no_args_is_help=True)


@app.command("build")
def build(
    folder: Annotated[
        Path, typer.Argument(help="Clips with captions in metadata.jsonl, metadata.csv or same-named .txt.", metavar="CLIPS")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for shards/ and data.json.", metavar="OUT")],
    config: Annotated[Path | None, setting("DATA_CONFIG", "Settings as TOML; flags win.")] = None,
    experts: Annotated[int | None, setting("EXPERTS", "Number of shards, one expert each.", min=1)] = None,
    frames: Annotated[int | None, setting("FRAMES", "Frames of a clip.", min=1)] = None,
    fps: Annotated[float | None, setting("FPS", "Frames per second of a clip.", min=0.01)] = None,
    size: Annotated[int | None, setting("SIZE", "Height and width in pixels.", min=8)] = None,
    latents: Annotated[str | None, setting("LATENTS", "Autoencoder: builtin:demo, pixels, folder or hub id.")] = None,
    text: Annotated[str | None, setting("TEXT", "Text encoder: builtin:words, folder or hub id.")] = None,
    features: Annotated[str | None, setting("FEATURES", "What clusters are found by.")] = None,
    skip_bad: Annotated[bool | None, setting("SKIP_BAD", "Leave unusable clips out and list them.", "--skip-bad")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Decode, encode and cluster clips into shards.

    Made again, only what changed is computed.
    """
    from lutetia.cli.progress import progress
    from lutetia.models.data.build import BuildSettings, build_data

    flags = given(
        experts=experts, frames=frames, fps=fps, height=size, width=size, latents=latents, text=text, features=features,
        skip_bad=skip_bad,
    )  # fmt: skip
    settings = settings_of(BuildSettings, str(config or "options"), {**read_config(config), **flags})
    require_device(settings.device)
    with progress("building shards") as on_progress:
        report = build_data(folder, out, settings, on_progress)
    emit(report, as_json, lambda: _built(report, out))


def _built(report: BuildReport, out: Path) -> str:
    left_out = [f"left out: {reason}" for _, reason in report.skipped]
    return "\n".join([*left_out, f"shards are in {out}; next: lutetia run create {out} RUN"])


@app.command("inspect")
def inspect(
    folder: Annotated[Path, typer.Argument(help="Folder made by `lutetia data build`.", metavar="DATA")],
    as_json: JsonFlag = False,
) -> None:
    """Show shards, their sizes and words."""
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
            f"{shard.index:03d}", shard.name, str(shard.train.clips), str(shard.holdout.clips),
            str(shard.test.clips) if shard.test else "-", f"{shard.prior:.3f}", size(shard.train.blob.size),
            ", ".join(shard.keywords[:6]),
        )  # fmt: skip
    return Group(head, table)


@app.command("train-autoencoder")
def train_autoencoder(
    out: Annotated[Path, typer.Argument(help="Folder for its weights; nothing else may be in it.", metavar="OUT")],
    steps: Annotated[int, setting("AUTOENCODER_STEPS", "Training steps.", min=1)] = 5000,
    seed: Annotated[int, setting("AUTOENCODER_SEED", "Seed of weights and pictures.")] = 0,
    clips: Annotated[
        Path | None, setting("AUTOENCODER_CLIPS", "Learn frames of these clips (split train) instead of rule-made ones.")
    ] = None,
    channels: Annotated[int, setting("AUTOENCODER_CHANNELS", "Channels of its latents.", min=1)] = 8,
    scale: Annotated[Literal["4", "8"], setting("AUTOENCODER_SCALE", "Pixels of a side of one latent.")] = "8",
    size: Annotated[int, setting("AUTOENCODER_SIZE", "Height and width of its frames in pixels, a multiple of 8.", min=8)] = 64,
    bfloat16: Annotated[bool, setting("AUTOENCODER_BFLOAT16", "Faster where the processor multiplies bfloat16 (AMX).")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train a small autoencoder from scratch: the one that ships as builtin:demo, or one for your own clips.

    It sees single frames only: motion and text are left to the swarm's experts.
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
