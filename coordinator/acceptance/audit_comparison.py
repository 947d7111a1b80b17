"""Audits: when a result is replayed, how closely a replay must agree, and what is concluded from it. Pure, without torch.

The rule of who is audited is BOINC's adaptive replication (its wiki, "AdaptiveReplication"): of each peer the number n of
consecutive results that were audited and found valid is kept; below a threshold everything is audited, above it a result is
audited with probability 1/n; one invalid result sets n to 0.

How closely two honest boxes agree was measured (docs/audits.md, `python -m benchmarks audit`) where it could be and is assumed
where it could not. What a peer says of its device chooses among a few tolerances, all of them far below what not training costs;
and no word about a device buys more than a replay of the whole epoch: what would be invalid between two of a kind asks for one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lutetia.coordinator.ledger.events import Outcome
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.records import TrainedWith


class AuditFinding(Frozen):
    """What a replay came to, and why. `closer`: a replay of the whole epoch would tell more.

    `doubt`: nothing is proved, but the end of the epoch is not where honest work of any kind was ever seen to end.
    """

    outcome: Outcome
    text: str = ""
    closer: bool = False
    doubt: bool = False


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Bounds for one pair of devices, as (up to here valid, beyond here invalid); between them nothing is concluded.

    `first` and `later` are relative differences of a step's loss, among the first FIRST_STEPS steps and after them. `drift` is
    the distance of two ends over the length of the way. Between its bounds the epoch's own noise decides: `noise` are bounds of
    the drift in multiples of how far two ways of computing this very epoch, both honest, end apart (`models.training.replay`).
    `measured` is False where the pair was not at hand.
    """

    name: str
    first: tuple[float, float]
    later: tuple[float, float]
    drift: tuple[float, float]
    noise: tuple[float, float]
    measured: bool

    def loss(self, step: int) -> tuple[float, float]:
        """The bounds for step `step` (0, 1, …) of the epoch."""
        return self.first if step < FIRST_STEPS else self.later


FIRST_STEPS = 8
FLOAT32_CPU = Tolerance("two processors, float32", (1e-4, 1e-3), (1e-3, 1e-2), (1e-3, 0.2), (10, 100), True)
BFLOAT16_CPU = Tolerance("two processors, bfloat16", (2e-3, 2e-2), (1e-2, 0.1), (0.03, 0.5), (6, 25), True)
FLOAT32_OTHER = Tolerance("different kinds of device, float32", (1e-3, 1e-2), (1e-2, 0.1), (0.02, 0.6), (6, 25), False)
BFLOAT16_OTHER = Tolerance(
    "different kinds of device or precision, bfloat16", (5e-3, 5e-2), (2e-2, 0.2), (0.05, 0.7), (6, 25), False
)
OWN_KIND = FLOAT32_CPU
"""What it finds invalid in a few steps is at least looked at closer, whatever the pair."""


def tolerance(author: TrainedWith, auditor: TrainedWith) -> Tolerance:
    """The tolerance of a pair. Whatever a peer says of itself, it is one of four."""
    processors = author.device == auditor.device == "cpu"
    if author.precision == auditor.precision == "float32":
        return FLOAT32_CPU if processors else FLOAT32_OTHER
    return BFLOAT16_CPU if processors and author.precision == auditor.precision else BFLOAT16_OTHER


def compare(
    published: Sequence[float],
    replayed: Sequence[float],
    drift: float | None,
    author: TrainedWith,
    auditor: TrainedWith,
    noise: float | None = None,
) -> AuditFinding:
    """The author's losses of an epoch against the replayed ones of its first steps, and its end's `drift` if replayed whole.

    The worst step decides. A replay that diverges, or that has no step, concludes nothing. Losses alone that fall between the
    bounds, or that OWN_KIND would not forgive, ask for the whole epoch: where losses are close by chance, ends are not.
    `noise`: the drift between two honest ways of computing the epoch, where it was measured.
    """
    bounds = tolerance(author, auditor)
    pair = f"{bounds.name}{'' if bounds.measured else ', assumed'}"
    if not replayed or not all(map(math.isfinite, replayed)):
        return AuditFinding(outcome="inconclusive", text="the replay gave no finite losses")
    if len(published) < len(replayed):
        return AuditFinding(outcome="invalid", text=f"it published {len(published)} losses of the {len(replayed)} steps replayed")
    apart = [_apart(said, found) for said, found in zip(published, replayed, strict=False)]
    step = max(range(len(apart)), key=lambda index: apart[index] / bounds.loss(index)[0])
    most, too_much = bounds.loss(step)
    losses = f"it published {published[step]:.6g}, the replay gave {replayed[step]:.6g}"
    text = f"step {step}: {losses} (may differ by {most:.0e}; {pair})"
    end: Outcome = "valid"
    if drift is not None:
        end, told = judged_end(drift, noise, bounds)
        text += f"; {told}"
    if apart[step] > too_much or end == "invalid":
        return AuditFinding(outcome="invalid", text=text)
    if apart[step] > most or end == "inconclusive":
        return AuditFinding(outcome="inconclusive", text=text, closer=drift is None, doubt=end == "inconclusive")
    if drift is None and any(found > OWN_KIND.loss(index)[1] for index, found in enumerate(apart)):
        text += f"; {OWN_KIND.name} would not differ like that, so the whole epoch decides"
        return AuditFinding(outcome="inconclusive", text=text, closer=True)
    return AuditFinding(outcome="valid", text=text)


def judged_end(drift: float, noise: float | None, bounds: Tolerance) -> tuple[Outcome, str]:
    """What the end of an epoch alone tells, and that in words. `noise` counts only where the drift lies between its bounds."""
    (near, too_far), (alike, apart) = bounds.drift, bounds.noise
    text = f"its end lies {drift:.3g} of the replayed way from the replayed end (at most {near:g})"
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


def _apart(said: float, found: float) -> float:
    return abs(said - found) / max(abs(found), 1e-12) if math.isfinite(said) else math.inf


def audit_due(streak: int, needed: int, lottery: float) -> bool:
    """BOINC's adaptive replication: always below `needed` consecutive valid results, then with probability 1/streak.

    `lottery` is uniform in [0, 1) and must be unpredictable to the peer.
    """
    return streak < needed or lottery * streak < 1


def lottery(secret: bytes, checkpoint: str, purpose: str = "audit") -> float:
    """Uniform in [0, 1) for each checkpoint and purpose; nobody without the coordinator's secret can foresee it."""
    return int.from_bytes(hashlib.sha256(purpose.encode() + secret + checkpoint.encode()).digest()[:7], "big") / (1 << 56)
