"""Which blobs of accepted results a coordinator keeps. Pure.

- Weights and traces: as long as their epoch can still be audited or rolled back to, which is HISTORY epochs of each shard, or for
  good if the owner wants that.
- Training states, several times as large: of each shard's last epochs, as many as the owner wants.
- Weights that a kept mixture names: as long as it is kept (`coordinator/mixtures/archive.py`).
- Of both: whatever a due audit begins or ends with, and whatever an undecided result names.
- Results of lanes: until they are merged, then while their epoch is the newest or an audit of one of its lanes is due.

So a shard takes a few times its training state and as many times its weights as mixtures name, and where their number is bounded
(`kept_mixtures`) at most HISTORY times its weights more, however long the run lasts.
"""

from __future__ import annotations

from collections.abc import Iterator

from lutetia.coordinator.ledger.run_state import HISTORY, AcceptedEpoch, RunState
from lutetia.protocol.schema.records import CheckpointRecord


def needed_blobs(run: RunState, kept_states: int) -> set[str]:
    """Digests of the blobs of accepted results that are still needed. `kept_states`: epochs of each shard, at least 1."""
    needed = {digest for shard in run.shards.values() for link in shard.lineage for digest in _lasting(link)}
    needed |= {link.acceptance.state.digest for shard in run.shards.values() for link in shard.lineage[-kept_states:]}
    needed |= {digest for link in _mergeable(run) for digest in _of_epoch(link)}
    for audit in run.audits.values():
        shard = run.shards[audit.shard]
        link = shard.link(audit.checkpoint)
        before = link and shard.before(link)
        needed |= {epoch.acceptance.state.digest for epoch in (link, before) if epoch}
    return needed | undecided_blobs(run)


def _mergeable(run: RunState) -> Iterator[AcceptedEpoch]:
    """Results of lanes that are merged, or are merged again if an audit finds another one of their epoch invalid."""
    audited = {(audit.shard, audit.epoch) for audit in run.audits.values()}
    for index, shard in run.shards.items():
        yield from shard.gathered.values()
        for link in shard.lineage:
            if link is shard.lineage[-1] or (index, link.acceptance.epoch) in audited:
                yield from link.sources


def _of_epoch(link: AcceptedEpoch) -> set[str]:
    return _lasting(link) | {link.acceptance.state.digest}


def _lasting(link: AcceptedEpoch) -> set[str]:
    return {link.acceptance.weights.digest} | ({link.trace.digest} if link.trace else set())


def undecided_blobs(run: RunState) -> set[str]:
    """The digests of all blobs that undecided results name. Any peer may name the blobs of another peer's result."""
    undecided = (candidate.record for shard in run.shards.values() for candidate in shard.candidates.values())
    return {digest for record in undecided for digest in blobs_of(record)}


def blobs_of(record: CheckpointRecord) -> set[str]:
    """The digests of a result's blobs."""
    return {ref.digest for ref in (record.weights, record.state, record.trace)}


def kept_bytes(weights: int, state: int, epochs: int, kept_states: int, mixtures: int | None, copied: bool = False) -> int:
    """The most bytes that a shard's accepted results take on the coordinator's disk, traces aside.

    Args:
        weights: bytes of one epoch's weights.
        state: bytes of one epoch's training state.
        epochs: of the shard's budget.
        kept_states: as in `needed_blobs`.
        mixtures: of how many mixtures the files are kept; None: of all, so that any epoch's weights may be needed.
        copied: whether a mixture holds its experts in a form of its own, as it does for adapters.
    """
    named = epochs if mixtures is None else min(epochs, mixtures)
    lasting = epochs if mixtures is None else min(epochs, HISTORY + mixtures)
    return weights * (lasting + (named if copied else 0)) + state * min(epochs, kept_states + 1)
