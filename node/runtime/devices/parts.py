"""What the devices of one node share, and what a device tells the node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from lutetia.node.contributions import Contributions
from lutetia.node.machine.messages import SwarmSeen
from lutetia.node.runtime.network import NodeNetwork
from lutetia.node.runtime.replication import Replicator
from lutetia.node.runtime.workspace import Workspace
from lutetia.node.settings import NodeSettings


class NodeHooks(Protocol):
    """What a device tells the node that it belongs to."""

    async def renew(self) -> None:
        """The node's record and those of its blobs are to be published, if they are due."""
        ...

    def device_changed(self) -> None:
        """A device's state has changed."""
        ...

    def shards_seen(self, event: SwarmSeen) -> None:
        """A device has looked at shards; the others need not look at the same ones."""
        ...

    def device_missing(self) -> None:
        """A device that was there does not answer."""
        ...


@dataclass
class NodeParts:
    """What the devices of one node share.

    Attributes:
        settings: the volunteer's settings.
        network: network operations on the current transport.
        workspace: the run's files.
        contributions: counts accepted and refused checkpoints.
        replicator: the copies that the node keeps for other peers.
    """

    settings: NodeSettings
    network: NodeNetwork
    workspace: Workspace
    contributions: Contributions
    replicator: Replicator
