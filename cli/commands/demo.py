"""`lutetia demo`: a swarm of processes on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lutetia.cli.arguments import setting


def register(app: typer.Typer) -> None:
    """Add the command to the top level."""
    app.command()(demo)


def demo(
    out: Annotated[Path, setting("DEMO_OUT", "Folder for the result. An earlier demo there is replaced.")] = Path("demo"),
    keep_run: Annotated[bool, setting("DEMO_KEEP_RUN", "Keep clips, shards, the run's folder and logs in OUT/run.")] = False,
    preset: Annotated[
        Literal["demo", "tiny"], setting("DEMO_PRESET", "tiny trains for seconds only; its samples are noise.")
    ] = "demo",
) -> None:
    """Train a mixture of three experts on this machine.

    A coordinator and three nodes run as real processes. One node is killed
    midway. Clips of the finished mixture are written to OUT.
    """
    from lutetia.cli.demo.run import run_demo

    run_demo(out, keep_run=keep_run, preset=preset)
