"""One step of a plan: something that happens to the swarm from outside."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """At `at` seconds `action` happens to `nodes` (by number); `value` and `detail` say how much and of which kind."""

    at: float
    action: str
    nodes: tuple[int, ...] = ()
    value: float = 0.0
    detail: str = ""

    @property
    def sentence(self) -> str:
        numbers = ", ".join(map(str, self.nodes[:8])) + (f" … ({len(self.nodes)})" if len(self.nodes) > 8 else "")
        nodes = f"node{'s' if len(self.nodes) > 1 else ''} {numbers}" if numbers else ""
        parts = [self.action, nodes, self.detail, f"{self.value:g}" if self.value else ""]
        return " ".join(part for part in parts if part)
