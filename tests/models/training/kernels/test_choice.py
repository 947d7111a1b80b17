"""Which kernels are taken: decisions from measured steps, no model."""

from __future__ import annotations

import pytest

from lutetia.coordinator.acceptance.audit_comparison import BFLOAT16_CPU, FLOAT32_CPU
from lutetia.models.training.kernels.choice import (
    LOSSES_APART,
    PLAIN_KERNELS,
    Kernels,
    KernelTrial,
    attention_kernels,
    choose_kernels,
    compiled_kernels,
    read_kernels,
    reproduced,
)

FLASH, COMPILED = Kernels(attention="flash"), Kernels(compiled=True)


def trial(kernels: Kernels, seconds: float, *, first: float | None = None, apart: float = 0.0, problem: str = "") -> KernelTrial:
    losses = () if problem else (2.0, 1.5 * (1 + apart), 1.0)
    return KernelTrial(kernels=kernels, first_seconds=first or seconds, step_seconds=seconds, losses=losses, problem=problem)


PLAIN = trial(PLAIN_KERNELS, 1.0)


def chosen(*trials: KernelTrial, steps: int = 100, shapes: int = 1) -> tuple[str, str]:
    found = choose_kernels([PLAIN, *trials], "float32", steps, shapes)
    return found.kernels.word, found.reason


def test_fastest_way_that_agrees_is_taken_and_the_reason_names_all() -> None:
    word, reason = chosen(trial(FLASH, 0.7), trial(Kernels(attention="math"), 3.0), trial(Kernels(attention="cudnn"), 0.8))
    assert word == "flash"
    assert reason == ("kernels: flash, 0.7 s a step (plain: 1 s; flash: 0.7 s, math: 3 s, cudnn: 0.8 s)")


def test_a_gain_within_the_noise_is_left() -> None:
    word, reason = chosen(trial(FLASH, 0.96))
    assert word == "plain"
    assert "flash: 0.96 s, less than 5% faster" in reason
    assert chosen(trial(FLASH, 0.94))[0] == "flash"


def test_losses_apart_from_the_plain_way_are_refused() -> None:
    word, reason = chosen(trial(FLASH, 0.5, apart=3e-5))
    assert word == "plain"
    assert "from the plain way's, at most 2.5e-05 is allowed" in reason


def test_losses_may_differ_by_a_quarter_of_what_an_audit_calls_valid() -> None:
    assert LOSSES_APART["float32"] == FLOAT32_CPU.first[0] / 4
    assert LOSSES_APART["bfloat16"] == LOSSES_APART["float16"] == BFLOAT16_CPU.first[0] / 4
    assert choose_kernels([PLAIN, trial(FLASH, 0.5, apart=4e-4)], "bfloat16", 100, 1).kernels == FLASH


@pytest.mark.parametrize(("steps", "shapes", "word"), [(100, 1, "compiled"), (79, 1, "plain"), (100, 2, "plain")])
def test_compiling_must_be_saved_within_an_epoch(steps: int, shapes: int, word: str) -> None:
    compiled = trial(COMPILED, 0.5, first=41.0)
    assert chosen(compiled, steps=steps, shapes=shapes)[0] == word


def test_way_that_failed_or_was_not_reached_is_left_with_its_words() -> None:
    word, reason = chosen(trial(FLASH, 0.0, problem="no kernel"), trial(COMPILED, 0.0, problem="not measured in time"))
    assert word == "plain"
    assert "flash: no kernel, compiled: not measured in time" in reason


def test_without_the_plain_way_nothing_is_chosen() -> None:
    found = choose_kernels([trial(PLAIN_KERNELS, 0.0, problem="out of memory"), trial(FLASH, 0.1)], "float32", 9, 1)
    assert (found.kernels, found.step_seconds) == (PLAIN_KERNELS, None)
    assert "could not be measured: out of memory" in found.reason
    assert "no time" in choose_kernels([], "float32", 9, 1).reason


def test_ways_to_try_follow_the_device_and_its_packages() -> None:
    names = [kernels.word for kernels in attention_kernels("cuda:1", ["xformers"])]
    assert names == ["flash", "efficient", "cudnn", "math", "xformers"]
    assert [kernels.word for kernels in attention_kernels("cpu", ["xformers"])] == ["math"]
    assert attention_kernels("mps", []) == compiled_kernels("mps", FLASH) == []
    assert [kernels.word for kernels in compiled_kernels("cuda:0", FLASH)] == [
        "flash compiled", "flash compiled graphs", "compiled", "compiled graphs",
    ]  # fmt: skip
    assert compiled_kernels("cpu", PLAIN_KERNELS) == [COMPILED]


@pytest.mark.parametrize("kernels", [PLAIN_KERNELS, FLASH, COMPILED, Kernels(attention="flash-attn", compiled=True, graphs=True)])
def test_word_names_kernels_and_nothing_else(kernels: Kernels) -> None:
    assert read_kernels(kernels.word) == kernels
    assert reproduced(kernels.word, kernels) == kernels
    assert reproduced(kernels.word, Kernels(attention="math")) == PLAIN_KERNELS
    assert read_kernels(None) == read_kernels("of a later version") == PLAIN_KERNELS
