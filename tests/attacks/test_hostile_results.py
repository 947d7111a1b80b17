"""Hostile results against the coordinator's real checks and replay: real tiny experts, real safetensors files.

Rates over many seeds and honest devices are measured by `python -m benchmarks attacks` (docs/results/attacks.md). Elsewhere:
hostile headers and wrong forms in tests/coordinator/worker/test_process.py and
tests/models/training/test_checkpoint_checks.py, a copied result in
tests/coordinator/acceptance/test_state_machine.py, a cheater in a real swarm and the rollback in
tests/coordinator/test_cheater.py.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from benchmarks.attacks.lab import SHORT, STEPS, Honest, Lab, Result
from benchmarks.attacks.lies import EXCUSES, LIES, OF_ADAPTERS, Scene
from benchmarks.attacks.main import truths
from lutetia.coordinator.acceptance.checks import SizeLimits, Verdict, run_checks
from lutetia.coordinator.acceptance.messages import Audited, CheckDone, JudgeTick, Proved, StartAudit, StartCheck, StartProof
from lutetia.coordinator.acceptance.transition import JudgeRules, JudgeState
from lutetia.coordinator.ledger.reducer import apply
from lutetia.coordinator.ledger.run_state import RunState, ShardLedger
from lutetia.models.training.holdout_loss import holdout_loss
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import AuditPolicy
from tests.coordinator.acceptance.judge_driver import PEERS, JudgeDriver, first_event

SEED = 1
STOPPED = {
    "untrained": "holdout",
    "one NaN": "numbers",
    "one infinity": "numbers",
    "one weight of 1e9": "numbers",
    "scaled by 10": "holdout",
    "poisoned raw parameters": "numbers",
    "poisoned moments": "numbers",
    "negative second moments": "numbers",
}
STOPPED_ADAPTERS = {
    "untrained": "holdout",
    "one NaN": "numbers",
    "poisoned raw parameters": "numbers",
    "poisoned moments": "numbers",
    "negative second moments": "numbers",
    "A times 64, B by 64": "numbers",
}
UPHILL_SEED = 0
"""A run in which the checks refuse the honest epoch after crafted moments, as in 7 of 20 with Muon at the usual tolerance."""
OWN, *_, WIDEST = EXCUSES.items()
BY_FIRST_STEPS = ("parent republished", "parent plus dust", "forward passes only", "fabricated trace", "other data")
BY_WHOLE_EPOCH = (
    f"stops after the {SHORT} replayed steps", "half trained", "scaled by 1.5", "backdoor, strong", "moments uphill",
    "moments a thousandth", "sign-flipped",
)  # fmt: skip


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return scene_of(Lab(tmp_path_factory.mktemp("lab"), Honest(seed=SEED)), SEED)


def scene_of(lab: Lab, seed: int) -> Scene:
    parent, before = lab.honest(None)
    verdict = asyncio.run(lab.judged(parent, None))
    assert verdict.outcome == "valid", verdict.text
    _, after = lab.honest(parent)
    return Scene(lab, before, parent, after, torch.Generator().manual_seed(3), seed)


@pytest.mark.parametrize(("name", "check"), STOPPED.items())
async def test_a_hostile_result_is_refused_by_its_check(scene: Scene, name: str, check: str) -> None:
    verdict = await scene.lab.judged(scene.lab.publish(LIES[name](scene)), scene.parent)
    assert (verdict.outcome, verdict.check) == ("invalid", check), verdict.text


@pytest.fixture(scope="module")
def adapter_scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return scene_of(Lab(tmp_path_factory.mktemp("adapters"), Honest(seed=2, adapter=True)), 2)


@pytest.mark.parametrize(("name", "check"), STOPPED_ADAPTERS.items())
async def test_a_hostile_adapter_is_refused_by_its_check(adapter_scene: Scene, name: str, check: str) -> None:
    lie = {**LIES, **OF_ADAPTERS}[name]
    verdict = await adapter_scene.lab.judged(adapter_scene.lab.publish(lie(adapter_scene)), adapter_scene.parent)
    assert (verdict.outcome, verdict.check) == ("invalid", check), verdict.text


@pytest.mark.parametrize("name", ["parent republished", "forward passes only", "A times 4, B by 4", "scaled by 1.5"])
async def test_a_faked_adapter_that_scores_well_is_found_by_replay(adapter_scene: Scene, name: str) -> None:
    lab, lie = adapter_scene.lab, {**LIES, **OF_ADAPTERS}[name]
    result = lab.publish(lie(adapter_scene))
    assert (await lab.judged(result, adapter_scene.parent)).outcome == "valid"
    assert lab.audited(result, adapter_scene.parent).whole.outcome == "invalid"
    honest = lab.publish(adapter_scene.after)
    assert lab.audited(honest, adapter_scene.parent).whole.outcome == "valid"


@pytest.fixture(scope="module")
def compact_scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return scene_of(Lab(tmp_path_factory.mktemp("compact"), Honest(seed=SEED, compact=True)), SEED)


async def test_hostile_results_in_the_compact_form_are_refused_or_found_by_replay(compact_scene: Scene) -> None:
    """It has no first moments, so the check that compares both moments cannot refuse; what second moments do, a replay finds."""
    lab, parent = compact_scene.lab, compact_scene.parent
    for name, check in {"one NaN": "numbers", "untrained": "holdout", "poisoned raw parameters": "numbers"}.items():
        verdict = await lab.judged(lab.publish(LIES[name](compact_scene)), parent)
        assert (verdict.outcome, verdict.check) == ("invalid", check), verdict.text
    for name in ("poisoned moments", "moments of next to nothing", "half trained"):
        result = lab.publish(LIES[name](compact_scene))
        assert (await lab.judged(result, parent)).outcome == "valid", name
        assert lab.audited(result, parent).whole.outcome == "invalid", name
    assert lab.audited(lab.publish(compact_scene.after), parent).whole.outcome == "valid"


async def test_noise_and_times_of_the_score_are_secret_and_new_for_each_result(scene: Scene) -> None:
    lab, snapshot = scene.lab, scene.after
    one, other = (lab.record(lab.publish(replace(snapshot, trace=[loss] * STEPS))) for loss in (0.5, 0.6))
    assert one.weights == other.weights
    scores = [await lab.check_runner.losses(record) for record in (one, other)]
    weights = lab.store.path(one.weights.digest)
    public = holdout_loss(lab.manifest, 0, weights, lab.holdout).rows
    assert len({*scores, public}) == 3, "equal weights, and nobody can compute on which rows they are scored"
    parent = lab.accepted(lab.publish(snapshot))
    assert await lab.check_runner.parent_losses(one, parent) == scores[0], "the parent is scored on the same rows"


@pytest.mark.parametrize("name", [*BY_FIRST_STEPS, *BY_WHOLE_EPOCH])
async def test_a_fake_that_scores_well_is_found_by_replay(scene: Scene, name: str) -> None:
    """The held-out loss does not reveal it. A replay does, of the first steps or of the whole epoch."""
    result = scene.lab.publish(LIES[name](scene))
    assert (await scene.lab.judged(result, scene.parent)).outcome == "valid"
    for device, said in (WIDEST, OWN):
        found = scene.lab.audited(result, scene.parent, said)
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
    lab, parent = Lab(tmp_path, setting), None
    for _ in range(2):
        result, _ = lab.honest(parent)
        verdict = await lab.judged(result, parent)
        assert verdict.outcome == "valid", verdict.text
        for said in truths(setting).values():
            found = lab.audited(result, parent, said)
            assert (found.begun_short, found.whole.outcome) == ("valid", "valid"), (found.first.text, found.whole.text)
        parent = result


@dataclass
class Court:
    """A real judge over a lab: what it wants checked or replayed is checked and replayed for real, and at once."""

    lab: Lab
    driver: JudgeDriver
    results: dict[str, tuple[Result, Result | None]] = field(default_factory=dict)
    """By digest of the record: the result, and the one before it."""
    verdicts: dict[str, Verdict] = field(default_factory=dict)

    @classmethod
    def of(cls, lab: Lab) -> Court:
        created = first_event(lab.manifest)
        rules = JudgeRules(lab.manifest, lab.manifest.coordinators[0], b"secret", newcomer_epochs=1)
        largest = SizeLimits(1 << 30, 1 << 30, 1 << 30)
        return cls(lab, JudgeDriver(lab.manifest, rules, JudgeState(apply(RunState(), created), limits={0: largest})))

    @property
    def shard(self) -> ShardLedger:
        return self.driver.state.run.shards[0]

    async def offer(self, result: Result, parent: Result | None, who: Identity) -> str:
        """The digest of the result's record, once the judge has no more to do for it."""
        changes = {"owner": who.public_key, "peer_id": who.peer_id, "parent": self.shard.accepted}
        record = self.lab.record(result).model_copy(update=changes)
        self.results[record.digest] = result, parent
        assert self.driver.offer(record).verdict == "queued"
        await self.settle()
        return record.digest

    async def later(self, seconds: float) -> None:
        self.driver.now += seconds
        self.driver.send(JudgeTick(self.driver.now))
        await self.settle()

    async def settle(self) -> None:
        """Carry out what the judge asks for until it asks for nothing more."""
        while self.driver.actions:
            action, self.driver.actions = self.driver.actions[0], self.driver.actions[1:]
            now = self.driver.now
            match action:
                case StartCheck(record, parent):
                    verdict = await run_checks(record, parent, self.lab.manifest, self.lab.check_runner, time.monotonic)
                    self.verdicts[record.digest] = verdict
                    self.driver.send(CheckDone(record, verdict, now))
                case StartAudit(audit, link, _):
                    found = self.lab.audited(*self.results[link.acceptance.checkpoint])
                    finding = found.whole if audit.whole or found.first.closer else found.first
                    self.driver.send(Audited(audit.checkpoint, finding, now, whole=audit.whole or found.first.closer))
                case StartProof(record, _):
                    self.driver.send(Proved(record, self.lab.audited(*self.results[record.digest]).whole, now))
                case _:
                    pass


