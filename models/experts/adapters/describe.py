"""The description of a base for a manifest, from a folder or what the hub has: its network, files and digests."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from lutetia.models.experts.adapters.base_sources import digest_of_file
from lutetia.models.experts.families import FAMILIES
from lutetia.models.networks.model_ref import ModelRef, hub_errors, parse_ref, read_config
from lutetia.protocol.schema.model.adapter import AdapterSpec, BaseDtype, BaseSpec
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.system.errors import ConfigError

_WHAT = "base"
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def describe_base(
    text: str, dtype: BaseDtype, served: bool, part: str = "transformer"
) -> tuple[ExpertSpec, BaseSpec, dict[str, Path]]:
    """The network of the base, its description, and its files on this machine.

    Args:
        text: folder of a transformer or of a pipeline, or hub id `owner/name[/folder][@revision]`; fetched if it is not here.
        dtype: how it is to be kept.
        served: whether the coordinator will serve its files.
        part: which transformer of a pipeline's folder.

    Raises ConfigError when there is none, its class cannot be trained, or it has no safetensors weights.
    """
    model = parse_ref(text, _WHAT, ())
    if model.folder and (model.folder / "model_index.json").is_file():
        model = replace(model, location=str(model.folder / part))
    config = read_config(_WHAT, model)
    class_name = str(config.get("_class_name"))
    if class_name not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(f"{_WHAT} {text!r} is of class {class_name}, which is not supported; use one of {known}")
    spec = ExpertSpec(class_name=class_name, config={key: value for key, value in config.items() if not key.startswith("_")})
    files = _folder_files(model.folder, text) if model.folder else _hub_files(model)
    refs = {name: digest_of_file(path) for name, path in files.items()}
    return spec, BaseSpec(source=_source(model, files), files=refs, dtype=dtype, served=served), files


def adapted(spec: ExpertSpec, base: BaseSpec, rank: int, alpha: float, targets: tuple[str, ...], dora: bool) -> ExpertSpec:
    """`spec` as an adapter on `base`."""
    adapter = AdapterSpec(rank=rank, alpha=alpha, targets=targets, dora=dora, base=base)
    return spec.model_copy(update={"adapter": adapter})


def _folder_files(folder: Path, text: str) -> dict[str, Path]:
    index = folder / f"{_WEIGHTS}.index.json"
    names = [_WEIGHTS]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(f"{index} is malformed; fetch the {_WHAT} again") from error
    for name in names:
        if not (folder / name).is_file():
            raise ConfigError(f"{_WHAT} {text!r} has no {name}; weights must be safetensors files, save it again with diffusers")
    return {name: folder / name for name in names}


def _hub_files(model: ModelRef) -> dict[str, Path]:
    from huggingface_hub import snapshot_download

    pattern = f"{model.subfolder}/" if model.subfolder else ""
    with hub_errors(_WHAT, model):
        snapshot = snapshot_download(
            model.location, revision=model.revision, local_files_only=model.offline,
            allow_patterns=[f"{pattern}{_WEIGHTS.partition('.')[0]}*.safetensors*", f"{pattern}config.json"],
        )  # fmt: skip
    return _folder_files(Path(snapshot) / model.subfolder, model.text)


def _source(model: ModelRef, files: dict[str, Path]) -> str:
    """The hub id with its commit, which is the name of the folder of a snapshot; of a folder its name alone."""
    if model.folder:
        return model.folder.name if model.folder.name != "transformer" else f"{model.folder.parent.name}/transformer"
    parts = next(iter(files.values())).parts
    commit = parts[parts.index("snapshots") + 1]
    return f"{model.location}{f'/{model.subfolder}' if model.subfolder else ''}@{commit}"
