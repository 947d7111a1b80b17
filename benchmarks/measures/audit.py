"""How closely honest replays of one epoch agree: across threads, instruction sets, micro-batches and precisions.

Every variant is a process of its own that replays the same epoch from the same parent. Figures are the relative differences of a
step's loss over the first four steps and over the epoch, and the drift of the epoch's end (see `models.training.replay.Replay`).
The last rows are what a cheater could publish: the losses of a model that is not updated, and an end that was not trained.

An accelerator is compared with the CPU of its machine. Machines are compared by the losses of the replayed epoch, which each
machine writes to docs/results/audit-traces.json. There each machine has trained the parent by itself, from one seed. That is a
stricter test than an audit, which starts from one state.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.report import Machine, Row

TRACES = Path(__file__).resolve().parents[2] / "docs" / "results" / "audit-traces.json"
FIRST, STEPS, BATCH = 4, 32, 4
PLAIN, HALF = "one thread", "bfloat16"
NO_VECTORS = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


@dataclass(frozen=True)
class Variant:
    """One replay. `base` names the variant that it is compared with."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    base: str = PLAIN


PROCESSES: tuple[tuple[dict[str, str], tuple[Variant, ...]], ...] = (
    (
        {},
        (
            Variant(PLAIN),
            Variant("the same again"),
            Variant("2 threads", {"threads": 2}),
            Variant("micro-batch 1", {"micro_batch": 1}),
            Variant("micro-batch 3", {"micro_batch": 3}),
            Variant(HALF, {"precision": "bfloat16"}),
            Variant("bfloat16, 2 threads", {"precision": "bfloat16", "threads": 2}, HALF),
            Variant("bfloat16, micro-batch 1", {"precision": "bfloat16", "micro_batch": 1}, HALF),
            Variant("cheater: forward passes without updates", {"frozen": True}),
            Variant("cheater: the same in bfloat16", {"frozen": True, "precision": "bfloat16"}, HALF),
            Variant("cheater: the parent plus noise", {"frozen": True, "noise": 1e-3}),
        ),
    ),
    ({"ATEN_CPU_CAPABILITY": "default"}, (Variant("ATen without vectors"),)),
    (AVX2, (Variant("AVX2 at most"), Variant("bfloat16, AVX2 at most", {"precision": "bfloat16"}, HALF))),
    (
        NO_VECTORS,
        (
            Variant("no vectors, 2 threads, micro-batch 1", {"threads": 2, "micro_batch": 1}),
            Variant("bfloat16, no vectors", {"precision": "bfloat16"}, HALF),
        ),
    ),
)
"""The environment of each process, and what it replays."""


def run(optimizers: tuple[str, ...] = ("adamw", "muon")) -> list[Row]:
    rows = []
    for optimizer in optimizers:
        with tempfile.TemporaryDirectory() as folder:
            found, losses = _measured(Path(folder), optimizer)
        rows += [*found, *_against_others(optimizer, {name: losses[name] for name in (PLAIN, HALF)})]
    return rows


def _processes() -> list[tuple[dict[str, str], tuple[Variant, ...]]]:
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return list(PROCESSES)
    device = {"device": found.type}
    accelerated = (
        Variant(f"{found.type} against cpu", device),
        Variant(f"bfloat16, {found.type} against cpu", {**device, "precision": "bfloat16"}, HALF),
        Variant(f"{found.type} in bfloat16 against cpu in float32", {**device, "precision": "bfloat16"}),
        Variant(f"{found.type}, the same again", device, f"{found.type} against cpu"),
        Variant(f"{found.type}, micro-batch 1", {**device, "micro_batch": 1}, f"{found.type} against cpu"),
    )
    return [*PROCESSES, ({}, accelerated)]


def _against_others(optimizer: str, losses: dict[str, list[float]]) -> list[Row]:
    """Compare with the machines in TRACES, and add this one."""
    import torch

    this = f"{Machine.this().processor}, {torch.backends.cpu.get_cpu_capability()}"
    traces: dict[str, dict[str, dict[str, list[float]]]] = json.loads(TRACES.read_text()) if TRACES.exists() else {}
    known = traces.setdefault(optimizer, {})
    rows = [
        row
        for machine, traced in known.items()
        for name, base in traced.items()
        if machine != this
        for row in _loss_rows(f"{optimizer}, {name}: against {machine}", base, losses[name])
    ]
    known[this] = losses
    TRACES.write_text(json.dumps(traces, indent=1) + "\n")
    return rows


def _measured(folder: Path, optimizer: str) -> tuple[list[Row], dict[str, list[float]]]:
    losses: dict[str, list[float]] = {}
    rows = []
    for environment, variants in _processes():
        asked = [{"name": variant.name, "base": variant.base, **variant.arguments} for variant in variants]
        question = json.dumps({"folder": str(folder), "optimizer": optimizer, "variants": asked})
        command = [sys.executable, "-m", "benchmarks.measures.audit_process", question]
        done = subprocess.run(command, env={**os.environ, **environment}, check=True, stdout=subprocess.PIPE, text=True)
        for variant, found in zip(variants, json.loads(done.stdout), strict=True):
            losses[variant.name] = found["losses"]
            if variant.name != PLAIN:
                rows += _rows(f"{optimizer}: {variant.name}", losses[variant.base], found)
                print(*rows[-3:], sep="\n", file=sys.stderr, flush=True)
    return rows, losses


def _rows(what: str, base: list[float], found: dict[str, Any]) -> list[Row]:
    end = Row.of(f"{what}: drift of the end", [found["drift"]], "", detail=f"{STEPS} steps")
    return [*_loss_rows(what, base, found["losses"]), end]


def _loss_rows(what: str, base: list[float], losses: list[float]) -> list[Row]:
    apart = [abs(a - b) / max(abs(a), abs(b)) for a, b in zip(base, losses, strict=True)]
    return [
        Row.of(f"{what}: loss, first {FIRST} steps", apart[:FIRST], "relative"),
        Row.of(f"{what}: loss, {STEPS} steps", apart, "relative"),
    ]
