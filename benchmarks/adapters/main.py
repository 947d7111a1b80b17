"""`python -m benchmarks adapters`: memory of a mixture of adapters on one base of 165 M parameters, and the time of a switch."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence

from benchmarks.adapters.process import COUNTS
from benchmarks.report import Machine, Row, markdown

CASES = ((16, "float32", "float32"), (8, "float32", "float32"), (16, "bfloat16", "bfloat16"), (16, "fp8", "bfloat16"))
"""Rank; data type of the base; data type of the mixture, in which adapters are held."""


def run() -> list[Row]:
    rows = []
    for rank, dtype, precision in CASES:
        command = [sys.executable, "-m", "benchmarks.adapters.process", str(rank), dtype, precision]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout)
        what = f"rank {rank}, base in {dtype}"
        detail = f"{found['parameters'] / 1e6:.0f} M parameters, adapters of {found['adapter'] / 1e6:.2f} M in {precision}"
        rows.append(Row.of(f"{what}: the base alone", [found["base"] / 1e6], "MB resident", detail=detail))
        for count, share in zip(COUNTS, found["shares"], strict=True):
            budget = "≤ 1.1" if count == 4 else ""
            rows.append(Row.of(f"{what}: {count} expert{'s' * (count > 1)} over the base alone", [share], "×", budget))
        rows.append(Row.of(f"{what}: switching experts", [1000 * found["switch"]], "ms"))
    return rows


def main(argv: Sequence[str]) -> None:
    argparse.ArgumentParser(prog="python -m benchmarks adapters", description=__doc__).parse_args(argv)
    print(f"{Machine.this()}\n\n{markdown('adapters', run())}")
