"""`lutetia run create|show|why|upgrade|rotate` and the owner's orders: what a run's owner does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lutetia.cli.arguments import RunFolder, documented_by, given, is_ticket, read_config, same_config, setting, settings_of
from lutetia.cli.output import JsonFlag, emit, say
from lutetia.cli.owner import actions, runs
from lutetia.system.errors import plain

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lutetia.protocol.schema.manifest import Manifest

app = typer.Typer(help="Create a run, show its manifest, or change it while it is served.", no_args_is_help=True)
actions.register(app)
runs.register(app)


@app.command("create", cls=documented_by("lutetia.coordinator.settings:RunSettings", address="addresses"))
def create(
    data: Annotated[Path, typer.Argument(help="Folder made by `lutetia data build`.", metavar="DATA")],
    folder: Annotated[Path, typer.Argument(help="Folder for the run's manifest, keys, blobs and ledger.", metavar="RUN")],
    config: Annotated[Path | None, setting("RUN_CONFIG", "TOML file with settings; options override it.")] = None,
    preset: Annotated[str | None, setting("RUN_PRESET")] = None,
    name: Annotated[str | None, setting("RUN_NAME")] = None,
    address: Annotated[list[str] | None, setting("RUN_ADDRESS")] = None,
    experts: Annotated[int | None, setting("RUN_EXPERTS", min=1)] = None,
    pipeline: Annotated[str | None, setting("PIPELINE", "", "--from")] = None,
    part: Annotated[Literal["high", "low"] | None, setting("RUN_PART")] = None,
    first_frame: Annotated[float | None, setting("RUN_FIRST_FRAME", min=0.0, max=1.0)] = None,
    warm_start: Annotated[
        str | None,
        setting("RUN_WARM_START"),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Create a run: sign its manifest and write the ticket for volunteers."""
    from lutetia.coordinator.settings import RunSettings

    flags = given(
        preset=preset, name=name, addresses=address, experts=experts, pipeline=pipeline, part=part,
        first_frame=first_frame, warm_start=warm_start,
    )  # fmt: skip
    values = {**read_config(config, "run"), **flags}
    settings = settings_of(RunSettings, str(config or "options"), values)  # before the slow imports
    from lutetia.coordinator.admin.create import create_run

    created = create_run(data, folder, settings)
    if warning := reach_warning(settings.resolved().addresses):
        say(warning)
    from lutetia.cli.doctor.run_needs import coordinator_needs, node_needs

    for line in (*node_needs(created.manifest), coordinator_needs(created.manifest)):
        say(line)
    document = {"run": created.run, "folder": str(folder), "ticket": created.ticket}
    emit(document, as_json, lambda: created_text(document, same_config(config, "serve")))


def reach_warning(addresses: Sequence[str]) -> str:
    """Who cannot join with a ticket that names `addresses`; empty if everybody can."""
    from lutetia.coordinator.addresses import reach

    named = ", ".join(addresses)
    match reach(addresses):
        case "machine":
            return f"only this machine can join: the ticket names {named}; for others create the run with --address HOST:PORT"
        case "network":
            return f"only machines of the same network can join: the ticket names {named}"
    return ""


def created_text(document: dict[str, Any], more: str) -> str:
    return (
        f"Run {document['run'][:12]} is in {document['folder']}. Keep owner.key there safe: it signs the run.\n"
        f"Start its coordinator:  lutetia coordinator serve {document['folder']}{more}\n"
        f"Volunteers join with:   lutetia join {document['ticket']}"
    )


OwnerKey = Annotated[Path | None, setting("OWNER_KEY", "File of the owner's key, where it is not in the run's folder.")]


@app.command("upgrade")
def upgrade(
    run: RunFolder,
    changes: Annotated[
        list[str] | None, setting("UPGRADE_SET", "A change, like samples_per_shard=128000. May be repeated.", "--set")
    ] = None,
    config: Annotated[Path | None, setting("UPGRADE_CONFIG", "TOML file with changes; --set overrides it.")] = None,
    owner_key: OwnerKey = None,
    as_json: JsonFlag = False,
) -> None:
    """Sign a new version of the manifest. The coordinator and all peers adopt it while they run.

    From another machine give the ticket in place of the folder, and --owner-key.

    What may change: samples_per_shard, holdout_tolerance, raw_tolerance, sampling.*, timing.*, audit.*, hardware.*, card.*,
    allowlist, coordinators, needs, valid_days.
    """
    from lutetia.coordinator.admin.upgrade import upgrade_run
    from lutetia.coordinator.run_folder import RunFolder as Folder

    wanted = {**flattened(read_config(config)), **dict(assignment(text) for text in changes or ())}
    if actions.is_remote(str(run)):
        new = actions.send_upgrade(str(run), wanted, owner_key)
    else:
        new = upgrade_run(Folder(run), wanted, owner_key).new
    document = {"run": new.run_id, "version": new.version, "changed": sorted(wanted), "epochs": new.epochs}
    emit(document, as_json, lambda: f"Version {new.version} of run {new.name} is signed: {', '.join(sorted(wanted))}.")


@app.command("rotate")
def rotate(run: RunFolder, owner_key: OwnerKey = None, as_json: JsonFlag = False) -> None:
    """Give the stopped coordinator a new key. Peers then refuse the old key.

    Peers that are online find the new coordinator themselves. New volunteers need the new ticket, which names the new key.
    """
    from lutetia.coordinator.admin.rotate import rotate_run
    from lutetia.coordinator.run_folder import RunFolder as Folder

    done = rotate_run(Folder(run), owner_key)
    document = {
        "run": done.manifest.run_id, "version": done.manifest.version, "old": done.old, "new": done.new, "ticket": done.ticket,
    }  # fmt: skip
    text = (
        f"Version {done.manifest.version} of run {done.manifest.name} names the coordinator's new key {done.new[:16]}….\n"
        f"Start it again:        lutetia coordinator serve {run}\n"
        f"New volunteers join:   lutetia join {done.ticket}"
    )
    emit(document, as_json, lambda: text)


