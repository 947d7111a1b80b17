"""The page of the command line: every command with its arguments, options, defaults and environment variables."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from docs.generate.markdown import code, escaped, join, table
from lutetia.cli.arguments import DocumentedCommand
from lutetia.cli.main import app, exit_code_rows
from lutetia.cli.variables import GENERAL

_BOUNDS = re.compile(r"(?:[\d.]+<=?)?x(?:[<>]=?[\d.]+)|[\d.]+<=?x")


def page() -> str:
    """docs/reference/cli.md."""
    parts = [command_section(path, command) for path, command in commands(root(), "lutetia")]
    return join(
        "# Command line",
        "Every option can also be set by its environment variable; the option overrides it. Commands with `--json` print one "
        "JSON document, also for errors.",
        *parts,
        "## Exit codes",
        table(("code", "meaning"), ((code(number), meaning) for number, meaning in exit_code_rows())),
        "## Environment variables",
        "Besides those of the options above:",
        table(("variable", "meaning"), ((code(name), text) for name, text in GENERAL.items())),
    )


@cache
def root() -> Any:
    """The whole command line, as typer has built it."""
    return typer.main.get_command(app)


def commands(command: Any, path: str) -> Iterator[tuple[str, TyperCommand | TyperGroup]]:
    """All commands and groups below `command`, with the words that call them."""
    yield path, command
    if isinstance(command, TyperGroup):
        for name, below in command.commands.items():
            yield from commands(below, f"{path} {name}")


def find(path: str) -> TyperCommand:
    """The command that the words of `path` call."""
    return next(command for words, command in commands(root(), "lutetia") if words == path)  # type: ignore[return-value]


def command_section(path: str, command: TyperCommand | TyperGroup) -> str:
    """Heading, help text, usage and parameters of one command."""
    if isinstance(command, DocumentedCommand):
        command.describe_options()
    context = typer.Context(command, info_name=path)
    usage = f"```text\n{path} {' '.join(command.collect_usage_pieces(context))}\n```"
    parameters = [option for option in command.params if not getattr(option, "hidden", False)]
    arguments = [_argument(each, context) for each in parameters if isinstance(each, TyperArgument)]
    options = [_option(each, context) for each in parameters if isinstance(each, TyperOption) and each.name != "help"]
    return join(
        f"## {path}",
        usage,
        _paragraphs(command.help or ""),
        table(("argument", "environment variable", "meaning"), arguments),
        table(("option", "type", "default", "environment variable", "meaning"), options),
    )


def _paragraphs(text: str) -> str:
    return escaped(inspect.cleandoc(text))


def _argument(argument: TyperArgument, context: typer.Context) -> tuple[str, ...]:
    name = (argument.metavar or argument.name or "").strip("[]")
    return code(name), _variable(argument), argument.help or ""


def _option(option: TyperOption, context: typer.Context) -> tuple[str, ...]:
    names = ", ".join(map(code, (*option.opts, *option.secondary_opts)))
    kind = "" if option.is_flag else option.display_type(context).strip("<>").removesuffix(" range")
    if bounds := _BOUNDS.search((option.get_help_record(context) or ("", ""))[1]):
        kind += f", {bounds[0]}"
    return names, kind, _default(option), _variable(option), option.help or ""


def _variable(parameter: TyperArgument | TyperOption) -> str:
    names = [parameter.envvar] if isinstance(parameter.envvar, str) else parameter.envvar or []
    return ", ".join(map(code, names))


def _default(option: TyperOption) -> str:
    if option.default is None or callable(option.default):
        return ""
    if option.is_flag:
        return "on" if option.default else "off"
    return code(option.default)
