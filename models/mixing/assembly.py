"""Puts a mixture together from parts that need no weights, and from accepted weights, which are linked. Imports no torch.

`stitch` writes the parts with diffusers and calls `assemble`. A coordinator that holds no model in memory has the parts written
once and then links and describes files only.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lutetia.models.experts.adapters.lora_file import LORA_FILE, write_lora
from lutetia.models.mixing.card import model_card
from lutetia.models.mixing.description import FILE, ExpertEntry, MixtureDocument, MixtureRouting, SignedMixture
from lutetia.models.mixing.layout import CONFIG, DEFAULT_SCHEDULER, INDEX, PIPELINE, WEIGHTS
from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.protocol.schema.canonical import digest_of
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.protocol.schema.model.training_spec import SamplingSpec
from lutetia.protocol.schema.records import AcceptanceRecord
from lutetia.system.files import disk_errors, replace_folder, write_atomic


def expert_folder(shard: int) -> str:
    """The name of a shard's expert in the mixture's folder."""
    return f"expert_{shard:03d}"


def write_mixture(folder: Path, fill: Callable[[Path], MixtureDocument], sign: Callable[[bytes], str] | None) -> str:
    """Replace `folder`, whole or not at all. Returns the digest of its description.

    Args:
        folder: the mixture to replace.
        fill: writes all files but the description into a folder beside it, and describes them.
        sign: signs the description; None leaves it unsigned.

    Raises DiskError: the folder cannot be written.
    """
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for leftover in folder.parent.glob(f".{folder.name}.*.part"):  # of a stitch that was killed
            shutil.rmtree(leftover)
        build = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
        try:
            os.chmod(build, 0o755)
            document = fill(build)
            signed = SignedMixture.sign(document, sign)
            write_atomic(build / FILE, signed.model_dump_json(indent=1).encode())
            replace_folder(build, folder)
        finally:
            shutil.rmtree(build, ignore_errors=True)
    return document.digest


def assemble(
    build: Path,
    manifest: Manifest,
    weights: Mapping[int, Path],
    accepted: Mapping[int, AcceptanceRecord],
    router: Path | None = None,
    routing: MixtureRouting | None = None,
) -> MixtureDocument:
    """Add weights and description to the parts in `build`.

    Args:
        build: the folder with the parts of at least these experts; those of others are removed.
        manifest: the run.
        weights: a checked file for each shard that has an expert.
        accepted: the acceptances of these files, if there are any.
        router: the router's weights, unless they are in `build`.
        routing: how experts are chosen, if that was measured; else as the manifest says.
    """
    known: dict[str, BlobRef] = {}
    for shard in range(len(manifest.shards)):
        if shard not in weights:
            shutil.rmtree(build / expert_folder(shard), ignore_errors=True)
            continue
        if manifest.adapter:
            write_lora(weights[shard], build / expert_folder(shard) / LORA_FILE, manifest.adapter)
            continue
        _link(weights[shard], build / expert_folder(shard) / WEIGHTS)
        if shard in accepted:
            known[f"{expert_folder(shard)}/{WEIGHTS}"] = accepted[shard].weights
    if router:
        _link(router, build / "router" / WEIGHTS)
    template = json.loads((build / "transformer" / CONFIG).read_text())
    (build / "transformer" / CONFIG).unlink()
    (build / "transformer").rmdir()
    entries = [_entry(manifest, shard.index, weights, accepted) for shard in manifest.shards]
    contents = digest_of({name: ref.digest for name, ref in _hashed(build, known).items()})
    sampling = manifest.sampling.model_copy(update={"mode": routing.mode}) if routing else manifest.sampling
    template["mode"], template["temperature"] = sampling.mode, routing.temperature if routing else 1.0
    if template["temperature"] == 1.0:
        del template["temperature"]  # earlier versions do not know it
    template["experts"] = [entry.entry for entry in entries]
    template["digest"] = contents
    (build / "transformer").mkdir()
    (build / "transformer" / CONFIG).write_text(json.dumps(template, indent=2, sort_keys=True) + "\n")
    _write_json(build / INDEX, _model_index(sampling, manifest.latent, build, template["_diffusers_version"]))
    write_atomic(build / "pipeline.py", PIPELINE)
    write_atomic(build / "README.md", model_card(manifest, entries).encode())
    return MixtureDocument(
        name=manifest.name,
        run=manifest.run_id,
        manifest=digest_of(manifest),
        manifest_version=manifest.version,
        latent=manifest.latent,
        sampling=sampling,
        routing=routing,
        experts=tuple(entries),
        network=manifest.expert if manifest.adapter else None,
        files=_hashed(build, known),
    )


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


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


def _model_index(spec: SamplingSpec, latent: LatentSpec, build: Path, diffusers: str) -> dict[str, Any]:
    folder = build / "vae" / CONFIG
    vae = str(json.loads(folder.read_text())["_class_name"]) if folder.exists() else None
    written = {"steps", "guidance", "mode", "scheduler", "embedded_guidance"}
    sampling = spec.model_dump(mode="json", include=written)
    return {
        "_class_name": ["pipeline", "LutetiaPipeline"],
        "_diffusers_version": diffusers,
        "transformer": ["lutetia.models.mixture", "MixtureTransformer"],
        "scheduler": ["diffusers", spec.scheduler.class_name if spec.scheduler else DEFAULT_SCHEDULER],
        "vae": ["diffusers", vae] if vae else [None, None],
        "latent": latent.model_dump(mode="json"),
        "sampling": sampling,
    }


def _hashed(build: Path, known: Mapping[str, BlobRef]) -> dict[str, BlobRef]:
    """Digest and size of every file written so far, by relative path. `known` ones (accepted weights) are not hashed again."""
    names = sorted(path.relative_to(build).as_posix() for path in build.rglob("*") if path.is_file())
    return {name: known.get(name) or ChunkTable.of_file(build / name).ref for name in names}


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    write_atomic(path, json.dumps(document, indent=2).encode())
