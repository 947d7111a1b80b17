"""`python -m benchmarks adapters`: memory of a mixture of adapters on one base of 165 M parameters, and the time of a switch."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks.adapters.process import COUNTS
from benchmarks.report import Machine, Row, markdown

CASES = ((16, "float32", "float32"), (8, "float32", "float32"), (16, "bfloat16", "bfloat16"), (16, "fp8", "bfloat16"))
"""Rank; data type of the base; data type of the mixture, in which adapters are held."""


def run() -> list[Row]:
    rows = []
    for rank, dtype, precision in CASES:
        with tempfile.TemporaryDirectory() as folder:
            made, base, found = (_stage(each, folder, str(rank), dtype, precision) for each in ("make", "alone", "mixture"))
        what = f"rank {rank}, base in {dtype}"
        detail = f"{made['parameters'] / 1e6:.0f} M parameters, adapters of {made['adapter'] / 1e6:.2f} M in {precision}"
        rows.append(Row.of(f"{what}: the base alone", [base["base"] / 1e6], "MB resident", detail=detail))
        for count, taken in zip(COUNTS, found["experts"], strict=True):
            named = f"{count} expert{'s' * (count > 1)}"
            rows.append(Row.of(f"{what}: {named} over the base alone", [taken / base["base"]], "×", "≤ 1.1"))
        ways = (("switch", "switching to an adapter in memory"), ("read", f"asking {max(COUNTS)} experts in turn, for each"))
        for key, way in ways:
            rows.append(
                Row.of(f"{what}: {way}", [1000 * seconds for seconds in found[key]], "ms", detail="more than asking again")
            )
    return rows


def _stage(stage: str, *arguments: str) -> Any:
    command = [sys.executable, "-m", "benchmarks.adapters.process", stage, *arguments]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def main(argv: Sequence[str]) -> None:
    argparse.ArgumentParser(prog="python -m benchmarks adapters", description=__doc__).parse_args(argv)
    print(f"{Machine.this()}\n\n{markdown('adapters', run())}")
