"""`lutetia data build|inspect|train-autoencoder`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .arguments import given, read_config, setting, settings_of
from .output import JsonFlag, emit

if TYPE_CHECKING:
    from rich.console import RenderableType

app = typer.Typer(help="Turn captioned clips into shards, and look at them.", no_args_is_help=True)


@app.command("build")
def build(
    folder: Annotated[
        Path, typer.Argument(help="Clips with captions in metadata.jsonl, metadata.csv or same-named .txt.", metavar="CLIPS")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for shards/ and data.json.", metavar="OUT")],
    config: Annotated[Path | None, setting("DATA_CONFIG", "Settings as TOML; flags win.")] = None,
    experts: Annotated[int | None, setting("EXPERTS", "Number of shards, one expert each.", min=1)] = None,
    as_json: JsonFlag = False,
) -> None:
    """Decode, encode and cluster clips into shards.

    Made again, only what changed is computed.
    """
    from ..models.data.build import BuildSettings, build_data
    from .progress import progress

    settings = settings_of(BuildSettings, str(config or "options"), {**read_config(config), **given(experts=experts)})
    with progress("building shards") as on_progress:
        report = build_data(folder, out, settings, on_progress)
    emit(report, as_json, lambda: f"shards are in {out}; next: lutetia run create {out} RUN")


@app.command("inspect")
def inspect(
    folder: Annotated[Path, typer.Argument(help="Folder made by `lutetia data build`.", metavar="DATA")],
    as_json: JsonFlag = False,
) -> None:
    """Show shards, their sizes and words."""
    document = read_data(folder)
    emit(document, as_json, lambda: render_data(document))


def read_data(folder: Path) -> dict[str, Any]:
    """`data.json` of a built folder. Raises DataError."""
    import json

    from ..system.errors import DataError

    path = folder / "data.json"
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; make it with lutetia data build CLIPS {folder}") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}; build the data again") from error


def render_data(document: dict[str, Any]) -> RenderableType:
    from rich.table import Table

    table = Table("SHARD", "CLUSTER", "CLIPS", "HELD OUT", "PRIOR", box=None, pad_edge=False, header_style="bold")
    for index, shard in enumerate(document["shards"]):
        table.add_row(f"{index:03d}", shard["name"], str(shard["clips"]), str(shard["holdout_clips"]), f"{shard['prior']:.3f}")
    return table
