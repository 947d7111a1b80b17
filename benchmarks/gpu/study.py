"""The study's headline at the size of a GPU, with nothing but torch: no swarm, no video files.

Clips are drawn into memory, clustered by their features, and a monolith, a monolith at an expert's batch and a mixture train on
them side by side, each expert in a process of its own, on equal FLOPs (docs/studies/h200.toml). Held-out losses are figures as
soon as an arm reaches a checkpoint. At the end, or shortly before the time limit, the newest complete checkpoints are sampled.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.gpu.runs import NO_BLOB, OWNER
from benchmarks.gpu.site import Site, first_line, processes
from lutetia.models.data.cluster.kmeans import cluster
from lutetia.models.data.encode.features import BuiltinFeatures, Joiner
from lutetia.models.data.encode.text import WordEncoder
from lutetia.models.data.ingest.synthetic import draw, plan
from lutetia.models.data.shards import ShardData
from lutetia.models.device import Precision
from lutetia.models.metrics.clips import ClipSet
from lutetia.models.metrics.evaluator import Evaluator
from lutetia.models.mixing.router_training import train_router
from lutetia.models.mixing.stitch import stitch
from lutetia.models.pipeline import load_pipeline
from lutetia.models.study.config import DrawnClips, StudyConfig
from lutetia.models.study.plan import Training, plan_study, planned_latent
from lutetia.models.training.checkpoint_io import write_weights
from lutetia.models.training.holdout_loss import holdout_loss
from lutetia.models.training.kernels.choice import Kernels
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.models.video_files import to_uint8
from lutetia.node.trainer.devices import Accelerators, choose_precision
from lutetia.node.trainer.kernels.measuring import KernelOrder, kernels_for
from lutetia.protocol.schema.manifest import Manifest, ShardSpec, SignedManifest
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.system.errors import LutetiaError
from lutetia.system.files import read_toml

CONFIG = Path(__file__).resolve().parents[2] / "docs" / "studies" / "h200.toml"
SHARE_TO_TRAIN = 0.75
"""Of the time limit; the rest is for sampling and distances."""
POLL = 0.2


@dataclass(frozen=True)
class Clips:
    """Drawn clips in memory: pixels uint8 [N, F, H, W, 3], as training data, and the cluster of each."""

    frames: torch.Tensor
    data: ShardData
    clusters: np.ndarray

    def of(self, number: int | None) -> ShardData:
        """The clips of one cluster; None: all."""
        return self.data if number is None else self.data.take(np.flatnonzero(self.clusters == number).tolist())


@dataclass(frozen=True)
class Arm:
    """One side: its training by the plan, and its run. `clusters`: the cluster of each shard; None: all clips."""

    training: Training
    manifest: Manifest
    clusters: tuple[int | None, ...]

    @property
    def name(self) -> str:
        return self.training.arm


def study(site: Site) -> None:
    """Monolith, small-batch monolith and mixture on equal FLOPs: held-out loss as it falls, compute multiplier, distance."""
    config = study_config(site)
    latent, train, held_out = make_clips(config)
    arms = make_arms(config, latent, train)
    site.put(
        "clips",
        f"{len(train.data)} to train on, {len(held_out.data)} held out",
        detail=f"clusters of {np.bincount(train.clusters).tolist()}",
    )
    precision, _ = choose_precision(site.device, "auto", Accelerators.seen())
    kernels = choose(site, arms[0], precision)
    trainers = []
    for arm in arms:
        for shard, number in enumerate(arm.clusters):
            data = site.folder / f"clips-{number}.safetensors"
            if not data.exists():
                write_clips(train.of(number), data)
            place = (arm, shard, data, site.device, precision, kernels, site.folder)
            trainers.append(processes(site.device).Process(target=_train, args=place))  # type: ignore[attr-defined]
            trainers[-1].start()
    curves = _watch(site, arms, held_out, trainers)
    for trainer in trainers:
        trainer.terminate()
        trainer.join()
    _multiplier(site, curves)
    for arm in arms:
        if arm.name in curves and site.left > 5:
            try:
                _sample(site, config, arm, len(curves[arm.name]), train, held_out)
            except (LutetiaError, RuntimeError) as error:
                site.put(f"{arm.name}: sampling", "failed", detail=first_line(error))


def study_config(site: Site) -> StudyConfig:
    """The study of docs/studies/h200.toml, or a toy of it."""
    values = read_toml(CONFIG)
    if site.small:
        values |= {"samples": 96, "checkpoints": 2}
        values["clips"] |= {"clips": 240, "size": 16, "frames": 4}
        values["data"] |= {"frames": 4, "height": 16, "width": 16, "experts": 2, "text_tokens": 10}
        values["expert"]["config"] |= {"num_layers": 1, "num_attention_heads": 1, "ffn_dim": 32, "patch_size": [2, 8, 8]}
        values["optimisation"] |= {"batch": 8, "warmup_steps": 2}
        values["router"] |= {"samples": 16, "batch": 8, "hidden": 16, "layers": 1}
        values["sampling"] |= {"steps": 2}
        values["evaluation"] |= {"clips": 20, "curve_clips": 20, "spare": 0, "batch": 10}
        values["evaluation"]["evaluator"] = {"metrics": ["motion"]}
    return StudyConfig.model_validate(values)


def make_clips(config: StudyConfig) -> tuple[LatentSpec, Clips, Clips]:
    """The run's latents, and the clips to train on and to judge by; held-out captions are those of the drawn split."""
    assert isinstance(config.clips, DrawnClips)
    size, frames, count = config.clips.size, config.clips.frames, config.clips.clips
    planned = plan(count, config.clips.seed)
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        pixels = np.stack(pool.starmap(draw, [(clip, frames, size) for clip in planned], chunksize=64))
    kept = np.array([clip.split == "train" for clip in planned])
    captions, kinds = [clip.caption for clip in planned], [clip.kind for clip in planned]
    text = WordEncoder(config.data.text_tokens or 1)
    tokens, pooled = text.encode(captions)
    raw = torch.from_numpy(pixels).movedim(-1, 1).float() / 127.5 - 1
    over = (0, 2, 3, 4)
    mean, std = raw[torch.from_numpy(kept)].mean(over), raw[torch.from_numpy(kept)].std(over)
    latents = (raw - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)
    statistics = {"mean": tuple(mean.tolist()), "std": tuple(std.tolist())}
    latent = planned_latent(config).model_copy(update=statistics)
    features = BuiltinFeatures()
    vectors = np.stack([features.of(clip, one) for clip, one in zip(pixels, latents, strict=True)])
    join = Joiner([vectors[kept], pooled.numpy()[kept]])
    joined = join([vectors, pooled.numpy()])
    keys = [str(number) for number in np.flatnonzero(kept)]
    found = cluster(joined[kept], keys, [""] * len(keys), config.data)
    parts = []
    for chosen, clusters in ((kept, found.labels), (~kept, found.place(joined[~kept]))):
        rows = np.flatnonzero(chosen).tolist()
        data = ShardData(latents, tokens, pooled, captions, kinds).take(rows)
        parts.append(Clips(torch.from_numpy(pixels[chosen]), data, np.asarray(clusters)))
    return latent, *parts


