"""Warm starts: experts that start from weights trained elsewhere, read by diffusers' own loaders and written as a run's blobs.

A source is a mixture (expert k starts shard k; the expert of a mixture of one starts all shards), a diffusers pipeline (its
transformer is used) or a transformer by itself. The experts of Paris 2.0 (arXiv 2605.26064) start from an image model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch

from lutetia.models.experts.families import FAMILIES, full_config
from lutetia.models.mixing.description import FILE, ExpertEntry
from lutetia.models.mixing.folder import MixtureFolder
from lutetia.models.networks.model_ref import ModelRef, hub_errors, parse_ref, read_config, refuse_pickled
from lutetia.models.tensor_files import write_tensors
from lutetia.models.training.checkpoint_checks import CheckpointMisfit, check_weights
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.system.errors import ConfigError

_WHAT = "warm start"


@dataclass(frozen=True)
class InitialWeights:
    """The weights that one expert starts from: where they are, and the expert that they fit."""

    model: ModelRef
    spec: ExpertSpec


def find_sources(ref: str, names: Sequence[str], wanted: ExpertSpec | None) -> tuple[InitialWeights, ...]:
    """The initial weights of the experts, one per shard. Those of a mixture are compared with its description.

    Args:
        ref: the folder or hub id of the source.
        names: the shards' names.
        wanted: the expert that the run's settings ask for. None: that of the source.

    Raises:
        ConfigError: there is no such source, its class cannot be trained, its config is not `wanted`, or it has other experts
            than the run has shards.
        IntegrityError: a part of the mixture is missing or damaged.
    """
    model = parse_ref(ref, _WHAT, ())
    folder = model.folder
    if folder and (folder / FILE).is_file():
        sources = _of_mixture(ref, folder, names)
    else:
        if folder and (folder / "model_index.json").is_file():
            _refuse_two_transformers(ref, folder)
            model = replace(model, location=str(folder / "transformer"))
        sources = (_source(model, wanted),)  # a transformer's config does not tell what it predicts
    for source in sources:
        if wanted:
            _check_agreement(ref, source.spec, wanted)
    return sources if len(sources) > 1 else sources * len(names)


def write_weights(source: InitialWeights, path: Path) -> None:
    """Write the source's weights to `path` in float32, in the form of a checkpoint's weights file.

    Raises ConfigError if they are incomplete, not finite or do not fit the source's config; DiskError.
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
        raise ConfigError(f"cannot use {_WHAT} {model.text!r}: {text}; name another") from error


def warm(manifest: Manifest, weights: Sequence[BlobRef]) -> Manifest:
    """The manifest, changed so that the expert of shard k starts from `weights[k]`."""
    if len(set(weights)) == 1 and all(shard.expert is None for shard in manifest.shards):
        return manifest.model_copy(update={"expert": manifest.expert.model_copy(update={"init": weights[0]})})
    shards = (
        shard.model_copy(update={"expert": manifest.expert_of(shard.index).model_copy(update={"init": ref})})
        for shard, ref in zip(manifest.shards, weights, strict=True)
    )
    return manifest.model_copy(update={"shards": tuple(shards)})


def _of_mixture(ref: str, folder: Path, names: Sequence[str]) -> tuple[InitialWeights, ...]:
    mixture = MixtureFolder(folder)
    if mixture.document.network:
        raise ConfigError(f"{_WHAT} {ref!r} holds adapters, not whole experts; name a model that is whole")
    experts = mixture.document.experts
    known = [expert.name for expert in experts]
    if len(experts) > 1 and known != list(names):
        raise ConfigError(
            f"the experts of {_WHAT} {ref!r} are {', '.join(known)}, but the data's shards are {', '.join(names)}; "
            "name the folder of one of its experts to start all shards from that"
        )
    sources = []
    for expert in experts:
        if expert.folder is None:
            raise ConfigError(f"{_WHAT} {ref!r} has no expert {expert.name} yet; name a mixture that has all its experts")
        model = ModelRef(ref, str(mixture.check(expert.folder)))
        sources.append(_source(model, expert))
    return tuple(sources)


def _refuse_two_transformers(ref: str, folder: Path) -> None:
    second = folder / "transformer_2" / "config.json"
    if second.is_file():
        raise ConfigError(
            f"{_WHAT} {ref!r} has two transformers, for high and for low noise, which are not supported together; "
            "name the folder of one of them, or a pipeline with a single transformer"
        )


def _source(model: ModelRef, like: ExpertEntry | ExpertSpec | None) -> InitialWeights:
    """The model as a source, with the prediction and noise schedule of `like` (None: the defaults of an ExpertSpec)."""
    config = read_config(_WHAT, model)
    if model.folder:
        refuse_pickled(f"{_WHAT} {model.text!r}", model.folder)
    class_name = str(config.get("_class_name"))
    if class_name not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(f"{_WHAT} {model.text!r} is of class {class_name}, which is not supported; use one of {known}")
    spec = ExpertSpec(class_name=class_name, config={key: value for key, value in config.items() if not key.startswith("_")})
    if like:
        kind = {name: getattr(like, name) for name in ("prediction", "noise_schedule", "betas", "inputs")}
        spec = spec.model_copy(update=kind)
    return InitialWeights(model, spec)


def _check_agreement(ref: str, given: ExpertSpec, wanted: ExpertSpec) -> None:
    for key in ("class_name", "prediction", "noise_schedule", "betas", "inputs"):
        _check_equal(ref, key, getattr(given, key), getattr(wanted, key))
    given_config, wanted_config = full_config(given), full_config(wanted)
    for key in sorted(given_config.keys() | wanted_config.keys()):
        _check_equal(ref, key, given_config.get(key), wanted_config.get(key))


def _check_equal(ref: str, key: str, given: Any, wanted: Any) -> None:
    if given != wanted:
        text = f"{_WHAT} {ref!r} has {key} {given!r}, but the settings' expert {wanted!r}"
        raise ConfigError(f"{text}; leave the settings' expert out to use that of the {_WHAT}")
