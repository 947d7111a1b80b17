"""Audits: when a result is replayed, how closely a replay must agree, and what is concluded from it. Pure, without torch.

Who is audited follows BOINC's adaptive replication (its wiki, "AdaptiveReplication"). For each peer the number n of consecutive
results that were audited and found valid is kept. Below a threshold everything is audited, above it a result is audited with
probability 1/n; one invalid result sets n to 0.

How closely two honest nodes agree was measured where the hardware was at hand (docs/explanation/audits.md, `python -m
benchmarks audit`) and is assumed elsewhere. The device that a peer reports selects one of a few tolerances, all far below the
difference that not training makes. A false report gains at most a replay of the whole epoch: a difference that would be invalid
between two devices of one kind leads to one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from pydantic import Field

from lutetia.coordinator.ledger.events import Outcome
from lutetia.coordinator.ledger.run_state import RunState, ShardLedger
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.records import TrainedWith


class AuditFinding(Frozen):
    """What is concluded from a replay."""

    outcome: Outcome = Field(description="What the replay found.")
    text: str = Field(default="", description="Why, in words.")
    closer: bool = Field(default=False, description="Inconclusive, and a replay of the whole epoch would tell more.")
    doubt: bool = Field(default=False, description="Nothing is proved, but honest work was never seen to end where this ends.")


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Bounds for one pair of devices, each as (valid up to here, invalid beyond); between them nothing is concluded."""

    name: str
    first: tuple[float, float]
    """Relative difference of a step's loss, within the first FIRST_STEPS steps."""
    later: tuple[float, float]
    """Relative difference of a step's loss, after them."""
    drift: tuple[float, float]
    """Distance between the published and the replayed end of the epoch (`models.training.replay`): of weights as a fraction of
    the replayed way, of moments as one of what they are."""
    noise: tuple[float, float]
    """Decides when the drift lies between its bounds: drift in multiples of the epoch's noise (`compare`)."""
    measured: bool
    """Whether the bounds were measured on such a pair, or are assumed."""

    def loss(self, step: int) -> tuple[float, float]:
        """The bounds for step `step` (0, 1, …) of the epoch."""
        return self.first if step < FIRST_STEPS else self.later


DEPTH_UNIT = 16
"""For each such number of epochs without one that was replayed whole the share of whole audits grows by `audit.whole_epoch`."""
FIRST_STEPS = 8
FLOAT32_CPU = Tolerance("two processors, float32", (1e-4, 1e-3), (1e-3, 1e-2), (1e-3, 0.2), (10, 100), True)
BFLOAT16_CPU = Tolerance("two processors, bfloat16", (2e-3, 2e-2), (1e-2, 0.1), (0.03, 0.5), (6, 25), True)
FLOAT32_OTHER = Tolerance("different kinds of device, float32", (1e-3, 1e-2), (1e-2, 0.1), (0.02, 0.6), (6, 25), False)
BFLOAT16_OTHER = Tolerance(
    "different kinds of device or precision, bfloat16", (5e-3, 5e-2), (2e-2, 0.2), (0.05, 0.7), (6, 25), False
)
OWN_KIND = FLOAT32_CPU
"""Whatever the pair: a difference that is invalid by this tolerance leads at least to a replay of the whole epoch."""


def tolerance(author: TrainedWith, auditor: TrainedWith) -> Tolerance:
    """The tolerance of a pair: one of four, whatever the peers report of themselves."""
    processors = author.device == auditor.device == "cpu"
    fine = author.moments == author.weights == auditor.moments == auditor.weights == "float32"
    if fine and author.precision == auditor.precision == "float32":
        return FLOAT32_CPU if processors else FLOAT32_OTHER
    return BFLOAT16_CPU if processors and author.precision == auditor.precision else BFLOAT16_OTHER


