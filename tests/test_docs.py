"""The tables of the documentation name what there is to set, and no more."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from lutetia.coordinator.settings import RunSettings
from lutetia.models.data.build import BuildSettings
from lutetia.node.settings import NodeSettings
from lutetia.system import errors

DOCS = Path(__file__).parents[1] / "docs"


def rows(text: str) -> set[str]:
    """The names in the first column of the tables in `text`."""
    cells = re.findall(r"^\| (`[^|]+`) \|", text, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def section(page: str, heading: str) -> str:
    return (DOCS / page).read_text().partition(f"## {heading}")[2].partition("\n## ")[0]


@pytest.mark.parametrize(
    ("settings", "text"),
    [(NodeSettings, (DOCS / "volunteer.md").read_text()), (BuildSettings, section("runs.md", "2. Shards"))],
)
def test_every_setting_has_its_row(settings: type[BaseModel], text: str) -> None:
    assert rows(text) == set(settings.model_fields)


def test_every_setting_of_a_run_is_named() -> None:
    named = set(re.findall(r"[`\[\"]([a-z_]+)", section("runs.md", "3. A run")))
    assert set(RunSettings.model_fields) - {"experts", "warm_start"} <= named


def test_every_exit_code_is_told() -> None:
    cells = re.findall(r"^\| ([\d, ]+) \|", section("runs.md", "Exit codes"), re.MULTILINE)
    told = {int(code) for cell in cells for code in cell.split(",")}
    raised = {each.code for each in vars(errors).values() if isinstance(each, type) and issubclass(each, errors.LutetiaError)}
    assert raised | {0, 60, 130, 143} == told
