"""The simulator takes its time-outs and periods from the code that it simulates, and has none of its own."""

from __future__ import annotations

import ast
from pathlib import Path

ROOM = Path(__file__).resolve().parents[2] / "simulation"
MODEL = {
    ("costs.py", "QUESTION_BYTES"): "the assumed size of a DHT request",
    ("costs.py", "_BUCKET"): "the bucket size in the formula for hops of a lookup",
    ("config.py", "_STEPS"): "how many steps an epoch has",
    ("event_queue.py", "START"): "the virtual time at which every run begins",
    ("event_queue.py", "_SPINS"): "after how many calls at one moment the program hangs",
    ("network/blobs.py", "_HOPELESS"): "the rate below which the model gives a transfer up",
    ("network/blobs.py", "_PATIENCE"): "how long the model waits before it gives a slow transfer up",
    ("network/held_out.py", "NOISES"): "how many rows a held-out clip gives",
    **{("network/held_out.py", name): "the model of noise" for name in ("LEVEL", "EARLY", "CLIP", "ROW")},
    **{("network/held_out.py", name): "the model of learning" for name in ("LEARNS", "OVERFITS")},
    **{("network/held_out.py", name): "the model of raw parameters" for name in ("RAW", "RAW_SPREAD", "RAW_CLIP")},
    ("network/links.py", "RETRANSMIT"): "how long a stream waits before it repeats a lost packet",
    ("network/links.py", "_BITS"): "the size of the tables of drawn delays",
    ("peers/check_runner.py", "_CORRUPT_SECONDS"): "how long a transfer of corrupt bytes takes",
    ("peers/lent_checks.py", "SLOW"): "how many times longer a slow checker takes",
    ("peers/lent_checks.py", "_ASKS"): "how often the model looks whether a lent check has ended",
    ("peers/lent_checks.py", "_DEVICES"): "how far the losses of two devices are apart",
    ("peers/node.py", "_PROBE_SECONDS"): "how long the probe of a machine takes",
    ("peers/node.py", "_LEAVE_SECONDS"): "how long a leaving node takes to publish its last records",
    ("peers/node.py", "_TICK"): "a margin for rounding errors of the clock",
    ("runner.py", "_SLICES"): "how often progress is reported",
    ("scenarios/few_clips.py", "LONGEST_GAP"): "how long a shard may be without acceptance",
    ("scenarios/few_clips.py", "_EPOCHS"): "the budget of these runs",
    ("scenarios/few_clips.py", "_SECONDS"): "when these runs end at the latest",
    ("scenarios/lent.py", "LONG"): "a gap between acceptances that a shard may have once",
    ("scenarios/lent.py", "LONGEST"): "how long a shard may be without acceptance",
    ("shrink.py", "MAX_TRIES"): "when shrinking stops",
    ("trace.py", "_SEARCHED"): "when the search for causes stops",
    ("world.py", "_LIST_SECONDS"): "for how long readers share one list of nodes, to save processor time",
}
"""Numbers that only the model has, and what each is."""


def test_simulator_defines_no_number_of_the_real_code() -> None:
    numbers = {
        (path.relative_to(ROOM).as_posix(), target.id)
        for path in ROOM.rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign)
        for target, value in _pairs(node)
        if isinstance(target, ast.Name) and _is_number(value)
    }
    assert numbers <= MODEL.keys() | {("config.py", "MIB")}
    assert MODEL.keys() <= numbers, "an entry of the list is no longer there"


def _pairs(node: ast.Assign) -> list[tuple[ast.expr, ast.expr]]:
    """(target, value), tuples taken apart."""
    pairs = []
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs += zip(target.elts, node.value.elts, strict=True)
        else:
            pairs.append((target, node.value))
    return pairs


def _is_number(value: ast.expr) -> bool:
    """Whether the value is made of number literals alone."""
    parts = [part for part in ast.walk(value) if isinstance(part, ast.expr)]
    numeric = (ast.Constant, ast.BinOp, ast.UnaryOp)
    return all(isinstance(part, numeric) and not isinstance(getattr(part, "value", 0), str) for part in parts)
