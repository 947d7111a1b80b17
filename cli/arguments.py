"""Arguments and options that several commands share, and functions that read them."""

from __future__ import annotations

import codecs
import importlib
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperOption

from lutetia.system.errors import ConfigError, disk_reason

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

    from lutetia.protocol.schema.ticket import Ticket


def setting(variable: str, help: str = "", *names: str, **limits: Any) -> Any:
    """An option that the environment variable LUTETIA_`variable` sets too.

    Without `help`, its command must take the text from a settings model: see `documented_by`. Numbers must be finite.
    """
    return typer.Option(*names, envvar=f"LUTETIA_{variable}", help=help, **{"callback": _finite, **limits})


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number; give one")
    return value


class DocumentedCommand(TyperCommand):
    """A command whose options take their help texts from the fields of settings models, see `documented_by`."""

    models: tuple[str, ...] = ()
    fields: dict[str, str] = {}

    def describe_options(self) -> None:
        """Fill in the help texts. This imports the models, so it is done only for a command's own help page."""
        described: dict[str, FieldInfo] = {}
        for model in reversed(self.models):
            module, _, name = model.partition(":")
            described |= getattr(importlib.import_module(module), name).model_fields
        for option in self.params:
            field = described.get(self.fields.get(option.name or "", option.name))
            if isinstance(option, TyperOption) and field is not None and field.description:
                option.help = _sentence(field.description, str(field.annotation))

    def get_help(self, ctx: typer.Context) -> str:
        self.describe_options()
        return super().get_help(ctx)


def _sentence(description: str, values: str) -> str:
    """With a full stop, and a capital letter unless it begins with one of the field's literal values, or as `host:port` does."""
    first = description.split()[0].rstrip(":,")
    begin = description[0] if f"'{first}'" in values or ":" in first else description[0].upper()
    return f"{begin}{description[1:].rstrip('.')}."


def documented_by(*models: str, **fields: str) -> type[DocumentedCommand]:
    """The class of a command whose options set settings models: pass it as `app.command(cls=…)`.

    An option takes its help from the field of the same name in the first model that has it; one that is no field keeps its own
    text.

    Args:
        models: `module:Class` of each settings model.
        fields: option → field, where their names differ.
    """
    return type("DocumentedCommand", (DocumentedCommand,), {"models": models, "fields": fields})


TicketArgument = Annotated[
    str,
    typer.Argument(envvar="LUTETIA_TICKET", help="The ticket, or a file that holds it.", metavar="TICKET"),
]
RunFolder = Annotated[
    Path, typer.Argument(envvar="LUTETIA_RUN_FOLDER", help="The run's folder, made by `lutetia run create`.", metavar="RUN")
]


def _state_folder(value: Path | None) -> Path | None:
    """Expand `~` here: no shell does it in systemd's EnvironmentFile or in `--state-folder=~/node`."""
    from lutetia.system.paths import expanded

    return value and expanded(value)


StateFolder = Annotated[
    Path | None,
    setting(
        "STATE_FOLDER", "Folder of this node's identity, socket and checkpoints.", "--state-folder", callback=_state_folder,
        readable=False,  # each command reports an unreadable folder in its own words
    ),
]  # fmt: skip

Model = TypeVar("Model", bound="BaseModel")


def read_ticket(text: str) -> Ticket:
    """Read a ticket: `text` is the ticket as it was pasted, or the name of a file that holds it. Raises ConfigError."""
    from lutetia.protocol.schema.ticket import Ticket

    if not is_ticket(text) and (os.sep in text or _is_file(text)):
        text = _file_text(Path(text))
    return Ticket.decode(text)


def is_ticket(text: str) -> bool:
    """Whether `text` is a pasted ticket, and not the name of a file. Whether it is whole is not checked."""
    from lutetia.protocol.schema.ticket import PREFIX, pasted

    return pasted(text).startswith(PREFIX) and not _is_file(text)


def _file_text(path: Path) -> str:
    """The text of a ticket's file, in UTF-8 or, as PowerShell writes, UTF-16."""
    from lutetia.protocol.schema.ticket import MAX_TICKET_CHARACTERS

    try:
        with path.open("rb") as file:
            data = file.read(8 * MAX_TICKET_CHARACTERS)
        return data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8")
    except OSError as error:
        reason = disk_reason(error)
    except UnicodeDecodeError:
        reason = "it is no text"
    raise ConfigError(f"cannot read a ticket from {path}: {reason}; give the ticket itself or its file")


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # longer than a file name may be, or with a zero byte: a mistyped ticket
        return False


COMMAND_TABLES = ("data", "run", "serve")
"""Tables of a file that `lutetia init` wrote: the settings of `data build`, `run create` and `coordinator serve`."""


def read_config(path: Path | None, table: str | None = None) -> dict[str, Any]:
    """Read a TOML file; nothing where `path` is None. Raises ConfigError.

    Args:
        path: the file.
        table: the settings of this command, where the file holds those of several, see COMMAND_TABLES.
    """
    from lutetia.system.files import read_toml

    values = {} if path is None else read_toml(path)
    if table is None or not any(isinstance(values.get(name), dict) for name in COMMAND_TABLES):
        return values
    if others := sorted(set(values) - set(COMMAND_TABLES)):
        raise ConfigError(f"{path} has tables of several commands and {others[0]} outside of them; move it into [{table}]")
    return values.get(table, {})


def same_config(path: Path | None, table: str) -> str:
    """` --config FILE` to put behind the next command, where this one's file has its settings in `table` too; else empty."""
    import shlex

    shared = path is not None and isinstance(read_config(path).get(table), dict)
    return f" --config {shlex.quote(str(path))}" if shared else ""


def require_device(device: str) -> None:
    """Raise HardwareError unless this machine has `device` (cpu, mps, cuda, cuda:N, xpu or xpu:N), before its driver fails."""
    from lutetia.node.trainer.devices import Accelerators, choose_device

    choose_device(device, Accelerators.seen())


def given(**options: Any) -> dict[str, Any]:
    """The options that the user set: those that are neither None nor an empty list."""
    return {name: value for name, value in options.items() if value is not None and value != []}


def settings_of(model: type[Model], source: str, values: dict[str, Any]) -> Model:
    """Make a `model` of `values`. Raises ConfigError that names `source` and the unknown or wrong key."""
    from pydantic import ValidationError

    from lutetia.protocol.schema.problems import describe_problem, unknown_key

    if unknown := unknown_key(values, model):
        raise ConfigError(f"{source}: {unknown}; known keys: {', '.join(sorted(model.model_fields))}")
    try:
        return model(**values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {describe_problem(error, model)}; correct it") from error


KEY_NAME = "identity.key"


def key_path(state_folder: Path | None) -> Path:
    """The identity's file in `state_folder`, or in the default one."""
    from lutetia.system.paths import default_state_folder

    return (state_folder or default_state_folder()) / KEY_NAME
