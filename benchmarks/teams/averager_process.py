"""One peer of the comparison with hivemind's averager: trains a lane, and averages its state with the others every interval.

`python -m benchmarks.teams.averager_process LANE FOLDER CELL [PEER]` prints JSON lines: its address, its rounds, its result.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

import hivemind
import psutil
import torch
from hivemind.averaging.matchmaking import MatchmakingException
from hivemind.averaging.partition import AllreduceException
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError

from benchmarks.teams.arms import cell_of
from benchmarks.teams.clips import team_clips
from benchmarks.teams.loop import Node, held_out_losses
from benchmarks.teams.merge import packed, unpacked
from benchmarks.teams.sizes import SIZES, run_of

ROUND_ERRORS = (AllreduceException, MatchmakingException, P2PHandlerError, P2PDaemonError)
PATIENCE = 90.0
"""Seconds for which a peer looks for a group before it trains on alone."""
SILENCE = 10.0
"""Seconds without a byte after which a peer is left out of a round."""


def main(lane: int, folder: Path, cell_text: str, peers: list[str]) -> None:
    torch.set_num_threads(1)
    cell, clips = cell_of(json.loads(cell_text)), team_clips(folder)
    manifest = run_of(SIZES[cell.size].expert, cell.batch, len(clips.train), cell.seed)
    node = Node(manifest, clips.train, cell.rate * SIZES[cell.size].rate, cell.steps, cell.seed)
    first = node.state()
    node.train(0, 1)  # moments have shapes from the first step on
    shapes = {name: torch.zeros_like(tensor) for name, tensor in packed(node.state()).items()}
    node.load(first, 0)
    dht = hivemind.DHT(initial_peers=peers, host_maddrs=["/ip4/127.0.0.1/tcp/0"], start=True)
    averager = hivemind.DecentralizedAverager(
        tuple(shapes.values()), dht, start=True, prefix="teams", target_group_size=cell.nodes, min_matchmaking_time=5.0,
        request_timeout=3.0, sender_timeout=SILENCE, reducer_timeout=2 * SILENCE, allreduce_timeout=6 * SILENCE,
    )  # fmt: skip
    _say(address=str(dht.get_visible_maddrs()[0]))
    sys.stdin.readline()  # all begin together
    began, waited = time.monotonic(), 0.0
    for done in range(0, cell.steps, cell.interval):
        node.train(done, min(cell.interval, cell.steps - done), lane, cell.nodes)
        trained = time.monotonic()
        for tensor, value in zip(shapes.values(), packed(node.state()).values(), strict=True):
            tensor.copy_(value)
        size = _average(averager)
        node.load(unpacked({name: tensor.clone() for name, tensor in shapes.items()}), done + cell.interval)
        waited += time.monotonic() - trained
        _say(round=done // cell.interval, group=size, seconds=round(time.monotonic() - trained, 2))
    loss = held_out_losses(manifest, node.model, node.state().averages, clips.held_out).mean().item()
    _say(loss=loss, seconds=round(time.monotonic() - began, 1), waited=round(waited, 1), written=_written())
    sys.stdin.readline()  # stays for the others' last round
    averager.shutdown()
    dht.shutdown()


def _average(averager: hivemind.DecentralizedAverager) -> int:
    """Average the tensors, which nobody else touches between rounds. Returns the number of peers; 1: the round failed."""
    try:
        group = averager.step(timeout=PATIENCE)
    except (*ROUND_ERRORS, RuntimeError, OSError, asyncio.CancelledError) as error:
        _say(failed=f"{type(error).__name__}: {error}"[:200])
        return 1
    return len(group) if isinstance(group, dict) else 1


def _written() -> int:
    """Bytes that this peer's p2pd wrote: each byte of a tensor once to another peer and once to its own process."""
    children = psutil.Process().children(recursive=True)
    return sum(child.io_counters().write_chars for child in children if child.name() == "p2pd")


def _say(**values: object) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
