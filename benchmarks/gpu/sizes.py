"""Real sizes: an expert of 1.3 billion parameters on cards of 24 and 12 GB, and a mixture of two of them that makes clips."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from benchmarks.gpu.runs import OWNER, clips_of, manifest_of, wan, wan_latent
from benchmarks.gpu.site import Site, first_line
from lutetia.cli.local.sampler import MixtureLoader
from lutetia.cli.local.sampling_plan import SamplingPlan
from lutetia.models.device import Precision
from lutetia.models.experts.families import build_expert
from lutetia.models.mixing.layout import WEIGHTS
from lutetia.models.mixing.router import build_router
from lutetia.models.mixing.stitch import stitch
from lutetia.models.tensor_files import write_tensors
from lutetia.models.training.memory.options import MemoryOptions
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.node.trainer.devices import Accelerators, choose_precision
from lutetia.node.trainer.probe import ProbeQuestion, probe
from lutetia.protocol.schema.manifest import SignedManifest
from lutetia.protocol.schema.model.latent_spec import LatentSpec

CARDS = (80, 24, 12)
"""GB that the card is told to have; the first is one without a limit that matters."""


def memory(site: Site) -> None:
    """Peak memory, seconds of a step and of a snapshot; with and without checkpointing."""
    precision, _ = choose_precision(site.device, "auto", Accelerators.seen())
    clips = {"toy": (wan_latent(3, 8, 8, 8, 64), False), "toy, checkpointing": (wan_latent(3, 8, 8, 8, 64), True)}
    if not site.small:
        small, large = wan_latent(9, 32, 32, 512), wan_latent(21, 60, 104, 512)
        clips = {"256 px, 33 frames": (small, False), "256 px, 33 frames, checkpointing": (small, True)}
        clips["480p, 81 frames, checkpointing"] = (large, True)
    for name, (latent, saving) in clips.items():
        site.clean()
        manifest = manifest_of(wan(site.small, latent.text_width), latent, clips=4, batch=2, steps=4)
        try:
            _one_size(site, name, manifest, latent, precision, saving)
        except RuntimeError as error:
            site.put(name, "failed", detail=first_line(error))


def _one_size(site: Site, name: str, manifest, latent: LatentSpec, precision: Precision, saving: bool) -> None:
    trainer = ExpertTrainer(
        manifest,
        0,
        clips_of(latent, 4),
        device=site.device,
        micro_batch=1,
        precision=precision,
        memory=MemoryOptions(checkpointing=saving),
    )
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    trainer.step()
    site.wait()
    began = time.perf_counter()
    trainer.step()
    site.wait()
    detail = f"{parameters / 1e9:.3g} billion parameters, batch 2, micro-batch 1, {precision}"
    site.put(f"{name}: step", round(time.perf_counter() - began, 3), "s", detail)
    if (peak := site.peak()) is not None:
        site.put(f"{name}: peak memory", round(peak, 2), "GB", detail)
    began = time.perf_counter()
    trainer.snapshot()
    site.put(f"{name}: snapshot", round(time.perf_counter() - began, 3), "s")


def small_cards(site: Site) -> None:
    """What the probe says on a card that is told to be of 24 and of 12 GB."""
    latent = wan_latent(3, 8, 8, 8, 64) if site.small else wan_latent(9, 32, 32, 512)
    manifest = manifest_of(wan(site.small, latent.text_width), latent, clips=4, batch=4, steps=4)
    path = site.folder / "manifest.json"
    path.write_bytes(SignedManifest.sign(manifest, OWNER).to_bytes())
    for gigabytes in CARDS if site.cuda else CARDS[:1]:
        site.clean()
        name = f"{gigabytes} GB" if site.cuda else "this device, no limit"
        with told_to_be(site, gigabytes):
            began = time.perf_counter()
            try:
                found = probe(ProbeQuestion(manifest=path, device=site.device, free_disk=1 << 40))
            except RuntimeError as error:
                site.put(name, "failed", detail=first_line(error))
                continue
            seconds = round(time.perf_counter() - began, 1)
        fit = found.shards[0]
        site.put(
            f"{name}: training", round(found.samples_per_second, 3), "samples/s", f"{fit.reason}; probed in {seconds} s"[:200]
        )
        if (peak := site.peak()) is not None:
            site.put(f"{name}: peak memory", round(peak, 2), "GB")


@contextlib.contextmanager
def told_to_be(site: Site, gigabytes: int) -> Iterator[None]:
    """Let this process allocate at most so much of the card."""
    if not site.cuda:
        yield
        return
    whole = torch.cuda.get_device_properties(site.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / whole), site.device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, site.device)


def sampling(site: Site) -> None:
    """Two experts in one mixture folder with one of them in memory: seconds, and the peak in multiples of an expert."""
    folder, expert_bytes = _two_experts(site)
    precision, _ = choose_precision(site.device, "auto", Accelerators.seen())
    expert = expert_bytes / 1e9 / (1 if precision == "float32" else 2)
    site.clean()
    with main_memory_peak() as held:
        loader = MixtureLoader(folder, plan=SamplingPlan(site.device, precision, 1, not site.small))
        for number in (0, 1, 0):
            began = time.perf_counter()
            loader.pipeline.transformer.expert(number)
            site.wait()
            site.put(f"read expert {number}", round(time.perf_counter() - began, 3), "s", f"{expert:.2f} GB in {precision}")
        for mode in ("top1", "full", "sticky"):
            began = time.perf_counter()
            next(loader.generate(["a red ball"], mode=mode, steps=2 if site.small else 8, guidance=3.0))
            site.put(f"a clip by {mode}", round(time.perf_counter() - began, 3), "s", "8 steps with guidance, decoding included")
    peak, what = site.peak(), "of the device"
    if peak is None:
        peak, what = held[0] / 1e9, "of main memory, above what was held before"
    site.put("peak ÷ one expert", round(peak / expert, 2), "×", f"{peak:.3g} GB {what}; at most 1.3 wanted")
    if not site.small and site.device != "cpu":
        _decoder(site)


def _two_experts(site: Site) -> tuple[Path, int]:
    """A stitched mixture of two random experts, and the bytes of one in its file."""
    latent = wan_latent(9, 32, 32, 32, 64) if site.device != "cpu" else wan_latent(3, 8, 8, 8, 64)
    latent = latent.model_copy(update={"vae": "pixels", "channels": 3, "pixel_frames": latent.frames})
    latent = latent.model_copy(update={"pixel_height": latent.height, "pixel_width": latent.width})
    spec, heads = wan(site.small, 64), {}
    if site.device == "cpu":  # 8 or 113 million parameters
        heads = {"num_attention_heads": 12, "attention_head_dim": 64, "ffn_dim": 3072, "num_layers": 12}
    if site.small:
        heads = {"num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 1024, "num_layers": 6}
    spec = spec.model_copy(update={"config": {**spec.config, **heads, "in_channels": 9, "out_channels": 3}})
    manifest, files = manifest_of(spec, latent, shards=2), []
    for number in range(2):
        files.append(site.folder / f"expert{number}")
        write_tensors(files[-1], build_expert(spec, number).state_dict())
    stitch(site.folder / "mixture", manifest, files, build_router(manifest))
    return site.folder / "mixture", (site.folder / "mixture" / "expert_000" / WEIGHTS).stat().st_size


@contextlib.contextmanager
def main_memory_peak() -> Iterator[list[int]]:
    """The most memory that this process held inside the block, mapped files included, bytes above that at its start."""
    process, most, done = psutil.Process(), [0], threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], process.memory_info().rss - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def _decoder(site: Site) -> None:
    """The autoencoder of Wan 2.1 with random weights: one clip of 480p and 81 frames, whole and in tiles."""
    autoencoder = cast(Any, AutoencoderKLWan()).to(site.device).eval()
    for name, tiled in (("whole", False), ("in tiles", True)):
        site.clean()
        (autoencoder.enable_tiling if tiled else autoencoder.disable_tiling)()
        began = time.perf_counter()
        try:
            with torch.no_grad():
                autoencoder.decode(torch.randn(1, 16, 21, 60, 104, device=site.device))
            site.wait()
            peak = site.peak()
            detail = "" if peak is None else f"peak {peak:.1f} GB"
            site.put(f"Wan's decoder, 480p, 81 frames, {name}", round(time.perf_counter() - began, 2), "s", detail)
        except RuntimeError as error:
            site.put(f"Wan's decoder, 480p, 81 frames, {name}", "failed", detail=first_line(error))
