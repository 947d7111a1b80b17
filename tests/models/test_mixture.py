"""The mixture's equation with analytic experts (exact flows of point clusters), and how rows reach experts."""

import math
from typing import Any

import pytest
import torch
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lutetia.models.experts.families import build_expert
from lutetia.models.experts.objectives import velocity
from lutetia.models.mixing.denoisers import module_denoiser
from lutetia.models.mixing.sampling import initial_noise, sample, time_grid
from lutetia.models.mixture import MixtureTransformer, Mode, combine, draw_experts, routing_weights
from lutetia.system.errors import ConfigError, UsageError
from tests.models.tiny_experts import LATENT, WAN, tiny_data

POINTS = torch.Generator().manual_seed(0)
CLUSTERS = [
    torch.randn(count, 2, generator=POINTS, dtype=torch.float64) * 0.5 + torch.tensor(centre, dtype=torch.float64)
    for count, centre in ((600, (-3.0, 0.0)), (300, (3.0, 0.0)), (100, (0.0, 4.0)))
]
UNION = torch.cat(CLUSTERS)
ENTRY = {"folder": "somewhere", "class_name": "WanTransformer3DModel", "prediction": "velocity", "noise_schedule": "linear"}


def log_likelihoods(z: Tensor, a: Tensor, b: Tensor, points: Tensor) -> Tensor:
    """log p(z | point) on the path z = a point + b noise, up to a constant; [rows, points]."""
    return -(z[:, None] - a[:, None, None] * points).square().sum(-1) / (2 * b[:, None] ** 2)


def posterior_mean(z: Tensor, a: Tensor, b: Tensor, points: Tensor) -> Tensor:
    return log_likelihoods(z, a, b, points).softmax(1) @ points


def union_flow(x: Tensor, t: Tensor) -> Tensor:
    return (x - posterior_mean(x, 1 - t, t, UNION)) / t[:, None]


class AnalyticExpert:
    """The exact expert of one cluster, with any prediction type and on any path."""

    def __init__(self, points: Tensor, prediction: Any, schedule: Any) -> None:
        self.points, self.prediction, self.schedule = points, prediction, schedule

    def predict(self, z: Tensor, s: Tensor) -> Tensor:
        a, b = (1 - s, s) if self.schedule == "linear" else (torch.cos(math.pi * s / 2), torch.sin(math.pi * s / 2))
        x0 = posterior_mean(z, a, b, self.points)
        noise = (z - a[:, None] * x0) / b[:, None]
        if self.prediction == "sample":
            return x0
        if self.prediction == "epsilon":
            return noise
        return noise - x0 if self.schedule == "linear" else a[:, None] * noise - b[:, None] * x0

    def __call__(self, x_t: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor | None) -> Tensor:
        return velocity(self.prediction, self.schedule, self.predict, x_t, t)


class AnalyticRouter(nn.Module):
    """The exact posterior p(cluster | x_t, t); every point counts equally, so the priors are included."""

    def forward(self, x_t: Tensor, t: Tensor, pooled: Tensor | None) -> Tensor:
        return torch.stack([log_likelihoods(x_t, 1 - t, t, points).logsumexp(1) for points in CLUSTERS], 1)


def analytic_mixture(kinds: list[tuple[str, str]]) -> MixtureTransformer:
    entries = [{**ENTRY, "prediction": p, "noise_schedule": s} for p, s in kinds]
    experts = [AnalyticExpert(points, *kind) for points, kind in zip(CLUSTERS, kinds, strict=True)]
    return MixtureTransformer(experts=entries, mode="full", text_conditioned=False).attach(AnalyticRouter(), experts.__getitem__)


ALL_KINDS = [(p, s) for p in ("velocity", "sample", "epsilon") for s in ("linear", "vp_cosine")]


@pytest.mark.parametrize(
    "kinds",
    [
        *([kind] * 3 for kind in ALL_KINDS),
        [("velocity", "linear"), ("epsilon", "vp_cosine"), ("sample", "linear")],
        [("epsilon", "vp_cosine"), ("velocity", "vp_cosine"), ("epsilon", "linear")],
    ],
    ids=lambda kinds: "+".join("-".join(kind) for kind in kinds),
)
def test_weighted_sum_of_cluster_flows_is_the_flow_of_the_union(kinds) -> None:
    mixture, draw = analytic_mixture(kinds), torch.Generator().manual_seed(1)
    worst = 0.0
    for now in (0.05, 0.2, 0.5, 0.8, 0.99):
        t = torch.full((500,), now, dtype=torch.float64)
        points = UNION[torch.randint(len(UNION), (500,), generator=draw)]
        x = (1 - now) * points + now * torch.randn(500, 2, generator=draw, dtype=torch.float64)
        flow = mixture(x, t * 1000, torch.zeros(500, 1, 1), return_dict=False)[0]
        worst = max(worst, (flow - union_flow(x, t)).abs().max().item())
    assert worst < 1e-10


