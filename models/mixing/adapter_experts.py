"""Experts that share one resident base: each is the tensors of its adapter, which are put in place when it is asked."""

from __future__ import annotations

import logging
from collections import OrderedDict
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

SHARE_OF_BASE = 0.04
"""Bytes of adapters that are held, over those of the base, where nobody says how many: with what else a process takes, a mixture
stays below 1.1 times its base, whatever the number of experts."""
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

    Adapters stay in memory while they take at most `SHARE_OF_BASE` of the base's bytes, at least one, or as many as the mixture's
    `experts_in_memory` says. Others are read again from their files at their next use.

    Args:
        folder: the mixture.
        mixture: its MixtureTransformer, whose `device`, `dtype` and `experts_in_memory` hold for experts.
        network: their network and adapter, of the description.
        base: the base's files.
    """

    def __init__(self, folder: MixtureFolder, mixture: Any, network: ExpertSpec, base: BaseFiles) -> None:
        self._folder, self._mixture, self._network, self._files = folder, mixture, network, base
        self._model: nn.Module | None = None
        self._form: tuple[torch.device, torch.dtype] | None = None
        self._slots: Mapping[str, nn.Parameter] = {}
        self._adapters: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self._placed: int | None = None
        self._base_bytes = 0

    def __call__(self, index: int) -> Denoiser:
        entry = self._mixture.config["experts"][index]
        kind = ExpertKind.model_validate({name: entry[name] for name in ExpertKind.model_fields if name in entry})
        model = self._resident()
        answer = module_denoiser(model, kind.prediction, schedule_of(kind), lambda: self._mixture.call_of(kind))
        self._adapter(index)

        def denoise(x_t: Tensor, *asked: Any) -> Tensor:
            self._place(index, x_t.device)
            return answer(x_t, *asked)

        return denoise

    def free(self) -> None:
        """Drop base and adapters from memory. Denoisers that were given before are of no use afterwards."""
        self._model, self._form, self._slots = None, None, {}
        self._forget()

    def _forget(self) -> None:
        self._adapters.clear()
        self._placed = None

    def _adapter(self, index: int) -> dict[str, Tensor]:
        """The tensors of an adapter by published name, on the mixture's device and in its data type. Raises IntegrityError."""
        if index in self._adapters:
            self._adapters.move_to_end(index)
            return self._adapters[index]
        size = sum(4 * torch.Size(shape).numel() for shape, _ in weight_schema(self._network).values())
        self._make_room(size * self._mixture.dtype.itemsize // 4)
        part = self._mixture.config["experts"][index]["folder"]
        self._adapters[index] = self._read(part)
        log.info("read expert %d, an adapter of %d tensors, from %s", index, len(self._adapters[index]), part)
        return self._adapters[index]

    def _make_room(self, size: int) -> None:
        """Drop the adapters that were not used for longest until one of `size` bytes more may be held."""
        most = self._mixture.experts_in_memory or max(1, int(SHARE_OF_BASE * self._base_bytes) // size)
        while len(self._adapters) >= most:
            dropped, _ = self._adapters.popitem(last=False)
            if dropped == self._placed:
                self._take_out()

    def _read(self, part: str) -> dict[str, Tensor]:
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
        adapter, form = self._network.adapter, (self._mixture.device, self._mixture.dtype)
        assert adapter
        if self._model is not None and self._form == form:
            return self._model
        self._forget()
        if self._model is None or self._form is None or self._form[1] != form[1]:
            self._model = None  # before another one is read
            self._model = build_base(lambda: construct(self._network), self._files, adapter.base.dtype).eval()
            add_adapter(self._model, adapter, empty=True)
            cast_parameters(self._model, form[1])
            self._base_bytes = sum(t.nbytes for t in (*self._model.parameters(), *self._model.buffers()))
        self._model.to(form[0])
        self._form, self._slots = form, trained_parameters(self._model)
        return self._model

    def _place(self, index: int, device: torch.device) -> None:
        """Make expert `index` the adapter: the model's parameters then share its memory, so that nothing is copied."""
        tensors = self._adapter(index)
        if self._placed != index:
            for name, parameter in self._slots.items():
                parameter.data = tensors[name].to(device)
            self._placed = index

    def _take_out(self) -> None:
        for parameter in self._slots.values():
            parameter.data = parameter.data.new_empty(0)
        self._placed = None


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the parameters as `from_pretrained` of diffusers does: those of the modules that its class names stay in float32."""
    exact = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if not exact & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model
