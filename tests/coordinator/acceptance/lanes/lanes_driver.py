"""Drives a judge of one shard with lanes in a test."""

from dataclasses import replace
from typing import Any

from lutetia.coordinator.acceptance.checks import Verdict
from lutetia.coordinator.acceptance.messages import JudgeTick, Merged, StartMerge
from lutetia.protocol.schema.capabilities import LANES
from lutetia.protocol.schema.manifest import AuditPolicy
from lutetia.protocol.schema.model.team_spec import TeamSpec
from lutetia.protocol.schema.records import CheckpointRecord
from tests.coordinator.acceptance.judge_driver import COORDINATOR, PEERS, JudgeDriver, drive_judge, make_record

DEADLINE = 100.0
NOT_AUDITED = AuditPolicy(streak=1, replay_steps=0, whole_epoch=0.0)


class LanesDriver:
    """A judge of one shard with lanes."""

    def __init__(self, lanes: int = 4, audit: AuditPolicy = NOT_AUDITED, quorum: float = 0.75) -> None:
        team = TeamSpec(lanes=lanes, shares=(1.0, 1.0, 1.0, 0.5), quorum=quorum, deadline=DEADLINE)
        self.judge: JudgeDriver = drive_judge(shards=1, epochs=4, team=team, needs=(LANES,), audit=audit)

    @property
    def shard(self):
        return self.judge.state.run.shards[0]

    def result(self, lane: int, peer: int | None = None, loss: float = 0.4) -> CheckpointRecord:
        """The result of a lane for the next epoch, which passes its checks."""
        author = PEERS[lane if peer is None else peer]
        record = make_record(self.judge.manifest, author, 0, self.shard.epoch + 1, self.shard.accepted, text=f"{lane}", lane=lane)
        assert self.judge.offer(record).verdict == "queued"
        self.judge.verdict(record, loss)
        return record

    def tick(self, seconds: float = 0.0, at_work: set[int] | None = None) -> None:
        self.judge.now += seconds
        self.judge.send(JudgeTick(self.judge.now, None, None if at_work is None else {0: frozenset(at_work)}))

    def with_run(self, **changes: Any) -> None:
        """Go on from other fields of the run's state."""
        self.judge.state = replace(self.judge.state, run=replace(self.judge.state.run, **changes))

    def merges(self) -> list[StartMerge]:
        return [action for action in self.judge.actions if isinstance(action, StartMerge)]

    def merged(self, verdict: Verdict | None = None, merge: StartMerge | None = None) -> CheckpointRecord:
        """The last merge that was asked for ends."""
        merge = merge or self.merges()[-1]
        sources = tuple(source.acceptance.checkpoint for source in merge.sources)
        record = make_record(
            self.judge.manifest, COORDINATOR, 0, merge.epoch, merge.parent and merge.parent.checkpoint, text="|".join(sources)
        )
        verdict = verdict or Verdict("valid", "holdout", "", 0.39, 0.5)
        self.judge.send(Merged(0, sources, record, verdict, self.judge.now))
        return record


def lanes_of(merge: StartMerge) -> list[int]:
    return [source.lane for source in merge.sources]
