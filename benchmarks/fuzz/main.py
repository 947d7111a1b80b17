"""`python -m benchmarks fuzz [--target NAME …] [--minutes M] [--json]`: coverage-guided fuzzing (atheris) of every parser.

Each target runs in a process of its own, one after another, from a corpus of real documents. Corpora and findings are kept in
--folder, and the next run starts from them. The table is for docs/results/fuzzing.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.fuzz.targets import NAMES, target
from benchmarks.report import Machine

_STATUS = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)/(\d+)(\w*)")
_DONE = re.compile(r"Done (\d+) (?:runs )?in (\d+) second")
_UNITS = {"": 1, "b": 1, "Kb": 1 << 10, "Mb": 1 << 20}
_GRACE = 900.0  # on a busy machine a fuzzer gets little processor time
MEMORY_MIB = 2048
INPUT_SECONDS = 300  # wall time; the child reports inputs that take more than a second of processor time


@dataclass(frozen=True)
class Summary:
    """One target's run. `edges` and `features` are libFuzzer's; `findings` are kinds of violations of the contract.

    `seconds` are wall time, `processor` are seconds of processor time.
    """

    target: str
    executions: int
    seconds: int
    processor: int
    edges: int
    features: int
    corpus_files: int
    corpus_bytes: int
    findings: tuple[str, ...]
    note: str = ""


def fuzz(name: str, seconds: float, folder: Path) -> Summary:
    """Fuzz one target for `seconds`."""
    corpus, findings = folder / name / "corpus", folder / name / "findings"
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in target(name).seeds():
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    arguments = [
        str(corpus), f"-max_total_time={seconds:.0f}", f"-rss_limit_mb={MEMORY_MIB}", f"-timeout={INPUT_SECONDS}",
        "-print_final_stats=1", "-verbosity=1", f"-artifact_prefix={folder / name}/", f"-max_len={target(name).most_bytes}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.fuzz.process", name, str(findings), *arguments]
    log = folder / name / "log.txt"
    with log.open("w") as out:
        before = _children_seconds()
        code = subprocess.run(
            command, stdout=out, stderr=subprocess.STDOUT, timeout=seconds + _GRACE, env={**os.environ, "OMP_NUM_THREADS": "1"}
        ).returncode
    return summary(name, log.read_text(errors="replace"), findings, code, _children_seconds() - before)


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def summary(name: str, log: str, findings: Path, code: int, processor: float) -> Summary:
    """Read libFuzzer's log."""
    states, done = _STATUS.findall(log), _DONE.search(log)
    edges, features, files, size, unit = states[-1] if states else ("0", "0", "0", "0", "")
    kinds = sorted(json.loads(path.read_text())["kind"] for path in findings.glob("*.json"))
    return Summary(
        name, int(done[1]) if done else 0, int(done[2]) if done else 0, round(processor), int(edges), int(features),
        int(files), int(size) * _UNITS.get(unit, 1), tuple(kinds), "" if code == 0 else f"ended with status {code}",
    )  # fmt: skip


def table(rows: Sequence[Summary]) -> str:
    lines = [
        "| target | executions | seconds | of processor | edges | features | corpus | findings |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        found = "; ".join((*row.findings, row.note)).strip("; ") or "none"
        corpus = f"{row.corpus_files} files, {row.corpus_bytes / 1024:.0f} KiB"
        times = f"{row.seconds} | {row.processor}"
        lines.append(f"| {row.target} | {row.executions:,} | {times} | {row.edges} | {row.features} | {corpus} | {found} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks fuzz", description=__doc__)
    parser.add_argument("--target", action="append", choices=NAMES, metavar="NAME", help=f"one of: {', '.join(NAMES)}")
    parser.add_argument("--minutes", type=float, default=10.0, help="per target (default 10)")
    parser.add_argument("--folder", type=Path, default=Path(".fuzz"), help="corpora, logs and findings (default .fuzz)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    arguments = parser.parse_args(argv)
    rows = []
    for name in arguments.target or NAMES:
        print(f"fuzzing {name} for {arguments.minutes:g} minutes …", file=sys.stderr, flush=True)
        rows.append(fuzz(name, 60 * arguments.minutes, arguments.folder))
        (arguments.folder / name / "summary.json").write_text(json.dumps(asdict(rows[-1])))
    if arguments.json:
        print(json.dumps({"machine": asdict(Machine.this()), "targets": [asdict(row) for row in rows]}, indent=1))
    else:
        print(f"{Machine.this()}\n\n{table(rows)}")
    sys.exit(1 if any(row.findings or row.note for row in rows) else 0)
