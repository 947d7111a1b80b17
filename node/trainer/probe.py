"""The hardware probe: run training steps of the run's experts on this machine and see what fits.

It runs in a trainer process, which may crash or hang. After the probe the same process can train.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from pydantic import Field

from lutetia.models.device import Precision, PrecisionChoice, free_cached_memory
from lutetia.models.training.kernels.choice import PLAIN_KERNELS, KernelChoice, Kernels
from lutetia.models.training.memory.needs import RunNeeds
from lutetia.models.training.memory.options import PLAIN, MemoryOptions
from lutetia.models.training.memory.plan import ExpertFacts, MemoryPlan, plan_memory
from lutetia.node.device_settings import torch_cards
from lutetia.node.trainer.devices import Accelerators, choose_device, choose_precision
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.fields import Digest
from lutetia.protocol.schema.manifest import HardwareNeeds, Manifest, SignedManifest
from lutetia.protocol.schema.records import Hardware
from lutetia.system.errors import LutetiaError

if TYPE_CHECKING:
    from lutetia.models.data.shards import ShardData

log = logging.getLogger(__name__)

PROBE_SECONDS = 300.0
KERNEL_SHARE = 0.6
"""Share of a probe's time after which kernels are measured no longer; the rest is for what is left to try."""
_PLAIN_BYTES, _SMALL = 20, 0.1
"""Bytes a number of plain training without activations, and the share of the memory below which that is small."""
_LESS = 0.8


@dataclass(frozen=True)
class PlanQuestion:
    """For what a plan is made; see `plan_memory`."""

    batch: int
    precision: Precision
    device: str
    optimizer: str
    narrower: bool
    host: int


class ProbeQuestion(Frozen):
    """What to probe, and what the volunteer allows."""

    manifest: Path = Field(description="The signed manifest")
    device: str = Field(default="auto", description="auto, cpu, mps, cuda, cuda:N, xpu or xpu:N")
    precision: PrecisionChoice = Field(default="auto", description="Data type of the forward pass")
    micro_batch: int | None = Field(default=None, description="Clips per forward pass to try first; None: the whole batch")
    kernels: KernelChoice = Field(default="auto", description="Whether attention kernels and compiling are measured")
    threads: int | None = Field(default=None, description="CPU threads; None: the default of torch")
    memory: int | None = Field(default=None, description="Bytes that training may take of the device; None: all that is free")
    hardware: str = Field(default="", description="Digest of this machine's cards, processor and drivers")
    free_disk: int = Field(ge=0, description="Bytes that blobs may still take")


class ShardFit(Frozen):
    """How a shard's expert fits this machine."""

    fitness: float = Field(description="0: does not fit; 1: fits")
    micro_batch: int | None = Field(default=None, description="Clips per forward pass that work")
    memory: MemoryOptions = Field(default=PLAIN, description="What is done to need less memory")
    precision: Precision | None = Field(default=None, description="Data type of the forward pass; None: the chosen one")
    kernels: Kernels = Field(default=PLAIN_KERNELS, description="Attention kernel, and whether blocks are compiled")
    takes: tuple[int, int] | None = Field(
        default=None, description="Bytes on the device and in main memory beside it, as planned; None: not counted"
    )
    reason: str = Field(description="Why")
    result_bytes: int = Field(default=0, description="Bytes of a result, weights and state; 0: not known")


class ProbeResult(Frozen):
    """The hardware, and the fit of each shard."""

    question: Digest = Field(description="`question_digest` of the question")
    hardware: Hardware = Field(description="As in the node record")
    device: str = Field(description="The chosen device: cpu, mps, cuda:N or xpu:N")
    cards: tuple[str, ...] = Field(default=(), description="Ids of its cards, as NVIDIA's tool names them")
    precision: Precision = Field(description="The chosen data type of the forward pass")
    precision_reason: str = Field(description="Why that data type")
    samples_per_second: float = Field(description="Training speed of the first expert that fits; 0 if none does")
    shards: dict[int, ShardFit] = Field(description="Fit by shard index")
    needs: RunNeeds | None = Field(default=None, description="What the first expert that fits takes of disk, line and time")

    def lines(self, *, base_here: bool) -> tuple[str, ...]:
        """What the run takes of this machine, in two lines; none where no expert fits. `base_here`: its base is on the disk."""
        fit = next((fit for _, fit in sorted(self.shards.items()) if fit.fitness > 0), None)
        if self.needs is None or fit is None:
            return ()
        return self.needs.two_lines(self.device, fit.takes, self.samples_per_second, base_here=base_here)

    @property
    def fitness(self) -> dict[int, float]:
        return {shard: fit.fitness for shard, fit in self.shards.items()}


