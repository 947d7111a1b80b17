"""Stitching: write accepted experts and the router as one diffusers folder, which is replaced as a whole.

model_index.json   pipeline and components, as diffusers reads them
expert_000/ …      one stock diffusers model each, which loads alone
transformer/       the mixture's config: experts, routing
router/            VideoRouter
scheduler/         FlowMatchEulerDiscreteScheduler
vae/               the autoencoder, if it is built in or a local folder; a hub id stays a reference
pipeline.py        two lines by which diffusers finds the pipeline class, the same in every mixture
mixture.json       origin, digests, signature
README.md          how to load it
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import nn

from lutetia.models.data.encode.latents import demo_autoencoder
from lutetia.models.experts.families import build_meta, family_of
from lutetia.models.mixing.description import FILE, ExpertEntry, MixtureDocument, SignedMixture
from lutetia.models.mixing.layout import CONFIG, INDEX, PIPELINE, WEIGHTS, is_known
from lutetia.models.mixing.router import VideoRouter, read_router
from lutetia.models.mixture import MixtureTransformer
from lutetia.models.training.checkpoint_checks import check_weights
from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.protocol.schema.canonical import digest_of
from lutetia.protocol.schema.manifest import BlobRef, ExpertSpec, LatentSpec, Manifest
from lutetia.protocol.schema.records import AcceptanceRecord
from lutetia.system.errors import ConfigError
from lutetia.system.files import disk_errors, replace_folder, write_atomic

log = logging.getLogger(__name__)

_README = """---
library_name: diffusers
pipeline_tag: text-to-video
tags: [decentralized-diffusion-model, lutetia]
---
# {name}

A mixture of {count} experts for text-to-video. Each was trained alone, on one shard of the data (run `{run}`).

```python
from lutetia.models.pipeline import LutetiaPipeline  # needs: pip install lutetia

pipe = LutetiaPipeline.from_pretrained("path/to/this/folder")
frames = pipe(["{prompt}"], seed=0).frames  # float32 in 0…1, [1, {frames}, {height}, {width}, 3]
```

