"""What is measured of experts gives the loss of the real mixture in every mode and at every temperature."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lutetia.models.mixing.description import MixtureRouting, read_mixture
from lutetia.models.mixing.router import build_router
from lutetia.models.mixing.routing import evidence as measuring
from lutetia.models.mixing.routing.choice import losses_of
from lutetia.models.mixing.routing.evidence import FEWEST_ROWS, MOST_ROWS, RoutingEvidence, draw_rows, gather_evidence
from lutetia.models.mixing.stitch import stitch
from lutetia.models.mixture import MixtureTransformer, Mode, combine
from lutetia.models.training.trainer import ExpertTrainer, write_weights
from lutetia.protocol.schema.manifest import Manifest
from tests.models.tiny_experts import accept, tiny_data, tiny_manifest

SHARDS = 3


class Site:
    """A run of three shards, two of which have a trained expert that differs from the other's."""

    def __init__(self, root: Path) -> None:
        self.root, self.manifest = root, tiny_manifest(SHARDS, sampling={"mode": "top2"})
        self.holdouts = [tiny_data(seed=10 + shard) for shard in range(SHARDS)]
        self.router = build_router(self.manifest, seed=3)
        torch.nn.init.normal_(self.router.head.weight, std=0.5, generator=torch.Generator().manual_seed(1))
        self.weights = {shard: root / f"weights {shard}" for shard in (0, 2)}
        for shard, path in self.weights.items():
            trainer = ExpertTrainer(self.manifest, shard, tiny_data(seed=shard))
            for _ in range(2):
                trainer.step()
            write_weights(trainer.snapshot(), path)

    def gather(self, seconds: float = 1e9, clock: object = None, manifest: Manifest | None = None) -> RoutingEvidence:
        options = {"clock": clock} if clock else {}
        return gather_evidence(
            manifest or self.manifest, self.weights, self.router, self.holdouts, draw="secret", seconds=seconds,
            **options,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip

    def mixture(self, mode: Mode, temperature: float) -> MixtureTransformer:
        accepted = [accept(self.manifest, shard, path) for shard, path in self.weights.items()]
        routing = MixtureRouting(mode=mode, temperature=temperature, loss=0.5, rows=8, text="because")
        stitch(self.root / "mixture", self.manifest, list(self.weights.values()), self.router, accepted, routing=routing)
        return MixtureTransformer.from_pretrained(self.root / "mixture" / "transformer")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("evidence"))


@pytest.fixture(scope="module")
def whole(site: Site) -> RoutingEvidence:
    return site.gather()


@pytest.mark.parametrize(("mode", "temperature"), [("top1", 1.0), ("top2", 0.5), ("top2", 1.0), ("full", 2.0)])
@torch.no_grad()
def test_losses_are_those_of_the_mixture_that_is_written(site: Site, whole: RoutingEvidence, mode: Mode, temperature: float):
    mixture = site.mixture(mode, temperature)
    assert mixture.config["mode"] == mode
    rows = draw_rows(site.manifest, site.holdouts, "secret")
    losses = losses_of(whole, mode, temperature)
    for row in range(0, MOST_ROWS, 16):
        clip = site.holdouts[rows.shards[row]].take([rows.clips[row]])
        noise, t = rows.noise(row, tuple(clip.latents.shape[1:]))[None], rows.times[row : row + 1]
        x_t = torch.lerp(clip.latents, noise, t.view(-1, 1, 1, 1, 1))
        flow = combine(mixture.expert, mixture.route(x_t, t, clip.pooled), x_t, t, clip.tokens, clip.pooled)
        assert losses[row].item() == pytest.approx((flow - (noise - clip.latents)).square().mean().item(), rel=1e-4)


def test_sticky_loss_is_its_expectation(site: Site, whole: RoutingEvidence):
    drawn = whole.first.softmax(1).double()
    errors = whole.gram.diagonal(dim1=1, dim2=2).nan_to_num(0)
    assert torch.allclose(losses_of(whole, "sticky", 1.0), (drawn * errors).sum(1))
    assert (whole.first[:, 1] == -torch.inf).all(), "the shard without an accepted checkpoint is never drawn"


def test_rows_follow_the_priors_and_do_not_depend_on_the_experts(site: Site, whole: RoutingEvidence):
    assert len(whole.gram) == MOST_ROWS
    assert set(draw_rows(site.manifest, site.holdouts, "secret").shards) == set(range(SHARDS))
    again = site.gather()
    assert torch.equal(again.gram.nan_to_num(0), whole.gram.nan_to_num(0))


def test_rows_are_limited_by_time_to_the_first_of_the_same(site: Site, whole: RoutingEvidence):
    ticks = iter(range(10_000))
    few = site.gather(seconds=40.0, clock=lambda: float(next(ticks)))  # one second a row, and half of the time for each expert
    assert len(few.gram) == 20
    assert torch.allclose(few.gram.nan_to_num(0), whole.gram[:20].nan_to_num(0), rtol=1e-4)
    assert len(site.gather(seconds=1e-9).gram) == FEWEST_ROWS


def test_of_many_experts_the_two_likeliest_are_asked(site: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measuring, "MOST_ASKED", 1)
    few = site.gather()
    assert not few.complete or (few.gram[:, [0, 2]][:, :, [0, 2]].isfinite().all()), "two of two are all"
    assert torch.isfinite(losses_of(few, "top2", 1.0)).all()


def test_long_residuals_are_estimated_from_a_fixed_draw(site: Site, whole: RoutingEvidence, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measuring, "_ELEMENTS", 64)
    part = site.gather()
    exact, estimated = (losses_of(each, "top1", 1.0).mean().item() for each in (whole, part))
    assert exact != estimated
    assert estimated == pytest.approx(exact, rel=0.1)


def test_choice_is_in_the_description_and_older_readers_see_only_the_mode(site: Site):
    site.mixture("full", 1.4)
    document = read_mixture(site.root / "mixture").mixture
    assert document.routing
    assert (document.routing.text, document.routing.temperature, document.sampling.mode) == ("because", 1.4, "full")
    assert site.mixture("top1", 1.4).config["temperature"] == 1.4
    config = (site.root / "mixture" / "transformer" / "config.json").read_text()
    assert '"temperature": 1.4' in config
    site.mixture("top1", 1.0)
    assert "temperature" not in (site.root / "mixture" / "transformer" / "config.json").read_text()
    plain = document.model_copy(update={"routing": None}).model_dump(mode="json")
    assert "routing" not in plain, "what does not use it is written as before"
