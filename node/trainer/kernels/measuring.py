"""Has kernels measured in processes of their own, within a time, and chooses among them."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from lutetia.models.device import Precision
from lutetia.models.training.kernels.choice import (
    PACKAGES,
    PLAIN_KERNELS,
    KernelChoice,
    KernelFinding,
    Kernels,
    KernelTrial,
    attention_kernels,
    choose_kernels,
    compiled_kernels,
)
from lutetia.models.training.memory.options import PLAIN, MemoryOptions
from lutetia.node.device_settings import torch_cards
from lutetia.protocol.schema.canonical import Frozen, canonical
from lutetia.protocol.schema.manifest import Manifest
from lutetia.system import tether
from lutetia.system.files import part_folder

KERNEL_SECONDS = 90.0
"""Most seconds that measuring takes for one kind of expert."""
_MODULE = "lutetia.node.trainer.kernels"


class KernelOrder(Frozen):
    """Steps to try with kernels on one device."""

    manifest: Path = Field(description="The signed manifest")
    shard: int = Field(description="Index of the shard")
    device: str = Field(description="In torch's words; a unit is not measured")
    precision: Precision = Field(default="float32", description="Data type of the forward pass")
    micro_batch: int = Field(description="Clips per forward pass")
    memory: MemoryOptions = Field(default=PLAIN, description="What is done to need less memory")
    threads: int | None = Field(default=None, description="CPU threads; None: the default of torch")
    limit: int | None = Field(default=None, description="Bytes that may be taken of the device; None: all that is free")
    kernels: tuple[Kernels, ...] = Field(default=(), description="The ways to try, in this order")


def kernels_for(choice: KernelChoice, order: KernelOrder, manifest: Manifest, until: float) -> KernelFinding:
    """The kernels that a trainer takes, and why.

    Args:
        choice: the volunteer's setting.
        order: the device and how it trains; its kernels are not looked at.
        manifest: the run.
        until: when to be done at the latest, in the seconds of `time.monotonic`.
    """
    if choice == "plain":
        return KernelFinding(PLAIN_KERNELS, "kernels: plain, as set")
    if len(torch_cards(order.device)) > 1:
        return KernelFinding(PLAIN_KERNELS, "kernels: plain, they are not measured for cards that train one expert together")
    if choice == "auto" and order.device == "cpu":
        return KernelFinding(PLAIN_KERNELS, "kernels: plain, so that replays on a CPU give the same bits")
    until = min(until, time.monotonic() + KERNEL_SECONDS)
    steps, shapes = manifest.steps_per_epoch, shapes_of(manifest, order.micro_batch)
    found = measure(order, (PLAIN_KERNELS, *attention_kernels(order.device, installed())), until)
    best = choose_kernels(found, order.precision, steps, shapes).kernels
    if found[0].problem == "":
        found += measure(order, compiled_kernels(order.device, best), until)
    return choose_kernels(found, order.precision, steps, shapes)


def installed() -> list[str]:
    """The packages with attention kernels that are here."""
    return [name for name in PACKAGES.values() if importlib.util.find_spec(name)]


def shapes_of(manifest: Manifest, micro_batch: int) -> int:
    """How many shapes of tensors training has: of each bucket, and of the last rows of a batch."""
    return len(manifest.latent.of_buckets) * (2 if manifest.optimisation.batch % micro_batch else 1)


def measure(order: KernelOrder, kernels: Sequence[Kernels], until: float) -> list[KernelTrial]:
    """A trial for each of `kernels`, in their order. Where a process crashes, another goes on with the next ones.

    `until`: when to end, in the seconds of `time.monotonic`; what was not tried by then says so.
    """
    found: list[KernelTrial] = []
    while len(found) < len(kernels):
        waiting = tuple(kernels[len(found) :])
        left = until - time.monotonic()
        shown, code = _in_a_process(order.model_copy(update={"kernels": waiting}), left) if left > 0 else ([], None)
        found += shown
        if code is None:
            problem = "not measured in time"
            return [*found, *(KernelTrial(kernels=each, problem=problem) for each in kernels[len(found) :])]
        if len(shown) < len(waiting):
            found.append(KernelTrial(kernels=waiting[len(shown)], problem=f"its process ended with exit code {code}"))
    return found


def _in_a_process(order: KernelOrder, seconds: float) -> tuple[list[KernelTrial], int | None]:
    """(what a process showed, its exit code; None if its time was over)."""
    with part_folder(order.manifest.parent, "kernels") as folder:
        process = subprocess.Popen(
            tether.command(sys.executable, "-m", _MODULE), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "TMPDIR": str(folder)}, start_new_session=True,
        )  # fmt: skip
        assert process.stdin
        assert process.stdout
        late = threading.Event()

        def end() -> None:
            late.set()
            _kill(process)

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            process.stdin.write(canonical(order))
            process.stdin.close()
            shown = [KernelTrial.model_validate_json(line) for line in process.stdout if line.startswith(b'{"kernels"')]
            code = process.wait()
        except BrokenPipeError:  # it ended before it had read its order
            shown, code = [], process.wait()
        finally:
            timer.cancel()
            _kill(process)
            process.wait()
            process.stdout.close()
    return shown, None if late.is_set() else code


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and the compilers that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
