"""Whom the demo kills and when, and what happened to the shard afterwards. Pure: fed with what was seen, and when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lutetia.cli.local.poller import LocalWorker
from lutetia.protocol.schema.status import ShardStatus, SwarmStatus


@dataclass(frozen=True)
class Takeover:
    """Times are seconds since the demo began; None until it was seen."""

    victim: str
    victim_owner: str
    shard: int
    shard_name: str
    epoch: int  # accepted checkpoints of the shard when its worker was killed
    killed: float
    samples_lost: int
    expired: float | None = None
    claimed: float | None = None
    heir: str | None = None
    training: float | None = None
    accepted: float | None = None

    @property
    def complete(self) -> bool:
        return self.accepted is not None

    def seen(self, at: float, shard: ShardStatus, workers: Mapping[str, LocalWorker]) -> Takeover:
        """What is known after a look at the shard and at the surviving workers (by owner) at time `at`."""
        now = self
        done = shard.epoch >= shard.epochs
        if now.training is None and self.epoch < shard.epoch and not done:  # the victim had handed this one in before it died
            handed_in = (shard.epoch - self.epoch) * shard.samples // shard.epoch
            now = replace(now, epoch=shard.epoch, samples_lost=max(0, self.samples_lost - handed_in))
        gone = shard.owner != self.victim_owner
        if now.expired is None and gone:
            now = replace(now, expired=at)
        if now.claimed is None and gone and shard.owner is not None:
            heir = workers.get(shard.owner)
            now = replace(now, claimed=at, heir=heir.name if heir else shard.owner[:8])
        heir = next((worker for worker in workers.values() if worker.name == now.heir), None)
        if now.claimed is not None and now.training is None and heir and heir.shard == self.shard and heir.step > 0:
            now = replace(now, training=at)
        if now.accepted is None and now.claimed is not None and shard.epoch > now.epoch and (now.training is not None or done):
            now = replace(now, accepted=at, training=now.training if now.training is not None else at)
        return now

    def steps(self) -> list[tuple[float, str]]:
        """The timeline as sentences."""
        heir, what = self.heir or "another worker", f"expert {self.shard} ({self.shard_name})"
        told = [
            (self.killed, f"{self.victim} was killed (SIGKILL) while it trained {what}; epoch {self.epoch} was accepted"),
            (self.expired, f"its lease on expert {self.shard} ran out"),
            (self.claimed, f"{heir} claimed expert {self.shard}"),
            (self.training, f"{heir} trains expert {self.shard} on from the accepted checkpoint of epoch {self.epoch}"),
            (self.accepted, f"the first checkpoint of {heir} for expert {self.shard} was accepted (epoch {self.epoch + 1})"),
        ]
        return [(at, text) for at, text in told if at is not None]


def choose_victim(status: SwarmStatus, workers: Mapping[str, LocalWorker], slowest_first: Sequence[str]) -> LocalWorker | None:
    """The worker to kill now, or None while it is too early.

    It is the slowest one (by name, in the order given) that trains a shard with accepted work behind it and a whole epoch ahead:
    one in its last epoch may hand that in before it dies, and nothing is left to take over. The time is right when another
    worker is free, at the latest when two thirds of the shard's budget are accepted or the last epoch but one is in training.
    """
    holders = {worker.name: (worker, status.shards[worker.shard]) for worker in workers.values() if worker.shard is not None}
    for name in slowest_first:
        worker, shard = holders.get(name, (None, None))
        if worker is None or shard is None or shard.owner != worker.owner or not 1 <= shard.epoch < shard.epochs:
            continue
        if worker.state not in ("training", "publishing"):
            continue
        ahead, epoch = shard.samples_budget - worker.samples, shard.samples // shard.epoch
        if ahead < epoch:
            continue
        free = any(other.state == "idle" and other.name != name for other in workers.values())
        last_chance = 3 * shard.epoch >= 2 * shard.epochs or ahead < 2 * epoch
        return worker if free or last_chance else None
    return None
