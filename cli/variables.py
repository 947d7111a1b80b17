"""The environment variables that Lutetia reads, and a warning about those that it does not know."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

import typer
from typer.core import TyperGroup

from lutetia.cli.output import say
from lutetia.system.log_format import LEVELS

PREFIX = "LUTETIA_"
GENERAL = {
    "LUTETIA_HOME": "Folder of everything that Lutetia keeps. Default: the XDG folders of the user.",
    "LUTETIA_CACHE": "Folder of caches that can be made again. Default: `cache` in `LUTETIA_HOME`, else the user's cache folder.",
    "LUTETIA_ASSETS": "Folder of weights for the metrics of `lutetia evaluate`.",
    "LUTETIA_JSON": "`1` prints JSON, as `--json` does.",
    "LUTETIA_LOG": "`debug`, `info` or `warning`: what `lutetia join` and `lutetia coordinator serve` log. Default: `info`.",
    "LUTETIA_DEBUG": "Set to anything: print the traceback of an error.",
    "NO_COLOR": "Set to anything: print no colours.",
}
"""Variables besides those of options and of the node's settings, with their meaning."""
_INTERNAL = {"LUTETIA_PARENT", "LUTETIA_TEMPLATE", "LUTETIA_WORKER_NICE", "LUTETIA_DATA", "LUTETIA_FAULTS"}
"""Read by processes that Lutetia starts, by docker/compose.yaml and by the tests of faults."""


def warn_of_unknown(app: typer.Typer, environment: Mapping[str, str]) -> None:
    """Name on stderr each variable of `environment` that begins like ours and that nothing reads, and a level that is none."""
    level = environment.get("LUTETIA_LOG", "info")
    if level.lower() not in LEVELS:
        say(f"lutetia: LUTETIA_LOG={level!r} is none of {', '.join(LEVELS)}; info is used")
    ours = {name for name in environment if name.startswith(PREFIX)} - GENERAL.keys() - _INTERNAL
    if not ours:  # the usual case; the rest takes a while
        return
    known = {*GENERAL, *_of_options(typer.main.get_command(app))}
    if ours - known:
        from lutetia.node.settings import NodeSettings

        known |= {f"{PREFIX}{field.upper()}" for field in NodeSettings.model_fields}
    for sentence in unknown_variables(ours, known):
        say(f"lutetia: {sentence}")


def unknown_variables(given: Collection[str], known: Collection[str]) -> list[str]:
    """A sentence for each of `given` that is not `known`, with the nearest known one."""
    sentences = []
    for name in sorted(set(given) - set(known)):
        near = get_close_matches(name, known, 1, 0.75)
        hint = f"did you mean {near[0]}?" if near else "docs/reference/cli.md lists all variables"
        sentences.append(f"the variable {name} is unknown and has no effect; {hint}")
    return sentences


def _of_options(command: Any) -> Iterator[str]:
    """The variables of all options and arguments of `command` and of the commands below it."""
    for option in command.params:
        variable = option.envvar
        yield from [variable] if isinstance(variable, str) else variable or ()
    if isinstance(command, TyperGroup):
        for below in command.commands.values():
            yield from _of_options(below)