def describe(device: str) -> Hardware:
    """Name, memory and cores of the device, for the node record. Cards of a unit are summed up."""
    import torch

    if len(cards := torch_cards(device)) > 1:
        each = [describe(card) for card in cards]
        memory = each[0].memory_bytes if cards[0] == "cpu" else sum(one.memory_bytes for one in each)
        name = f"{len(cards)} x {each[0].name}"[:64]
        return Hardware(device=device[:64], name=name, memory_bytes=memory, cores=each[0].cores)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.startswith(("cuda", "xpu")):
        kind = torch.cuda if device.startswith("cuda") else torch.xpu
        properties = kind.get_device_properties(torch.device(device))
        return Hardware(device=device, name=properties.name[:64], memory_bytes=properties.total_memory, cores=cores)
    return Hardware(device=device, name=_cpu_name(), memory_bytes=psutil.virtual_memory().total, cores=cores)


def card_ids(devices: Sequence[str]) -> tuple[str, ...]:
    """The ids of these cards, as NVIDIA's tool names them; other devices have none."""
    import torch

    cards = [torch.cuda.get_device_properties(device) for device in devices if device.startswith("cuda")]
    return tuple(f"GPU-{card.uuid}" for card in cards if hasattr(card, "uuid"))


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()[:64]
    return ""


def unmet_need(needs: HardwareNeeds, hardware: Hardware, free_disk: int) -> str | None:
    """Which need of the run this machine does not meet; None if it meets all. `free_disk` in bytes."""
    if needs.cuda and not hardware.device.startswith("cuda"):
        return "the run needs a CUDA device"
    if hardware.memory_bytes < needs.memory_bytes:
        return (
            f"the run needs {needs.memory_bytes / 1e9:.1f} GB of memory, {hardware.device} has {hardware.memory_bytes / 1e9:.1f}"
        )
    if free_disk < needs.disk_bytes:
        return f"the run needs {needs.disk_bytes / 1e9:.1f} GB of disk, {free_disk / 1e9:.1f} are free"
    return None