No code of this folder is run. Every expert also loads alone, for instance
`diffusers.{class_name}.from_pretrained("path/to/this/folder/{expert}")`.
"""


def stitch(
    folder: Path,
    manifest: Manifest,
    weights: Sequence[Path],
    router: Path | VideoRouter | None,
    accepted: Sequence[AcceptanceRecord] = (),
    sign: Callable[[bytes], str] | None = None,
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
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for leftover in folder.parent.glob(f".{folder.name}.*.part"):  # of a stitch that was killed
            shutil.rmtree(leftover)
        build = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
        try:
            os.chmod(build, 0o755)
            document = _fill(build, manifest, dict(zip(shards, weights, strict=True)), router, {a.shard: a for a in accepted})
            signed = SignedMixture.sign(document, sign)
            write_atomic(build / FILE, signed.model_dump_json(indent=1).encode())
            replace_folder(build, folder)
        finally:
            shutil.rmtree(build, ignore_errors=True)
    return document.digest


def _fill(
    build: Path,
    manifest: Manifest,
    weights: Mapping[int, Path],
    router: nn.Module | None,
    accepted: Mapping[int, AcceptanceRecord],
) -> MixtureDocument:
    known: dict[str, BlobRef] = {}
    for shard, path in weights.items():
        _write_expert(build / expert_folder(shard), manifest.expert_of(shard), path)
        if shard in accepted:
            known[f"{expert_folder(shard)}/{WEIGHTS}"] = accepted[shard].weights
    if isinstance(router, VideoRouter):
        router.save_pretrained(build / "router")
    vae = _write_vae(build / "vae", manifest.latent)
    FlowMatchEulerDiscreteScheduler(shift=manifest.sampling.time_shift).save_pretrained(build / "scheduler")
    entries = [_entry(manifest, shard.index, weights, accepted) for shard in manifest.shards]
    contents = digest_of({name: ref.digest for name, ref in _hashed(build, known).items()})
    _write_transformer(build / "transformer", manifest, entries, contents)
    _write_json(build / INDEX, _model_index(manifest, vae))
    write_atomic(build / "pipeline.py", PIPELINE)
    write_atomic(build / "README.md", _readme(manifest, entries).encode())
    return MixtureDocument(
        name=manifest.name,
        run=manifest.run_id,
        manifest=digest_of(manifest),
        manifest_version=manifest.version,
        latent=manifest.latent,
        sampling=manifest.sampling,
        experts=tuple(entries),
        files=_hashed(build, known),
    )


def expert_folder(shard: int) -> str:
    """The name of a shard's expert in the mixture's folder."""
    return f"expert_{shard:03d}"


def _write_expert(folder: Path, spec: ExpertSpec, weights: Path) -> None:
    check_weights(weights, spec)
    folder.mkdir()
    model = build_meta(spec)
    assert isinstance(model, ConfigMixin)
    model.save_config(folder)
    _link(weights, folder / WEIGHTS)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _write_vae(folder: Path, latent: LatentSpec) -> str | None:
    """Copy the autoencoder. Returns its class name, or None if it stays a reference (a hub id) or there is none (pixels)."""
    source = demo_autoencoder() if latent.vae == "builtin:demo" else Path(latent.vae).expanduser()
    if not (source / CONFIG).is_file():
        if Path(latent.vae).is_absolute():
            log.warning("autoencoder %s is not on this machine: stitching without it; copy it there", latent.vae)
        return None
    folder.mkdir()
    for path in source.iterdir():
        if is_known(f"{folder.name}/{path.name}"):
            shutil.copyfile(path, folder / path.name)
    return str(json.loads((folder / CONFIG).read_text())["_class_name"])


def _write_transformer(folder: Path, manifest: Manifest, entries: Sequence[ExpertEntry], contents: str) -> None:
    first = manifest.expert_of(0)
    config = getattr(build_meta(first), "config", None)
    MixtureTransformer(
        experts=[entry.entry for entry in entries],
        mode=manifest.sampling.mode,
        in_channels=manifest.latent.channels,
        patch_size=family_of(first.class_name).patch(config),
        text_conditioned=manifest.router.text_conditioned,
        digest=contents,
    ).save_config(folder)


def _entry(manifest: Manifest, shard: int, weights: Mapping[int, Path], accepted: Mapping[int, AcceptanceRecord]) -> ExpertEntry:
    spec, record = manifest.expert_of(shard), accepted.get(shard)
    return ExpertEntry(
        name=manifest.shards[shard].name,
        folder=expert_folder(shard) if shard in weights else None,
        class_name=spec.class_name,
        prediction=spec.prediction,
        noise_schedule=spec.noise_schedule,
        betas=spec.betas,
        inputs=spec.inputs,
        prior=manifest.shards[shard].prior,
        epoch=record.epoch if record else 0,
        samples=record.samples if record else 0,
        checkpoint=record.checkpoint if record else None,
    )


def _model_index(manifest: Manifest, vae: str | None) -> dict[str, Any]:
    sampling = manifest.sampling.model_dump(mode="json", include={"steps", "guidance", "mode"})
    return {
        "_class_name": ["pipeline", "LutetiaPipeline"],
        "_diffusers_version": diffusers.__version__,
        "transformer": ["lutetia.models.mixture", "MixtureTransformer"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "vae": ["diffusers", vae] if vae else [None, None],
        "latent": manifest.latent.model_dump(mode="json"),
        "sampling": sampling,
    }


def _readme(manifest: Manifest, entries: Sequence[ExpertEntry]) -> str:
    first = next(entry for entry in entries if entry.folder)
    latent = manifest.latent
    return _README.format(
        name=manifest.name,
        count=sum(entry.folder is not None for entry in entries),
        run=manifest.run_id,
        prompt=manifest.sampling.prompts[0] if manifest.sampling.prompts else "a prompt",
        frames=latent.pixel_frames,
        height=latent.pixel_height,
        width=latent.pixel_width,
        class_name=first.class_name,
        expert=first.folder,
    )


def _hashed(build: Path, known: Mapping[str, BlobRef]) -> dict[str, BlobRef]:
    """Digest and size of every file written so far, by relative path. `known` ones (accepted weights) are not hashed again."""
    names = sorted(path.relative_to(build).as_posix() for path in build.rglob("*") if path.is_file())
    return {name: known.get(name) or ChunkTable.of_file(build / name).ref for name in names}


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    write_atomic(path, json.dumps(document, indent=2).encode())