def compare(
    published: Sequence[float],
    replayed: Sequence[float],
    drift: float | None,
    author: TrainedWith,
    auditor: TrainedWith,
    noise: float | None = None,
    part: str = "end",
) -> AuditFinding:
    """Compare an epoch's published losses, and its end, with a replay. The worst step decides.

    A replay that diverges, or has no step, is inconclusive. When only first steps were replayed, losses between the bounds, or
    invalid by OWN_KIND, lead to a replay of the whole epoch: losses can be close by chance, ends cannot.

    Args:
        published: the author's loss of each step.
        replayed: the losses of the replayed steps, from the first step on.
        drift: distance between the two ends; None: the epoch was not replayed whole.
        author: what the author trained with.
        auditor: what the replay was computed with.
        noise: the drift between two honest ways of computing this epoch (`models.training.replay`), if measured.
        part: the part of the end that the drift was measured on, for the text.
    """
    bounds = tolerance(author, auditor)
    pair = f"{bounds.name}{'' if bounds.measured else ', assumed'}"
    if not replayed or not all(map(math.isfinite, replayed)):
        return AuditFinding(outcome="inconclusive", text="the replay gave no finite losses")
    if len(published) < len(replayed):
        return AuditFinding(outcome="invalid", text=f"it published {len(published)} losses of the {len(replayed)} steps replayed")
    apart = [_difference(*losses) for losses in zip(published, replayed, strict=False)]
    step = max(range(len(apart)), key=lambda index: apart[index] / bounds.loss(index)[0])
    most, too_much = bounds.loss(step)
    losses = f"it published {published[step]:.6g}, the replay gave {replayed[step]:.6g}"
    text = f"step {step}: {losses} (may differ by {most:.0e}; {pair})"
    end: Outcome = "valid"
    if drift is not None:
        end, why = judge_end(drift, noise, bounds, part)
        text += f"; {why}"
    if apart[step] > too_much or end == "invalid":
        return AuditFinding(outcome="invalid", text=text)
    if apart[step] > most or end == "inconclusive":
        return AuditFinding(outcome="inconclusive", text=text, closer=drift is None, doubt=end == "inconclusive")
    if drift is None and any(difference > OWN_KIND.loss(index)[1] for index, difference in enumerate(apart)):
        text += f"; {OWN_KIND.name} would not differ so much, so the whole epoch is replayed"
        return AuditFinding(outcome="inconclusive", text=text, closer=True)
    return AuditFinding(outcome="valid", text=text)


def judge_end(drift: float, noise: float | None, bounds: Tolerance, part: str = "end") -> tuple[Outcome, str]:
    """What the end of an epoch alone shows, and why. `noise` counts only when the drift lies between its bounds."""
    (near, too_far), (alike, apart) = bounds.drift, bounds.noise
    text = f"the relative distance of its {part} from the replay is {drift:.3g} (at most {near:g})"
    if drift <= near:
        return "valid", text
    if not drift <= too_far:
        return "invalid", text
    if noise is None:
        return "inconclusive", text
    text += f", {drift / max(noise, 1e-9):.3g} times as far as honest ways of computing it differ (at most {alike:g})"
    if drift <= alike * noise:
        return "valid", text
    return ("invalid" if drift > apart * noise else "inconclusive"), text


def _difference(published: float, replayed: float) -> float:
    return abs(published - replayed) / max(abs(replayed), 1e-12) if math.isfinite(published) else math.inf


def audit_due(streak: int, needed: int, lottery: float) -> bool:
    """Adaptive replication: always below `needed` consecutive valid results, then with probability 1/streak.

    `lottery` is uniform in [0, 1) and must be unpredictable to the peer.
    """
    return streak < needed or lottery * streak < 1


def secret_steps(draw: float, fewest: int, epoch: int) -> int:
    """How many first steps an audit replays that is not of the whole epoch: `fewest`, half as many more on average, at most all.

    The probability that an audit replays k steps or more is proportional to 1 / k. A peer that stops training earlier is
    convicted more often.

    Args:
        draw: uniform in [0, 1) and unpredictable to the peer.
        fewest: the manifest's `replay_steps`.
        epoch: steps of an epoch.
    """
    fewest = max(1, fewest)
    if epoch <= fewest:
        return epoch
    share = fewest / 2 / sum(1 / step for step in range(fewest + 1, epoch + 1))
    return epoch if draw * epoch < share else max(fewest, math.ceil(share / draw) - 1)


def lottery(secret: bytes, checkpoint: str, purpose: str = "audit") -> float:
    """Uniform in [0, 1) for each checkpoint and purpose; unpredictable without the coordinator's secret."""
    return int.from_bytes(hashlib.sha256(purpose.encode() + secret + checkpoint.encode()).digest()[:7], "big") / (1 << 56)


def is_newcomer(run: RunState, owner: str, epochs: int) -> bool:
    """Whether fewer than `epochs` of its epochs were, or are to be, replayed whole."""
    missing = max(0, epochs - run.peer(owner).proved)
    due = (audit for audit in run.audits.values() if audit.owner == owner and audit.whole)
    return len(tuple(islice(due, missing))) < missing  # no further than needed: thousands may be due


def unproved_depth(shard: ShardLedger) -> int:
    """The number of epochs at the end of the lineage since the last one that was, or is to be, replayed whole."""
    proved = (
        place
        for place, link in enumerate(reversed(shard.lineage))
        if any(one.whole and one.audit == "valid" for one in link.makers)
    )
    return next(proved, len(shard.lineage))
