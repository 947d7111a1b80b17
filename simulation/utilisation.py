"""How many of the devices that could train do: sums over looks at the whole swarm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lutetia.simulation.interfaces import Node


@dataclass
class Utilisation:
    """Devices that fit a shard and are online, those of them that hold a slot, and those whose trainer takes steps."""

    fit: int = 0
    at_work: int = 0
    training: int = 0

    def add(self, nodes: Sequence[Node]) -> None:
        """Count every device once more. `nodes`: of a node with several devices each."""
        for node in nodes:
            if node.answering and node.state.wanted == "run" and any(node.machine.fitness.values()):
                trainer = node.trainer.training
                self.fit += 1
                self.at_work += node.state.work is not None and node.state.work.owned
                self.training += trainer is not None and not trainer.waiting

    def share(self, count: int) -> float | None:
        """`count` as a share of the fit nodes; None before the first look."""
        return round(count / self.fit, 4) if self.fit else None