def assignment(text: str) -> tuple[str, Any]:
    """Split `name=value`; the value is TOML, or else plain text. Raises UsageError."""
    import tomllib

    from lutetia.system.errors import UsageError

    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise UsageError(f"cannot read {text!r}; write it like samples_per_shard=128000 or timing.heartbeat=10.0")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value.strip()


def flattened(tables: dict[str, Any]) -> dict[str, Any]:
    """Write tables as dotted keys: `{"timing": {"tenure": 60}}` changes `timing.tenure` and nothing else of the table."""
    keys: dict[str, Any] = {}
    for name, value in tables.items():
        keys |= {f"{name}.{key}": entry for key, entry in value.items()} if isinstance(value, dict) else {name: value}
    return keys


@app.command("show")
def show(
    source: Annotated[str, typer.Argument(help="A run's folder, a manifest file, or a ticket.", metavar="RUN|MANIFEST|TICKET")],
    timeout: Annotated[float, setting("TIMEOUT", "Seconds to wait for each address of a ticket.", min=0.1)] = 8.0,
    as_json: JsonFlag = False,
) -> None:
    """Show and verify a run's manifest."""
    manifest = load_manifest(source, timeout)
    emit(manifest, as_json, lambda: render_manifest(manifest))


@app.command("why")
def why(
    source: Annotated[
        str, typer.Argument(help="A run's folder on the coordinator's machine, or a ticket.", metavar="RUN|TICKET")
    ],
    shard: Annotated[int, typer.Argument(min=0, help="Index of the shard.", metavar="SHARD")],
    timeout: Annotated[float, setting("TIMEOUT", "Seconds to wait for each address of a ticket.", min=0.1)] = 8.0,
    as_json: JsonFlag = False,
) -> None:
    """Say in two sentences what holds a shard up, and what to do."""
    import time

    from lutetia.cli.status_table import shard_reason
    from lutetia.system.errors import plain

    status = actions.load_status(source, timeout)
    reason = shard_reason(status, shard, time.time())
    emit(reason, as_json, lambda: plain(str(reason["text"])))


def load_manifest(source: str, timeout: float) -> Manifest:
    """Load and verify the manifest of a folder, file or ticket. Raises ConfigError, AuthorisationError or BootstrapError."""
    import time

    from lutetia.cli.arguments import read_ticket
    from lutetia.protocol.light_client.documents import fetch_document
    from lutetia.protocol.rpc.introduction import MANIFEST
    from lutetia.protocol.schema.manifest import MAX_MANIFEST_BYTES, open_manifest
    from lutetia.system.errors import ConfigError

    if is_ticket(source) or source.endswith(".txt"):
        ticket = read_ticket(source)
        data = fetch_document(ticket, MANIFEST, timeout, MAX_MANIFEST_BYTES)
        return open_manifest(data, now=time.time(), run=ticket.run, owner=ticket.owner).manifest
    path = Path(source)
    path = path / "manifest.json" if path.is_dir() else path
    try:
        return open_manifest(path.read_bytes(), now=time.time()).manifest
    except OSError as error:
        raise ConfigError(
            f"cannot read a manifest from {path}: {error.strerror}; give a run's folder, a manifest or a ticket"
        ) from error


def _beginning(manifest: Manifest) -> str:
    """The weights that experts start from."""
    from lutetia.cli.formatting import short

    given = {init.digest: None for shard in manifest.shards if (init := manifest.expert_of(shard.index).init)}
    return f"warm start from {', '.join(short(digest, 12) for digest in given)}" if given else "random start"


def render_manifest(manifest: Manifest) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from lutetia.cli.formatting import short, size, thousands

    latent, optimisation = manifest.latent, manifest.optimisation
    size_in_pixels = f"{latent.pixel_width}×{latent.pixel_height}"
    facts = {
        "run": f"{manifest.name}   {manifest.run_id}   version {manifest.version}",
        "owner": manifest.owner,
        "expert": f"{manifest.expert.class_name}, predicts {manifest.expert.prediction}, {_beginning(manifest)}",
        "clips": f"{latent.pixel_frames} frames of {size_in_pixels}, latents {latent.shape} by {latent.vae}",
        "text": f"{latent.text_encoder}, {latent.text_tokens} tokens",
        "budget": f"{thousands(manifest.samples_per_shard)} samples per expert in {manifest.epochs} checkpoints",
        "training": f"{optimisation.optimizer}, batch {optimisation.batch}, learning rate {optimisation.learning_rate:g}",
        "lease": f"{manifest.timing.lease:.0f} s",
    }
    table = Table.grid(padding=(0, 3))
    for key, value in facts.items():
        table.add_row(key, plain(value))
    shards = Table(
        "SHARD", "CLUSTER", "CLIPS", "HELD OUT", "PRIOR", "TRAIN BLOB", "SIZE", box=None, pad_edge=False, header_style="bold"
    )
    for shard in manifest.shards:
        shards.add_row(
            f"{shard.index:03d}", plain(shard.name), str(shard.clips), str(shard.holdout_clips), f"{shard.prior:.3f}",
            short(shard.train.digest, 12), size(shard.size),
        )  # fmt: skip
    return Group(table, Text(), shards)
