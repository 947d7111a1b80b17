"""The mixture: K experts and a router that together are one denoiser.

`u(x_t, t, c) = sum_k p(k | x_t, t, c) u_k(x_t, t, c)` is exact when p is the router's calibrated posterior and u_k expert k's
flow. Experts may predict velocity, x0 or eps on any noise path: all answers are turned into velocities first. Experts are
unreliable on the data of other shards, so usually only some of them are asked:

- `top1`: the most probable expert;
- `top2`: the two most probable, with renormalised weights;
- `full`: all experts;
- `sticky`: one expert per clip, drawn from p(k | c) at t = 1 and kept to the end. Exact in theory, and a clip needs one expert.

This module's path is part of the file format: the `model_index.json` of every published mixture names
`["lutetia.models.mixture", "MixtureTransformer"]`. Do not move or rename either.
"""

from __future__ import annotations

import contextlib
import logging
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from lutetia.models.experts.families import family_of, full_config
from lutetia.models.experts.objectives import with_first_frame
from lutetia.models.experts.pictures import Pictures
from lutetia.models.mixing.adapter_experts import AdapterExperts, locate_base
from lutetia.models.mixing.denoisers import Denoiser, ExpertCall, FolderExperts
from lutetia.models.mixing.description import ExpertKind
from lutetia.models.mixing.folder import MixtureFolder
from lutetia.models.mixing.layout import CONFIG
from lutetia.models.mixing.router import VideoRouter
from lutetia.models.mixing.stock.stock_call import read_stock_call, stock_config
from lutetia.models.randomness import normals, stream
from lutetia.protocol.schema.model.pipeline_spec import ExpertInputs, NoisePart
from lutetia.system.errors import ConfigError, UsageError

Mode = Literal["top1", "top2", "full", "sticky"]

log = logging.getLogger(__name__)


def routing_weights(probabilities: Tensor, mode: Mode) -> Tensor:
    """Weights of the experts' velocities `[B, K]` from the router's posterior `[B, K]`; rows sum to 1. Not for `sticky`."""
    if mode == "full":
        return probabilities
    kept = min({"top1": 1, "top2": 2}[mode], probabilities.shape[1])
    best, index = probabilities.topk(kept, dim=1)
    return torch.zeros_like(probabilities).scatter(1, index, best / best.sum(1, keepdim=True))


def draw_experts(probabilities: Tensor, seeds: Sequence[int]) -> Tensor:
    """One expert per row, drawn from `probabilities [B, K]` by that row's seed: one-hot weights `[B, K]`."""
    uniforms = torch.tensor([stream("sticky", 0, 0, seed, "expert").random() for seed in seeds], dtype=torch.float64)
    below = probabilities.double().cpu().cumsum(1) <= uniforms[:, None]
    chosen = below.sum(1).clamp(max=probabilities.shape[1] - 1)
    return nn.functional.one_hot(chosen, probabilities.shape[1]).to(probabilities)


def combine(
    experts: Callable[[int], Denoiser],
    weights: Tensor,
    x_t: Tensor,
    t: Tensor,
    tokens: Tensor,
    pooled: Tensor | None = None,
    pictures: Pictures | None = None,
) -> Tensor:
    """The weighted sum of the experts' velocities, `[B, ...]` like `x_t`. Each expert is called once, with its rows only.

    Args:
        experts: gives expert k as a denoiser; asked only for experts with a weight.
        weights: `[B, K]`.
        x_t: noisy latents, `[B, ...]`.
        t: flow times in [0, 1], `[B]`.
        tokens: `[B, L, D]`.
        pooled: `[B, P]`, or None.
        pictures: of the rows, for experts that take them in channels of their own.
    """
    total = torch.zeros_like(x_t)
    for expert in weights.any(0).nonzero().flatten().tolist():
        rows = weights[:, expert].nonzero().flatten()
        if len(rows) == len(x_t):
            more = () if pictures is None else (pictures,)
            flow = experts(expert)(x_t, t, tokens, pooled, *more)
            rows = slice(None)
        else:
            more = () if pictures is None else (pictures.each(operator.itemgetter(rows)),)
            flow = experts(expert)(x_t[rows], t[rows], tokens[rows], None if pooled is None else pooled[rows], *more)
        total[rows] += flow * weights[rows, expert].to(flow.dtype).view(-1, *[1] * (x_t.ndim - 1))
    return total


