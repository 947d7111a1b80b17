"""The emulated device refuses what a card refuses, and takes what a card takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.models.emulated_device import DEVICE, DeviceMismatchError, emulated_device


def test_it_computes_as_the_cpu_does_and_keeps_its_tensors() -> None:
    layer = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    with emulated_device() as device:
        layer.to(device)
        loss = layer(x.to(device)).square().sum()
        loss.backward()
        assert {p.device for p in layer.parameters()} == {loss.device} == {torch.device(DEVICE)}
        for parameter, gradient in zip(layer.parameters(), expected, strict=True):
            assert parameter.grad is not None
            assert torch.allclose(parameter.grad.to("cpu"), gradient)


@pytest.mark.parametrize(
    "mix",
    [
        lambda there, here: there + here,
        lambda there, here: torch.cat([there, here]),
        lambda there, here: there.mul_(here),
        lambda there, here: torch.where(there > 0, there, here),
        lambda there, here: nn.functional.linear(there, torch.ones(2, 3)),
        lambda there, here: torch.randn(3, device=DEVICE, generator=torch.Generator()),
    ],
)
def test_mixing_with_the_cpu_is_refused(mix) -> None:
    with emulated_device() as device, pytest.raises(DeviceMismatchError):
        mix(torch.ones(3, device=device), torch.ones(3))


def test_its_tensors_are_not_numpy_arrays() -> None:
    with emulated_device() as device, pytest.raises((TypeError, RuntimeError), match="numpy"):
        np.asarray(torch.ones(3, device=device))


def test_scalars_copies_and_indices_of_the_cpu_are_taken() -> None:
    with emulated_device() as device:
        there = torch.arange(3.0, device=device)
        assert (there * torch.tensor(2.0) + 1).tolist() == [1, 3, 5]
        assert there[torch.tensor([2, 0])].tolist() == [2, 0]
        assert there.copy_(torch.ones(3)) is there
        assert torch.tensor([1.0], device=device).device.type == "emulated"


def test_outside_it_torch_sees_no_accelerator() -> None:
    with emulated_device():
        assert torch.accelerator.is_available()
    assert torch.accelerator.current_accelerator(check_available=True) is None
    assert torch.tensor([1.0]).tolist() == [1.0]
