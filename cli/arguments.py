"""Arguments that several commands share, and how they are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from lutetia.system.errors import ConfigError

if TYPE_CHECKING:
    pass

if TYPE_CHECKING:
    from pydantic import BaseModel

    from lutetia.protocol.schema.ticket import Ticket


def setting(variable: str, help: str, *names: str, **limits: Any) -> Any:
    """An option that the environment variable LUTETIA_`variable` sets too."""
    return typer.Option(*names, envvar=f"LUTETIA_{variable}", help=help, **limits)


TicketArgument = Annotated[
    str,
    typer.Argument(envvar="LUTETIA_TICKET", help="The ticket, or a file that holds it.", metavar="TICKET"),
]
RunFolder = Annotated[
    Path, typer.Argument(envvar="LUTETIA_RUN_FOLDER", help="The run's folder, made by `lutetia run create`.", metavar="RUN")
]


def _state_folder(value: Path | None) -> Path | None:
    """No shell expands `~` in systemd's EnvironmentFile or in `--state-folder=~/box`."""
    from lutetia.system.paths import expanded

    return value and expanded(value)


StateFolder = Annotated[
    Path | None,
    setting(
        "STATE_FOLDER", "Where this box keeps identity, socket and checkpoints.", "--state-folder", callback=_state_folder,
        readable=False,  # where it may not be read, each command says better what that means
    ),
]  # fmt: skip

Model = TypeVar("Model", bound="BaseModel")


def read_ticket(text: str) -> Ticket:
    """The ticket itself, or the one in the file that `text` names. Raises ConfigError."""
    from lutetia.protocol.schema.ticket import PREFIX, Ticket

    if not text.startswith(PREFIX) and (os.sep in text or _is_file(text)):
        try:
            text = Path(text).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read a ticket from {text}: {error}; give the ticket itself or its file") from error
    return Ticket.decode(text)


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # longer than any file name: a mistyped ticket
        return False


def read_config(path: Path | None) -> dict[str, Any]:
    """The tables of a TOML file; nothing for None. Raises ConfigError."""
    from lutetia.system.files import read_toml

    return {} if path is None else read_toml(path)


def require_device(device: str) -> None:
    """Raises HardwareError unless this box has `device` (cpu, mps, cuda or cuda:N): before a driver's own words are met."""
    from lutetia.node.trainer.devices import Accelerators, choose_device

    choose_device(device, Accelerators.seen())


def given(**options: Any) -> dict[str, Any]:
    """The options that the user gave: those that are not None."""
    return {name: value for name, value in options.items() if value is not None and value != []}


def settings_of(model: type[Model], source: str, values: dict[str, Any]) -> Model:
    """`model` from `values`. Raises ConfigError naming the unknown or wrong key and `source`."""
    from pydantic import ValidationError

    from lutetia.protocol.schema.manifest import first_problem

    try:
        return model(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        known = ", ".join(sorted(model.model_fields))
        hint = f"; known keys: {known}" if problem["type"] == "extra_forbidden" else "; correct it"
        raise ConfigError(f"{source}: {first_problem(error)}{hint}") from error


KEY_NAME = "identity.key"


def key_path(state_folder: Path | None) -> Path:
    from lutetia.system.paths import default_state_folder

    return (state_folder or default_state_folder()) / KEY_NAME
