"""Which means a trainer takes to fit a device's memory: a pure decision from what the expert needs.

The plan climbs a ladder and stops at the first step at which one row fits: as set, then bfloat16, checkpointing, moments in eight
bits, the average in main memory, weights in bfloat16. Each step costs more time or changes results more than the one before it.
The micro-batch is the largest that still fits, because a step back costs more than a smaller micro-batch. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from lutetia.models.device import Precision
from lutetia.models.training.memory.options import PLAIN, MemoryOptions
from lutetia.system.errors import HardwareError

GB = 10**9
_CONTEXT = {"cuda": 700 << 20, "xpu": 700 << 20}
"""Bytes of an accelerator that its driver and libraries take before the first tensor."""
_PROCESS = 600 << 20
"""Bytes of main memory that a trainer process takes besides its tensors."""
_FRAGMENTS = 0.05
"""Share of what comes and goes within a step that an allocator loses between tensors."""
_BACKWARD = 1.25
"""Bytes of a block's backward pass over those that it keeps: gradients of its largest tensors besides."""
_SHARES = range(95, 0, -5)
"""Percentages that are tried for what would fit."""
_ADAPTED = 0.02
"""Numbers of an adapter to those of its base: rank 16 on the attention of Wan 2.1 1.3B are 0.8 %."""
_UPDATE = 24
"""Bytes a number that the update of one tensor takes for a moment: gradient, moments and weights in float32, and two more."""


class MemoryShort(HardwareError):
    """The expert does not fit the device. The text says how many GB are missing."""


@dataclass(frozen=True)
class KeptBytes:
    """What autograd keeps: `fixed` whatever the batch, `per_row`, and what the largest block keeps for a row."""

    fixed: int
    per_row: int
    block_per_row: int


@dataclass(frozen=True)
class ExpertFacts:
    """What the memory of an expert depends on. Counts are of numbers."""

    trained: int
    """Numbers that training changes."""
    matrices: int
    """Of which Muon trains."""
    narrow: int
    """Of which weights of linear layers and convolutions, which may be kept in bfloat16."""
    largest: int
    """Numbers of the largest trained tensor; with Muon of all matrices of one shape."""
    frozen_bytes: int
    """Bytes of what is not trained: buffers, and the base of an adapter."""
    kept: Callable[[Precision, bool], KeptBytes]
    """What autograd keeps for a precision, with or without checkpointing."""


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes by what they are for. `host` is in main memory, everything else on the device."""

    weights: int
    gradients: int
    moments: int
    average: int
    activations: int
    workspace: int
    host: int = 0

    @property
    def state(self) -> int:
        return self.weights + self.gradients + self.moments + self.average

    @property
    def device(self) -> int:
        return self.state + self.activations + self.workspace


@dataclass(frozen=True)
class MemoryPlan:
    """How to train an expert on a device."""

    options: MemoryOptions
    precision: Precision
    rows: int
    """Rows per forward pass."""
    need: MemoryNeed | None
    """None where it was not counted."""
    reason: str


def memory_need(facts: ExpertFacts, options: MemoryOptions, precision: Precision, rows: int, device: str) -> MemoryNeed:
    """The bytes that training takes at its peak. `device`: cpu, mps, cuda or xpu, with or without a number."""
    kept = facts.kept(precision, options.checkpointing)
    narrow = facts.narrow if options.weights == "bfloat16" else 0
    packed = facts.trained - facts.matrices if options.moments == "8bit" else 0
    moments = 4 * facts.matrices + 8 * (facts.trained - facts.matrices - packed) + 2 * packed + 2 * packed // 256
    average, cuda = 4 * facts.trained, device.partition(":")[0] in _CONTEXT
    host = average if options.average == "host" and cuda else 0
    block = kept.block_per_row if not options.checkpointing else facts.kept(precision, False).block_per_row
    need = MemoryNeed(
        weights=4 * facts.trained + facts.frozen_bytes, gradients=4 * facts.trained - 2 * narrow, moments=moments,
        average=average - host, activations=(0 if narrow else kept.fixed) + kept.per_row * rows, workspace=0, host=host,
    )  # fmt: skip
    fixed = _CONTEXT.get(device.partition(":")[0], _PROCESS)
    backward = block * rows * (_BACKWARD if options.checkpointing else _BACKWARD - 1)
    work = max(backward, _UPDATE * facts.largest)  # a backward pass is over when weights are updated
    return replace(need, workspace=int(fixed + work + _FRAGMENTS * (need.gradients + need.activations + work)))


Step = tuple[MemoryOptions, Precision, str]


def ladder(precision: Precision, device: str, optimizer: str, *, narrower: bool) -> Iterator[Step]:
    """The steps of the ladder, each with a word for it. `narrower`: whether the precision may be lowered to bfloat16."""
    options, half = PLAIN, precision
    yield options, half, f"{precision} and nothing else"
    if narrower and precision == "float32":
        half = "bfloat16"
        yield options, half, "bfloat16"
    options = options.model_copy(update={"checkpointing": True})
    yield options, half, "checkpointing"
    options = options.model_copy(update={"moments": "8bit"})
    yield options, half, "moments in 8 bits"
    if device.partition(":")[0] in _CONTEXT:
        options = options.model_copy(update={"average": "host"})
        yield options, half, "the average in main memory"
    if half == "bfloat16" and optimizer == "adamw":
        options = options.model_copy(update={"weights": "bfloat16"})
        yield options, half, "weights in bfloat16"


def plan_memory(
    facts: ExpertFacts, memory: int, batch: int, precision: Precision, device: str, optimizer: str = "adamw", *,
    narrower: bool = True, host: int | None = None,
) -> MemoryPlan:  # fmt: skip
    """The first step of the ladder at which one row fits, with the most rows that fit.

    Args:
        facts: of the expert on the run's latents.
        memory: bytes of the device that training may take.
        batch: rows of a training step.
        precision: of the forward pass, as chosen for the device.
        device: cpu, mps, cuda or xpu, with or without a number.
        optimizer: the run's; Muon's momentum and the weights beside it stay in float32.
        narrower: whether bfloat16 may be taken instead of float32.
        host: bytes of main memory beside an accelerator; None: as many as needed.

    Raises MemoryShort, naming the GB that are missing on the last step, and what would fit.
    """
    need, options, used, word = None, PLAIN, precision, ""
    for options, used, word in ladder(precision, device, optimizer, narrower=narrower):
        need = memory_need(facts, options, used, 1, device)
        if need.device <= memory and (host is None or need.host <= host):
            rows = batch
            while (fits := memory_need(facts, options, used, rows, device)).device > memory:
                rows = -(-rows // 2)
            return MemoryPlan(options, used, rows, fits, _reason(fits, rows, memory, word))
    assert need

    def holds(changed: ExpertFacts, options: MemoryOptions = options) -> bool:
        it = memory_need(changed, options, used, 1, device)
        return it.device <= memory and (host is None or it.host <= host)

    if host is not None and need.device <= memory:
        raise MemoryShort(
            f"training takes {need.host / GB:.1f} GB of main memory beside the device, of which {host / GB:.1f} GB are free: "
            f"{(need.host - host) / GB:.1f} GB are missing; {_what_fits(facts, holds)}"
        )
    raise MemoryShort(
        f"training takes {need.device / GB:.1f} GB even with {word}, the device has {memory / GB:.1f} GB: "
        f"{(need.device - memory) / GB:.1f} GB are missing; {_what_fits(facts, holds)}"
    )


def _what_fits(facts: ExpertFacts, fits: Callable[..., bool]) -> str:
    """What less than this expert on these clips would fit, in a clause. `fits`: whether it does, with the last step's options."""
    found: list[str] = []
    if share := next((share for share in _SHARES if fits(_smaller(facts, share / 100))), 0):
        found.append(f"an expert of {share} % of its numbers")
    if share := next((share for share in _SHARES if fits(_shorter(facts, share / 100))), 0):
        found.append(f"clips of {share} % of their latents")
    if facts.frozen_bytes < facts.trained and fits(_adapters(facts), PLAIN.model_copy(update={"checkpointing": True})):
        found.append("adapters on it as a frozen base in bfloat16")
    listed = " or ".join(found)
    return f"what would fit: {listed}" if found else "nothing would fit that is like it; use a device with more memory"


