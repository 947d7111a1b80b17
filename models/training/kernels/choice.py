"""Which attention kernel a trainer uses, and whether it compiles the expert's blocks: a pure decision from measured steps.

Another kernel takes the sums of the same products in another order, as another micro-batch does, and compiled code also fuses
operations. So neither changes what is computed, and both change its last bits. A way is taken only where its losses on this
machine agree with the plain way's within a share of what an audit allows two machines, where it is faster by more than times
vary, and where what compiling costs is saved again within an epoch. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import Field

from lutetia.models.device import Precision
from lutetia.protocol.schema.canonical import Frozen

Attention = Literal["torch", "flash", "efficient", "cudnn", "math", "flash-attn", "xformers"]
"""Whose kernel: what torch chooses, one of torch's own, or one of the package of this name, through diffusers."""
KernelChoice = Literal["auto", "plain", "measured"]
"""The setting: auto measures on cards alone."""

LEAST_GAIN = 0.05
"""Share of a step's time that a way must save to be taken: medians of so few steps vary by about as much."""
LOSSES_APART: dict[Precision, float] = {"float32": 2.5e-5, "bfloat16": 5e-4, "float16": 5e-4}
"""Most relative difference of a step's loss from the plain way's: a quarter of what an audit calls valid between two processors.

The rest is left to differences between machines. float16 is audited as bfloat16.
"""
PACKAGES: Mapping[Attention, str] = {"flash-attn": "flash_attn", "xformers": "xformers"}
"""The packages with attention kernels, as they are imported."""
_OF_TORCH: dict[str, tuple[Attention, ...]] = {"cpu": ("math",), "cuda": ("flash", "efficient", "cudnn", "math")}
_COMPILED = {"cpu", "cuda", "xpu"}
COMPILED, GRAPHS = "compiled", "graphs"


class Kernels(Frozen):
    """How a step is computed. The defaults are the plain way."""

    attention: Attention = Field(default="torch", description="Whose attention kernel; torch: what torch chooses")
    compiled: bool = Field(default=False, description="Whether the expert's blocks are compiled by torch.compile")
    graphs: bool = Field(
        default=False, description="Whether compiled blocks are launched as CUDA graphs: small experts are bound by launches"
    )

    @property
    def word(self) -> str:
        """In records and files: plain, or for instance `flash compiled`."""
        names = [self.attention] * (self.attention != "torch") + [COMPILED] * self.compiled + [GRAPHS] * self.graphs
        return " ".join(names) or "plain"


PLAIN_KERNELS = Kernels()


def read_kernels(word: object) -> Kernels:
    """Kernels from their word. The plain way for one that this version does not know."""
    names = word.split() if isinstance(word, str) else []
    attention: Attention = next((name for name in get_args(Attention) if name in names), "torch")
    compiled = COMPILED in names
    return Kernels(attention=attention, compiled=compiled, graphs=compiled and GRAPHS in names)


def reproduced(word: str, own: Kernels) -> Kernels:
    """The kernels of a replay: the author's where this machine's own measurements chose the same, else the plain way.

    What an author says of itself so never makes an auditor compile, or use a kernel that it has not tried.
    """
    return own if own.word == word else PLAIN_KERNELS


class KernelTrial(Frozen):
    """What some steps with some kernels showed."""

    kernels: Kernels = Field(description="The way")
    first_seconds: float = Field(default=0.0, description="Seconds of the first step, compilation included")
    step_seconds: float = Field(default=0.0, description="Seconds of a later step, median")
    losses: tuple[float, ...] = Field(default=(), description="Loss of each step, from the same start on the same clips")
    problem: str = Field(default="", description="Why it cannot be used; empty: it can")


@dataclass(frozen=True)
class KernelFinding:
    """The chosen kernels, and why. `step_seconds`: of a step with them; None: not measured."""

    kernels: Kernels
    reason: str
    step_seconds: float | None = None


def attention_kernels(device: str, packages: Sequence[str]) -> list[Kernels]:
    """The attention kernels to try beside the plain way, uncompiled.

    Args:
        device: cpu, mps, cuda or xpu, with or without a number.
        packages: names of importable packages.
    """
    kind = device.partition(":")[0]
    outside: list[Attention] = [name for name, package in PACKAGES.items() if kind == "cuda" and package in packages]
    return [Kernels(attention=name) for name in (*_OF_TORCH.get(kind, ()), *outside)]


def compiled_kernels(device: str, best: Kernels) -> list[Kernels]:
    """The compiled ways to try once the best attention kernel is known; those with it come first, on CUDA also as graphs."""
    kind = device.partition(":")[0]
    if kind not in _COMPILED:
        return []
    ways = ({"compiled": True}, *([{"compiled": True, "graphs": True}] if kind == "cuda" else ()))
    return [kernels.model_copy(update=way) for kernels in dict.fromkeys((best, PLAIN_KERNELS)) for way in ways]


def choose_kernels(trials: Sequence[KernelTrial], precision: Precision, steps: int, shapes: int) -> KernelFinding:
    """The fastest way that agrees with the plain one.

    Args:
        trials: what was measured, the plain way among it.
        precision: of the forward pass.
        steps: of an epoch. What compiling costs must be saved within it.
        shapes: how many shapes of tensors a run has; each is compiled once.
    """
    plain = next((trial for trial in trials if trial.kernels == PLAIN_KERNELS), None)
    if plain is None or plain.problem:
        why = plain.problem if plain else "no time"
        return KernelFinding(PLAIN_KERNELS, f"kernels: plain, because the plain way could not be measured: {why}")
    best, notes = plain, []
    for trial in trials:
        if trial is plain:
            continue
        refused = _refused(trial, plain, precision, steps, shapes)
        if refused is None and trial.step_seconds < best.step_seconds:
            best = trial
        notes.append(f"{trial.kernels.word}: {refused or f'{trial.step_seconds:.3g} s'}")
    listed = f"; {', '.join(notes)}" if notes else ""
    reason = f"kernels: {best.kernels.word}, {best.step_seconds:.3g} s a step (plain: {plain.step_seconds:.3g} s{listed})"
    return KernelFinding(best.kernels, reason, best.step_seconds)


def _refused(trial: KernelTrial, plain: KernelTrial, precision: Precision, steps: int, shapes: int) -> str | None:
    """Why a way is not taken, if it is not."""
    if trial.problem:
        return trial.problem
    apart = max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(trial.losses, plain.losses, strict=True))
    if apart > LOSSES_APART[precision]:
        return f"its losses are {apart:.1e} from the plain way's, at most {LOSSES_APART[precision]:.1e} is allowed"
    saved = plain.step_seconds - trial.step_seconds
    if saved < LEAST_GAIN * plain.step_seconds:
        return f"{trial.step_seconds:.3g} s" + (f", less than {LEAST_GAIN:.0%} faster" if saved > 0 else "")
    cost = shapes * (trial.first_seconds - plain.first_seconds)
    if trial.kernels.compiled and cost > steps * saved:
        return f"{trial.step_seconds:.3g} s, but compiling takes {cost:.0f} s and saves {steps * saved:.0f} s in an epoch"
    return None
