"""The processes of a unit: rank 0 is the trainer process itself, which starts one for each further card and ends with them."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import Field

from lutetia.models.device import Precision
from lutetia.models.training.memory.options import MemoryOptions
from lutetia.models.training.units.split import Split, joined
from lutetia.node.device_settings import torch_cards
from lutetia.node.trainer.assignment import EXIT_CODES, Assignment
from lutetia.protocol.schema.canonical import Frozen, canonical
from lutetia.system import tether
from lutetia.system.files import part_folder

log = logging.getLogger(__name__)

RANK_MODULE = "lutetia.node.trainer.units"
_END_SECONDS = 20.0


class UnitTrial(Frozen):
    """Steps that all ranks try together on random clips, to see whether a plan fits the cards."""

    manifest: Path = Field(description="The signed manifest")
    shard: int = Field(description="Index of the shard")
    device: str = Field(description="The unit, like cuda:0+cuda:1")
    precision: Precision = Field(description="Data type of the forward pass")
    micro_batch: int = Field(description="Clips per forward pass on each card")
    memory: MemoryOptions = Field(description="What is done to need less memory")
    threads: int | None = Field(default=None, description="CPU threads of each rank; None: the default of torch")


class RankOrder(Frozen):
    """What a rank is to do: to follow the training of an assignment, or a trial."""

    rank: int = Field(description="Its number; 0 leads")
    meeting: Path = Field(description="File by which the ranks find each other")
    limit: int | None = Field(default=None, description="Bytes that it may take of its card; None: all that is free")
    assignment: Assignment | None = Field(default=None, description="What is trained")
    trial: UnitTrial | None = Field(default=None, description="What is tried")


def start_rank(order: RankOrder, output: int | None = None) -> subprocess.Popen[bytes]:
    """Start a rank, which dies with the thread that calls this. `output`: where it prints; None: to the log."""
    process = subprocess.Popen(
        tether.command(sys.executable, "-m", RANK_MODULE), stdin=subprocess.PIPE, stdout=2 if output is None else output
    )
    assert process.stdin
    process.stdin.write(canonical(order))
    process.stdin.close()
    return process


@contextlib.contextmanager
def unit_of(assignment: Assignment, limit: int | None) -> Iterator[Split | None]:
    """The ranks that train the assignment with this process as the first; None for a single device.

    Whichever ends, by itself or by a signal, takes the others with it: this process ends with the exit code of a rank that is
    lost, and the node starts the unit again from its last state.

    `limit`: bytes that each rank may take of its card.
    """
    cards = torch_cards(assignment.device)
    if len(cards) == 1:
        yield None
        return
    with part_folder(assignment.manifest.parent, "unit") as folder:
        meeting, ended = folder / "meeting", threading.Event()
        orders = [RankOrder(rank=rank, meeting=meeting, limit=limit, assignment=assignment) for rank in range(1, len(cards))]
        ranks = [start_rank(order) for order in orders]
        for rank, process in enumerate(ranks, 1):
            threading.Thread(target=_watch, args=(rank, cards[rank], process, ended), daemon=True).start()
        try:
            with joined(0, len(cards), meeting, cards[0]) as split:
                yield split
                ended.set()
            for process in ranks:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_END_SECONDS)
        finally:
            ended.set()
            _kill(ranks)


def _watch(rank: int, card: str, process: subprocess.Popen[bytes], ended: threading.Event) -> None:
    """End this process when the rank has ended before the unit: it may wait in a collective operation that never ends."""
    code = process.wait()
    if ended.is_set() or code == 0:  # rank 0 has told it to end
        return
    log.error("rank %d of the unit, on %s, ended with status %d; the unit ends", rank, card, code)
    os._exit(code if code in EXIT_CODES.values() else EXIT_CODES["crash"])


def run_trial(trial: UnitTrial, limit: int | None) -> tuple[float | None, int]:
    """Let fresh ranks try a plan: (samples per second, or None; exit code of the first rank that failed, or 0)."""
    cards = torch_cards(trial.device)
    with part_folder(trial.manifest.parent, "unit") as folder:
        meeting = folder / "meeting"
        orders = [RankOrder(rank=rank, meeting=meeting, limit=limit, trial=trial) for rank in range(len(cards))]
        ranks = [start_rank(order, subprocess.PIPE if order.rank == 0 else None) for order in orders]
        try:
            code = _first_failure(ranks)
            shown = ranks[0].stdout.read() if ranks[0].stdout and code == 0 else b""
        finally:
            _kill(ranks)
    return (float(shown.split()[-1]), 0) if shown.split() else (None, code)


def _first_failure(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """The exit code of the first rank that fails; 0 once all have ended well."""
    codes: list[int] = []
    changed = threading.Condition()

    def wait(process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        with changed:
            codes.append(code)
            changed.notify()

    for process in ranks:
        threading.Thread(target=wait, args=(process,), daemon=True).start()
    with changed:
        changed.wait_for(lambda: any(codes) or len(codes) == len(ranks))
        return next((code for code in codes if code), 0)


def _kill(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in ranks:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()
