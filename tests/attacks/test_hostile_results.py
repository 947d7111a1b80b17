"""Hostile results against the coordinator's real checks and replay: real tiny experts, real safetensors files.

Rates over many seeds and honest devices are measured by `python -m benchmarks attacks` (docs/results/attacks.md). Elsewhere:
hostile headers and wrong forms in tests/coordinator/worker/test_process.py and
tests/models/training/test_checkpoint_checks.py, a copied result in
tests/coordinator/acceptance/test_state_machine.py, a cheater in a real swarm and the rollback in
tests/coordinator/test_cheater.py.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from benchmarks.attacks.lab import SHORT, Honest, Lab
from benchmarks.attacks.lies import EXCUSES, LIES, Scene
from benchmarks.attacks.main import truths
from lutetia.coordinator.acceptance.checks import Verdict

SEED = 1
STOPPED = {
    "untrained": "holdout",
    "sign-flipped": "holdout",
    "one NaN": "numbers",
    "one infinity": "numbers",
    "one weight of 1e9": "numbers",
    "scaled by 10": "holdout",
    "poisoned raw parameters": "raw",
    "poisoned moments": "numbers",
    "negative second moments": "numbers",
}
OWN, *_, WIDEST = EXCUSES.items()
BY_FIRST_STEPS = ("parent republished", "parent plus dust", "forward passes only", "fabricated trace", "other data")
BY_WHOLE_EPOCH = (f"stops after the {SHORT} replayed steps", "half trained", "scaled by 1.5", "backdoor, strong")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[Scene, Verdict]:
    lab = Lab(tmp_path_factory.mktemp("lab"), Honest(seed=SEED))
    parent, before = lab.honest(None)
    verdict = asyncio.run(lab.judged(parent, None))
    assert verdict.outcome == "valid", verdict.text
    _, after = lab.honest(parent)
    return Scene(lab, before, parent, after, torch.Generator().manual_seed(3), SEED), verdict


@pytest.mark.parametrize(("name", "rung"), STOPPED.items())
async def test_a_hostile_result_is_refused_by_its_check(scene: tuple[Scene, Verdict], name: str, rung: str) -> None:
    stage, parent = scene
    verdict = await stage.lab.judged(stage.lab.publish(LIES[name](stage)), parent.loss)
    assert (verdict.outcome, verdict.check) == ("invalid", rung), verdict.text


@pytest.mark.parametrize("name", [*BY_FIRST_STEPS, *BY_WHOLE_EPOCH])
async def test_a_fake_that_scores_well_is_found_by_replay(scene: tuple[Scene, Verdict], name: str) -> None:
    """The held-out loss does not reveal it. A replay does, of the first steps or of the whole epoch."""
    stage, parent = scene
    result = stage.lab.publish(LIES[name](stage))
    assert (await stage.lab.judged(result, parent.loss)).outcome == "valid"
    for device, said in (WIDEST, OWN):
        found = stage.lab.audited(result, stage.parent, said)
        assert (found.begun_short == "invalid") == (name in BY_FIRST_STEPS), (device, found.first.text, found.whole.text)
        assert found.whole.outcome == "invalid", (device, found.whole.text)


@pytest.mark.parametrize(
    "setting",
    [
        Honest(seed=11, micro_batch=1, clips=4, noise=0.0),
        Honest(seed=12, micro_batch=3, clips=8, noise=0.5),
        Honest(seed=13, precision="bfloat16"),
    ],
    ids=str,
)
async def test_an_honest_result_of_any_device_passes(setting: Honest, tmp_path: Path) -> None:
    lab, parent, parent_loss = Lab(tmp_path, setting), None, None
    for _ in range(2):
        result, _ = lab.honest(parent)
        verdict = await lab.judged(result, parent_loss)
        assert verdict.outcome == "valid", verdict.text
        for said in truths(setting).values():
            found = lab.audited(result, parent, said)
            assert (found.begun_short, found.whole.outcome) == ("valid", "valid"), (found.first.text, found.whole.text)
        parent, parent_loss = result, verdict.loss
