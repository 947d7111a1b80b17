"""Which files a mixture folder holds, and which classes its `model_index.json` may name. Imports no torch.

A mixture may come from a hostile coordinator. Nothing in it may run code: `pipeline.py`, the only program, is the same in every
mixture, weights are safetensors, and classes come from the lists below. The format is a file format: mixtures that are out
must still be read, so do not change `PIPELINE`, and only add to the names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import ValidationError

from lutetia.models.experts.adapters.lora_file import LORA_FILE
from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.protocol.schema.manifest import first_problem
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.protocol.schema.model.pipeline_spec import SchedulerSpec
from lutetia.protocol.schema.model.training_spec import SamplingSpec
from lutetia.system.errors import IntegrityError

INDEX = "model_index.json"
CONFIG = "config.json"
SCHEDULER_CONFIG = "scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
WEIGHTS_INDEX = f"{WEIGHTS}.index.json"
EXPERT_FOLDER = r"^expert_[0-9]{3,4}$"
PIPELINE = b'''"""Lets diffusers find the pipeline of the installed package `lutetia`."""

from lutetia.models.pipeline import LutetiaPipeline

__all__ = ["LutetiaPipeline"]
'''
"""`pipeline.py` of every mixture, byte for byte."""

AUTOENCODERS = (
    "AutoencoderTiny", "AutoencoderKL", "AutoencoderKLWan", "AutoencoderKLHunyuanVideo", "AutoencoderKLLTXVideo",
    "AutoencoderKLCogVideoX", "AutoencoderKLMochi",
)  # fmt: skip
DEFAULT_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
SCHEDULERS: tuple[str, ...] = get_args(SchedulerSpec.model_fields["class_name"].annotation)
COMPONENTS: Mapping[str, Sequence[tuple[str | None, str | None]]] = {
    "_class_name": [("pipeline", "LutetiaPipeline")],
    "transformer": [("lutetia.models.mixture", "MixtureTransformer")],
    "scheduler": [("diffusers", name) for name in SCHEDULERS],
    "vae": [*(("diffusers", name) for name in AUTOENCODERS), (None, None)],
}
"""Module and class of each component, as `model_index.json` names them; both null where a mixture holds none."""

MOST_BYTES, MOST_FILES = 1 << 40, 100_000
MOST_BLOCKS, LARGEST_SIZE = 256, 1 << 16
"""Most blocks of one kind in a network, and the largest length of an axis."""
MOST_TEXT_BYTES = 1 << 20
"""Most bytes of a file that holds no weights."""

_SHARD = re.compile(r"diffusion_pytorch_model-[0-9]{5}-of-[0-9]{5}\.safetensors")
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*){0,3}")
_KNOWN_NAME = re.compile(
    rf"{INDEX}|pipeline\.py|README\.md|transformer/{CONFIG}|scheduler/{SCHEDULER_CONFIG}"
    rf"|(router|vae|{EXPERT_FOLDER.strip('^$')})/({CONFIG}|{re.escape(WEIGHTS)})"
    rf"|{EXPERT_FOLDER.strip('^$')}/{re.escape(LORA_FILE)}"
    rf"|vae/({_SHARD.pattern}|{re.escape(WEIGHTS_INDEX)})"
)


@dataclass(frozen=True)
class ModelIndex:
    """What `model_index.json` says of a mixture: classes of autoencoder (None: it holds none) and scheduler, shapes, sampling."""

    vae: str | None
    scheduler: str
    latent: LatentSpec
    sampling: SamplingSpec


def read_index(data: bytes) -> ModelIndex:
    """Parse `model_index.json`; what newer versions add is left unread.

    Raises IntegrityError if it is malformed, or names another class than the components of a mixture have.
    """
    try:
        index = json.loads(data)
        parts = {name: tuple(index.get(name) or (None, None)) for name in COMPONENTS}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"{INDEX} of the mixture is damaged; fetch the mixture again") from error
    for name, given in parts.items():
        if given not in COMPONENTS[name]:
            raise IntegrityError(f"{INDEX} names {str(given)[:80]} as {name}, which no mixture has; refused")
    latent, sampling = parse_shapes(index)
    return ModelIndex(parts["vae"][1], str(parts["scheduler"][1]), latent, sampling)


def parse_shapes(index: Mapping[str, Any]) -> tuple[LatentSpec, SamplingSpec]:
    """The entries `latent` and `sampling` of a model index. Raises IntegrityError if one is missing or malformed."""
    try:
        return LatentSpec.model_validate(index.get("latent")), SamplingSpec.model_validate(index.get("sampling") or {})
    except ValidationError as error:
        raise IntegrityError(f"{INDEX} of the mixture is damaged ({first_problem(error)}); fetch the mixture again") from error


def check_weights_index(data: bytes) -> None:
    """Raises ValueError unless the index of weights in several files names files beside itself."""
    try:
        names = set(json.loads(data)["weight_map"].values())
    except (TypeError, AttributeError, LookupError, RecursionError) as error:
        raise ValueError(f"{WEIGHTS_INDEX} is malformed") from error
    if not all(isinstance(name, str) and _SHARD.fullmatch(name) for name in names):
        raise ValueError(f"{WEIGHTS_INDEX} names a file that is not beside it")


def check_sizes(config: Mapping[str, Any]) -> None:
    """Raises ValueError for a network that no mixture has, and whose building alone would take minutes or all memory."""
    if config.get("quantization_config") is not None:
        raise ValueError("its config asks for quantised weights, which mixtures do not have")
    for key, value in config.items():
        sizes = value if isinstance(value, list) else [value]
        most = MOST_BLOCKS if key.endswith(("layers", "blocks", "layers_per_block")) else LARGEST_SIZE
        if len(sizes) > MOST_BLOCKS or any(isinstance(size, int) and not 0 <= size <= most for size in sizes):
            raise ValueError(f"{key[:40]} in its config is not within 0 to {most}")


def is_known(name: str) -> bool:
    """Whether a mixture's loader or its readers use the file of this relative path."""
    return _KNOWN_NAME.fullmatch(name) is not None


