"""Training speed of a node compared with a bare loop of the same model, and how soon a new node trains."""

from __future__ import annotations

import asyncio
import time

import torch

from benchmarks.report import Row
from benchmarks.swarm import Site, site
from lutetia.models.experts.families import build_expert, call_expert

ROUNDS = 2
SECONDS = 30.0
BARE_STEPS = 150


def _bare(place: Site) -> float:
    """Samples per second of a hand-written loop: the same expert, batch and AdamW, one thread."""
    torch.set_num_threads(1)
    manifest, data = place.manifest, place.data
    model, batch = build_expert(manifest.expert, seed=0), manifest.optimisation.batch
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    start = 0.0
    for step in range(BARE_STEPS + 5):
        if step == 5:  # the first steps warm up
            start = time.perf_counter()
        rows = torch.randint(len(data.latents), (batch,))
        x0, noise, t = data.latents[rows], torch.randn(batch, *manifest.latent.shape), torch.rand(batch)
        column = t.view(-1, 1, 1, 1, 1)
        answer = call_expert(model, (1 - column) * x0 + column * noise, t, data.tokens[rows])
        loss = (answer - (noise - x0)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return BARE_STEPS * batch / (time.perf_counter() - start)


async def _under_daemon(place: Site, state) -> float:
    """Samples per second of wall time over SECONDS, including checkpoints and their publication."""
    first = await place.until(state, lambda status: status.get("step"))
    start = time.perf_counter()
    await asyncio.sleep(SECONDS)
    last = await place.until(state, lambda status: status.get("samples"))
    return (last["samples"] - first["samples"]) / (time.perf_counter() - start)


async def _measure() -> list[Row]:
    ratios, bare, daemon, firsts = [], [], [], []
    settings = {
        "optimisation": {"optimizer": "adamw", "batch": 8}, "samples_per_shard": 480_000, "checkpoint_samples": 960,
        "timing": {"heartbeat": 2.0, "tenure": 60.0},
    }  # fmt: skip
    async with site(**settings) as place:
        for number in range(ROUNDS):
            bare.append(await asyncio.to_thread(_bare, place))
            joined = time.perf_counter()
            state = await place.join(f"worker-{number}")
            await place.until(state, lambda status: status.get("step"))
            firsts.append(time.perf_counter() - joined)
            daemon.append(await _under_daemon(place, state))
            await place.swarm.stop(f"worker-{number}")
            ratios.append(daemon[-1] / bare[-1])
    return [
        Row.of("samples/s under the daemon ÷ bare loop", ratios, "×", "≥ 0.98", "the demo's expert, one thread, alternating"),
        Row.of("under the daemon, publishing included", daemon, "samples/s"),
        Row.of("bare loop", bare, "samples/s"),
        Row.of("process start to first training step", firsts, "s", "≤ 10 s", "join, claim, sync, torch import"),
    ]


def run() -> list[Row]:
    return asyncio.run(_measure())