def make_arms(config: StudyConfig, latent: LatentSpec, train: Clips) -> list[Arm]:
    """The headline's two sides and the monolith at an expert's batch, each with a run of its own."""
    wanted = ("monolith", "mixture", "small-batch")
    arms = []
    for training in plan_study(config, latent).trainings:
        if training.arm in wanted:
            clusters = tuple(range(training.experts)) if training.experts > 1 else (None,)
            counts = [len(train.of(number)) for number in clusters]
            shards = tuple(_shard(f"{training.arm} {k}", k, count, sum(counts)) for k, count in enumerate(counts))
            changes = {"batch": training.batch, "learning_rate": training.learning_rate}
            manifest = Manifest(
                name=training.name, owner=OWNER.public_key, coordinators=(OWNER.public_key,), created=1.0, expires=4e9,
                latent=latent, expert=training.expert, shards=shards, samples_per_shard=training.samples_per_shard,
                checkpoint_samples=training.checkpoint_samples, router=config.router, sampling=config.sampling,
                optimisation=config.optimisation.model_copy(update=changes),
            )  # fmt: skip
            arms.append(Arm(training, manifest, clusters))
    return arms


def _shard(name: str, index: int, clips: int, of: int) -> ShardSpec:
    return ShardSpec(index=index, name=name, train=NO_BLOB, holdout=NO_BLOB, clips=clips, holdout_clips=1, prior=clips / of)