def check_names(files: Mapping[str, BlobRef]) -> None:
    """Raises IntegrityError for a name that could leave the folder, or for more files or bytes than a mixture has."""
    bad = next((name for name in files if not _SAFE_NAME.fullmatch(name)), None)
    if bad is not None:
        raise IntegrityError(f"the mixture's description names the file {bad[:80]!r}, which would leave its folder; refused")
    if len(files) > MOST_FILES or sum(ref.size for ref in files.values()) > MOST_BYTES:
        raise IntegrityError("the mixture's description names more files or bytes than any mixture has; refused")


def known_files(files: Mapping[str, BlobRef], experts: Sequence[str], adapters: bool = False) -> dict[str, BlobRef]:
    """The files of a mixture that are used; others, which older versions copied with an autoencoder, are left out.

    Args:
        files: all files that its description names, by relative path.
        experts: the folders of its experts.
        adapters: whether they are adapters.

    Raises IntegrityError when a part is not listed, `pipeline.py` is not ours, or a text file is too long.
    """
    check_names(files)
    known = {name: ref for name, ref in files.items() if is_known(name)}
    for name in _required(experts, adapters):
        if name not in known:
            raise IntegrityError(f"the mixture's description lacks {name}; refused")
    if "pipeline.py" in known and known["pipeline.py"] != ChunkTable.of_bytes(PIPELINE).ref:
        raise IntegrityError(
            "the mixture's pipeline.py is not Lutetia's and could run any code; refused: ask the run's owner, and update lutetia"
        )
    for name, ref in known.items():
        if not name.endswith(".safetensors") and ref.size > MOST_TEXT_BYTES:
            raise IntegrityError(f"the mixture's {name} has {ref.size} bytes, more than {MOST_TEXT_BYTES}; refused")
    return known


def _required(experts: Sequence[str], adapters: bool) -> Iterator[str]:
    yield from (INDEX, f"transformer/{CONFIG}", f"scheduler/{SCHEDULER_CONFIG}")
    for expert in experts:
        yield from (f"{expert}/{name}" for name in expert_files(adapters))


def expert_files(adapters: bool) -> tuple[str, ...]:
    """The files in the folder of an expert."""
    return (LORA_FILE,) if adapters else (CONFIG, WEIGHTS)
