"""`lutetia identity show|export|import`: this node's key."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lutetia.cli.arguments import StateFolder, key_path
from lutetia.cli.output import JsonFlag, emit
from lutetia.system.errors import IdentityError

if TYPE_CHECKING:
    from lutetia.protocol.schema.identity import Identity

app = typer.Typer(help="Show, export or import this node's key.", no_args_is_help=True)


def load_own(path: Path) -> Identity:
    """Load this node's identity. Raises IdentityError where it has none yet or the file cannot be used."""
    from lutetia.protocol.schema.identity import Identity

    if not path.exists():
        raise IdentityError(
            f"this node has no identity yet ({path} is missing); `lutetia join` makes one, `lutetia identity import` restores one"
        )
    return Identity.load(path)


@app.command("show")
def show(state_folder: StateFolder = None, as_json: JsonFlag = False) -> None:
    """Show the public key, the peer id and the file of the secret key."""
    path = key_path(state_folder)
    identity = load_own(path)
    document = {"public_key": identity.public_key, "peer_id": identity.peer_id, "key_file": str(path)}
    emit(document, as_json, lambda: "\n".join(f"{key.replace('_', ' '):<12}{value}" for key, value in document.items()))


@app.command("export")
def export(
    target: Annotated[Path, typer.Argument(help="File to write the secret key to; keep it off this machine.", metavar="FILE")],
    state_folder: StateFolder = None,
    as_json: JsonFlag = False,
) -> None:
    """Copy the secret key into a file that only you can read."""
    if target.exists():
        raise IdentityError(f"{target} exists; choose another file, keys are never overwritten")
    identity = load_own(key_path(state_folder))
    identity.save(target)
    document = {"public_key": identity.public_key, "file": str(target)}
    emit(
        document,
        as_json,
        lambda: f"wrote the secret key of {identity.public_key[:16]}… to {target}; anybody who has it can act as this node",
    )


@app.command("import")
def import_key(
    source: Annotated[Path, typer.Argument(help="File that `lutetia identity export` wrote.", metavar="FILE")],
    state_folder: StateFolder = None,
    as_json: JsonFlag = False,
) -> None:
    """Give this node the key in the file."""
    from lutetia.protocol.schema.identity import Identity

    if not source.exists():
        raise IdentityError(f"there is no file {source}; name the one that `lutetia identity export` wrote")
    identity, path = Identity.load(source), key_path(state_folder)
    if path.exists() and Identity.load(path) != identity:
        raise IdentityError(f"this node already has another identity in {path}; move that file away first")
    identity.save(path)
    document = {"public_key": identity.public_key, "key_file": str(path)}
    emit(document, as_json, lambda: f"this node is now {identity.public_key[:16]}… ({path})")
