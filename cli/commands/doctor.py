"""`lutetia doctor`: check this machine and say what to do about each problem."""

from __future__ import annotations

from typing import Annotated

import typer

from lutetia.cli.arguments import StateFolder, read_ticket
from lutetia.cli.output import JsonFlag, emit


def register(app: typer.Typer) -> None:
    """Add the command to the top level."""
    app.command()(doctor)


def doctor(
    ticket: Annotated[
        str | None,
        typer.Argument(
            envvar="LUTETIA_TICKET",
            help="A run's ticket: check whether this machine can train its experts.",
            metavar="[TICKET]",
        ),
    ] = None,
    state_folder: StateFolder = None,
    as_json: JsonFlag = False,
) -> None:
    """Check this machine before it joins a run."""
    from lutetia.cli.doctor.checks import render_findings, run_checks
    from lutetia.system.paths import default_state_folder

    decoded = read_ticket(ticket) if ticket else None
    folder = state_folder or default_state_folder()
    findings = run_checks(folder)
    if decoded:
        from lutetia.cli.doctor.run_needs import check_run

        findings.append(check_run(decoded, folder))
    emit({"findings": [vars(finding) for finding in findings]}, as_json, lambda: render_findings(findings))
    raise typer.Exit(next((finding.code for finding in findings if finding.verdict == "fail"), 0))
