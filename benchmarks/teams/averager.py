"""hivemind's averager in real processes on loopback beside the merge of lanes, with equal steps, data and interval."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save

from benchmarks.report import Machine
from benchmarks.teams.arms import Arms, Cell
from benchmarks.teams.clips import TeamClips, team_clips
from benchmarks.teams.loop import Node
from benchmarks.teams.merge import packed
from benchmarks.teams.sizes import SIZES, run_of

CELL = Cell("0.16M", "lanes", 2, 240, 2.0, 0, nodes=4, interval=40)
KILLED_AFTER = 2
"""Rounds of the last peer after which it is killed, in the second run."""


@dataclass(frozen=True)
class Outcome:
    """What the peers that were not killed said.

    Attributes:
        losses: held-out losses at the end.
        seconds: wall time of the slowest.
        waited: seconds in which the slowest did not train.
        sent: bytes that all peers together sent to others.
        rounds: size of the group and seconds of every round, by peer.
        failures: what the library raised.
    """

    losses: tuple[float, ...]
    seconds: float
    waited: float
    sent: int
    rounds: tuple[tuple[tuple[int, float], ...], ...]
    failures: tuple[str, ...]


def compare(folder: Path) -> None:
    """Run lanes, the averager, and the averager with a peer that is killed; writes averager.json and prints a table."""
    clips = team_clips(folder)
    began = time.monotonic()
    lanes = Arms(clips, folder).run(CELL)
    seconds = time.monotonic() - began
    found: dict[str, Any] = {
        "machine": asdict(Machine.this()), "cell": asdict(CELL), "lanes": asdict(lanes) | {"wall": round(seconds, 1)},
        "state": _state_bytes(clips), "outcomes": {},
    }  # fmt: skip
    for name, killed_after in (("averager", None), ("averager, a peer killed", KILLED_AFTER)):
        found["outcomes"][name] = asdict(run(folder, killed_after))
        (folder / "averager.json").write_text(json.dumps(found, indent=1))
    print(table(found))


def table(found: Mapping[str, Any]) -> str:
    """The comparison, from what averager.json holds."""
    nodes, rounds = found["cell"]["nodes"], found["cell"]["steps"] // found["cell"]["interval"]
    moved = 2 * nodes * found["state"] / 1e6
    lines = [
        "| what | held-out loss | MB sent per round, all peers | seconds per round besides training | nodes in a round |",
        "|---|---|---|---|---|",
        f"| lanes, merged in one place | {found['lanes']['loss']:.4f} | {moved:.1f} | | {nodes} |",
    ]
    for name, outcome in found["outcomes"].items():
        every = [each for peer in outcome["rounds"] for each in peer]
        losses, groups = outcome["losses"], sorted({group for group, _ in every})
        spread = f"{statistics.mean(losses):.4f} [{min(losses):.4f}, {max(losses):.4f}]"
        shares = ", ".join(f"{group}: {sum(g == group for g, _ in every) / len(every):.0%}" for group in groups)
        times = [seconds for _, seconds in every]
        pace = f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})"
        lines.append(f"| {name} | {spread} | {outcome['sent'] / rounds / 1e6:.1f} | {pace} | {shares} |")
    return "\n".join(lines)


def run(folder: Path, killed_after: int | None) -> Outcome:
    """Run the peers; the last one is killed after so many of its rounds."""
    peers: list[subprocess.Popen[str]] = []
    address: list[str] = []
    lines: list[list[dict[str, Any]]] = [[] for _ in range(CELL.nodes)]
    try:
        for lane in range(CELL.nodes):
            peers.append(_start(lane, folder, address))
            address = [_next(peers[lane])["address"], *address][-1:]
        for peer in peers:
            _go_on(peer)
        if killed_after is not None:
            while len([line for line in lines[-1] if "round" in line]) < killed_after:
                lines[-1].append(_next(peers[-1]))
            os.killpg(peers[-1].pid, signal.SIGKILL)
            peers[-1].wait()
        alive = range(CELL.nodes - (killed_after is not None))
        for lane in alive:
            while not lines[lane] or "loss" not in lines[lane][-1]:
                lines[lane].append(_next(peers[lane]))
        for lane in alive:
            _go_on(peers[lane])
            peers[lane].wait(60)
    finally:
        for peer in peers:
            if peer.poll() is None:
                os.killpg(peer.pid, signal.SIGKILL)
                peer.wait()
    ends = [lines[lane][-1] for lane in alive]
    return Outcome(
        losses=tuple(end["loss"] for end in ends),
        seconds=max(end["seconds"] for end in ends),
        waited=max(end["waited"] for end in ends),
        sent=sum(end["written"] for end in ends) // 2,
        rounds=tuple(tuple((line["group"], line["seconds"]) for line in lines[lane] if "round" in line) for lane in alive),
        failures=tuple(line["failed"] for lane in alive for line in lines[lane] if "failed" in line),
    )


def _start(lane: int, folder: Path, peers: list[str]) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.teams.averager_process",
        str(lane),
        str(folder),
        json.dumps(asdict(CELL)),
        *peers,
    ]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def _next(peer: subprocess.Popen[str]) -> dict[str, Any]:
    """The peer's next line."""
    assert peer.stdout
    for line in peer.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise RuntimeError(f"peer {peer.pid} ended with exit code {peer.wait()} before its result; its errors are above")


def _go_on(peer: subprocess.Popen[str]) -> None:
    assert peer.stdin
    peer.stdin.write("\n")
    peer.stdin.flush()


def _state_bytes(clips: TeamClips) -> int:
    """Bytes of what a lane publishes and the next one fetches: parameters, moments and averages."""
    manifest = run_of(SIZES[CELL.size].expert, CELL.batch, len(clips.train), CELL.seed)
    node = Node(manifest, clips.train, 1e-3, 1, 0)
    node.train(0, 1)
    return len(save(packed(node.state())))
