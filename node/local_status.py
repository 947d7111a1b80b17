"""What a node tells its volunteer: the status document of the control socket. Imports neither torch nor hivemind."""

from __future__ import annotations

from pydantic import Field

from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.records import NodeState


class DeviceStatus(Frozen):
    """What one device does. Fields of a shard are None while it has none."""

    device: str | None = Field(default=None, description="Its name: cpu, cpu:N, mps, cuda:N or xpu:N; null: not found yet")
    state: NodeState = Field(description="What it does now")
    reason: str = Field(description="Why it is in this state, in one sentence")
    since: float = Field(description="When it entered this state, in Unix seconds")
    shard: int | None = Field(default=None, description="Index of the shard that it works on")
    lane: int | None = Field(default=None, description="Lane of that shard, in a run with lanes")
    shard_name: str | None = Field(default=None, description="Name of that shard")
    epoch: int | None = Field(default=None, description="Newest accepted epoch of that shard, as the node knows it")
    epochs: int | None = Field(default=None, description="Epochs of each shard in total")
    step: int | None = Field(default=None, description="Training steps done in the current epoch")
    steps: int | None = Field(default=None, description="Training steps of an epoch")
    samples: int | None = Field(default=None, description="Samples of the shard that this work has seen so far")
    loss: float | None = Field(default=None, description="Training loss of the last step")
    samples_per_second: float | None = Field(default=None, description="Training speed of the last seconds")
    pending: int = Field(default=0, description="Own checkpoints that wait for acceptance")
    due: float | None = Field(default=None, description="When the next checkpoint is expected, in Unix seconds")
    paused_until: float | None = Field(default=None, description="When the pause ends, in Unix seconds; None: at resume")
    precision: str | None = Field(default=None, description="Data type of the forward pass, and why")
    waits_for_part: int | None = Field(default=None, description="Part of the shard's data that training stands still for")
    waits_since: float | None = Field(default=None, description="Since when it does, in Unix seconds")
    celsius: float | None = Field(default=None, description="Its temperature, in degrees Celsius, where max_temp is set")
    slowed: str | None = Field(default=None, description="Why it trains less than it may: its temperature")
    left_out: str | None = Field(
        default=None, description="Why its last work on a lane is in no merge, until a result is in time"
    )
    problem: str | None = Field(default=None, description="The last warning, until a checkpoint is accepted")


class TrafficStatus(Frozen):
    """Bytes that the node sends and receives. Those of records are estimated."""

    sent_today: int = Field(description="Bytes sent since local midnight")
    received_today: int = Field(description="Bytes received since local midnight")
    this_month: int = Field(description="Bytes sent and received in this calendar month")
    bytes_per_day: int | None = Field(default=None, description="The cap for a day; null: none")
    bytes_per_month: int | None = Field(default=None, description="The cap for a month; null: none")
    held_back: str | None = Field(default=None, description="What the caps hold back now; null: nothing")
    expected: str | None = Field(default=None, description="Bytes an hour, from what the probe measured")


class LocalStatus(DeviceStatus):
    """What the node does, and whether its work counts.

    With several devices, `device` names all of them, state and shard are those of the first of the busiest, `pending` and
    `samples_per_second` sum them up, and `devices` says the rest.
    """

    owner: str = Field(description="The node's public key, 64 hexadecimal digits")
    peer_id: str = Field(description="The node's peer id")
    run: str | None = Field(default=None, description="The run's id")
    name: str | None = Field(default=None, description="The run's name")
    manifest_version: int | None = Field(default=None, description="Version of the manifest that the node follows")
    accepted: int = Field(default=0, description="Checkpoints of this node that the run has accepted")
    accepted_today: int = Field(default=0, description="Those accepted since local midnight")
    refused: int = Field(default=0, description="Checkpoints of this node that were refused")
    last_accepted: float | None = Field(default=None, description="When the last one was accepted, in Unix seconds")
    devices: tuple[DeviceStatus, ...] = Field(default=(), description="Each device of the node")
    online: bool = Field(default=False, description="Whether the network is up")
    addresses: tuple[str, ...] = Field(default=(), description="Addresses that the node announces")
    blobs_bytes: int | None = Field(default=None, description="Bytes of blobs that it serves; null before the first heartbeat")
    audits_today: int = Field(default=0, description="Audits that it has carried out for the coordinator since local midnight")
    checks_today: int = Field(default=0, description="Checks that it has carried out for the coordinator since local midnight")
    traffic: TrafficStatus | None = Field(default=None, description="Bytes sent and received; null while it joins")
    copies: int = Field(default=0, description="Checkpoints of other peers of which the node keeps copies")
    pid: int = Field(description="Process id of the daemon")
    software: str = Field(description="Version of Lutetia")
    started: float = Field(description="When the daemon started, in Unix seconds")
