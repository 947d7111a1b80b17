"""The guides, README and CONTRIBUTING say the defaults, lists and figures of the code."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import BaseModel

from docs.generate.cli import commands, root
from lutetia.cli.commands.study import load_study
from lutetia.coordinator.settings import AdapterSettings
from lutetia.models.experts.classes.registry import FAMILIES
from lutetia.models.sources.conventions import CONVENTIONS
from lutetia.models.study.plan import plan_study, planned_latent
from lutetia.node.machine.state import NodeRules
from lutetia.node.runtime.replication import _FREE_SHARE
from lutetia.node.settings import NodeSettings
from lutetia.node.trainer.__main__ import NICENESS
from tests.docs.test_figures import counted
from tests.test_docs import DOCS, ROOT
from tests.test_walls import IMPURE, MAY_IMPORT, MOST_FILES

VOLUNTEER = (DOCS / "guide" / "volunteer.md").read_text()
PIPELINES = (DOCS / "guide" / "pipelines.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
IN_WORDS = {
    "ticket": "", "announce": "", "operator": "", "name": "", "micro_batch": "probed",
    "threads": "torch's choice; several devices share the cores", "memory_limit": "all that is free",
    "hours": "always",
    "max_temp": "none", "base": "the hub's cache, or from the swarm", "disk_limit": "none", "upload_rate": "none",
    "bytes_per_day": "none", "bytes_per_month": "none",
    "losses": "none", "local_bytes_per_day": "300 GB",
}  # fmt: skip
"""Defaults that the table says in words."""


def cells(text: str) -> dict[str, list[str]]:
    """The rows of tables by the names in their first column: the other cells without backquotes."""
    found = {}
    for line in re.findall(r"^\| `.*\|$", text, re.MULTILINE):
        first, *others = (cell.strip() for cell in line.strip("|").split("|"))
        for name in re.findall(r"`(\w+)`", first):
            found[name] = [other.replace("`", "") for other in others]
    return found


def default(model: type[BaseModel], name: str) -> Any:
    return model.model_fields[name].get_default(call_default_factory=True)


@pytest.mark.parametrize("name", NodeSettings.model_fields)
def test_default_of_a_node_setting_is_as_the_guide_says(name: str) -> None:
    said, value = cells(VOLUNTEER)[name][1], default(NodeSettings, name) if name != "ticket" else None
    if name == "state_folder":
        assert said == "~/.local/state/lutetia"
    elif name in IN_WORDS:
        assert said == IN_WORDS[name]
        assert value in (None, (), 300 * 10**9) or name == "ticket"
    elif isinstance(value, bool | str):
        assert said == str(value).lower()
    else:
        assert float(said) == value


def test_flags_of_the_guide_are_those_of_join() -> None:
    options = {
        option for each in dict(commands(root(), "lutetia"))["lutetia join"].params for option in each.opts if "-" in option
    }
    said = {name: row[0] for name, row in cells(VOLUNTEER).items()}
    assert {flag for flag in said.values() if flag.startswith("--")} == options - {"--config", "--help"}
    assert all(flag in ("", "argument", f"--{name.replace('_', '-')}") for name, flag in said.items())


@pytest.mark.parametrize(
    "figure",
    [
        f"Training runs at niceness {NICENESS},",
        f"half of the free disk holds, at most {NodeRules.max_ahead};",
        f"{counted(NodeRules.max_pending)} results may wait for their verdicts",
        f"copies leave {100 * _FREE_SHARE:.0f} % of the disk free",
    ],
)
def test_figures_of_the_volunteers_guide(figure: str) -> None:
    assert figure in VOLUNTEER


def test_defaults_of_adapters_are_as_the_guide_says() -> None:
    text = (DOCS / "guide" / "adapters.md").read_text()
    rows = cells(text)
    assert set(rows) == set(AdapterSettings.model_fields)
    assert rows["rank"][0] == f"{default(AdapterSettings, 'rank')}, {default(AdapterSettings, 'alpha')}"
    assert rows["targets"][0] == ", ".join(default(AdapterSettings, "targets"))
    assert rows["dtype"][0] == f'"{default(AdapterSettings, "dtype")}"'
    assert [rows[name][0] for name in ("dora", "serve")] == [
        str(default(AdapterSettings, name)).lower() for name in ("dora", "serve")
    ]


def test_pipelines_and_classes_of_the_guide_are_those_of_the_code() -> None:
    assert set(re.findall(r"^\| `(\w+Pipeline)` \|", PIPELINES, re.MULTILINE)) == set(CONVENTIONS)
    kinds = {name.removesuffix("Pipeline").removesuffix("Video").removesuffix("ImageTo").lower() for name in CONVENTIONS}
    others = {name for name in FAMILIES if not any(name.lower().startswith(kind) for kind in kinds)}
    assert set(re.findall(r"`(\w+Transformer3DModel)`", PIPELINES)) == others
    assert len(FAMILIES) == len(kinds) + len(others)


def test_contributing_has_the_walls() -> None:
    table = {
        name: set(re.findall(r"`(\w+)`", row[-1])) or {row[-1]} for name, row in _rooms(CONTRIBUTING).items()
    }  # fmt: skip
    assert table.pop("cli") == {"all"}
    assert len(table.pop("system")) == 1
    assert table == {room: below for room, below in MAY_IMPORT.items() if room not in ("cli", "system")}
    assert f"at most {'twelve' if MOST_FILES == 12 else MOST_FILES} files in a folder" in CONTRIBUTING
    (named,) = re.findall(r"decision folders and files import no ([^;]+);", CONTRIBUTING)
    assert set(re.split(r", | or ", named)) == IMPURE


def _rooms(text: str) -> dict[str, list[str]]:
    rows = re.findall(r"^\| `(\w+)/` \| (.+) \| (.+) \|$", text, re.MULTILINE)
    return {name: [holds, imports] for name, holds, imports in rows}


def test_contributing_has_every_step_of_the_checks() -> None:
    steps = re.findall(r"^make (\w+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    said = CONTRIBUTING.partition("`.ci/run`")[2].partition("\n\n")[0]
    assert steps == re.findall(r"`make (\w+)`", said)
    numbers = re.findall(r"--numprocesses (\d)", (ROOT / "Makefile").read_text())
    assert f"all tests, {counted(int(numbers[0]))} files at a time" in CONTRIBUTING


def test_figures_of_readme_are_in_the_results() -> None:
    section = (ROOT / "README.md").read_text().partition("## Figures")[2].partition("\n## ")[0]
    results = "\n".join(
        (DOCS / "results" / name).read_text()
        for name in ("base-union/README.md", "base-drawn/README.md", "union/README.md", "study-tries.md")
    )
    figures = re.findall(r"\d+\.\d+ \[\d+\.\d+, \d+\.\d+\]", section)
    assert len(figures) >= 7
    assert not [figure for figure in figures if figure not in results]


def test_plan_of_the_miniature_is_as_the_tutorial_prints_it() -> None:
    config = load_study(DOCS / "studies" / "miniature.toml")
    plan = plan_study(config, planned_latent(config))
    printed = re.findall(
        r"^((?:base|headline|control)-\S+)\s+(.+)$", (DOCS / "tutorials" / "researcher.md").read_text(), re.MULTILINE
    )
    assert [(name, rest.split()) for name, rest in printed] == [
        (
            each.name,
            [
                str(each.experts), str(each.batch), f"{each.samples_per_shard:,}", f"{each.parameters / 1e6:.2f}", "M",
                f"{each.flops:.4g}", f"{each.router_flops / each.flops:.1%}", str(len(plan.readings_of(each))),
            ],
        )
        for each in plan.trainings
    ]  # fmt: skip
