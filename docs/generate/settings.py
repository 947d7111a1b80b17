"""The page of the settings models."""

from __future__ import annotations

from pydantic_settings import BaseSettings

from docs.generate.cli import find
from docs.generate.markdown import join
from docs.generate.models import Model, sections
from lutetia.cli.arguments import DocumentedCommand
from lutetia.coordinator.settings import RunSettings, ServeSettings
from lutetia.models.data.build_settings import BuildSettings
from lutetia.models.metrics.settings import EvaluateSettings
from lutetia.models.study.config import StudyConfig
from lutetia.node.settings import NodeSettings

_COMMANDS: dict[Model, str] = {
    NodeSettings: "lutetia join",
    RunSettings: "lutetia run create",
    ServeSettings: "lutetia coordinator serve",
    BuildSettings: "lutetia data build",
    EvaluateSettings: "lutetia evaluate",
    StudyConfig: "lutetia study",
}


def roots() -> list[Model]:
    return list(_COMMANDS)


def page() -> str:
    """docs/reference/settings.md."""
    listed = "\n".join(f"- [{model.__name__}](#{model.__name__.lower()}): `{command}`" for model, command in _COMMANDS.items())
    return join(
        "# Settings",
        "Each command reads a TOML file whose keys are the fields of its model; unknown keys are refused. An environment "
        "variable overrides the file, and an option of the [command line](cli.md) overrides both.",
        listed,
        *sections(roots(), "settings.md", variable),
    )


def variable(model: Model, field: str) -> str:
    """The environment variable that sets a field; empty where none does."""
    if issubclass(model, BaseSettings):
        return f"{model.model_config.get('env_prefix', '')}{field}".upper()
    if model not in _COMMANDS:
        return ""
    command = find(_COMMANDS[model])
    fields = command.fields if isinstance(command, DocumentedCommand) else {}
    option = next((each for each in command.params if fields.get(each.name or "", each.name) == field), None)
    return str(option.envvar) if option is not None and option.envvar else ""