def write_clips(clips: ShardData, path: Path) -> None:
    """Write what training needs of the clips, in float16 as shards are."""
    tensors = {"latents": clips.latents, "tokens": clips.tokens, "pooled": clips.pooled}
    save_file({name: tensor.half().contiguous() for name, tensor in tensors.items()}, path)


def read_clips(path: Path) -> ShardData:
    """The clips of `write_clips`; their captions are empty."""
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    count = len(tensors["pooled"])
    return ShardData(tensors["latents"], tensors["tokens"], tensors["pooled"], [""] * count, [""] * count)


def choose(site: Site, arm: Arm, precision: Precision) -> Kernels:
    """The kernels of all arms, as a node's probe chooses them: on a card by a fifth of the time at most."""
    path = site.folder / "manifest.json"
    path.write_bytes(SignedManifest.sign(arm.manifest, OWNER).to_bytes())
    batch = arm.manifest.optimisation.batch
    order = KernelOrder(manifest=path, shard=0, device=site.device, precision=precision, micro_batch=batch)
    found = kernels_for("auto", order, arm.manifest, time.monotonic() + site.left / 5)
    site.put("kernels", found.kernels.word, detail=found.reason.removeprefix("kernels: "))
    return found.kernels


def _train(arm: Arm, shard: int, data: Path, device: str, precision: Precision, kernels: Kernels, folder: Path) -> None:
    """Train one expert to the end of its budget; leaves its weights at every checkpoint."""
    torch.set_num_threads(1)
    trainer = ExpertTrainer(arm.manifest, shard, read_clips(data), device=device, precision=precision, kernels=kernels)
    for epoch in range(arm.manifest.epochs):
        for _ in range(arm.manifest.steps_per_epoch):
            trainer.step()
        write_weights(trainer.snapshot(), _weights(folder, arm, shard, epoch + 1))


def _weights(folder: Path, arm: Arm, shard: int, epoch: int) -> Path:
    return folder / f"{arm.name}-{shard}-{epoch}.safetensors"


def _watch(site: Site, arms: Sequence[Arm], held_out: Clips, trainers: Sequence) -> dict[str, list[tuple[float, float]]]:
    """Score each arm at each checkpoint when all its experts have reached it: arm to (FLOPs, held-out loss)."""
    curves: dict[str, list[tuple[float, float]]] = {}
    while True:
        alive = any(trainer.is_alive() for trainer in trainers)
        for arm in arms:
            epoch = len(curves.get(arm.name, [])) + 1
            files = [_weights(site.folder, arm, shard, epoch) for shard in range(len(arm.clusters))]
            if epoch <= arm.manifest.epochs and all(file.exists() for file in files):
                point = arm.training.flops_at(epoch), _loss(site, arm, files, held_out)
                curves.setdefault(arm.name, []).append(point)
                site.put(f"{arm.name}: held-out loss", round(point[1], 5), "", f"checkpoint {epoch}, {point[0]:.3g} FLOPs")
                (site.lines.parent / "gpu-curves.json").write_text(json.dumps(curves, indent=1))
        complete = all(len(curves.get(arm.name, [])) == arm.manifest.epochs for arm in arms)
        if complete or not alive or site.left < (1 - SHARE_TO_TRAIN) * site.seconds:
            return curves
        # checkpoints are files, and nothing else tells of a new one
        wait([trainer.sentinel for trainer in trainers if trainer.is_alive()], POLL)


