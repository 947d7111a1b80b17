"""The node as a whole: its devices under one identity, one network and one store, and what concerns all of them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from lutetia.node.contributions import Contributions
from lutetia.node.device_settings import choose, named_device
from lutetia.node.machine import messages as m
from lutetia.node.machine.state import NodeRules
from lutetia.node.runtime.data_fetcher import DataFetcher
from lutetia.node.runtime.devices.device_shell import DeviceShell
from lutetia.node.runtime.devices.inventory import Inventory
from lutetia.node.runtime.devices.parts import NodeParts
from lutetia.node.runtime.network import NodeNetwork
from lutetia.node.runtime.node_record import NodeSummary, summary_due, summary_of
from lutetia.node.runtime.replication import Replicator
from lutetia.node.runtime.workspace import Workspace
from lutetia.node.settings import NodeSettings
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.transport.base import Transport
from lutetia.system.errors import LutetiaError, UsageError, one_error
from lutetia.system.notify import notify
from lutetia.system.process import Child

log = logging.getLogger(__name__)

_NETWORK_CHECK_SECONDS = 1.0


class NodeShell:
    """One node. Created when the network is up; `run` returns when it has left.

    Args:
        settings: the volunteer's settings.
        network: network operations on the current transport.
        workspace: the run's files.
        contributions: counts accepted and refused checkpoints.
        rejoin: joins again after p2pd has died; raises LutetiaError or ConnectionError when that fails.
    """

    def __init__(
        self,
        settings: NodeSettings,
        network: NodeNetwork,
        workspace: Workspace,
        contributions: Contributions,
        rejoin: Callable[[], Awaitable[Transport]],
    ) -> None:
        self.settings, self.network, self.workspace, self.contributions = settings, network, workspace, contributions
        self.rules = NodeRules.of(network.manifest, network.identity.public_key)
        self.replicator = Replicator(network, workspace, workspace.paths.folder / "seeds.json")
        self.parts = NodeParts(settings, network, workspace, contributions, self.replicator)
        self.devices: dict[str, DeviceShell] = {}
        self.left = asyncio.Event()
        self.blobs_bytes: int | None = None
        """Bytes of the blobs that this node serves, for the local status; None before the first heartbeat."""
        self.offline: str | None = None
        """Why the network cannot be joined again now."""
        self._rejoin = rejoin
        self._group: asyncio.TaskGroup | None = None
        self._ending = False
        self._standing: dict[str, m.Event] = {}
        self._renewing = asyncio.Lock()
        self._published: tuple[NodeSummary, float] | None = None
        self._shown = ""
        find = settings.devices == ("auto",)
        self.inventory = Inventory(workspace.paths.devices, self.hardware_seen, find=find)
        if not find:
            self._add(settings.devices, found=False)

    @property
    def manifest(self) -> Manifest:
        return self.network.manifest

    async def run(self, *services: Coroutine[Any, Any, None]) -> None:
        """Run until the node has left; `services` run beside it and are cancelled then."""
        try:
            with one_error():
                async with asyncio.TaskGroup() as self._group:
                    beside = [self._group.create_task(work) for work in (self._watch_network(), self.inventory.run(), *services)]
                    for device in tuple(self.devices.values()):
                        self._begin(device)
                    await self.left.wait()
                    for task in beside:
                        task.cancel()
        finally:
            await self.inventory.close()
            for device in self.devices.values():
                await device.trainer.close()

    def upgrade(self, manifest: Manifest) -> None:
        """Apply a newer version of the manifest; the current work continues."""
        old = self.manifest
        if manifest.version <= old.version:
            return
        self.network.upgrade(manifest)
        self.workspace.manifest = manifest
        self.rules = NodeRules.of(manifest, self.network.identity.public_key)
        for device in tuple(self.devices.values()):
            device.upgrade(old)

    # --- devices ------------------------------------------------------------------------------------------------------------

    def _add(self, names: Sequence[str], *, found: bool) -> None:
        """Begin with these devices; `names` has those that the node uses already, too."""
        settings = self.settings
        for choice in choose(names, settings.threads, settings.memory_limit, settings.local_bytes_per_day):
            if choice.name not in self.devices:
                device = self.devices[choice.name] = DeviceShell(self.parts, choice, self, found=found)
                if self._group:
                    self._begin(device)
        for device in self.devices.values():
            device.named = len(self.devices) > 1

    def _begin_again(self) -> None:
        """Begin again with devices that had ended before a finish was cancelled."""
        for name, old in tuple(self.devices.items()):
            if old.left.is_set():
                self.devices[name] = DeviceShell(self.parts, old.choice, self, found=old.found)
                self._begin(self.devices[name])

    def _begin(self, device: DeviceShell) -> None:
        assert self._group
        self._group.create_task(self._run_device(device))

    async def _run_device(self, device: DeviceShell) -> None:
        await device.run(list(self._standing.values()), DataFetcher(device).run())
        if not self._ending:
            del self.devices[device.name]
            self.device_changed()
            self.inventory.look_again()  # it may have come back meanwhile
        elif all(other.left.is_set() for other in self.devices.values()):
            self.left.set()

    def hardware_seen(self, found: Sequence[str] | None, spare: Child | None) -> None:
        """Cards or drivers may have changed: begin with new devices, and end those that are gone.

        Args:
            found: the devices to use; None where the volunteer has named them.
            spare: a trainer process that a new device may use.
        """
        now = time.time()
        if self._ending:
            found = None
        if found is not None:
            for name in [name for name in self.devices if name not in found]:
                self.devices[name].feed(m.DeviceGone(now, f"the device {name} is gone or not to be used any more"))
            new = [name for name in found if name not in self.devices]
            self._add(found, found=True)
            if new and spare:
                self.devices[new[0]].trainer.adopt(spare)
        for device in tuple(self.devices.values()):
            device.feed(m.HardwareChanged(now))

    def free_device(self) -> DeviceShell | None:
        """A device without work of its own whose hardware is known to be fit; None if there is none."""
        return next((device for device in self.devices.values() if is_free(device)), None)

    # --- events -------------------------------------------------------------------------------------------------------------

    def feed(self, event: m.Event) -> None:
        """Feed an event that concerns all devices, those that are added later included."""
        if isinstance(event, m.UserVerb):
            self._standing["verb"] = event
            self._ending = event.verb in ("finish", "leave")
            if self._ending and not self.devices:
                self.left.set()
            if event.verb == "resume":
                self._begin_again()
        elif isinstance(event, m.HoursChanged):
            self._standing["hours"] = event
        for device in tuple(self.devices.values()):
            device.feed(event)  # before `run` they pass it over, and hear of it when they begin

    def feed_device(self, event: m.Event, name: str) -> None:
        """Feed an event that concerns one device, by its name or number. Raises UsageError when the node has no such device."""
        try:
            self.devices[named_device(name, tuple(self.devices))].feed(event)
        except ValueError as error:
            raise UsageError(f"{error}; `lutetia status` shows them") from error

    def device_changed(self) -> None:
        """Tell each device which slots the others have."""
        used = {name: device.slots_in_use for name, device in self.devices.items()}
        self.workspace.at_work = {
            work.shard: (work.epoch, work.checkpoint) for device in self.devices.values() if (work := device.state.work)
        }
        for name, device in tuple(self.devices.items()):
            taken = frozenset().union(*(slots for other, slots in used.items() if other != name))
            if device.state.phase != "left" and taken != device.state.taken:  # one that has left takes nothing in
                device.feed(m.ShardsTaken(time.time(), taken))
        self._notify()

    def _notify(self) -> None:
        states = [device.state for device in self.devices.values()]
        shown = "; ".join(f"{state.phase}: {state.why}" for state in states)[:400]
        if shown and shown != self._shown:
            self._shown = shown
            notify(f"STATUS={shown}")

    def shards_seen(self, event: m.SwarmSeen) -> None:
        """Devices that stand by need not look at the same shards."""
        for device in tuple(self.devices.values()):
            if device.state.phase == "idle":
                device.feed(event)

    def device_missing(self) -> None:
        self.inventory.look_again()

    # --- network ------------------------------------------------------------------------------------------------------------

    async def renew(self) -> None:
        """Publish the node's record if it is due, and the records of its blobs. Raises ConnectionError."""
        async with self._renewing:
            summary, now = summary_of([device.facts for device in self.devices.values()]), time.monotonic()
            if summary_due(self._published, summary, now, self.rules.heartbeat):
                self._published = summary, now
                await self.network.publish_node(*summary)
            if summary.state != "left":
                served = await asyncio.to_thread(self.served)
                self.blobs_bytes = sum(served.values())
                unannounced = await asyncio.to_thread(self.workspace.unannounced)
                await self.network.announce(digest for digest in served if digest not in unannounced)

    def served(self) -> dict[str, int]:
        """Blobs that this node serves (own work and copies for other peers), with sizes in bytes. Blocks on the disk."""
        return self.workspace.held() | self.replicator.held()

    async def _watch_network(self) -> None:
        """Restart the network when p2pd has died, while training goes on."""
        while True:
            await asyncio.sleep(_NETWORK_CHECK_SECONDS)
            if not self.network.transport.alive():
                self.feed(m.NetworkLost(time.time()))
                await self.network.transport.close()
                await self._rejoin_network()
                self._published = None
                self.feed(m.NetworkBack(time.time()))

    async def _rejoin_network(self) -> None:
        attempt = 0
        while True:
            attempt += 1
            try:
                self.network.replace_transport(await self._rejoin())
            except (LutetiaError, ConnectionError) as error:
                wait = self.rules.backoff(attempt, "rejoin")
                self.offline = str(error)
                log.warning("cannot rejoin the network: %s; trying again in %.0f s", error, wait)
                await asyncio.sleep(wait)
            else:
                self.offline = None
                return


def is_free(shell: DeviceShell) -> bool:
    """Whether the device has no work of its own, and its hardware is known to be fit."""
    state = shell.state
    fit = shell.prober.result is not None and state.disk_full_since is None and shell.slowed is None
    return state.phase == "idle" and state.online and fit and not shell.choice.is_unit
