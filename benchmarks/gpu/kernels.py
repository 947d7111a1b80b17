"""Attention kernels and torch.compile by measurement, as the hardware probe of a node does it."""

from __future__ import annotations

import time

from benchmarks.gpu.runs import OWNER, clips_of, manifest_of
from benchmarks.gpu.site import Site
from benchmarks.gpu.speed import sizes
from lutetia.models.training.kernels.choice import PLAIN_KERNELS, attention_kernels, choose_kernels, compiled_kernels
from lutetia.node.trainer.devices import Accelerators, choose_precision
from lutetia.node.trainer.kernels.measuring import KernelOrder, installed, measure, shapes_of
from lutetia.protocol.schema.manifest import SignedManifest

_KEPT = 5.0
"""Seconds that are left for the end of the part."""


def kernels(site: Site) -> None:
    """Seconds of a training step with each attention kernel, compiled and not, and the node's choice."""
    precision, _ = choose_precision(site.device, "auto", Accelerators.seen())
    chosen = sizes(site)
    for left, (name, (spec, latent, batch, _, _)) in zip(range(len(chosen), 0, -1), chosen.items(), strict=True):
        manifest = manifest_of(spec, latent, clips=len(clips_of(latent, max(batch, 8))), batch=batch, steps=1000)
        path = site.folder / "manifest.json"
        path.write_bytes(SignedManifest.sign(manifest, OWNER).to_bytes())
        order = KernelOrder(manifest=path, shard=0, device=site.device, precision=precision, micro_batch=batch)
        until = time.monotonic() + (site.left - _KEPT) / left
        facts = precision, manifest.steps_per_epoch, shapes_of(manifest, batch)
        found = measure(order, (PLAIN_KERNELS, *attention_kernels(site.device, installed())), until)
        if not site.small:  # a compiler takes minutes on a CPU
            found += measure(order, compiled_kernels(site.device, choose_kernels(found, *facts).kernels), until)
        for trial in found:
            what = f"{name}: step, {trial.kernels.word}"
            detail = f"first step {trial.first_seconds:.3g} s, {precision}, batch {batch}"
            if trial.problem:
                site.put(what, trial.problem)
            else:
                site.put(what, trial.step_seconds, "s", detail)
        site.put(f"{name}: chosen", choose_kernels(found, *facts).reason.removeprefix("kernels: "), "", "of epochs of 1000 steps")
