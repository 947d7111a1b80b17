"""`lutetia swarm status|fetch|export`: ask a run's peers over py-libp2p, without hivemind or torch; hand a model on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lutetia.cli.arguments import TicketArgument, read_ticket, setting
from lutetia.cli.output import JsonFlag, emit

if TYPE_CHECKING:
    from lutetia.protocol.schema.status import SwarmStatus

app = typer.Typer(help="Show a run's status, or fetch its model.", no_args_is_help=True)


@app.command("status")
def swarm_status(
    ticket: TicketArgument,
    timeout: Annotated[float, setting("TIMEOUT", "Seconds to wait for each address.", min=0.1)] = 8.0,
    as_json: JsonFlag = False,
) -> None:
    """Show the accepted work of each shard and the peers that did it."""
    import time

    from lutetia.cli.status_table import render_status

    status = fetch_status(ticket, timeout)
    emit(status, as_json, lambda: render_status(status, time.time()))


def fetch_status(ticket: str, timeout: float) -> SwarmStatus:
    """Fetch the run's status. Raises BootstrapError when no address answers, ConfigError when the peer serves another run."""
    decoded = read_ticket(ticket)

    from lutetia.protocol.light_client.documents import fetch_document
    from lutetia.protocol.rpc.introduction import STATUS
    from lutetia.protocol.schema.status import MAX_STATUS_BYTES
    from lutetia.system.errors import ConfigError

    status = read_status(fetch_document(decoded, STATUS, timeout, MAX_STATUS_BYTES))
    if status.run != decoded.run:
        raise ConfigError(f"that peer coordinates run {status.run[:12]}, not {decoded.run[:12]}; check the ticket")
    return status


def read_status(data: bytes) -> SwarmStatus:
    """Parse a status document. Raises IntegrityError when it is malformed."""
    from pydantic import ValidationError

    from lutetia.protocol.schema.manifest import first_problem
    from lutetia.protocol.schema.status import SwarmStatus
    from lutetia.system.errors import IntegrityError

    try:
        return SwarmStatus.model_validate_json(data)
    except ValidationError as error:
        raise IntegrityError(
            f"the coordinator's status is malformed: {first_problem(error)}; update lutetia on one of the two sides"
        ) from error


@app.command("fetch")
def fetch(
    ticket: TicketArgument,
    out: Annotated[Path, setting("FETCH_OUT", "Folder for the mixture. An earlier mixture there is replaced.")] = Path("mixture"),
    checkpoints: Annotated[
        bool,
        setting(
            "FETCH_CHECKPOINTS", "Fetch the newest accepted checkpoints instead. Any peer has them, so no coordinator is needed."
        ),
    ] = False,
    mixture: Annotated[
        str | None,
        setting(
            "FETCH_MIXTURE", "Digest of a mixture that the run made earlier, or its first 12 letters; default: the current one."
        ),
    ] = None,
    peer: Annotated[
        list[str] | None, setting("FETCH_PEER", "Address of a peer to ask instead of the ticket's (see `lutetia status --json`).")
    ] = None,
    timeout: Annotated[float, setting("TIMEOUT", "Seconds without progress after which to give up.", min=0.1)] = 20.0,
    as_json: JsonFlag = False,
) -> None:
    """Fetch the run's current mixture, an earlier one or the newest checkpoints, and verify their signatures."""
    from lutetia.cli.fetch_mixture import asked_at, fetch_mixture
    from lutetia.cli.progress import progress
    from lutetia.system.errors import UsageError

    decoded = asked_at(read_ticket(ticket), peer or ())
    if checkpoints and mixture:
        raise UsageError("--mixture and --checkpoints ask for different things; give one of them")
    if checkpoints:
        from lutetia.cli.fetch_checkpoints import fetch_checkpoints

        with progress("fetching checkpoints") as on_progress:
            acceptances = fetch_checkpoints(decoded, out, timeout, lambda done, total: on_progress("bytes", done, total))
        shards = [{"shard": given.shard, "epoch": given.epoch, "checkpoint": given.checkpoint} for given in acceptances]
        listed = {"folder": str(out), "run": decoded.run, "checkpoints": shards}
        emit(listed, as_json, lambda: f"{len(acceptances)} accepted checkpoints of run {decoded.run[:12]} are in {out}")
        return
    with progress("fetching the mixture") as on_progress:
        found = fetch_mixture(decoded, out, timeout, lambda done, total: on_progress("bytes", done, total), mixture)
    document = {"folder": str(out), "mixture": found.digest, "run": found.run, "files": len(found.files)}
    emit(document, as_json, lambda: f"mixture {found.digest[:12]} is in {out}; next: lutetia generate PROMPT --mixture {out}")


@app.command("export")
def export(
    mixture: Annotated[Path, typer.Argument(help="Folder of a mixture of adapters.", metavar="MIXTURE")],
    out: Annotated[Path, typer.Argument(help="File to write, .safetensors.", metavar="FILE")],
    expert: Annotated[str, setting("EXPORT_EXPERT", "Name or number of the expert.")] = "0",
    as_json: JsonFlag = False,
) -> None:
    """Write one adapter as a single file, in the names of the base's original release, for ComfyUI and programs like it."""
    from lutetia.models.experts.adapters.lora_file import LORA_FILE
    from lutetia.models.experts.adapters.single_file import write_single_file
    from lutetia.models.mixing.folder import MixtureFolder
    from lutetia.system.errors import UsageError

    folder = MixtureFolder(mixture)
    experts = [entry for entry in folder.document.experts if entry.folder]
    found = [entry for entry in experts if expert in (entry.name, str(int((entry.folder or "").partition("_")[2])))]
    if folder.document.network is None:
        raise UsageError(f"{mixture} holds whole experts; each is a diffusers model of its own in its folder")
    if not found:
        raise UsageError(f"{mixture} has no expert {expert!r}; it has {', '.join(entry.name for entry in experts)}")
    write_single_file(folder.check(f"{found[0].folder}/{LORA_FILE}"), out, folder.document.network)
    document = {
        "file": str(out),
        "expert": found[0].name,
        "base": folder.document.network.model_dump()["adapter"]["base"]["source"],
    }
    emit(document, as_json, lambda: f"wrote {out}: the adapter {document['expert']} for {document['base']}")