def _loss(site: Site, arm: Arm, files: Sequence[Path], held_out: Clips) -> float:
    """Mean over the held-out clips, each scored by the expert of its cluster, on the same draw of noise and times."""
    total, count = 0.0, 0
    for shard, number in enumerate(arm.clusters):
        data = held_out.of(number)
        if len(data):
            found = holdout_loss(arm.manifest, shard, files[shard], data, draw="study", noises=2, device=site.device)
            total, count = total + found.loss * len(data), count + len(data)
    return total / count


def _multiplier(site: Site, curves: dict[str, list[tuple[float, float]]]) -> None:
    """Compute multiplier: the FLOPs of each opponent over those at which the mixture has its last loss, by log-linear reading."""
    for opponent in ("monolith", "small-batch"):
        if opponent in curves and "mixture" in curves:
            flops, loss = curves[opponent][-1]
            needed = flops_to_reach(curves["mixture"], loss)
            words = f"the mixture reaches loss {loss:.4f} of {opponent} after {{}} of its {flops:.3g} FLOPs"
            if needed is None:
                last = curves["mixture"][-1][1]
                site.put(
                    f"compute multiplier against {opponent}", "below 1", "", f"the mixture ends at {last:.4f}, above {loss:.4f}"
                )
            else:
                value = round(flops / needed, 3)
                site.put(f"compute multiplier against {opponent}", value, "×", words.format(f"{needed:.3g}"))


def flops_to_reach(curve: Sequence[tuple[float, float]], loss: float) -> float | None:
    """FLOPs at which a falling curve of (FLOPs, loss) reaches `loss`, between its points in log FLOPs; None: it never does.

    A loss that the first point is below already is reached there, at the latest.
    """
    for (before, high), (after, low) in zip(curve[:-1], curve[1:], strict=True):
        if high > loss >= low:
            share = (high - loss) / (high - low)
            return math.exp(math.log(before) + share * (math.log(after) - math.log(before)))
    return curve[0][0] if curve and curve[0][1] <= loss else None


def _sample(site: Site, config: StudyConfig, arm: Arm, epoch: int, train: Clips, held_out: Clips) -> None:
    """Clips of held-out prompts at the newest complete checkpoint, and their distance from the real ones."""
    files = [_weights(site.folder, arm, shard, epoch) for shard in range(len(arm.clusters))]
    router = None
    if len(arm.clusters) > 1:
        router, report = train_router(arm.manifest, [train.of(number) for number in arm.clusters], seed=0, device=site.device)
        site.put(f"{arm.name}: router accuracy", round(report.accuracy, 3), "", "on its own training clips")
    stitch(site.folder / arm.name, arm.manifest, files, router)
    count = min(config.evaluation.clips, len(held_out.data))
    real = ClipSet(held_out.frames, tuple(held_out.data.captions), tuple(held_out.data.kinds)).take(range(count))
    pipeline, parts = load_pipeline(site.folder / arm.name, device=site.device), []
    for first in range(0, count, config.evaluation.batch):
        prompts = list(real.captions[first : first + config.evaluation.batch])
        parts.append(torch.from_numpy(to_uint8(pipeline(prompts, seed=first, cut_prompts=True).frames)))
    settings = config.evaluation.evaluator.model_copy(update={"device": site.device})
    evaluator = Evaluator(real.take(range(min(100, count))), real, None, settings)
    for name, why in evaluator.left_out.items():
        site.put(f"{arm.name}: {name}", "left out", detail=why[:200])
    for entry in evaluator.evaluate(real.with_frames(torch.cat(parts)), (0,)):
        spread = f"{entry.figure.low:.4g} to {entry.figure.high:.4g}, N = {count}, checkpoint {epoch}"
        site.put(f"{arm.name}: {entry.name}", round(entry.figure.value, 4), "", spread)