def test_router_at_pure_noise_gives_the_priors() -> None:
    mixture = analytic_mixture([("velocity", "linear")] * 3)
    x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mean = mixture.probabilities(x, torch.ones(2000, dtype=torch.float64), None).mean(0)
    assert torch.allclose(mean, torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64), atol=0.01)


@pytest.mark.parametrize(("mode", "mass"), [("full", (0.6, 0.3, 0.1)), ("sticky", (0.6, 0.3, 0.1)), ("top1", (0.87, 0.12, 0.01))])
def test_modes_give_clusters_their_expected_share_of_clips(mode, mass) -> None:
    """Without text, `top1` sends nearly all clips to the largest cluster: the reason why the router reads the text."""
    mixture, count = analytic_mixture([("velocity", "linear")] * 3), 800
    noise = initial_noise((2,), range(count)).double()
    blank = torch.zeros(count, 1, dtype=torch.float64)
    clips = sample(mixture, blank, blank, noise, times=time_grid(30).clamp_min(0.01), mode=mode, seeds=range(count)).latents
    centres = torch.stack([points.mean(0) for points in CLUSTERS])
    shares = torch.bincount(torch.cdist(clips, centres).argmin(1), minlength=3) / count
    assert torch.allclose(shares, torch.tensor(mass), atol=0.05)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=40)
def test_routing_weights_are_a_distribution_over_the_best(rows, experts, seed) -> None:
    p = torch.rand(rows, experts, generator=torch.Generator().manual_seed(seed)).softmax(1)
    modes: list[tuple[Mode, int]] = [("top1", 1), ("top2", 2), ("full", experts)]
    for mode, kept in modes:
        weights = routing_weights(p, mode)
        assert torch.allclose(weights.sum(1), torch.ones(rows), atol=1e-6)
        assert ((weights > 0).sum(1) == min(kept, experts)).all()
        assert (weights.argmax(1) == p.argmax(1)).all()
    top2 = routing_weights(p, "top2")
    ratio = top2 / p
    assert all(torch.allclose(row[row > 0], row[row > 0][0], atol=1e-5) for row in ratio)


def test_draw_experts_follows_probabilities_and_seeds() -> None:
    p = torch.tensor([[0.6, 0.3, 0.1]]).expand(4000, 3)
    drawn = draw_experts(p, range(4000))
    assert torch.allclose(drawn.mean(0), p[0], atol=0.03)
    assert torch.equal(draw_experts(p[:3], [7, 8, 9]), drawn[7:10])


def test_combine_calls_each_expert_once_with_its_rows() -> None:
    calls: list[tuple[int, int]] = []

    def expert(index: int):
        def denoise(x, t, tokens, pooled):
            calls.append((index, len(x)))
            assert len(t) == len(tokens) == len(pooled) == len(x)
            return torch.full_like(x, index + 1.0)

        return denoise

    weights = torch.tensor([[1.0, 0, 0], [0, 0, 1.0], [0.5, 0, 0.5], [1.0, 0, 0]])
    flow = combine(expert, weights, torch.zeros(4, 2), torch.zeros(4), torch.zeros(4, 1), torch.zeros(4, 1))
    assert calls == [(0, 3), (2, 2)]
    assert flow[:, 0].tolist() == [1.0, 3.0, 2.0, 1.0]


