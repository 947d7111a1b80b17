"""`python -m benchmarks gpu`: everything that only an accelerator can tell, in under ten minutes.

Each part runs in a process of its own with a time limit, and its figures are written as they come: a part that fails or is cut
off leaves what it has, and the others go on. The table is printed at the end and lies beside the JSON in the output folder.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.gpu import kernels, numbers, sizes, speed, study, worker
from benchmarks.gpu.packages import wheels
from benchmarks.gpu.site import Figure, Site, first_line, processes, read_figures
from benchmarks.report import Machine
from lutetia.node.trainer.devices import Accelerators, choose_device

LINES, REPORT, TABLE = "gpu.jsonl", "gpu.json", "gpu.md"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
"""Between them a page of results has the table; what a person wrote about it stays."""
GRACE = 5.0


@dataclass(frozen=True)
class Part:
    """A part, and the seconds after which it is ended."""

    run: Callable[[Site], None]
    seconds: float

    @property
    def name(self) -> str:
        return self.run.__name__.replace("_", "-")

    @property
    def what(self) -> str:
        return (self.run.__doc__ or "").splitlines()[0]


PARTS = (
    Part(numbers.device, 40),
    Part(numbers.resume, 40),
    Part(numbers.audits, 90),
    Part(numbers.tolerances, 90),
    Part(worker.audited_worker, 90),
    Part(speed.throughput, 90),
    Part(speed.batches_ahead, 40),
    Part(kernels.kernels, 120),
    Part(sizes.memory, 90),
    Part(sizes.small_cards, 120),
    Part(sizes.sampling, 100),
    Part(study.study, 300),
)
"""In the order of what is known least, so that a run that is cut off has told most."""


@dataclass(frozen=True)
class Outcome:
    """How a part ended: `done`, `failed`, `cut off` or `not begun`."""

    name: str
    state: str
    seconds: float


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__, epilog=catalogue(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, mps, cuda:N or xpu:N (default: auto)")
    parser.add_argument("--small", action="store_true", help="sizes that a CPU manages in seconds, to try the benchmark itself")
    parser.add_argument("--only", default="", metavar="PART,…", help="parts to run (default: all)")
    parser.add_argument("--seconds", type=float, default=540.0, help="time limit of all parts together (default: 540)")
    parser.add_argument("--patience", type=float, default=1.0, help="multiplies the limits of the parts, for slow machines")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of the results (default: build/gpu)")
    parser.add_argument("--page", type=Path, metavar="FILE.md", help="page of results whose table is replaced, and FILE.json")
    parser.add_argument("--wheels", action="store_true", help="only print the packages that a machine with torch needs besides")
    given = parser.parse_args(arguments)
    if given.wheels:
        print("\n".join(wheels()))
        return
    names = [name for name in given.only.split(",") if name]
    if unknown := set(names) - {part.name for part in PARTS}:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are: {', '.join(part.name for part in PARTS)}")
    parts = [replace(part, seconds=part.seconds * given.patience) for part in PARTS if not names or part.name in names]
    if given.page:
        on_page(given.page, "")  # a page that cannot be written is found before the hour that the parts take
    run(parts, given.device, given.small, given.seconds, given.out)
    if given.page:
        given.page.write_text(on_page(given.page, (given.out / TABLE).read_text()))
        given.page.with_suffix(".json").write_text((given.out / REPORT).read_text())


def on_page(page: Path, table: str) -> str:
    """The text of the page with `table` in the place of its figures. Ends the program where it has no such place."""
    text = page.read_text() if page.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{page} has no lines {BEGIN} and {END}; write them where the table belongs")
    return f"{before}{BEGIN}\n\n{table.strip()}\n\n{END}{after}"


def catalogue() -> str:
    """The parts with their time limits."""
    return "\n".join(["parts, with their limits:", *(f"  {p.name:<16} {p.seconds:3.0f} s  {p.what}" for p in PARTS)])


def run(parts: Sequence[Part], device: str, small: bool, seconds: float, out: Path) -> list[Outcome]:
    """Run the parts in turn, print the table, and write it and the JSON to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / LINES).unlink(missing_ok=True)
    began, outcomes = time.monotonic(), []
    for part in parts:
        left = seconds - (time.monotonic() - began)
        if left < min(10.0, part.seconds):
            outcomes.append(Outcome(part.name, "not begun", 0.0))
            continue
        print(f"{part.name}: {part.what}", file=sys.stderr, flush=True)
        outcomes.append(run_part(part, device, small, min(part.seconds, left), out / LINES))
        write_report(out, device, outcomes)
    print(write_report(out, device, outcomes))
    return outcomes


def run_part(part: Part, device: str, small: bool, limit: float, lines: Path) -> Outcome:
    """Run one part in a process of its own, and end it and its children at the limit."""
    began = time.monotonic()
    child = processes(device).Process(target=_in_child, args=(part, device, small, limit, lines))  # type: ignore[attr-defined]
    child.start()
    child.join(limit)
    state = "done" if child.exitcode == 0 else "failed"
    if child.exitcode is None:
        state = "cut off"
        _end(child.pid or 0, signal.SIGTERM)
        child.join(GRACE)
    _end(child.pid or 0, signal.SIGKILL)
    child.join()
    return Outcome(part.name, state, round(time.monotonic() - began, 1))


def _in_child(part: Part, device: str, small: bool, limit: float, lines: Path) -> None:
    os.setsid()  # its own group, so that its children end with it
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        chosen, _ = choose_device(device, Accelerators.seen())
        site = Site(part.name, chosen, small, Path(folder), lines, limit)
        if chosen == "cpu":
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        try:
            part.run(site)
        except Exception as error:  # noqa: BLE001 - drivers raise errors of many types, and each must end only its own part
            traceback.print_exc()
            site.put("failed", first_line(error))
            sys.exit(1)


def _end(group: int, how: signal.Signals) -> None:
    try:
        os.killpg(group, how)
    except (ProcessLookupError, PermissionError):
        return


def write_report(out: Path, device: str, outcomes: Sequence[Outcome]) -> str:
    """Write JSON and table of all that is known by now. Returns the table."""
    figures = read_figures(out / LINES)
    document = {
        "machine": asdict(Machine.this()), "device": device, "torch": torch.__version__,
        "parts": [asdict(outcome) for outcome in outcomes], "figures": [asdict(figure) for figure in figures],
    }  # fmt: skip
    (out / REPORT).write_text(json.dumps(document, indent=1) + "\n")
    table = markdown(figures, outcomes)
    (out / TABLE).write_text(table)
    return table


def markdown(figures: Sequence[Figure], outcomes: Sequence[Outcome]) -> str:
    """One table of all figures, and a line about each part."""
    lines = [f"{Machine.this()}, torch {torch.__version__}", "", "| part | what | value | detail |", "|---|---|---|---|"]
    for figure in figures:
        value = f"{figure.value:.4g}" if isinstance(figure.value, float) else str(figure.value)
        lines.append(f"| {figure.part} | {figure.what} | {value} {figure.unit} | {figure.detail} |".replace("  |", " |"))
    lines += ["", *(f"- {each.name}: {each.state} after {each.seconds:g} s" for each in outcomes), ""]
    return "\n".join(lines)
