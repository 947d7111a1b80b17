"""What the device is, how closely it computes as a CPU does, and whether training resumes on it bit for bit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

import torch

from benchmarks.gpu.runs import AUDITED, FAMILIES, clips_of, manifest_of
from benchmarks.gpu.site import Site, first_line
from lutetia.coordinator.acceptance.audit_comparison import compare
from lutetia.models.device import Precision
from lutetia.models.training.checkpoint_io import write_state, write_weights
from lutetia.models.training.memory.options import MemoryOptions
from lutetia.models.training.replay import ReplayEnd, ReplayParent, made_with, replay
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.node.trainer.devices import Accelerators, choose_device, choose_precision
from lutetia.node.trainer.probe import describe
from lutetia.protocol.schema.model.expert_spec import ExpertSpec

OPTIMIZERS: tuple[Literal["adamw", "muon"], ...] = ("adamw", "muon")
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
FIRST = 4  # steps that short audits replay


def device(site: Site) -> None:
    """Name, memory and precision that a node would choose, and the rate of a matrix product."""
    seen = Accelerators.seen()
    _, why = choose_device(site.device, seen)
    precision, why_precision = choose_precision(site.device, "auto", seen)
    hardware = describe(site.device)
    site.put("device", hardware.name or hardware.device, detail=why)
    site.put("memory", round(hardware.memory_bytes / 1e9, 1), "GB")
    site.put("torch", torch.__version__, detail=f"CUDA {torch.version.cuda}" if site.cuda else "")
    site.put("precision", precision, detail=why_precision)
    size = 512 if site.small else 8192
    x = torch.randn(size, size, device=site.device, dtype=getattr(torch, precision))
    torch.mm(x, x)
    site.wait()
    began, count = time.perf_counter(), 20
    for _ in range(count):
        torch.mm(x, x)
    site.wait()
    rate = count * 2 * size**3 / (time.perf_counter() - began)
    site.put("matrix product", round(rate / 1e12, 3), "TFLOP/s", f"{precision}, {size} × {size}")


def tolerances(site: Site) -> None:
    """Largest relative difference of the losses of six steps from those of the CPU in float32, for every kind of expert."""
    families = list(FAMILIES)[: 1 if site.small else None]
    for name in families:
        for optimizer in OPTIMIZERS[: 1 if site.small else None]:
            manifest = manifest_of(ExpertSpec(class_name=name, config=FAMILIES[name]), optimizer=optimizer)
            expected = _losses(ExpertTrainer(manifest, 0, clips_of(), micro_batch=2), 6)
            for precision in PRECISIONS:
                for saving in (False, True):
                    what = f"{name.removesuffix('Transformer3DModel')}, {optimizer}, {precision}{', checkpointing' * saving}"
                    try:
                        trainer = ExpertTrainer(
                            manifest, 0, clips_of(), device=site.device, precision=precision, micro_batch=2,
                            memory=MemoryOptions(checkpointing=saving),
                        )  # fmt: skip
                        site.put(what, _apart(_losses(trainer, 6), expected), "relative", "six losses against the CPU in float32")
                    except (RuntimeError, TypeError, ValueError) as error:
                        site.put(what, "failed", detail=first_line(error))


def audits(site: Site) -> None:
    """An epoch on the device, replayed on the CPU and on the device again: what docs/explanation/audits.md calls assumed."""
    steps = 4 if site.small else 32
    for optimizer in OPTIMIZERS[: 1 if site.small else None]:
        manifest = manifest_of(AUDITED, optimizer=optimizer, steps=steps)
        for precision in PRECISIONS[: 1 if site.small else None]:
            trainer = ExpertTrainer(manifest, 0, clips_of(), device=site.device, precision=precision)
            _losses(trainer, steps)
            snapshot = trainer.snapshot()
            end = ReplayEnd(site.folder / "weights", site.folder / "state")
            write_weights(snapshot, end.weights)
            write_state(snapshot, end.state, ema=False)
            author = made_with(trainer.device.type, precision, trainer.micro_batch)
            ways: dict[str, tuple[str, Precision, int | None]] = {
                "on the CPU": ("cpu", precision, None),
                "on the CPU in float32": ("cpu", "float32", None),
                "on the device again": (site.device, precision, None),
                "on the device, micro-batch 1": (site.device, precision, 1),
            }
            for name, (where, how, micro_batch) in ways.items():
                if name == "on the CPU in float32" and precision == "float32":
                    continue
                again = replay(
                    manifest, 0, clips_of(), ReplayParent(0), steps, end=end, device=where, precision=how, micro_batch=micro_batch
                )  # fmt: skip
                what, drift = f"{optimizer} in {precision}, replayed {name}", again.drift or 0.0
                site.put(
                    f"{what}: first losses", _apart(again.losses[:FIRST], snapshot.trace[:FIRST]), "relative", f"{FIRST} steps"
                )
                site.put(f"{what}: losses", _apart(again.losses, snapshot.trace), "relative", f"{steps} steps")
                verdict = compare(snapshot.trace, again.losses, drift, author, again.made)
                site.put(f"{what}: drift", drift, "", f"{verdict.outcome}: {verdict.text.split('(')[-1].rstrip(')')}"[:200])


def resume(site: Site) -> None:
    """A trainer that is restored from its local state against one that goes on."""
    manifest = manifest_of(ExpertSpec(config=FAMILIES["WanTransformer3DModel"]))
    for precision in PRECISIONS:
        whole = ExpertTrainer(manifest, 0, clips_of(), device=site.device, precision=precision)
        _losses(whole, 5)
        write_state(whole.snapshot(), site.folder / "local")
        resumed = ExpertTrainer(manifest, 0, clips_of(), device=site.device)
        resumed.restore(0, local=site.folder / "local")
        ours, theirs = _losses(resumed, 5), _losses(whole, 5)
        same = "bit-equal" if ours == theirs else "differs"
        site.put(f"five steps after a restart in {precision}", same, detail=f"largest difference {_apart(ours, theirs):.1e}")


def _losses(trainer: ExpertTrainer, steps: int) -> list[float]:
    return [trainer.step() for _ in range(steps)]


def _apart(losses: Sequence[float], others: Sequence[float]) -> float:
    return max(abs(a - b) / max(abs(a), abs(b), 1e-12) for a, b in zip(losses, others, strict=True))