async def test_moments_uphill_stop_a_shard_only_until_the_refusals_have_it_replayed(tmp_path: Path) -> None:
    """Real training, checks and replays under the real judge. The liar has a proved epoch, so nothing else replays its lie."""
    setting = Honest(seed=UPHILL_SEED, muon=True, clips=(8, 32)[UPHILL_SEED % 2], noise=(0.05, 0.1, 0.3)[UPHILL_SEED % 3])
    policy = AuditPolicy(replay_steps=SHORT, whole_epoch=0.0)  # besides newcomers nobody is replayed whole
    lab = Lab(tmp_path, setting, audit=policy, tolerance=0.005)  # the next epoch's loss is 2.3 % worse than its parent's
    liar, ann, ben = PEERS[:3]
    court = Court.of(lab)
    first, before = lab.honest(None)
    _, after = lab.honest(first)
    await court.offer(first, None, liar)
    assert court.driver.state.run.peer(liar.public_key).proved == 1, "its first epoch was replayed whole"
    lie = lab.publish(LIES["moments uphill"](Scene(lab, before, first, after, torch.Generator().manual_seed(3), UPHILL_SEED)))
    assert await court.offer(lie, first, liar) == court.shard.accepted, "its checks and the replay of its first steps see nothing"

    for who, micro_batch in ((ann, 4), (ben, 2)):
        if court.shard.epoch == 2:
            honest, _ = lab.honest(lie, replace(setting, micro_batch=micro_batch))
            refused = await court.offer(honest, lie, who)
            assert (court.verdicts[refused].outcome, court.verdicts[refused].check) == ("invalid", "holdout")
    assert court.shard.epoch == 1, "the refusals had the lie replayed whole, and the shard went back"
    assert liar.public_key in court.driver.state.run.quarantined

    again, _ = lab.honest(first, replace(setting, micro_batch=2))
    wanted = await court.offer(again, first, ann)
    await court.later(2 * lab.manifest.timing.tenure)
    assert court.shard.accepted == wanted
    following, _ = lab.honest(again)
    assert await court.offer(following, again, ann) == court.shard.accepted
    assert court.shard.epoch == 3
