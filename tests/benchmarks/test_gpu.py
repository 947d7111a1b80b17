"""The GPU benchmark on a CPU, small: every part gives figures; one that fails or is cut off leaves what it has."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu.main import BEGIN, END, PARTS, REPORT, TABLE, Part, main, on_page, run
from benchmarks.gpu.packages import wheels
from benchmarks.gpu.site import Site
from benchmarks.gpu.study import flops_to_reach

FIGURES = {
    "device": "matrix product",
    "resume": "five steps after a restart in float32",
    "audits": "adamw in float32, replayed on the CPU: drift",
    "tolerances": "Wan, adamw, bfloat16",
    "audited-worker": "audit of epoch 2 on the CPU",
    "throughput": "toy: trainer ÷ plain loop",
    "batches-ahead": "steps with new batches ÷ steps with one kept batch",
    "kernels": "toy: chosen",
    "memory": "toy, checkpointing: step",
    "small-cards": "this device, no limit: training",
    "sampling": "peak ÷ one expert",
    "study": "mixture: held-out loss",
}


def test_every_part_gives_figures_on_a_cpu(tmp_path: Path) -> None:
    patient = [replace(part, seconds=500) for part in PARTS]
    outcomes = run(patient, "cpu", True, 5000, tmp_path)
    report = json.loads((tmp_path / REPORT).read_text())
    assert [outcome.state for outcome in outcomes] == ["done"] * len(PARTS), report["figures"][-3:]
    found = {(figure["part"], figure["what"]): figure["value"] for figure in report["figures"]}
    assert FIGURES.keys() == {part.name for part in PARTS}
    assert FIGURES.items() <= found.keys()
    assert "failed" not in found.values()
    assert found["resume", FIGURES["resume"]] == "bit-equal"
    assert found["audits", FIGURES["audits"]] == 0
    assert found["audited-worker", FIGURES["audited-worker"]] == "valid"
    assert found["tolerances", FIGURES["tolerances"]] < 0.01
    table = (tmp_path / TABLE).read_text()
    assert all(f"| {part} | {what} |" in table for part, what in FIGURES.items())


def test_table_takes_its_place_on_a_page_of_results(tmp_path: Path) -> None:
    page = tmp_path / "speed.md"
    page.write_text(f"# Speed\n\n{BEGIN}\n\nold\n\n{END}\n\nRead with care.\n")
    assert on_page(page, "| new |\n") == f"# Speed\n\n{BEGIN}\n\n| new |\n\n{END}\n\nRead with care.\n"
    results = Path(__file__).resolve().parents[2] / "docs" / "results" / "speed-on-a-cpu.md"
    assert "| throughput |" not in on_page(results, ""), "its table is between the marks"
    page.write_text("# Speed\n")
    with pytest.raises(SystemExit, match="write them where the table belongs"):
        main(["--page", str(page), "--only", "device"])


def test_page_lists_the_parts_in_their_order_with_their_limits() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "gpu.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| (\d+) s \|", page, re.MULTILINE)
    assert rows == [(part.name, f"{part.seconds:.0f}") for part in PARTS]


def hangs(site: Site) -> None:
    """A part that never ends."""
    site.put("before", 1.0, "s")
    signal.pause()


def breaks(site: Site) -> None:
    """A part that a driver ends."""
    site.put("before", 2.0, "s")
    raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")


def counts(site: Site) -> None:
    """A part that works."""
    site.put("after", 3.0, "s")


def test_failed_and_endless_parts_leave_their_figures_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = run([Part(hangs, 1.5), Part(breaks, 30), Part(counts, 30)], "cpu", True, 100, tmp_path)
    assert [outcome.state for outcome in outcomes] == ["cut off", "failed", "done"]
    table = capsys.readouterr().out
    for line in (
        "| hangs | before | 1 s | |",
        "| breaks | before | 2 s | |",
        "| breaks | failed | RuntimeError: CUDA error: an illegal memory access was encountered | |",
        "| counts | after | 3 s | |",
        "- hangs: cut off after",
    ):
        assert line in table


def test_part_without_time_is_not_begun(tmp_path: Path) -> None:
    assert [outcome.state for outcome in run([Part(counts, 30)], "cpu", True, 5, tmp_path)] == ["not begun"]


def test_unknown_part_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "speed"])
    assert "there is no part speed; there are: device, resume" in capsys.readouterr().err


def test_flops_to_reach_a_loss_are_read_between_checkpoints() -> None:
    curve = [(1e12, 1.0), (1e13, 0.5), (1e14, 0.25)]
    assert flops_to_reach(curve, 0.5) == pytest.approx(1e13)
    assert flops_to_reach(curve, 0.75) == pytest.approx(10**12.5)
    assert flops_to_reach(curve, 0.2) is None
    assert flops_to_reach(curve, 2.0) == 1e12


def test_wheels_to_carry_leave_torch_and_the_network_out() -> None:
    names = {line.partition("==")[0] for line in wheels()}
    assert {"diffusers", "transformers", "pydantic", "scikit-image"} <= names
    assert not names & {"torch", "numpy", "sympy", "hivemind", "av", "libp2p"}
