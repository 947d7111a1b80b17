"""How closely honest replays of one epoch agree: threads, instruction sets, micro-batches and precisions against each other.

Every variant is a process of its own that replays the same epoch from the same parent. Figures are the relative differences of a
step's loss over the first four steps and over the epoch, and the drift of the epoch's end (see `models.replay.Replay`).
The last rows are what a cheater would publish: the losses of a model that is not updated, and an end that was not trained for.
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

from .report import Row

FIRST, STEPS, BATCH = 4, 32, 4


@dataclass(frozen=True)
class Variant:
    """`environment` and arguments of one replay; `base` names the variant that it is compared with."""

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    base: str = "float32"


VARIANTS = (
    Variant("float32"),
    Variant("float32 again"),
    Variant("2 threads", arguments={"threads": 2}),
    Variant("ATen without vectors", {"ATEN_CPU_CAPABILITY": "default"}),
    Variant("ATen with AVX2", {"ATEN_CPU_CAPABILITY": "avx2"}),
    Variant("oneDNN and MKL with SSE4.2", {"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}),
    Variant("oneDNN and MKL with AVX2", {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}),
    Variant(
        "no vectors anywhere, 2 threads, micro-batch 1",
        {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
        {"threads": 2, "micro_batch": 1},
    ),
    Variant("micro-batch 1", arguments={"micro_batch": 1}),
    Variant("micro-batch 3", arguments={"micro_batch": 3}),
    Variant("bfloat16 against float32", arguments={"precision": "bfloat16"}),
    Variant("bfloat16, 2 threads", arguments={"precision": "bfloat16", "threads": 2}, base="bfloat16 against float32"),
    Variant("bfloat16, micro-batch 1", arguments={"precision": "bfloat16", "micro_batch": 1}, base="bfloat16 against float32"),
    Variant(
        "bfloat16 with AVX2", {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
        {"precision": "bfloat16"}, base="bfloat16 against float32",
    ),
    Variant("cheater: forward passes only", arguments={"frozen": True}),
    Variant("cheater: parent plus noise", arguments={"frozen": True, "noise": 1e-3}),
)  # fmt: skip


def run(optimizers: tuple[str, ...] = ("adamw", "muon")) -> list[Row]:
    rows = []
    for optimizer in optimizers:
        with tempfile.TemporaryDirectory() as folder:
            rows += _measured(Path(folder), optimizer)
    return rows


def _measured(folder: Path, optimizer: str) -> list[Row]:
    _child(folder, optimizer, "parent", {}, {})
    found: dict[str, dict[str, Any]] = {}
    rows = []
    for number, variant in enumerate(VARIANTS):
        print(f"  {optimizer}: {variant.name}", file=sys.stderr)
        base = found.get(variant.base)
        arguments = {**variant.arguments, "out": str(number), "against": base and base["out"]}
        found[variant.name] = result = {**_child(folder, optimizer, "replay", variant.environment, arguments), **arguments}
        if base:
            rows += _rows(f"{optimizer}: {variant.name}", base["losses"], result)
    return rows


def _rows(what: str, base: list[float], result: dict[str, Any]) -> list[Row]:
    apart = [abs(a - b) / max(abs(a), abs(b)) for a, b in zip(base, result["losses"], strict=True)]
    return [
        Row.of(f"{what}: loss, first {FIRST} steps", apart[:FIRST], "relative", detail=f"largest {max(apart[:FIRST]):.2e}"),
        Row.of(f"{what}: loss, {STEPS} steps", apart, "relative", detail=f"largest {max(apart):.2e}"),
        Row.of(f"{what}: drift of the end", [result["drift"]], "", detail=f"{STEPS} steps"),
    ]


def _child(folder: Path, optimizer: str, do: str, environment: dict[str, str], arguments: dict[str, Any]) -> dict[str, Any]:
    question = json.dumps({"folder": str(folder), "optimizer": optimizer, "do": do, **arguments})
    command = [sys.executable, "-m", "benchmarks.audit_child", question]
    done = subprocess.run(command, env={**os.environ, **environment}, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)
