"""Lanes: how several nodes train one epoch of a shard, each alone, and how their results become that epoch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lutetia.protocol.schema.canonical import WireDocument
from lutetia.protocol.schema.fields import MOST_LANES, Positive


class TeamSpec(WireDocument):
    """The lanes of every shard.

    Each lane trains its own share of an epoch, with its own batches and noise, from the same accepted parent: parameters,
    averages and moments. The coordinator merges what it accepted of them into the next epoch (DiLoCo, 2311.08105, with the mean
    as outer step).
    """

    lanes: int = Field(ge=2, le=MOST_LANES, description="Lanes of each shard: so many nodes train one epoch of it at once")
    shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        default=(1.0,),
        min_length=1,
        max_length=MOST_LANES,
        description="Share of an epoch's samples that a lane trains, for lane 0, 1, …; repeated when there are more lanes, "
        "and rounded to whole steps, at least one",
    )
    quorum: float = Field(
        default=0.75, gt=0, le=1, description="Share of the lanes whose accepted results are enough to merge the epoch"
    )
    deadline: Positive = Field(
        default=600.0, description="Seconds after an epoch's first accepted lane in which the epoch is merged at the latest"
    )
    inner_rate: Positive = Field(default=1.0, description="Factor on the learning rate in every lane")
    outer_rate: float = Field(
        default=1.0, gt=0, le=2, description="Factor on the mean change of parameters and averages; 1: their mean is taken over"
    )

    def share(self, lane: int) -> float:
        """The share of an epoch's samples that `lane` trains."""
        return self.shares[lane % len(self.shares)]
