"""`lutetia coordinator serve|replay`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .arguments import RunFolder, given, read_config, setting, settings_of

app = typer.Typer(help="Serve a run: bootstrap peer, origin, judge, stitcher.", no_args_is_help=True)


@app.command("serve")
def serve(
    run: RunFolder,
    config: Annotated[Path | None, setting("COORDINATOR_CONFIG", "Settings as TOML; flags win.")] = None,
    listen: Annotated[str | None, setting("COORDINATOR_LISTEN", "Where to listen, if not at the run's own address.")] = None,
    exit_when_done: Annotated[bool, setting("EXIT_WHEN_DONE", "End when all budgets are done and stitched.")] = False,
) -> None:
    """Run the coordinator until Ctrl-C; started again it goes on where it was."""
    from ..coordinator.serve import serve_run
    from ..coordinator.settings import ServeSettings
    from .service import run_service

    values = {**read_config(config), **given(listen=listen, exit_when_done=exit_when_done or None)}
    run_service(serve_run(run, settings_of(ServeSettings, str(config or "options"), values)))
