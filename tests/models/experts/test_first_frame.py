"""Experts that continue a given first frame, as Wan 2.2 TI2V and LTX-Video do: clean, at time 0, and no part of the loss."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from lutetia.models.experts.classes.family import TIMESTEPS
from lutetia.models.experts.families import build_expert, call_expert, check_fits
from lutetia.models.experts.loss_weights import weighted_losses
from lutetia.models.training.batches import Batches
from lutetia.models.training.holdout_loss import holdout_loss
from lutetia.protocol.schema.capabilities import FIRST_FRAME
from lutetia.protocol.schema.manifest import Manifest, needed_capabilities
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.pipeline_spec import ExpertInputs
from lutetia.protocol.schema.model.training_spec import Optimisation
from lutetia.system.errors import ConfigError
from tests.models.tiny_experts import CONFIGS, LATENT, WAN, tiny_data, tiny_manifest

LTX = ExpertSpec(class_name="LTXVideoTransformer3DModel", config=CONFIGS["LTXVideoTransformer3DModel"])


def taking(share: float | None, spec: ExpertSpec = WAN) -> ExpertSpec:
    return spec.model_copy(update={"inputs": ExpertInputs(first_frame=share)})


def run_of(share: float | None) -> Manifest:
    return tiny_manifest(1, expert=taking(share), needs=(FIRST_FRAME,))


def test_given_frame_is_clean_and_no_part_of_the_loss() -> None:
    data, generator = tiny_data(3), torch.Generator().manual_seed(1)
    x0, t, given = data.latents[:3], torch.tensor([0.2, 0.5, 0.9]), torch.tensor([True, False, True])
    noise = torch.randn(x0.shape, generator=generator)
    wrong = torch.randn(x0.shape, generator=generator)

    def answer(z: Tensor, s: Tensor) -> Tensor:
        assert torch.equal(z[given][:, :, 0], x0[given][:, :, 0])
        assert torch.equal(z[~given], torch.lerp(x0, noise, t.view(-1, 1, 1, 1, 1))[~given])
        assert torch.equal(z[:, :, 1:], torch.lerp(x0, noise, t.view(-1, 1, 1, 1, 1))[:, :, 1:])
        return wrong

    losses = weighted_losses(Optimisation(), taking(0.5), answer, x0, noise, t, given)
    error = (wrong - (noise - x0)).square()
    expected = torch.stack([error[row, :, 1:].mean() if given[row] else error[row].mean() for row in range(3)])
    assert torch.allclose(losses, expected)


@torch.no_grad()
@pytest.mark.parametrize("spec", [WAN, LTX], ids=["wan", "ltx"])
def test_expert_is_told_time_0_in_the_rows_with_a_given_frame(spec: ExpertSpec) -> None:
    model, data = build_expert(spec, 1).eval(), tiny_data(2)
    x, tokens, t = data.latents[:2], data.tokens[:2], torch.tensor([0.3, 0.8])
    plain = call_expert(model, x, t, tokens)
    assert torch.allclose(call_expert(model, x, t, tokens, given=torch.tensor([False, False])), plain, atol=1e-5)
    mixed = call_expert(model, x, t, tokens, given=torch.tensor([True, False]))
    assert torch.allclose(mixed[1], plain[1], atol=1e-5)
    assert torch.dist(mixed[0], plain[0]) > 0.1


@torch.no_grad()
def test_expert_is_told_time_0_for_the_patches_of_a_given_frame() -> None:
    model, data = build_expert(WAN, 1).eval(), tiny_data(2)
    x, tokens, t = data.latents[:2], data.tokens[:2], torch.tensor([0.3, 0.8])
    mixed = call_expert(model, x, t, tokens, given=torch.tensor([True, False]))
    patches = x.shape[2] * x.shape[3] * x.shape[4] // 16
    times = (TIMESTEPS * t)[:, None].repeat(1, patches)
    times[0, : patches // x.shape[2]] = 0
    assert torch.equal(mixed, model(x, times, tokens, return_dict=False)[0])


def test_batches_draw_first_frames_apart_from_all_else() -> None:
    data = tiny_data(8)
    none, half = (Batches(run_of(share), 0, data) for share in (None, 0.5))
    drawn = [half.at(0, step) for step in range(32)]
    given = torch.cat([batch.given for batch in drawn if batch.given is not None])
    assert 0.3 < given.float().mean() < 0.7
    again = Batches(run_of(0.5), 0, data).at(0, 3)
    assert again.given is not None
    assert drawn[3].given is not None
    assert torch.equal(again.given, drawn[3].given)
    assert none.at(0, 3).given is None
    assert drawn[3].rows(1, 2).given is not None


def test_held_out_loss_is_scored_with_first_frames_too() -> None:
    data = tiny_data(4)
    always, never = (holdout_loss(run_of(share), 0, None, data, draw="secret", noises=2) for share in (1.0, 0.0))
    again = holdout_loss(run_of(1.0), 0, None, data, draw="secret", noises=2)
    assert always == again
    assert len(always.rows) == 8
    assert all(a != b for a, b in zip(always.rows, never.rows, strict=True))


def test_run_with_first_frames_needs_the_capability_and_a_transformer_that_takes_them() -> None:
    assert needed_capabilities(taking(0.9), Optimisation()) == (FIRST_FRAME,)
    assert needed_capabilities(taking(None), Optimisation()) == ()
    with pytest.raises(ValidationError, match="need the capability first-frame; add it to needs"):
        tiny_manifest(1, expert=taking(0.9))
    check_fits(taking(0.9), LATENT)
    check_fits(taking(0.9, LTX), LATENT)
    other = ExpertSpec(class_name="MochiTransformer3DModel", config=CONFIGS["MochiTransformer3DModel"])
    for spec, says in (
        (taking(0.9, other), "MochiTransformer3DModel takes no first frame; leave first_frame out, or use one of LTXV.*, Wan"),
        (taking(0.9).model_copy(update={"noise_schedule": "vp_cosine"}), "first_frame needs patches of one frame and flow"),
    ):
        with pytest.raises(ConfigError, match=says):
            check_fits(spec, LATENT)
