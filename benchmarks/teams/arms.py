"""The arms: one node, lanes that are merged, the whole batch at every step, and branches of the cluster."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.teams.clips import TeamClips
from benchmarks.teams.loop import Node, held_out_losses
from benchmarks.teams.merge import OuterStep, State, mean_state, packed, unpacked
from benchmarks.teams.sizes import SIZES, adapter_on, run_of
from lutetia.models.data.build_settings import ClusterSettings
from lutetia.models.data.cluster.kmeans import cluster
from lutetia.models.data.shards import ShardData
from lutetia.models.experts.trained import published_tensors
from lutetia.protocol.schema.model.expert_spec import ExpertSpec

Arm = Literal["one", "whole", "lanes", "branches"]
PARENT_BATCH = 8
BRANCH_SHARE = 1 / 3
"""Share of the steps after which a cluster is split."""


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        size: name of the expert's size.
        arm: one node; the whole batch of all nodes at every step; lanes; branches.
        batch: samples per step of each node.
        steps: steps one after another, whatever the number of nodes.
        rate: learning rate in multiples of the size's.
        seed: of first weights, order of clips, noise and times.
        nodes: nodes that train at once; 1 for the arm `one`.
        interval: steps between two merges of lanes; 0 in other arms.
        moments: "mean": merge them; "new": set them to zero at the start of every round.
        outer: rate and momentum of the outer step of lanes.
        parent: steps that one node has trained before with batch 8 at the size's constant rate; 0: from the first weights.
    """

    size: str
    arm: Arm
    batch: int
    steps: int
    rate: float
    seed: int
    nodes: int = 1
    interval: int = 0
    moments: Literal["mean", "new"] = "mean"
    outer: tuple[float, float] = (1.0, 0.0)
    parent: int = 0


@dataclass(frozen=True)
class Result:
    """What a cell gave.

    Attributes:
        loss: held-out loss of the averages that a run publishes.
        seconds: processor time.
    """

    loss: float
    seconds: float


class Arms:
    """Trains cells on the clips of one folder, which also keeps bases of adapters and parents."""

    def __init__(self, clips: TeamClips, folder: Path) -> None:
        self._clips, self._folder = clips, folder

    def run(self, cell: Cell) -> Result:
        """Train the cell and measure it."""
        expert, base = self._expert(cell.size)
        parent = self._parent(cell, expert, base) if cell.parent else None
        began = time.process_time()
        training = _Training(cell, expert, base, self._clips, parent)
        arms = {"one": training.one, "whole": training.one, "lanes": training.lanes, "branches": training.branches}
        return Result(arms[cell.arm](), round(time.process_time() - began, 2))

    def _expert(self, size: str) -> tuple[ExpertSpec, Path | None]:
        """The expert of a size and the file of its base, which is trained on the other kinds of clips if it is not there yet."""
        found = SIZES[size]
        if not found.base_steps:
            return found.expert, None
        path = self._folder / f"base-{size}.safetensors"
        if not path.exists():
            manifest = run_of(found.expert, PARENT_BATCH, len(self._clips.others), 0)
            node = Node(manifest, self._clips.others, found.base_rate, found.base_steps, 0)
            node.train(0, found.base_steps)
            averages = node.state().averages
            weights = {name: averages.get(name, tensor) for name, tensor in published_tensors(node.model).items()}
            save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, path)
        return adapter_on(found.expert, path), path

    def _parent(self, cell: Cell, expert: ExpertSpec, base: Path | None) -> State:
        """The state that all cells of a size and a seed go on from."""
        path = self._folder / f"parent-{cell.size}-{cell.parent}-{cell.seed}.safetensors"
        if not path.exists():
            manifest = run_of(expert, PARENT_BATCH, len(self._clips.train), cell.seed)
            rate = SIZES[cell.size].rate
            node = Node(manifest, self._clips.train, rate, cell.parent, cell.seed, base, schedule="constant")
            node.train(0, cell.parent)
            save_file(packed(node.state()), path)
        return unpacked(load_file(path))


@dataclass(frozen=True)
class _Training:
    """The training of one cell."""

    cell: Cell
    expert: ExpertSpec
    base: Path | None
    clips: TeamClips
    parent: State | None

    def one(self) -> float:
        node = self._node(self.clips.train)
        node.train(0, self.cell.steps)
        return self._losses(node, node.state()).mean().item()

    def lanes(self) -> float:
        cell, node = self.cell, self._node(self.clips.train)
        state, outer, velocity = node.state(), OuterStep(*cell.outer), dict[str, Tensor]()
        for first in range(0, cell.steps, cell.interval):
            count, results = min(cell.interval, cell.steps - first), list[State]()
            for lane in range(cell.nodes):
                node.load(state, first)
                node.train(first, count, lane, cell.nodes)
                results.append(node.state())
            merged = mean_state(results, [1.0] * cell.nodes)
            parameters, velocity = outer.apply(state.parameters, merged.parameters, velocity)
            state = State(parameters, merged.moments if cell.moments == "mean" else {}, merged.averages)
        return self._losses(node, state).mean().item()

    def branches(self) -> float:
        cell, node = self.cell, self._node(self.clips.train)
        shared = round(cell.steps * BRANCH_SHARE)
        node.train(0, shared)
        parent, losses = node.state(), list[Tensor]()
        children, kept = split(self.clips, cell.nodes)
        for child in range(cell.nodes):
            node = self._node(self.clips.train.take(np.flatnonzero(children == child).tolist()))
            node.load(parent, shared)
            node.train(shared, cell.steps - shared)
            chosen = torch.from_numpy(np.flatnonzero(kept == child))
            if len(chosen):
                losses.append(self._losses(node, node.state(), chosen))
        return torch.cat(losses).mean().item()

    def _node(self, data: ShardData) -> Node:
        cell = self.cell
        manifest = run_of(self.expert, cell.batch * cell.nodes if cell.arm == "whole" else cell.batch, len(data), cell.seed)
        rate = cell.rate * SIZES[cell.size].rate
        node = Node(manifest, data, rate, cell.steps, cell.seed, self.base, before=cell.parent)
        if self.parent is not None:
            node.load(self.parent, 0)
        return node

    def _losses(self, node: Node, state: State, chosen: Tensor | None = None) -> Tensor:
        manifest, data = run_of(self.expert, self.cell.batch, len(self.clips.held_out), 0), self.clips.held_out
        return held_out_losses(manifest, node.model, state.averages, data, chosen)


def split(clips: TeamClips, children: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The child of each clip to train on and of each held-out clip, by k-means inside the cluster."""
    train, held_out = clips.features
    keys = [str(row) for row in range(len(train))]
    found = cluster(train, keys, [""] * len(train), ClusterSettings(experts=children))
    return found.labels, found.place(held_out)


def cell_of(values: Mapping[str, Any]) -> Cell:
    """The cell of a line of results."""
    fields: dict[str, Any] = {name: values[name] for name in Cell.__dataclass_fields__ if name in values}
    fields["outer"] = tuple(fields["outer"])
    return Cell(**fields)
