"""`lutetia identity show|export|import`: the key of this box."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lutetia.cli.arguments import StateFolder, key_path
from lutetia.cli.output import JsonFlag, emit
from lutetia.system.errors import IdentityError

if TYPE_CHECKING:
    from lutetia.protocol.schema.identity import Identity

app = typer.Typer(help="Show, export or import the key of this box.", no_args_is_help=True)


def load_own(path: Path) -> Identity:
    """The identity of this box. Raises IdentityError where it has none yet, or the file cannot be used."""
    from lutetia.protocol.schema.identity import Identity

    if not path.exists():
        raise IdentityError(
            f"this box has no identity yet ({path} is missing); `lutetia join` makes one, `lutetia identity import` restores one"
        )
    return Identity.load(path)


@app.command("show")
def show(state_folder: StateFolder = None, as_json: JsonFlag = False) -> None:
    """Show public key and peer id, and where the secret key lies."""
    path = key_path(state_folder)
    identity = load_own(path)
    document = {"public_key": identity.public_key, "peer_id": identity.peer_id, "key_file": str(path)}
    emit(document, as_json, lambda: "\n".join(f"{key.replace('_', ' '):<12}{value}" for key, value in document.items()))


@app.command("export")
def export(
    target: Annotated[Path, typer.Argument(help="File to write the secret key to; keep it off this box.", metavar="FILE")],
    state_folder: StateFolder = None,
    as_json: JsonFlag = False,
) -> None:
    """Copy the secret key into a file only you can read."""
    if target.exists():
        raise IdentityError(f"{target} exists; choose another file, keys are never overwritten")
    identity = load_own(key_path(state_folder))
    identity.save(target)
    document = {"public_key": identity.public_key, "file": str(target)}
    emit(
        document, as_json, lambda: f"wrote the secret key of {identity.public_key[:16]}… to {target}; whoever has it is this box"
    )


@app.command("import")
def import_key(
    source: Annotated[Path, typer.Argument(help="File that `identity export` wrote.", metavar="FILE")],
    state_folder: StateFolder = None,
    as_json: JsonFlag = False,
) -> None:
    """Make this box the one whose key is in the file."""
    from lutetia.protocol.schema.identity import Identity

    if not source.exists():
        raise IdentityError(f"there is no file {source}; name the one that `lutetia identity export` wrote")
    identity, path = Identity.load(source), key_path(state_folder)
    if path.exists() and Identity.load(path) != identity:
        raise IdentityError(f"this box already has another identity in {path}; move it away first if you mean it")
    identity.save(path)
    document = {"public_key": identity.public_key, "key_file": str(path)}
    emit(document, as_json, lambda: f"this box is now {identity.public_key[:16]}… ({path})")
