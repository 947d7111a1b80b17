"""Shards in parts: bytes on disk, bytes before the first step, and memory of training and of the router on a 4 GB shard."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import Row

BYTES = 4 << 30


def run() -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        written = _in_process(name, "write")
        trained, routed = _in_process(name, "train"), _in_process(name, "router")
    gib = 1 << 30
    return [
        Row.of(
            "size of a shard / its latents and the tokens of each caption once", [written["bytes"] / written["real"]], "",
            "1.1", f"{written['bytes'] / gib:.2f} GiB in {written['parts']} parts, {written['clips']} clips",
        ),
        Row.of("the same clips with padded tokens, as release 0.1 stored them", [written["padded"] / gib], "GiB"),
        Row.of(
            "bytes before the first step / all bytes", [trained["first"] / written["bytes"]], "", "0.1",
            f"batch {trained['batch']}: {trained['first'] / 2**20:.0f} MiB",
        ),
        Row.of(
            "memory of training above the model", [trained["peak"] - trained["model"]], "MiB", "1000",
            f"peak of {trained['read']} batches read and {trained['steps']} steps; with 8 clips in memory "
            f"{trained['small'] - trained['model']:.0f} MiB",
        ),
        Row.of(
            "time to read a batch", trained["milliseconds"], "ms", "", f"{trained['batch']} clips from the page cache or the disk"
        ),
        Row.of("memory of the router's training", [routed["peak"] - routed["base"]], "MiB", "1000", "two such shards"),
    ]  # fmt: skip


def _in_process(folder: str, what: str) -> dict[str, Any]:
    """Each measurement has a process of its own, so that none sees the memory of another."""
    command = [sys.executable, "-m", "benchmarks.measures.shards_process", what, folder]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])
