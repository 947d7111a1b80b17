"""Warm starts: experts that begin with weights trained elsewhere, read by diffusers' own loaders and written as a run's blobs.

What can be named is a mixture (each expert goes on in the shard of its place, a lone one in all), a diffusers pipeline (its
transformer) or a transformer by itself. The experts of Paris 2.0 (arXiv 2605.26064) start from an image model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch

from lutetia.models.experts.families import FAMILIES, full_config
from lutetia.models.mixing.description import FILE, ExpertEntry, read_mixture
from lutetia.models.networks.model_ref import ModelRef, hub_errors, parse_ref, read_config
from lutetia.models.tensor_files import write_tensors
from lutetia.models.training.checkpoint_checks import CheckpointMisfit, check_weights
from lutetia.protocol.schema.manifest import BlobRef, ExpertSpec, Manifest
from lutetia.system.errors import ConfigError

_WHAT = "warm start"


@dataclass(frozen=True)
class InitialWeights:
    """One expert's weights and what they are weights of."""

    model: ModelRef
    spec: ExpertSpec


def find_sources(ref: str, names: Sequence[str], wanted: ExpertSpec | None) -> tuple[InitialWeights, ...]:
    """Where the experts of the shards called `names` begin; no weights are read. `wanted`: what the run's settings ask for.

    Raises ConfigError: nothing there, a class that cannot be trained, another config than `wanted`, other experts than shards.
    """
    model = parse_ref(ref, _WHAT, ())
    folder = model.folder
    if folder and (folder / FILE).is_file():
        found = _of_mixture(ref, folder, names)
    else:
        if folder and (folder / "model_index.json").is_file():
            model = replace(model, location=str(folder / "transformer"))
        found = (_source(model, wanted),)  # a transformer does not say what it predicts
    for source in found:
        if wanted:
            _agree(ref, source.spec, wanted)
    return found if len(found) > 1 else found * len(names)


def write_weights(source: InitialWeights, path: Path) -> None:
    """The source's weights in float32 as `path`, as a checkpoint's weights file is.

    Raises ConfigError where they are not whole, not finite or do not fit the source's own config; DiskError.
    """
    model = source.model
    with hub_errors(_WHAT, model):
        expert, report = getattr(diffusers, source.spec.class_name).from_pretrained(
            model.location, use_safetensors=True, torch_dtype=torch.float32, output_loading_info=True, **model.options
        )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, report.get(problem, ()))):
            text = f"{len(keys)} {problem.replace('_', ' ')}, among them {keys[0][:80]}"
            raise ConfigError(f"cannot load {_WHAT} {model.text!r}: its weights have {text}; name a whole model")
    write_tensors(path, {name: tensor.contiguous() for name, tensor in expert.state_dict().items()})
    try:
        check_weights(path, source.spec)
    except CheckpointMisfit as error:
        text = str(error).replace(path.name, "its weights").removesuffix("; refused")
        raise ConfigError(f"cannot begin with {_WHAT} {model.text!r}: {text}; name another") from error


def warm(manifest: Manifest, weights: Sequence[BlobRef]) -> Manifest:
    """The run whose expert of shard k begins with `weights[k]`."""
    if len(set(weights)) == 1 and all(shard.expert is None for shard in manifest.shards):
        return manifest.model_copy(update={"expert": manifest.expert.model_copy(update={"init": weights[0]})})
    shards = (
        shard.model_copy(update={"expert": manifest.expert_of(shard.index).model_copy(update={"init": ref})})
        for shard, ref in zip(manifest.shards, weights, strict=True)
    )
    return manifest.model_copy(update={"shards": tuple(shards)})


def _of_mixture(ref: str, folder: Path, names: Sequence[str]) -> tuple[InitialWeights, ...]:
    experts = read_mixture(folder).mixture.experts
    known = [expert.name for expert in experts]
    if len(experts) > 1 and known != list(names):
        raise ConfigError(
            f"the experts of {_WHAT} {ref!r} are {', '.join(known)}, but the data's shards {', '.join(names)}; "
            "name the folder of one expert in it to start all from that"
        )
    sources = []
    for expert in experts:
        if expert.folder is None:
            raise ConfigError(f"{_WHAT} {ref!r} has no expert {expert.name} yet; name a mixture that has them all")
        model = ModelRef(ref, str(folder / expert.folder))
        sources.append(_source(model, expert))
    return tuple(sources)


def _source(model: ModelRef, as_in: ExpertEntry | ExpertSpec | None) -> InitialWeights:
    """What it predicts and on which schedule is taken from `as_in`; None: a spec's defaults."""
    config = read_config(_WHAT, model)
    class_name = str(config.get("_class_name"))
    if class_name not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(f"{_WHAT} {model.text!r} is of class {class_name}, which is not supported; use one of {known}")
    spec = ExpertSpec(class_name=class_name, config={key: value for key, value in config.items() if not key.startswith("_")})
    if as_in:
        spec = spec.model_copy(update={"prediction": as_in.prediction, "noise_schedule": as_in.noise_schedule})
    return InitialWeights(model, spec)


def _agree(ref: str, found: ExpertSpec, wanted: ExpertSpec) -> None:
    for key in ("class_name", "prediction", "noise_schedule"):
        _same(ref, key, getattr(found, key), getattr(wanted, key))
    theirs, ours = full_config(found), full_config(wanted)
    for key in sorted(theirs.keys() | ours.keys()):
        _same(ref, key, theirs.get(key), ours.get(key))


def _same(ref: str, key: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        text = f"{_WHAT} {ref!r} has {key} {found!r}, but the settings' expert {wanted!r}"
        raise ConfigError(f"{text}; leave the settings' expert out to take over that of the {_WHAT}")
