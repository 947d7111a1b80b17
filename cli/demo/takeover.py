"""Which node the demo kills and when, and what then happens to its shard. Pure functions of observations and their times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lutetia.cli.local.poller import LocalWorker
from lutetia.protocol.schema.status import ShardStatus, SwarmStatus


@dataclass(frozen=True)
class Takeover:
    """A killed node and the takeover of its shard. Times are seconds since the demo began; None until it was observed."""

    victim: str
    victim_owner: str
    shard: int
    shard_name: str
    epoch: int  # accepted checkpoints of the shard when the node was killed
    killed: float
    samples_lost: int
    expired: float | None = None
    claimed: float | None = None
    successor: str | None = None
    training: float | None = None
    accepted: float | None = None

    @property
    def complete(self) -> bool:
        return self.accepted is not None

    def observe(self, at: float, shard: ShardStatus, workers: Mapping[str, LocalWorker]) -> Takeover:
        """The takeover, updated by an observation.

        Args:
            at: seconds since the demo began.
            shard: the shard's status.
            workers: the nodes that still run, by public key.
        """
        now = self
        done = shard.epoch >= shard.epochs
        if now.training is None and self.epoch < shard.epoch and not done:  # the victim had submitted it before it was killed
            submitted = (shard.epoch - self.epoch) * shard.samples // shard.epoch
            now = replace(now, epoch=shard.epoch, samples_lost=max(0, self.samples_lost - submitted))
        released = shard.owner != self.victim_owner
        if now.expired is None and released:
            now = replace(now, expired=at)
        if now.claimed is None and released and shard.owner is not None:
            holder = workers.get(shard.owner)
            now = replace(now, claimed=at, successor=holder.name if holder else shard.owner[:8])
        successor = next((worker for worker in workers.values() if worker.name == now.successor), None)
        at_work = successor is not None and successor.shard == self.shard and successor.step > 0
        if now.claimed is not None and now.training is None and at_work:
            now = replace(now, training=at)
        if now.accepted is None and now.claimed is not None and shard.epoch > now.epoch and (now.training is not None or done):
            now = replace(now, accepted=at, training=now.training if now.training is not None else at)
        return now

    def timeline(self) -> list[tuple[float, str]]:
        """What was observed so far, as (seconds, sentence)."""
        successor, what = self.successor or "another node", f"expert {self.shard} ({self.shard_name})"
        steps = [
            (self.killed, f"{self.victim} was killed (SIGKILL) while it trained {what}; epoch {self.epoch} was accepted"),
            (self.expired, f"its lease on expert {self.shard} expired"),
            (self.claimed, f"{successor} claimed expert {self.shard}"),
            (self.training, f"{successor} continues expert {self.shard} from the accepted checkpoint of epoch {self.epoch}"),
            (self.accepted, f"the first checkpoint of {successor} for expert {self.shard} was accepted (epoch {self.epoch + 1})"),
        ]
        return [(at, text) for at, text in steps if at is not None]


def choose_victim(status: SwarmStatus, workers: Mapping[str, LocalWorker], slowest_first: Sequence[str]) -> LocalWorker | None:
    """The node to kill now, or None while it is too early.

    Chosen is the slowest node that trains a shard with at least one accepted epoch and at least one whole epoch to go: a node in
    its last epoch may submit it before it dies, and then nothing is left to take over. It is killed when another node is idle, at
    the latest when two thirds of the shard's epochs are accepted or its last epoch but one is in training.

    Args:
        status: the coordinator's status.
        workers: the nodes that run, by public key.
        slowest_first: their names, slowest first.
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
