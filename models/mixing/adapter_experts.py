"""Experts that share one resident base: each is the tensors of its adapter, which are put in place when it is asked."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lutetia.models.experts.adapters.base_model import BaseFiles, build_base
from lutetia.models.experts.adapters.base_sources import find_base
from lutetia.models.experts.adapters.inject import add_adapter
from lutetia.models.experts.adapters.lora_file import LORA_FILE, published_of
from lutetia.models.experts.families import construct, weight_schema
from lutetia.models.experts.objectives import schedule_of
from lutetia.models.experts.trained import trained_parameters
from lutetia.models.mixing.denoisers import Denoiser, module_denoiser
from lutetia.models.mixing.description import ExpertKind
from lutetia.models.mixing.folder import MixtureFolder
from lutetia.models.networks.model_ref import hub_errors, parse_ref
from lutetia.protocol.schema.model.adapter import BaseSpec
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.system.errors import ConfigError

log = logging.getLogger(__name__)

GivenBase = Path | str | Mapping[str, Path] | None
"""A folder, or the files by name where their digests have been compared; None: what was downloaded before."""


def locate_base(base: BaseSpec, given: GivenBase = None, hub: bool = False) -> BaseFiles:
    """The files of a mixture's base, compared with its description.

    Args:
        base: what the description names.
        given: by the caller.
        hub: whether it may be downloaded. A mixture may come from anybody, so nothing that it names is fetched without asking.

    Raises ConfigError when it is not here, or is another.
    """
    if isinstance(given, Mapping):
        return given
    folder = None if given is None else Path(given)
    files = find_base(base, folder)
    if files is None and hub:
        _download(base)
        files = find_base(base)
    if files is None:
        raise ConfigError(
            f"the experts of this mixture adapt {base.source} ({base.size / 1e9:.1f} GB), which is not on this machine; name its "
            "folder (--base, in Python base=...) or allow to download it (--hub, in Python hub=True)"
        )
    return files


def _download(base: BaseSpec) -> None:
    from huggingface_hub import hf_hub_download

    ref = replace(parse_ref(base.source, "base", ()), offline=False)
    with hub_errors("base", ref):
        for name in base.files:
            hf_hub_download(ref.location, name, subfolder=ref.subfolder or None, revision=ref.revision)


class AdapterExperts:
    """Reads the experts of a mixture of adapters. All of them run on the same base, which is read once.

    Args:
        folder: the mixture.
        mixture: its MixtureTransformer, whose `device` and `dtype` experts get.
        network: their network and adapter, of the description.
        base: the base's files.
    """

    def __init__(self, folder: MixtureFolder, mixture: Any, network: ExpertSpec, base: BaseFiles) -> None:
        self._folder, self._mixture, self._network, self._files = folder, mixture, network, base
        self._model: nn.Module | None = None
        self._dtype: torch.dtype | None = None
        self._slots: Mapping[str, nn.Parameter] = {}
        self._placed: Mapping[str, Tensor] | None = None

    def __call__(self, index: int) -> Denoiser:
        entry = self._mixture.config["experts"][index]
        kind = ExpertKind.model_validate({name: entry[name] for name in ExpertKind.model_fields if name in entry})
        tensors, model = self._tensors(entry["folder"]), self._resident()
        answer = module_denoiser(model, kind.prediction, schedule_of(kind), lambda: self._mixture.inputs_of(kind))
        log.info("read expert %d, an adapter of %d tensors, from %s", index, len(tensors), entry["folder"])

        def denoise(x_t: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor | None) -> Tensor:
            self._place(tensors, x_t.device)
            return answer(x_t, t, tokens, pooled)

        return denoise

    def free(self) -> None:
        """Drop the base from memory. Denoisers that were given before are of no use afterwards."""
        self._model, self._slots, self._placed = None, {}, None

    def _tensors(self, part: str) -> dict[str, Tensor]:
        """The adapter's tensors by published name, on the mixture's device and in its data type. Raises IntegrityError."""
        name = f"{part}/{LORA_FILE}"
        path = self._folder.check(name)
        with self._folder.reading(name):
            tensors = {published_of(key): tensor for key, tensor in load_file(path).items()}
            forms = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
            if forms != weight_schema(self._network):
                raise ValueError("it does not hold the adapter that the description names")
        return {key: tensor.to(self._mixture.device, self._mixture.dtype) for key, tensor in tensors.items()}

    def _resident(self) -> nn.Module:
        """The base with the place for an adapter, read again when the data type has changed."""
        adapter = self._network.adapter
        assert adapter
        if self._model is None or self._dtype != self._mixture.dtype:
            self._model = None  # before another one is read
            self._model = build_base(lambda: construct(self._network), self._files, adapter.base.dtype).eval()
            add_adapter(self._model, adapter)
            self._dtype = self._mixture.dtype
            _cast(self._model, self._mixture.dtype)
        self._model.to(self._mixture.device)
        self._slots, self._placed = trained_parameters(self._model), None
        return self._model

    def _place(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Make `tensors` the adapter: the model's parameters then share their memory, so that nothing is copied."""
        if self._placed is not tensors:
            for name, parameter in self._slots.items():
                parameter.data = tensors[name].to(device)
            self._placed = tensors


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters as `from_pretrained` of diffusers does: those of the modules that its class names stay in float32."""
    exact = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if not exact & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
