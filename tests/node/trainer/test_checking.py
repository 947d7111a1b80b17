"""What a trainer process answers to the check of a mixture."""

from __future__ import annotations

from pathlib import Path

from lutetia.models.mixing.router import build_router, write_router
from lutetia.models.training.trainer import ExpertTrainer, write_weights
from lutetia.node.trainer.checking.answers import answer_mixture
from lutetia.node.trainer.checking.questions import MixtureQuestion
from lutetia.node.trainer.messages import MixtureScored, RequestFailed
from tests.node.tiny_run import make_run, tiny_shard


def test_two_mixtures_are_scored_on_the_same_rows(tmp_path: Path):
    run = make_run(tmp_path)
    router, weights = tmp_path / "router", {}
    write_router(build_router(run.manifest, seed=1), router)
    for name, steps in (("old", 0), ("new", 3)):
        trainer = ExpertTrainer(run.manifest, 0, tiny_shard(0))
        for _ in range(steps):
            trainer.step()
        weights[name] = tmp_path / name
        write_weights(trainer.snapshot(), weights[name])
    question = MixtureQuestion(
        manifest=run.manifest_file, weights={0: weights["new"]}, current={0: weights["old"]}, mode="top1", router=router,
        holdout=(tmp_path / "0.holdout.safetensors", tmp_path / "1.holdout.safetensors"), draw="d" * 64, seconds=0.0, choose=True,
        device="cpu", threads=1,
    )  # fmt: skip
    answer = answer_mixture(question)
    assert isinstance(answer, MixtureScored)
    assert len(answer.findings.averages) == len(answer.findings.parent) >= 8
    assert answer.findings.averages != answer.findings.parent
    same = answer_mixture(question.model_copy(update={"current": question.weights}))
    assert isinstance(same, MixtureScored)
    rows = min(len(same.findings.parent), len(answer.findings.averages))
    assert same.findings.parent[:rows] == answer.findings.averages[:rows], "equal rows, noise and times"
    torn = answer_mixture(question.model_copy(update={"weights": {0: router}}))
    assert isinstance(torn, RequestFailed)
