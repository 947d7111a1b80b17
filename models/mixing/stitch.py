"""Stitching: write accepted experts and the router as one diffusers folder, which is replaced as a whole.

model_index.json   pipeline and components, as diffusers reads them
expert_000/ …      one stock diffusers model each, which loads alone, or an adapter in diffusers' LoRA layout
transformer/       the mixture's config: experts, routing
router/            VideoRouter
scheduler/         that of the run's pipeline, or FlowMatchEulerDiscreteScheduler
vae/               the autoencoder, if it is built in or a local folder; a hub id stays a reference
pipeline.py        two lines by which diffusers finds the pipeline class, the same in every mixture
mixture.json       origin, digests, signature
README.md          the model card: base, data, recipe, lineage, licences, and how to load it
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from lutetia.models.data.encode.latents import demo_autoencoder
from lutetia.models.experts.families import build_meta, family_of
from lutetia.models.mixing.assembly import assemble, expert_folder, write_mixture
from lutetia.models.mixing.description import ExpertKind, MixtureDocument, MixtureRouting
from lutetia.models.mixing.layout import CONFIG, is_known
from lutetia.models.mixing.router import VideoRouter, read_router
from lutetia.models.mixture import MixtureTransformer
from lutetia.models.training.checkpoint_checks import check_weights
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.protocol.schema.model.training_spec import SamplingSpec
from lutetia.protocol.schema.records import AcceptanceRecord
from lutetia.system.errors import ConfigError

log = logging.getLogger(__name__)


def stitch(
    folder: Path,
    manifest: Manifest,
    weights: Sequence[Path],
    router: Path | VideoRouter | None,
    accepted: Sequence[AcceptanceRecord] = (),
    sign: Callable[[bytes], str] | None = None,
    routing: MixtureRouting | None = None,
) -> str:
    """Write a mixture, whole or not at all. Returns the digest of its description.

    Weights are hard-linked if the file system can do that, so stitching copies nothing large.

    Args:
        folder: the mixture to replace.
        manifest: the run.
        weights: one checked file per entry of `accepted`; without `accepted`, one per shard.
        router: a model, a file of `write_router`, or None for a run of one shard.
        accepted: the acceptances of the checkpoints. A shard without one is left out and never routed to.
        sign: signs the description; None leaves it unsigned.
        routing: how experts are chosen, if that was measured; else as the manifest says.

    Raises:
        CheckpointMisfit: weights do not fit their shard's expert.
        ConfigError: weights or the router are missing.
        DiskError: the folder cannot be written.
    """
    shards = [record.shard for record in accepted] if accepted else list(range(len(manifest.shards)))
    if len(weights) != len(shards) or not shards:
        raise ConfigError(f"a mixture needs one weights file per accepted expert: {len(shards)} expected, {len(weights)} given")
    if isinstance(router, Path):
        router = read_router(manifest, router)
    if router is None and len(manifest.shards) > 1:
        raise ConfigError(f"a mixture of {len(manifest.shards)} shards needs a router; train it first")
    files, given, network = dict(zip(shards, weights, strict=True)), {a.shard: a for a in accepted}, router
    return write_mixture(folder, lambda build: _fill(build, manifest, files, network, given, routing), sign)


def _fill(
    build: Path,
    manifest: Manifest,
    weights: Mapping[int, Path],
    router: VideoRouter | None,
    accepted: Mapping[int, AcceptanceRecord],
    routing: MixtureRouting | None,
) -> MixtureDocument:
    for shard, path in weights.items():
        check_weights(path, manifest.expert_of(shard), None)
    write_parts(build, manifest, list(weights), router)
    if router is not None:
        router.save_pretrained(build / "router")
    return assemble(build, manifest, weights, accepted, routing=routing)


def write_parts(build: Path, manifest: Manifest, shards: Sequence[int], router: VideoRouter | None) -> None:
    """Write everything of a mixture that needs no weights into the folder `build`; `assemble` does the rest without torch.

    Args:
        build: an empty folder.
        manifest: the run.
        shards: the shards whose experts will be there.
        router: a router of the run, trained or not; None: the run has one shard.
    """
    for shard in shards:
        (build / expert_folder(shard)).mkdir()
        if manifest.adapter is None:
            model = build_meta(manifest.expert_of(shard))
            assert isinstance(model, ConfigMixin)
            model.save_config(build / expert_folder(shard))
    if router is not None:
        router.save_config(build / "router")
    _write_vae(build / "vae", manifest.latent)
    build_scheduler(manifest.sampling).save_pretrained(build / "scheduler")
    _write_transformer(build / "transformer", manifest)


def build_scheduler(sampling: SamplingSpec) -> Any:
    """The scheduler that `sampling` names. Raises ConfigError if diffusers refuses its configuration."""
    spec = sampling.scheduler
    if spec is None:
        return FlowMatchEulerDiscreteScheduler(shift=sampling.time_shift)
    try:
        return getattr(diffusers, spec.class_name).from_config(spec.config)
    except (TypeError, ValueError, ArithmeticError, NotImplementedError) as error:  # what the constructors of schedulers raise
        raise ConfigError(f"{spec.class_name} refuses its configuration: {error}; correct sampling.scheduler") from error


def _write_vae(folder: Path, latent: LatentSpec) -> None:
    """Copy the autoencoder, unless it stays a reference (a hub id) or there is none (pixels)."""
    source = demo_autoencoder() if latent.vae == "builtin:demo" else Path(latent.vae).expanduser()
    if not (source / CONFIG).is_file():
        if Path(latent.vae).is_absolute():
            log.warning("autoencoder %s is not on this machine: stitching without it; copy it there", latent.vae)
        return
    folder.mkdir()
    for path in source.iterdir():
        if is_known(f"{folder.name}/{path.name}"):
            shutil.copyfile(path, folder / path.name)


def _write_transformer(folder: Path, manifest: Manifest) -> None:
    """The mixture's config with all experts and no digest; `assemble` fills both in."""
    first = manifest.expert_of(0)
    config = getattr(build_meta(first), "config", None)
    specs = [manifest.expert_of(shard.index) for shard in manifest.shards]
    MixtureTransformer(
        experts=[
            {"folder": expert_folder(shard), **spec.model_dump(mode="json", include=set(ExpertKind.model_fields))}
            for shard, spec in enumerate(specs)
        ],
        mode=manifest.sampling.mode,
        in_channels=manifest.latent.channels,
        patch_size=family_of(first.class_name).patch(config),
        text_conditioned=manifest.router.text_conditioned,
        digest="",
        interface=first.class_name if first.inputs else None,
    ).save_config(folder)
