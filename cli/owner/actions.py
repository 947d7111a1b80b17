"""`lutetia run pause|resume|ban|unban|hide-name|show-name`: the owner's orders, here or from another machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lutetia.cli.arguments import is_ticket, read_ticket, setting
from lutetia.cli.output import JsonFlag, emit
from lutetia.system.errors import ConfigError, UsageError, plain

if TYPE_CHECKING:
    from lutetia.protocol.schema.manifest import Manifest
    from lutetia.protocol.schema.owner.orders import Order, OrderKind
    from lutetia.protocol.schema.status import SwarmStatus

Run = Annotated[
    str, typer.Argument(help="The run's folder, or from another machine its ticket, with --owner-key.", metavar="RUN|TICKET")
]
Peer = Annotated[str, typer.Argument(metavar="PEER", help="Public key, its first eight or more digits, or peer id.")]
OwnerKey = Annotated[Path | None, setting("OWNER_KEY", "File of the owner's key, where it is not in the run's folder.")]
Timeout = Annotated[float, setting("TIMEOUT", "Seconds to wait for each address of a ticket.", min=0.1)]
Reason = Annotated[str, setting("REASON", "Why, for people: peers, status and page show it.", "--reason")]
_LONGEST_REASON = 200


def register(app: typer.Typer) -> None:
    """Add the commands to `lutetia run`."""
    app.command("pause")(pause)
    app.command("resume")(resume)
    app.command("ban")(ban)
    app.command("unban")(unban)
    app.command("hide-name")(hide_name)
    app.command("show-name")(show_name)


def pause(run: Run, reason: Reason = "", owner_key: OwnerKey = None, timeout: Timeout = 20.0, as_json: JsonFlag = False) -> None:
    """Pause a run: nothing is accepted and nothing is lost until `lutetia run resume`.

    Nodes keep their shards and end the epoch that they train. Their results wait.
    """
    give(run, "pause", None, reason, owner_key, timeout, as_json)


def resume(run: Run, owner_key: OwnerKey = None, timeout: Timeout = 20.0, as_json: JsonFlag = False) -> None:
    """Let a paused run go on. Results that waited are checked at once."""
    give(run, "resume", None, "", owner_key, timeout, as_json)


def ban(
    run: Run, peer: Peer, reason: Reason = "", owner_key: OwnerKey = None, timeout: Timeout = 20.0, as_json: JsonFlag = False
) -> None:
    """Ban a peer: its records, results and requests are refused by all peers.

    What it had accepted stays; `lutetia coordinator rollback` takes that back.
    """
    give(run, "ban", peer, reason, owner_key, timeout, as_json)


def unban(run: Run, peer: Peer, owner_key: OwnerKey = None, timeout: Timeout = 20.0, as_json: JsonFlag = False) -> None:
    """Lift a ban."""
    give(run, "unban", peer, "", owner_key, timeout, as_json)


def hide_name(run: Run, peer: Peer, owner_key: OwnerKey = None, timeout: Timeout = 20.0, as_json: JsonFlag = False) -> None:
    """Show a peer's name to nobody any more."""
    give(run, "hide-name", peer, "", owner_key, timeout, as_json)


def show_name(run: Run, peer: Peer, owner_key: OwnerKey = None, timeout: Timeout = 20.0, as_json: JsonFlag = False) -> None:
    """Show a peer's name again."""
    give(run, "show-name", peer, "", owner_key, timeout, as_json)


def give(run: str, kind: OrderKind, peer: str | None, reason: str, owner_key: Path | None, timeout: float, as_json: bool) -> None:
    """Sign the order and bring it to the run. Raises LutetiaError."""
    from lutetia.protocol.schema.owner.orders import Order

    if len(reason) > _LONGEST_REASON:
        raise UsageError(f"the reason has {len(reason)} letters; say it in at most {_LONGEST_REASON}")
    owner = "" if peer is None else _peer_of(run, peer, timeout)
    order = Order(kind, owner, reason)
    remote = is_remote(run)
    manifest = _sent(run, order, owner_key, timeout) if remote else _noted(Path(run), order, owner_key)
    document = {"run": manifest.run_id, "version": manifest.version, "order": kind, "peer": owner or None, "reason": reason}
    emit(document, as_json, lambda: _text(kind, owner, manifest, remote))


def is_remote(run: str) -> bool:
    """Whether `run` is a ticket or its file, and no folder."""
    return is_ticket(run) or run.endswith(".txt")


def send_upgrade(ticket: str, changes: Mapping[str, Any], owner_key: Path | None) -> Manifest:
    """`run upgrade` from another machine. Raises as `send_next`, and UpgradeRefused."""
    from lutetia.protocol.schema.manifest_upgrade import next_version

    if not changes:
        raise ConfigError("no change is given; name one with --set, for example --set samples_per_shard=128000")
    return send_next(ticket, lambda old: next_version(old, changes, time.time()), owner_key, 20.0)