def largest_working(batch: int, works: Callable[[int], bool]) -> int | None:
    """The largest of batch, batch/2, batch/4, … (rounded up) for which `works`; None if not even 1 does."""
    size = batch
    while True:
        if works(size):
            return size
        if size == 1:
            return None
        size = -(-size // 2)


def probe(question: ProbeQuestion) -> ProbeResult:
    """Run the probe. Raises HardwareError when the wanted device is missing."""
    import torch

    from lutetia.models.training.memory.forecast import run_needs

    until = time.monotonic() + KERNEL_SHARE * PROBE_SECONDS
    if question.threads:
        torch.set_num_threads(question.threads)
    manifest = SignedManifest.model_validate_json(question.manifest.read_bytes()).manifest
    accelerators = Accelerators.seen()
    chosen = [choose_device(card, accelerators) for card in torch_cards(question.device)]
    device, device_reason = (question.device if len(chosen) > 1 else chosen[0][0]), "; ".join(reason for _, reason in chosen)
    precision, precision_reason = choose_precision(chosen[0][0], question.precision, accelerators)
    hardware = describe(device)
    log.info("device %s; precision %s", device_reason, precision_reason)
    unmet = unmet_need(manifest.hardware, hardware, question.free_disk)
    fits: dict[int, ShardFit] = {}
    rate, tried, needs = 0.0, {}, None
    for shard in manifest.shards:
        spec = manifest.expert_of(shard.index)
        kind = spec.model_dump_json()
        if unmet is None and kind not in tried:
            tried[kind], measured = _try_expert(manifest, shard.index, device, precision, question, until)
            if measured and needs is None:
                rate, needs = measured, run_needs(manifest, shard.index)
            log.info("expert of shard %d: %s", shard.index, tried[kind].reason)
        fits[shard.index] = ShardFit(fitness=0.0, reason=unmet) if unmet else tried[kind]
    return ProbeResult(
        question=question_digest(question), hardware=hardware, device=device, cards=card_ids(torch_cards(device)),
        precision=precision, precision_reason=precision_reason, samples_per_second=rate, shards=fits, needs=needs,
    )  # fmt: skip


def available_memory(device: str, most: int | None = None) -> int:
    """Bytes that training may take of the device now; of a unit, of all its cards. `most`: as the volunteer allows, of each."""
    if len(cards := torch_cards(device)) > 1:
        shared = _free_memory("cpu") // len(cards)  # processors have one memory
        free = min(shared if card == "cpu" else _free_memory(card) for card in cards)
        return len(cards) * (free if most is None else min(free, most))
    free = _free_memory(device)
    return free if most is None else min(free, most)


def _free_memory(device: str) -> int:
    import torch

    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(torch.device(device))[0]
    if device.startswith("xpu"):
        return torch.xpu.get_device_properties(torch.device(device)).total_memory
    return psutil.virtual_memory().available


def plans(facts: Callable[[], ExpertFacts], parameters: int, memory: int, ask: PlanQuestion) -> Iterator[MemoryPlan]:
    """What to try, one after another; each takes less memory than the one before it.

    An expert that is small beside the memory is tried plainly first, because counting what it keeps takes seconds.

    Args:
        facts: counts them.
        parameters: numbers of the expert.
        memory: bytes of the device that are free.
        ask: for what.

    Raises MemoryShort when nothing more is left.
    """
    if _PLAIN_BYTES * parameters < _SMALL * memory:
        yield MemoryPlan(PLAIN, ask.precision, ask.batch, None, "small beside the memory")
    counted = facts()
    while True:
        plan = plan_memory(
            counted, memory, ask.batch, ask.precision, ask.device, ask.optimizer, narrower=ask.narrower, host=ask.host
        )
        yield plan
        assert plan.need
        memory = int(_LESS * min(memory, plan.need.device))


def _try_expert(
    manifest: Manifest, shard: int, device: str, precision: Precision, question: ProbeQuestion, until: float
) -> tuple[ShardFit, float]:
    """Train steps of the shard's expert on random clips, by the first plan that works: (fit, samples per second).

    `until`: when kernels are measured no longer, in the seconds of `time.monotonic`.
    """
    from lutetia.models.experts.families import build_meta
    from lutetia.models.training.memory.activations import expert_facts
    from lutetia.models.training.memory.forecast import result_bytes
    from lutetia.node.trainer.kernels.measuring import KernelOrder, kernels_for
    from lutetia.node.trainer.units.trials import UnitTrialRunner, probe_data

    batch, data = manifest.optimisation.batch, probe_data(manifest)
    wanted, optimizer = question.micro_batch, manifest.optimisation.optimizer
    ask = PlanQuestion(
        batch=min(wanted or batch, batch), precision=precision, device=device, optimizer=optimizer,
        narrower=question.precision == "auto" and device.startswith("cpu"), host=psutil.virtual_memory().available,
    )  # fmt: skip
    unit_trial = UnitTrialRunner(question.manifest, shard, device, question.threads, question.memory)
    trial = _Trial(manifest, shard, data, device) if len(torch_cards(device)) == 1 else unit_trial
    try:
        parameters = sum(parameter.numel() for parameter in build_meta(manifest.expert_of(shard)).parameters())
        for plan in plans(lambda: expert_facts(manifest, shard), parameters, available_memory(device, question.memory), ask):
            most = -(-plan.rows // len(torch_cards(device)))
            size = largest_working(most, lambda rows, plan=plan: trial.works(plan, rows))
            if size is not None:
                why = "as set" if wanted and size == wanted else "the whole batch" if size >= batch else "the largest that fits"
                reason = f"micro-batch {size}, {why}; {plan.reason}"
                order = KernelOrder(
                    manifest=question.manifest, shard=shard, device=device, precision=plan.precision, micro_batch=size,
                    memory=plan.options, threads=question.threads, limit=question.memory,
                )  # fmt: skip
                found = kernels_for(question.kernels, order, manifest, until)
                rate = batch / found.step_seconds if found.step_seconds else trial.rate
                reason = f"{reason}; {found.reason}"
                takes = (plan.need.device, plan.need.host) if plan.need else None
                return ShardFit(
                    fitness=1.0, micro_batch=size, memory=plan.options, precision=plan.precision, takes=takes, reason=reason,
                    kernels=found.kernels, result_bytes=sum(result_bytes(manifest, shard)),
                ), rate  # fmt: skip
            if not trial.out_of_memory:
                break
    except LutetiaError as error:
        trial.problem = str(error)
    return ShardFit(fitness=0.0, reason=f"does not fit this machine: {trial.problem}"), 0.0


@dataclass
class _Trial:
    """Tries plans with one expert. `rate`: samples per second of the last try that worked."""

    manifest: Manifest
    shard: int
    data: ShardData
    device: str
    problem: str = ""
    out_of_memory: bool = False
    rate: float = 0.0

    def works(self, plan: MemoryPlan, rows: int) -> bool:
        from lutetia.models.training.trainer import ExpertTrainer
        from lutetia.node.trainer.exit_reasons import reason_of
        from lutetia.node.trainer.units.trials import fastest_rate

        try:
            trainer = ExpertTrainer(
                self.manifest, self.shard, self.data, base="random",
                device=self.device, micro_batch=rows, precision=plan.precision, memory=plan.options,
            )  # fmt: skip
            trainer.step()  # the first step allocates optimiser moments and compiles kernels
            self.rate = fastest_rate(trainer.step, self.manifest.optimisation.batch)
        except (RuntimeError, MemoryError) as error:
            known = reason_of(error)
            if known is None or known[0] != "out-of-memory":
                raise
            self.problem, self.out_of_memory = known[1], True
        except LutetiaError as error:
            self.problem, self.out_of_memory = str(error), False
        else:
            return True
        finally:
            trainer = None
            free_cached_memory(self.device)
        return False


def question_digest(question: ProbeQuestion) -> str:
    """Digest of all that the result depends on: manifest, settings, hardware and software versions."""
    parts = [question.manifest.read_bytes().hex(), question.model_dump_json(exclude={"free_disk", "manifest"})]
    parts += [importlib.metadata.version(name) for name in ("torch", "diffusers")]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()
