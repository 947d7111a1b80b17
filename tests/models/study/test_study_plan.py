"""Plans: FLOPs by torch's counter, router included; no arm exceeds the budget of its tier."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from lutetia.models.experts.families import build_expert, call_expert
from lutetia.models.study.config import StudyConfig
from lutetia.models.study.flops import expert_cost, router_cost
from lutetia.models.study.plan import StudyPlan, plan_study, planned_latent
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.training_spec import RouterSpec
from lutetia.system.errors import ConfigError
from tests.models.tiny_experts import LATENT, WAN

STUDIES = Path(__file__).parents[3] / "docs" / "studies"


def config(**changes: Any) -> StudyConfig:
    values = tomllib.loads((STUDIES / "union.toml").read_text())
    return StudyConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def plan() -> StudyPlan:
    return plan_study(settings := config(), planned_latent(settings))


def test_expert_cost_counts_parameters_and_backward_pass() -> None:
    cost = expert_cost(WAN, LATENT)
    assert cost.parameters == sum(p.numel() for p in build_expert(WAN, 0).parameters())
    assert 2.5 < cost.training / cost.forward < 3.1  # backward: twice the forward pass, less the first layer's input
    deeper = ExpertSpec(config={**WAN.config, "num_layers": 2})
    assert expert_cost(deeper, LATENT).forward > cost.forward


def test_expert_cost_equals_count_of_a_real_pass() -> None:
    model = build_expert(WAN, 0)
    x, tokens = torch.randn(1, *LATENT.shape), torch.randn(1, LATENT.text_tokens, LATENT.text_width)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        call_expert(model, x, torch.rand(1), tokens, torch.randn(1, LATENT.pooled_width)).sum().backward()
    assert counter.get_total_flops() == expert_cost(WAN, LATENT).training


def test_plan_arms_use_up_their_budget_but_never_exceed_it(plan: StudyPlan) -> None:
    for tier in ("headline", "control"):
        arms = [training for training in plan.trainings if training.tier == tier]
        budget = config().samples * arms[0].flops_per_sample * (1 if tier == "headline" else config().controls.share)
        for training in arms:
            step = training.experts * training.batch * training.flops_per_sample
            assert budget - config().checkpoints * step <= training.flops <= budget * 1.0001, training.name
            assert training.samples_per_shard == training.epochs * training.checkpoint_samples
            assert training.checkpoint_samples % training.batch == 0
    mixture = plan.of("headline", "mixture")[0]
    assert mixture.router_flops > 0
    assert mixture.flops_at(0) == mixture.router_flops
    assert 0 < mixture.router_flops / mixture.flops < 0.05
    monolith = plan.of("headline", "monolith")[0]
    assert monolith.router_flops == 0
    assert 1 < mixture.pass_flops / monolith.pass_flops < 1.25


def test_plan_controls_match_their_definitions(plan: StudyPlan) -> None:
    arms = {training.arm: training for training in plan.trainings if training.tier == "control"}
    monolith, mixture = arms["monolith"], arms["mixture"]
    assert arms["small-batch"].batch * 3 == monolith.batch
    steps = {name: each.samples_per_shard // each.batch for name, each in arms.items()}
    assert steps["small-batch"] / steps["monolith"] == pytest.approx(3, rel=0.05)
    assert (arms["balanced"].method, arms["balanced"].experts, arms["balanced"].flops) == ("balanced", 1, monolith.flops)
    warm = arms["warm-start"]
    assert warm.begin is not None
    assert (warm.begin.training, warm.begin.epoch, warm.begin.flops) == (monolith.name, 1, monolith.flops_at(1))
    assert warm.samples_per_shard / mixture.samples_per_shard == pytest.approx(0.75, rel=0.03), "the rest counts for its start"
    assert arms["random"].method == "random"
    assert arms["random"].data != mixture.data
    assert arms["wide"].parameters / mixture.parameters == pytest.approx(1, rel=0.05)
    assert arms["narrow"].parameters / monolith.parameters == pytest.approx(1, rel=0.05)
    assert {"2-experts", "4-experts", "8-experts"} <= arms.keys()
    routes = {(reading.route, reading.mode, reading.expert) for reading in plan.readings_of(mixture)}
    assert {("text-blind", None, None), ("oracle", None, None), ("router", "sticky", None), ("router", None, 2)} <= routes
    assert ("router", "top1", None) not in routes  # that is the mode of the run
    names = [reading.name for reading in plan.readings]
    assert len(set(names)) == len(names)


def test_plan_full_control_has_budget_and_seeds_of_headline(plan: StudyPlan) -> None:
    rivals = plan.of("headline", "small-batch")
    assert [rival.seed for rival in rivals] == [0, 1, 2]
    monolith = plan.of("headline", "monolith")[0]
    assert rivals[0].batch * 3 == monolith.batch
    assert rivals[0].flops == pytest.approx(monolith.flops, rel=0.001)
    assert [(r.epoch, r.clips) for r in plan.readings_of(rivals[0])] == [(r.epoch, r.clips) for r in plan.readings_of(monolith)]
    assert not {training.tier for training, _ in plan.controls(config())} - {"control"}
    with pytest.raises(ValidationError, match=r"full"):
        config(controls={"full": ["oracle"]})


def test_plan_learning_rates_change_nothing_else() -> None:
    settings = config(controls={"learning_rates": [4e-3, 1.2e-2], "clips": 128})
    plan = plan_study(settings, planned_latent(settings))
    arms = {training.arm: training for training in plan.trainings if training.tier == "control"}
    assert set(arms) == {"monolith", "mixture", "monolith-rate-0.012", "mixture-rate-0.012"}, (
        "the rate of the recipe is not repeated"
    )
    for side in ("monolith", "mixture"):
        recipe, other = arms[side], arms[f"{side}-rate-0.012"]
        assert (recipe.learning_rate, other.learning_rate) == (4e-3, 1.2e-2)
        assert other.model_copy(update={"name": recipe.name, "arm": recipe.arm, "learning_rate": 4e-3}) == recipe
    assert {reading.training for _, reading in plan.controls(settings)} == {training.name for training in arms.values()}


def test_plan_curve_has_one_n_and_the_end_all_clips(plan: StudyPlan) -> None:
    readings = plan.readings_of(plan.of("headline", "monolith")[0])
    assert [(r.epoch, r.clips) for r in readings if r.clips == 128] == [(1, 128), (2, 128), (3, 128), (4, 128)]
    assert {(r.epoch, r.prompts) for r in readings if r.clips == 256} == {(4, "natural"), (4, "stratified")}


def test_config_that_cannot_be_fair_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"must be divisible by the number of experts"):
        config(optimisation={"batch": 25})
    with pytest.raises(ValidationError, match=r"the control wide needs its own expert"):
        config(wide=None)
    with pytest.raises(ValidationError, match=r"controls.learning_rates must differ"):
        config(controls={"learning_rates": [1e-3, 0.001]})
    with pytest.raises(ValidationError, match=r"samplez"):
        config(samplez=3)
    poor = config(samples=1000)
    with pytest.raises(ConfigError, match=r"leaves arm .* fewer than 4 steps"):
        plan_study(poor, planned_latent(poor))


def test_router_cost_grows_with_experts() -> None:
    few, many = (router_cost(RouterSpec(), LATENT, experts).parameters for experts in (2, 8))
    assert few < many


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_study_is_valid(path: Path) -> None:
    StudyConfig(**tomllib.loads(path.read_text()))


def test_base_counts_for_no_arm_and_is_carried_out_first() -> None:
    base = {"kind": "frames", "samples": 4_801}
    arms = [arm for arm in config().controls.arms if arm not in ("wide", "narrow")]
    settings = config(base=base, controls={**config().controls.model_dump(), "arms": arms})
    with_base, without = plan_study(settings, planned_latent(settings)), plan_study(config(), planned_latent(config()))
    first, *others = with_base.trainings
    assert (first.tier, first.data, first.samples_per_shard) == ("base", "frames", 4_800)
    assert first.flops < with_base.of("headline", "monolith")[0].flops / 100  # a frame costs a sixteenth of a clip
    kept = {training.name: training for training in without.trainings}
    assert all(training == kept[training.name] for training in others)
    assert not with_base.readings_of(first)


def test_base_is_refused_for_networks_that_cannot_start_from_it() -> None:
    with pytest.raises(ValidationError, match="wide has another network"):
        config(base={"kind": "weights", "weights": "some/where"})
    expert = config().expert.model_dump()
    expert["config"] = {**expert["config"], "patch_size": [2, 4, 4]}
    with pytest.raises(ValidationError, match="patch is one frame long"):
        config(base={"kind": "frames", "samples": 4_800}, expert=expert, controls={})