def _noted(folder: Path, order: Order, owner_key: Path | None) -> Manifest:
    from lutetia.coordinator.owner.orders import order_run
    from lutetia.coordinator.run_folder import RunFolder

    return order_run(RunFolder(folder), order, owner_key)


def _sent(ticket: str, order: Order, owner_key: Path | None, timeout: float) -> Manifest:
    """Fetch the manifest in force, sign the next one with the order, and send it to the coordinator."""
    from lutetia.coordinator.owner.orders import ordered

    return send_next(ticket, lambda old: ordered(old, order, time.time()), owner_key, timeout)


def send_next(ticket: str, change: Callable[[Manifest], Manifest], owner_key: Path | None, timeout: float) -> Manifest:
    """Send the version of the manifest that `change` makes of the one in force to the coordinator of a ticket.

    Raises ConfigError (no key is given, the change cannot be made), BootstrapError (nobody answers) or AuthorisationError
    (refused).
    """
    from lutetia.coordinator.admin.upgrade import sign_version
    from lutetia.protocol.light_client.documents import fetch_document
    from lutetia.protocol.light_client.owner import send_request
    from lutetia.protocol.rpc.introduction import MANIFEST
    from lutetia.protocol.rpc.owner_request import RequestRefused, sign_request
    from lutetia.protocol.schema.identity import Identity
    from lutetia.protocol.schema.manifest import MAX_MANIFEST_BYTES, open_manifest

    if owner_key is None:
        raise ConfigError("a ticket needs the owner's key: give its file with --owner-key, or name the run's folder instead")
    decoded, owner = read_ticket(ticket), Identity.load(owner_key)
    data = fetch_document(decoded, MANIFEST, timeout, MAX_MANIFEST_BYTES)
    old = open_manifest(data, now=0.0, run=decoded.run, owner=decoded.owner).manifest
    signed = sign_version(change(old), owner)
    answer = send_request(decoded, sign_request(signed, owner, time.time()), timeout)
    if not answer.done:
        raise RequestRefused(f"the coordinator did not do it: {plain(answer.text)}")
    return signed.manifest


def _peer_of(run: str, text: str, timeout: float) -> str:
    """The public key that `text` names. Raises UsageError where it names none, or several."""
    import re

    from lutetia.protocol.schema.identity import peer_id_of, public_key_of

    if re.fullmatch(r"[0-9a-f]{64}", text):
        return text
    if key := public_key_of(text):
        return key
    if not re.fullmatch(r"[0-9a-f]{8,63}", text):
        raise UsageError(f"{text!r} is no peer; give a public key, its first eight or more digits, or a peer id")
    matches = sorted(owner for owner in _known(load_status(run, timeout)) if owner.startswith(text))
    if len(matches) != 1:
        named = ", ".join(peer_id_of(owner) for owner in matches[:5]) or "none"
        raise UsageError(f"{len(matches)} peers of the run begin with {text} ({named}); give the whole key or a peer id")
    return matches[0]


def load_status(source: str, timeout: float) -> SwarmStatus:
    """The status that the coordinator wrote into a run's folder, or that a ticket's peers answer. Raises LutetiaError."""
    from lutetia.cli.commands.swarm import fetch_status, read_status
    from lutetia.coordinator.run_folder import RunFolder as Folder

    if is_remote(source):
        return fetch_status(source, timeout)
    path = Folder(Path(source)).status
    try:
        return read_status(path.read_bytes())
    except OSError as error:
        text = f"cannot read {path}: {error.strerror}; give the folder of a run that is or was served, or its ticket"
        raise ConfigError(text) from error


def _known(status: SwarmStatus) -> set[str]:
    lists = (status.nodes, status.refusals, status.quarantined, status.banned)
    return {each.owner for entries in lists for each in entries}


def _text(kind: str, owner: str, manifest: Manifest, remote: bool) -> str:
    from lutetia.protocol.schema.identity import peer_id_of

    peer = peer_id_of(owner) if owner else ""
    done = {
        "pause": "is paused. Nodes end the epoch that they train; results wait.",
        "resume": "goes on.",
        "ban": f"refuses peer {peer} from now on. What it had accepted stays.",
        "unban": f"takes peer {peer} again.",
        "hide-name": f"shows the name of peer {peer} to nobody.",
        "show-name": f"shows the name of peer {peer} again.",
    }[kind]
    when = "" if remote else " A coordinator that serves the run adopts it within seconds."
    return f"Run {manifest.name} {done} Version {manifest.version} of its manifest says so.{when}"
