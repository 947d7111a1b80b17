"""Eight-bit numbers: how wrong they are, and that they do not become more wrong."""

from __future__ import annotations

import pytest
import torch

from lutetia.models.training.states.eight_bit import blocks, pack_float, pack_root, pack_steps, unpack, unpack_root


@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 50.0])
def test_decoded_numbers_are_near_and_stay_as_they_are(count: int, scale: float):
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)) * scale
    largest = values.abs().max()
    steps = pack_steps(values)
    assert (unpack(steps) - values).abs().max() <= largest / 126
    assert len(steps.exponents) == blocks(count)
    assert steps.nbytes == count + blocks(count)
    near = unpack(pack_float(values))
    assert ((near - values).abs() <= values.abs() / 15 + largest / 2**17).all()
    assert torch.equal(unpack(pack_steps(unpack(steps))), unpack(steps))
    assert torch.equal(unpack(pack_float(near)), near)


def test_no_second_moment_becomes_zero():
    values = torch.cat([torch.zeros(3), torch.logspace(-30, 0, 300)])
    roots = unpack_root(pack_root(values))
    assert torch.equal(roots == 0, values == 0)
    large = values[200:256] > 1e-8
    assert ((roots[200:256] / values[200:256])[large] - 1).abs().max() < 0.14
    assert torch.equal(unpack_root(pack_root(roots)), roots)


def test_difference_from_bfloat16_averages_is_stable():
    """The sum of a rounded average and its difference gives the same difference again."""
    generator = torch.Generator().manual_seed(0)
    average = torch.randn(3000, generator=generator).mul(0.05).bfloat16().float()
    for size in (1e-6, 1e-3, 0.3):
        weights = average + torch.randn(3000, generator=generator) * size
        once = average + unpack(pack_steps(weights - average))
        assert torch.equal(average + unpack(pack_steps(once - average)), once)