class SpyRouter(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts, self.seen = experts, 0

    def forward(self, x: Tensor, t: Tensor, pooled: Tensor | None) -> Tensor:
        self.seen += 1
        assert pooled is not None
        return pooled[:, : self.experts] * 100


def spy_mixture(**config: Any) -> tuple[MixtureTransformer, SpyRouter, list[int]]:
    """Two tiny Wan experts, chosen by the first coordinates of the pooled text; also the list of experts that were read."""
    read: list[int] = []

    def expert(index: int):
        read.append(index)
        return module_denoiser(build_expert(WAN, index).eval(), "velocity", "linear")

    router = SpyRouter(2)
    return MixtureTransformer(experts=[ENTRY] * 2, **config).attach(router, expert), router, read


def test_time_is_not_rounded_to_the_latents_dtype() -> None:
    """Between 0.5 and 1, bfloat16 has 128 times: 50 steps would ask experts at times that are off by up to two timesteps."""
    seen: list[Tensor] = []

    def spy(x: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor | None) -> Tensor:
        seen.append(t)
        return x

    mixture = MixtureTransformer(experts=[ENTRY]).attach(None, lambda index: spy)
    mixture(torch.zeros(2, *LATENT.shape, dtype=torch.bfloat16), torch.tensor(937.3), torch.zeros(2, 5, 16).bfloat16())
    assert torch.allclose(seen[0], torch.full((2,), 0.9373), atol=1e-6)


def test_guidance_branches_share_one_routing_decision() -> None:
    mixture, router, _ = spy_mixture()
    data = tiny_data(3)
    noise, times = initial_noise(LATENT.shape, [1, 2, 3]), time_grid(4)
    sampled = sample(mixture, data.tokens, data.pooled, noise, times=times, guidance=3.0)
    assert router.seen == 4
    assert sampled.routing.shape == (4, 3, 2)
    x = noise
    for now, then in zip(times[:-1], times[1:], strict=True):
        t = now.expand(3)
        weights = mixture.route(x, t, data.pooled)
        given_text = combine(mixture.expert, weights, x, t, data.tokens, data.pooled)
        null = combine(mixture.expert, weights, x, t, data.tokens * 0, data.pooled * 0)
        x = x + (then - now) * (null + 3.0 * (given_text - null))
    assert torch.allclose(sampled.latents, x, atol=1e-4)


def test_experts_are_read_on_first_use_and_dropped_at_the_cap() -> None:
    mixture, _, read = spy_mixture()
    mixture.experts_in_memory = 1
    x, t, tokens = torch.zeros(1, *LATENT.shape), torch.ones(1), torch.zeros(1, 5, 16)
    for wanted, so_far in ((0, [0]), (0, [0]), (1, [0, 1]), (0, [0, 1, 0])):
        combine(mixture.expert, torch.eye(2)[[wanted]], x, t, tokens)
        assert read == so_far


def test_sticky_keeps_its_draw_until_new_clips_begin() -> None:
    mixture, router, _ = spy_mixture()
    x, even = torch.zeros(6, 1), torch.full((6, 2), 0.5)
    drawn = mixture.route(x, torch.full((6,), 1.0), even, "sticky")
    later = [mixture.route(x, torch.full((6,), now), even, "sticky") for now in (1.0, 0.7, 0.7, 0.1)]
    assert router.seen == 1
    assert all(torch.equal(weights, drawn) for weights in later)
    again = mixture.route(x, torch.full((6,), 1.0), even, "sticky", seeds=range(100, 106))
    assert router.seen == 2
    assert not torch.equal(again, drawn)


def test_expert_without_checkpoint_is_never_routed_to() -> None:
    mixture = MixtureTransformer(experts=[{**ENTRY, "folder": None}, ENTRY]).attach(SpyRouter(2), lambda k: lambda *a: a[0])
    weights = mixture.route(torch.zeros(2, 1), torch.ones(2), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), "full")
    assert weights.tolist() == [[0.0, 1.0], [0.0, 1.0]]


def test_wan_pipeline_of_diffusers_runs_on_a_mixture() -> None:
    """The mixture replaces the transformer of a stock pipeline; both calls of guidance route by the given text."""
    mixture, router, read = spy_mixture(in_channels=4, patch_size=(1, 4, 4))
    pipe = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), transformer=mixture)  # pyright: ignore[reportArgumentType]
    pipe.set_progress_bar_config(disable=True)
    data = tiny_data(2)
    text = torch.eye(2, 8)
    options: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 13, "num_inference_steps": 3, "output_type": "latent"}
    latents = pipe(
        return_dict=False, prompt_embeds=data.tokens, negative_prompt_embeds=data.tokens * 0, guidance_scale=2.0,
        attention_kwargs={"routing_text": text}, **options,
    )[0]  # fmt: skip
    assert isinstance(latents, Tensor)
    assert latents.shape == (2, 4, 4, 8, 8)
    assert torch.isfinite(latents).all()
    assert (router.seen, read) == (6, [0, 1])


def test_misuse_raises_one_sentence() -> None:
    mixture, *_ = spy_mixture()
    x, t, tokens = torch.zeros(1, *LATENT.shape), torch.ones(1), torch.zeros(1, 5, 16)
    with pytest.raises(UsageError, match="no routing mode 'best'; use one of top1, top2, full, sticky"):
        mixture.route(x, t, torch.zeros(1, 8), "best")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="the router needs the prompt"):
        mixture(x, t, tokens)
    with pytest.raises(UsageError, match="does not know attention_kwargs"):
        mixture(x, t, tokens, attention_kwargs={"text": 1})
    with pytest.raises(UsageError, match="takes no image embeddings"):
        mixture(x, t, tokens, tokens)
    with pytest.raises(ConfigError, match="no experts attached"):
        MixtureTransformer(experts=[ENTRY]).expert(0)
    with pytest.raises(ConfigError, match="holds no mixture"):
        MixtureTransformer.from_pretrained("/nowhere/transformer")
