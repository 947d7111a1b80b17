"""The trainer's speed and memory against a plain diffusers training loop of the same model, in one process, in turns."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import psutil
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.training_utils import EMAModel

from benchmarks.gpu.runs import clips_of, manifest_of, wan, wan_latent
from benchmarks.gpu.site import Site
from lutetia.models.data.shards import ShardData
from lutetia.models.device import Precision
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.node.trainer.devices import Accelerators, choose_precision
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.latent_spec import LatentSpec

Step = Callable[[], object]
MIDDLE = ExpertSpec(
    config={
        "patch_size": [1, 2, 2], "num_attention_heads": 4, "attention_head_dim": 32, "in_channels": 16, "out_channels": 16,
        "text_dim": 64, "freq_dim": 64, "ffn_dim": 512, "num_layers": 6, "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 64,
    }
)  # fmt: skip
"""An expert of 1.8 million parameters, which a CPU trains in seconds a step."""


def plain_loop(spec: ExpertSpec, latent: LatentSpec, data: ShardData, device: str, precision: Precision, batch: int) -> Step:
    """One step of the loop that diffusers' training examples use.

    Flow matching, fused AdamW, clipped gradients, autocast, and the moving average of `EMAModel`, which the trainer keeps, too.
    Noise and times are drawn on the device.
    """
    torch.manual_seed(0)
    model = cast(Any, WanTransformer3DModel(**cast(Any, spec.config))).to(device).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    average = EMAModel(model.parameters(), decay=0.99, foreach=True)
    autocast = torch.autocast(torch.device(device).type, getattr(torch, precision), enabled=precision != "float32")

    def step() -> float:
        rows = torch.randint(len(data), (batch,))
        latents, text = data.latents[rows].to(device), data.tokens[rows].to(device)
        noise = torch.randn_like(latents)
        sigmas = torch.sigmoid(torch.randn(batch, device=device))
        column = sigmas.view(-1, 1, 1, 1, 1)
        noisy = (1 - column) * latents + column * noise
        with autocast:
            answer = model(noisy, sigmas * 1000, text, return_dict=False)[0]
        loss = (answer.float() - (noise - latents)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        average.step(model.parameters())
        return loss.item()

    return step


def throughput(site: Site) -> None:
    """Samples per second of both, rounds in turns; peak memory of each alone."""
    for name, (spec, latent, batch, steps, rounds) in sizes(site).items():
        precision, _ = choose_precision(site.device, "auto", Accelerators.seen())
        data = clips_of(latent, max(batch, 8))
        manifest = manifest_of(spec, latent, clips=len(data), batch=batch, steps=1000)

        def ours(manifest=manifest, data=data, precision: Precision = precision) -> Step:
            return ExpertTrainer(manifest, 0, data, device=site.device, precision=precision).step

        def plain(spec=spec, latent=latent, data=data, precision: Precision = precision, batch=batch) -> Step:
            return plain_loop(spec, latent, data, site.device, precision, batch)

        for side, make in (("trainer", ours), ("plain loop", plain)):
            site.put(f"{name}: peak memory, {side}", round(peak_of(site, make), 3), "GB", "above what was held before; two steps")
        site.clean()
        _in_turns(site, name, ours(), plain(), batch, steps, rounds, precision)


def peak_of(site: Site, make: Callable[[], Step]) -> float:
    """Most memory that two steps take, building included, GB: of the card, or of a forked process of its own on a CPU."""
    if site.device != "cpu":
        site.clean()
        step = make()
        step()
        step()
        return site.peak() or 0.0
    here, there = multiprocessing.get_context("fork").Pipe()

    def measured() -> None:
        before = psutil.Process().memory_info().rss
        step = make()
        step()
        step()
        there.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)

    child = multiprocessing.get_context("fork").Process(target=measured)
    child.start()
    there.close()
    try:
        return here.recv() / 1e9
    finally:
        child.join()


def _in_turns(site: Site, name: str, ours: Step, plain: Step, batch: int, steps: int, rounds: int, precision: str) -> None:
    """Both warm, then rounds of `steps` steps of each; the ratio is taken within a round."""
    for step in (ours, plain):
        step()
        step()
    rates: dict[str, list[float]] = {"trainer": [], "plain loop": []}
    for number in range(rounds):
        order = [("trainer", ours), ("plain loop", plain)]
        for side, step in order if number % 2 == 0 else reversed(order):
            site.wait()
            began = time.perf_counter()
            for _ in range(steps):
                step()
            site.wait()
            rates[side].append(steps * batch / (time.perf_counter() - began))
    ratios = [a / b for a, b in zip(rates["trainer"], rates["plain loop"], strict=True)]
    detail = f"{precision}, batch {batch}, {rounds} rounds of {steps} steps in turns"
    for side, values in rates.items():
        site.put(f"{name}: {side}", round(statistics.median(values), 3), "samples/s", detail)
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    site.put(f"{name}: trainer ÷ plain loop", round(statistics.median(ratios), 3), "×", f"at least 1.0 wanted; {spread}")


def batches_ahead(site: Site) -> None:
    """Whether the thread that draws noise keeps up: the trainer's step against one whose batch is always there."""
    spec, latent, batch, steps, _ = next(iter(sizes(site).values()))
    data = clips_of(latent, max(batch, 8))
    manifest = manifest_of(spec, latent, clips=len(data), batch=batch, steps=1000)
    trainer = ExpertTrainer(manifest, 0, data, device=site.device)

    def rate() -> float:
        trainer.step()
        site.wait()
        began = time.perf_counter()
        for _ in range(steps):
            trainer.step()
        site.wait()
        return steps / (time.perf_counter() - began)

    drawn = rate()
    kept = trainer._batches.take(trainer.epoch, trainer.step_in_epoch)
    trainer._batches.take = lambda *place: kept  # pyright: ignore[reportAttributeAccessIssue]
    site.put("steps with new batches ÷ steps with one kept batch", round(drawn / rate(), 3), "×", "1: drawing costs nothing")


def sizes(site: Site) -> dict[str, tuple[ExpertSpec, LatentSpec, int, int, int]]:
    """Name of a size: expert, latent, batch, steps of a round, rounds."""
    if site.small:
        latent = wan_latent(3, 8, 8, 8, 64)
        return {"toy": (wan(True, 64), latent, 4, 3, 2)}
    if site.device == "cpu":
        return {"2 M, 8 × 16 × 16": (MIDDLE, wan_latent(8, 16, 16, 16, 64), 8, 6, 6)}
    return {
        "2 M, 8 × 16 × 16": (MIDDLE, wan_latent(8, 16, 16, 16, 64), 16, 30, 5),
        "Wan 1.3 B, 256 px, 33 frames": (wan(False), wan_latent(9, 32, 32, 512), 2, 3, 3),
    }