def _smaller(facts: ExpertFacts, share: float) -> ExpertFacts:
    """The same expert with fewer blocks."""

    def kept(precision: Precision, checkpointing: bool) -> KeptBytes:
        whole = facts.kept(precision, checkpointing)
        return KeptBytes(int(whole.fixed * share), int(whole.per_row * share), whole.block_per_row)

    counts = {name: int(getattr(facts, name) * share) for name in ("trained", "matrices", "narrow", "frozen_bytes")}
    return replace(facts, **counts, kept=kept)


def _shorter(facts: ExpertFacts, share: float) -> ExpertFacts:
    """The same expert on smaller or shorter clips."""

    def kept(precision: Precision, checkpointing: bool) -> KeptBytes:
        whole = facts.kept(precision, checkpointing)
        return KeptBytes(whole.fixed, int(whole.per_row * share), int(whole.block_per_row * share))

    return replace(facts, kept=kept)


def _adapters(facts: ExpertFacts) -> ExpertFacts:
    """Adapters on the expert, which keep what it keeps."""
    frozen = 2 * facts.trained + facts.frozen_bytes
    return replace(
        facts, trained=int(_ADAPTED * facts.trained), matrices=0, narrow=0, largest=int(_ADAPTED * facts.largest),
        frozen_bytes=frozen,
    )  # fmt: skip


def _reason(need: MemoryNeed, rows: int, memory: int, word: str) -> str:
    parts = {"weights": need.weights, "gradients": need.gradients, "moments": need.moments, "average": need.average}
    parts |= {"activations": need.activations, "the rest": need.workspace}
    listed = ", ".join(f"{name} {size / GB:.2f}" for name, size in parts.items() if size)
    return f"{need.device / GB:.2f} of {memory / GB:.2f} GB with {word} and {rows} rows a pass ({listed})"