def noised_first_frame(latents: Tensor, t: Tensor) -> Tensor:
    """Latents `[B, C, F, H, W]` whose first frame, which is clean, is as noisy as the others at `t [B]`: what a router knows.

    It draws the same noise at each step.
    """
    frame = latents[:, :, :1]
    noise = normals(stream("sample", 0, 0, 0, "first frame"), tuple(frame.shape[1:])).to(frame)
    return with_first_frame(latents, torch.lerp(frame, noise.expand_as(frame), t.to(frame.dtype).view(-1, 1, 1, 1, 1)))


class MixtureTransformer(ModelMixin, ConfigMixin, CacheMixin):
    """Experts and router behind the `forward` of a diffusers class, so that it can replace that class in a pipeline.

    `from_pretrained` finds router and experts in the mixture's folder; `attach` takes them from the caller. An expert is read
    when it is first used. If more than `experts_in_memory` would be held (None: no limit), the least recently used is dropped.

    Args:
        experts: one ExpertKind per shard, as JSON: `folder` (beside this model's own; None while the shard has no accepted
            checkpoint, then the expert is never routed to), `class_name`, `prediction`, `noise_schedule`, `betas`, `inputs`.
        mode: how experts are chosen if a call does not say.
        in_channels: channels of the latents.
        patch_size: frames, height and width of an expert's patch, which diffusers pipelines read.
        text_conditioned: whether the router needs the prompt.
        digest: of the mixture's contents, by which a folder that was replaced is noticed.
        temperature: by which the router's logits are divided; above 1 it is less sure.
        interface: class of an expert, in whose place the mixture stands in a stock pipeline. None: WanTransformer3DModel.
    """

    experts_in_memory: int | None = None
    folder: MixtureFolder | None = None

    @register_to_config
    def __init__(
        self,
        experts: Sequence[dict[str, Any]],
        mode: Mode = "top1",
        in_channels: int = 16,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        text_conditioned: bool = True,
        digest: str | None = None,
        interface: str | None = None,
        temperature: float = 1.0,
    ) -> None:
        self._expert_config: dict[str, Any] = {}
        super().__init__()
        for expert in experts:
            family_of(expert["class_name"])
        spoken = (ExpertKind.model_validate(expert) for expert in experts if expert["class_name"] == interface)
        self._interface = next(spoken, None)
        self.router: nn.Module | None = None
        self._read: Callable[[int], Denoiser] | None = None
        self._held: OrderedDict[int, Denoiser] = OrderedDict()
        self._available = torch.tensor([expert["folder"] is not None for expert in experts])
        self.changed_inputs: dict[str, Any] = {}
        """Fields of ExpertInputs that a caller gives in place of those of the experts' training."""
        self.first_frame_given = False
        """Whether the first latent frame of the rows of a call is given, clean."""
        self._kept: tuple[float, Tensor] | None = None  # sticky: time of the last call and its weights
        self.register_buffer("_anchor", torch.empty(0), persistent=False)  # gives an empty mixture a device and a dtype

    def attach(self, router: nn.Module | None, read: Callable[[int], Denoiser]) -> MixtureTransformer:
        """Set the router (None: only for a mixture of one) and the function that reads expert k. Returns itself."""
        self.router, self._read = router, read
        self._held.clear()
        return self

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> MixtureTransformer:  # pyright: ignore
        """Load the `transformer` folder of a mixture, with the router and experts beside it.

        Honours `torch_dtype`, and for a mixture of adapters `base` (the folder of their base) and `hub` (whether the base may be
        downloaded).

        Raises ConfigError without a mixture or its base, IntegrityError when a part is missing, damaged or not as described.
        """
        folder = MixtureFolder(Path(pretrained_model_name_or_path).expanduser().absolute().parent)
        config = folder.config(f"transformer/{CONFIG}")
        folder.check_experts(config.get("experts"))
        with folder.reading("transformer"):
            mixture = cls.from_config(config)
        assert isinstance(mixture, MixtureTransformer)
        router = None
        if folder.holds("router"):
            router = folder.load(VideoRouter, "router")
        network, read = folder.document.network, FolderExperts(folder, mixture)
        if network and network.adapter:
            files = locate_base(network.adapter.base, options.get("base"), bool(options.get("hub")))
            read = AdapterExperts(folder, mixture, network, files)
        mixture.attach(router, read)
        if mixture._interface and mixture._interface.folder:
            stock = f"{mixture._interface.folder}/{CONFIG}"
            mixture._expert_config = full_config(network) if network else folder.config(stock)
        mixture.folder = folder
        dtype = options.get("torch_dtype") or options.get("dtype")
        if isinstance(dtype, torch.dtype):
            nn.Module.to(mixture, dtype=dtype)
        return mixture

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:  # pyright: ignore
        """Raises ConfigError: experts are files beside this model's own, so a mixture is saved as a whole."""
        raise ConfigError("a mixture is saved as a whole; call save_pretrained of its LutetiaPipeline")

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        pooled_projections: Tensor | None = None,
        weights: Tensor | None = None,
        **stock: Any,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The prediction at the given latents, in their shape: of the class `interface`, by default Wan's, a velocity.

        Args:
            hidden_states: noisy latents, `[B, C, F, H, W]`, or as `interface` takes them.
            timestep: in 0..1000, `[B]`.
            encoder_hidden_states: token vectors, `[B, L, D]`.
            encoder_hidden_states_image: embeddings of the pictures, `[B, T, D]`, for experts that take them; else None.
            return_dict: return a Transformer2DModelOutput instead of a tuple.
            attention_kwargs: without `weights`, what the router decides by: `routing_text` (pooled text `[B, P]`; the same for
                both branches of guidance, so that they share the decision), `mode`, `seeds`.
            pooled_projections: pooled text for the experts that take it, `[B, P]`.
            weights: a routing decision made by `route`, `[B, K]`.
            stock: the other arguments of `interface`, such as masks and sizes.
        """
        arguments = {
            "hidden_states": hidden_states, "timestep": timestep, "encoder_hidden_states": encoder_hidden_states,
            "pooled_projections": pooled_projections, "encoder_hidden_states_image": encoder_hidden_states_image, **stock,
        }  # fmt: skip
        call = read_stock_call(self._interface, self.config, arguments)
        if encoder_hidden_states_image is not None and call.pictures is None:
            raise UsageError("this mixture is text-to-video: it takes no image embeddings; leave encoder_hidden_states_image out")
        x, t = call.latents, call.time
        if weights is None:
            seen = noised_first_frame(x, t) if call.given else x
            weights = self.route(seen, t, **{"pooled": None, **_routing_options(attention_kwargs)})
        with self.told(call.changed, call.given):
            answer = call.answer(combine(self.expert, weights, x, t, call.tokens, call.pooled, call.pictures))
        return Transformer2DModelOutput(sample=answer) if return_dict else (answer,)

    @property
    def config(self) -> Any:
        """The configuration; with `interface`, that of an expert of this class, too, which its pipelines read."""
        own = super().config
        return FrozenDict(stock_config(own, self._expert_config)) if self._expert_config else own

    @torch.no_grad()
    def route(
        self, x_t: Tensor, t: Tensor, pooled: Tensor | None = None, mode: Mode | None = None, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """The experts' weights, `[B, K]`. Raises UsageError for an unknown mode.

        Args:
            x_t: noisy latents, `[B, C, F, H, W]`.
            t: flow times in [0, 1], `[B]`.
            pooled: pooled texts, `[B, P]`.
            mode: None: the mixture's own.
            seeds: one per row, for `sticky`; None: 0, 1, … It draws when t is larger than at the last call: new clips begin then.
                Experts for low noise are drawn by what the latents show when they are first asked.
        """
        mode = cast(Mode, mode or self.config["mode"])
        if mode not in get_args(Mode):
            raise UsageError(f"there is no routing mode {mode!r}; use one of {', '.join(get_args(Mode))}")
        if mode != "sticky":
            return routing_weights(self.probabilities(x_t, t, pooled), mode)
        now = t.max().item()
        if self._kept is None or now > self._kept[0] or len(self._kept[1]) != len(x_t):
            part = self.noise_part
            begin = t if part and part.side == "low" else torch.ones_like(t)
            drawn = draw_experts(self.probabilities(x_t, begin, pooled), seeds or range(len(x_t)))
        else:
            drawn = self._kept[1]
        self._kept = now, drawn
        return drawn

    def _apply(self, fn: Any, recurse: bool = True) -> MixtureTransformer:
        """Drop the experts when the device or dtype changes; they are read again when they are next used."""
        self._held.clear()
        return super()._apply(fn, recurse)

    @property
    def count(self) -> int:
        """Number of experts of the run, including those without an accepted checkpoint."""
        return len(self._available)

    @contextlib.contextmanager
    def told(self, changed: dict[str, Any], given: bool = False) -> Iterator[None]:
        """Within it, experts are given these fields of ExpertInputs in place of those of their training.

        `given`: whether the first latent frame of all rows is given. Raises UsageError where experts take no first frames.
        """
        if given and not self.takes_first_frames:
            raise UsageError("this mixture makes clips from text alone: its experts were not trained with first frames")
        before = self.changed_inputs, self.first_frame_given
        self.changed_inputs, self.first_frame_given = {**self.changed_inputs, **changed}, given
        try:
            yield
        finally:
            self.changed_inputs, self.first_frame_given = before

    @property
    def takes_first_frames(self) -> bool:
        """Whether its experts were trained with first frames."""
        kinds = [ExpertKind.model_validate(expert) for expert in self.config["experts"]]
        return all(kind.inputs and kind.inputs.first_frame is not None for kind in kinds if kind.folder)

    @property
    def noise_part(self) -> NoisePart | None:
        """The part of the noise levels that its experts are for; None: all of them."""
        inputs = [expert.get("inputs") or {} for expert in self.config["experts"]]
        part = inputs[0].get("noise_part") if inputs else None
        return NoisePart.model_validate(part) if part else None

    def call_of(self, expert: ExpertKind) -> ExpertCall:
        """What `expert` is given at a call besides latents, time and text."""
        return ExpertCall(self.inputs_of(expert), self.first_frame_given)

    def inputs_of(self, expert: ExpertKind) -> ExpertInputs | None:
        """What `expert` is given at a call besides latents and text: as in its training, but for `changed_inputs`."""
        inputs = expert.inputs or (family_of(expert.class_name).inputs if self.changed_inputs else None)
        return inputs.model_copy(update=self.changed_inputs) if inputs else None

    def begin(self) -> None:
        """Forget the experts that `sticky` drew: new clips begin."""
        self._kept = None

    def probabilities(self, x_t: Tensor, t: Tensor, pooled: Tensor | None) -> Tensor:
        """The router's posterior over the experts that have an accepted checkpoint, `[B, K]`."""
        if self.count == 1:
            return x_t.new_ones(len(x_t), 1)
        if self.router is None:
            raise ConfigError(f"this mixture of {self.count} experts has no router; fetch or stitch it again")
        if self.config["text_conditioned"] and pooled is None:
            raise UsageError("the router needs the prompt: pass attention_kwargs={'routing_text': pooled text [B, P]}")
        logits = self.router(x_t, t, pooled)
        if self.config["temperature"] != 1.0:
            logits = logits / self.config["temperature"]
        return logits.masked_fill(~self._available.to(logits.device), -torch.inf).softmax(1)

    def free_experts(self) -> None:
        """Drop all experts from memory; they are read again at their next use."""
        self._held.clear()
        if isinstance(self._read, AdapterExperts):
            self._read.free()

    def expert(self, index: int) -> Denoiser:
        """Expert `index`, read on first use."""
        if index in self._held:
            self._held.move_to_end(index)
            return self._held[index]
        if self._read is None:
            raise ConfigError("this mixture has no experts attached; load it with from_pretrained")
        cap = self.experts_in_memory
        while cap is not None and len(self._held) >= max(1, cap):
            dropped, _ = self._held.popitem(last=False)
            log.info("drop expert %d from memory: at most %d are held", dropped, cap)
        self._held[index] = self._read(index)
        return self._held[index]


def _routing_options(attention_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    options = dict(attention_kwargs or {})
    if "routing_text" in options:
        options["pooled"] = options.pop("routing_text")
    unknown = options.keys() - {"pooled", "mode", "seeds", "scale"}
    if unknown:
        raise UsageError(f"a mixture does not know attention_kwargs {sorted(unknown)}; use routing_text, mode, seeds")
    options.pop("scale", None)
    return options
