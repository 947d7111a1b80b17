"""The model card of a mixture, its README.md: base, data, recipe, lineage and licences. Pure, without torch.

Names, captions and licences are texts of others: they are written so that none of them can become markup or metadata.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from lutetia.models.mixing.description import ExpertEntry
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.expert_spec import ExpertSpec

UNSTATED = "not stated by the run's owner"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def model_card(manifest: Manifest, entries: Sequence[ExpertEntry]) -> str:
    """The card of a mixture with these experts, in Markdown with the metadata that hubs read."""
    return "\n".join([*_metadata(manifest), *_introduction(manifest, entries), *_base(manifest), *_data(manifest),
                      *_recipe(manifest), *_lineage(manifest, entries), *_licences(manifest), ""])  # fmt: skip


def _metadata(manifest: Manifest) -> Iterator[str]:
    """The YAML head. JSON strings are YAML strings."""
    tags = "decentralized-diffusion-model, lutetia" + (", lora" if manifest.adapter else "")
    yield from ("---", "library_name: diffusers", f"pipeline_tag: {_task(manifest)}", f"tags: [{tags}]")
    if manifest.card and manifest.card.license:
        yield f"license: {json.dumps(manifest.card.license)}"
    if bases := sorted({name for name in map(_hub_base, _specs(manifest)) if name}):
        yield f"base_model: {json.dumps(bases)}"
    yield "---"


def _task(manifest: Manifest) -> str:
    return "image-to-video" if manifest.latent.picture else "text-to-video"


def _introduction(manifest: Manifest, entries: Sequence[ExpertEntry]) -> Iterator[str]:
    first = next(entry for entry in entries if entry.folder)
    latent = manifest.latent
    count = sum(entry.folder is not None for entry in entries)
    prompt = manifest.sampling.prompts[0] if manifest.sampling.prompts else "a prompt"
    size = f"[1, {latent.pixel_frames}, {latent.pixel_height}, {latent.pixel_width}, 3]"
    yield from (f"# {_words(manifest.name)}", "")
    if manifest.card and manifest.card.description:
        yield from (_words(manifest.card.description), "")
    yield f"A mixture of {count} experts for {_task(manifest)}. Each was trained alone, on one shard of the data of run"
    yield from (f"`{manifest.run_id}`.", "")
    base = ', base="folder/of/the/base"' if manifest.adapter else ""
    image = ', image=Image.open("first.png")' if latent.picture else ""
    example = json.dumps(prompt.replace("`", " "), ensure_ascii=False)
    yield from (
        "```python",
        *(("from PIL import Image", "") if latent.picture else ()),
        "from lutetia.models.pipeline import LutetiaPipeline  # needs: pip install lutetia",
        "",
        f'pipe = LutetiaPipeline.from_pretrained("path/to/this/folder"{base})  # or its id on a hub',
        f"frames = pipe([{example}]{image}, seed=0).frames  # float32 in 0…1, {size}",
        "```",
        "",
        "No code of this folder is run.",
    )
    if part := manifest.expert.noise_part:
        span = f"from {part.boundary:g} on" if part.side == "high" else f"below {part.boundary:g}"
        yield f"The experts were trained for {part.side} noise (flow times {span}). The other steps are made by the pipeline's"
        yield 'own transformer, or by a mixture for them: `pipe.pair_with("path/to/it")`.'
    if manifest.adapter:
        second = ", load_into_transformer_2=True" if part and part.side == "low" else ""
        yield f"Every adapter also loads alone into a diffusers pipeline of the base ({first.class_name}), by"
        yield f'`load_lora_weights("path/to/this/folder/{first.folder}"{second})`.'
    else:
        yield "Every expert also loads alone, for instance"
        yield f'`diffusers.{first.class_name}.from_pretrained("path/to/this/folder/{first.folder}")`.'


def _base(manifest: Manifest) -> Iterator[str]:
    yield from ("", "## Base", "")
    for text in dict.fromkeys(map(_origin, _specs(manifest))):
        yield f"- {text}"


def _origin(spec: ExpertSpec) -> str:
    name = f"`{spec.class_name}`"
    if spec.adapter is not None:
        base = spec.adapter.base
        kind = "DoRA" if spec.adapter.dora else "LoRA"
        return f"{name}: {kind} adapters of rank {spec.adapter.rank} on `{_code(base.source)}`, kept in {base.dtype}"
    if spec.init is not None:
        return f"{name}, from given weights: the file of digest `{spec.init.digest}`"
    return f"{name}, from random weights"


def _hub_base(spec: ExpertSpec) -> str | None:
    """The hub id of the model that an expert adapts, if it is one."""
    source = spec.adapter.base.source.partition("@")[0] if spec.adapter else ""
    name = "/".join(source.split("/")[:2])
    return name if _HUB_ID.fullmatch(name) else None


def _data(manifest: Manifest) -> Iterator[str]:
    latent = manifest.latent
    clips = sum(shard.clips for shard in manifest.shards)
    yield from ("", "## Data", "")
    if manifest.card and manifest.card.data:
        yield from (_words(manifest.card.data), "")
    size = f"{latent.pixel_height} × {latent.pixel_width} pixels"
    yield f"{clips} clips of {latent.pixel_frames} frames at {latent.fps:g} a second, {size}, in {len(manifest.shards)} clusters."
    yield f"Autoencoder: `{_code(latent.vae)}`. Text encoder: `{_code(latent.text_encoder)}`, {latent.text_tokens} tokens."
    yield from ("", "| cluster | clips | share of the data |", "|---|---|---|")
    for shard in manifest.shards:
        yield f"| {_words(shard.name)} | {shard.clips} | {shard.prior:.1%} |"


def _recipe(manifest: Manifest) -> Iterator[str]:
    how, time = manifest.optimisation, manifest.optimisation.time
    yield from ("", "## Recipe", "", "| setting | value |", "|---|---|")
    sampling, warmup = manifest.sampling, f"{how.warmup_steps} steps of warm-up"
    rows = {
        "prediction": ", ".join(sorted({spec.prediction for spec in _specs(manifest)})),
        "optimiser": f"{how.optimizer}, learning rate {how.learning_rate:g}, {how.schedule} schedule, {warmup}",
        "batch": f"{how.batch} clips",
        "budget of each expert": f"{manifest.samples_per_shard} samples",
        "moving average": f"{how.ema_decay:g} a step",
        "samples without text": f"{how.text_dropout:.0%}",
        "times": f"sigmoid of a normal of mean {time.mean:g} and deviation {time.std:g}, shifted by {time.shift:g}",
        "sampling": f"{sampling.steps} steps, guidance {sampling.guidance:g}, experts by {sampling.mode}",
    }
    for name, value in rows.items():
        yield f"| {name} | {value} |"


def _lineage(manifest: Manifest, entries: Sequence[ExpertEntry]) -> Iterator[str]:
    yield from ("", "## Lineage", "")
    yield f"Run `{manifest.run_id}`, version {manifest.version} of its manifest. `mixture.json` holds the digest of every file."
    yield from ("", "| expert | cluster | accepted epoch | samples | checkpoint |", "|---|---|---|---|---|")
    for entry in entries:
        place = f"`{entry.folder}`" if entry.folder else "none yet"
        checkpoint = f"`{entry.checkpoint}`" if entry.checkpoint else ""
        yield f"| {place} | {_words(entry.name)} | {entry.epoch} | {entry.samples} | {checkpoint} |"


def _licences(manifest: Manifest) -> Iterator[str]:
    card = manifest.card
    given = {
        "these weights": card.license if card else "",
        "the base": card.base_license if card else "",
        "the data": card.data_license if card else "",
    }
    yield from ("", "## Licences", "")
    for what, licence in given.items():
        yield f"- {what}: {_words(licence) if licence else UNSTATED}"


def _specs(manifest: Manifest) -> list[ExpertSpec]:
    return [manifest.expert_of(shard.index) for shard in manifest.shards]


def _words(text: str) -> str:
    """A text of others as plain words in one line: what Markdown and HTML would read is escaped."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~$&-])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """A text of others between backticks."""
    return " ".join(text.replace("`", " ").replace("|", " ").split())
