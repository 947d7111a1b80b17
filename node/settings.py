"""The volunteer's settings, and where each comes from: flag, then environment, then file, then default."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, SettingsConfigDict

from lutetia.models.device import PrecisionChoice
from lutetia.models.training.kernels.choice import KernelChoice
from lutetia.node.device_settings import DEVICES, Cap, read_cap, read_devices, unknown_cap
from lutetia.node.schedule import WeeklyHours
from lutetia.node.trainer.loss_log import parse_place
from lutetia.protocol.schema.fields import LONGEST_PEER_NAME, peer_name
from lutetia.protocol.schema.problems import describe_problem
from lutetia.protocol.schema.ticket import PORT, Ticket
from lutetia.system.errors import ConfigError
from lutetia.system.files import read_toml
from lutetia.system.paths import default_state_folder

Origin = Literal["flag", "environment", "file", "default"]
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}


def parse_bytes(value: Any) -> Any:
    """`50 GB`, `500MiB` or a number -> bytes; anything else is returned as it is, for the validator to refuse."""
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", value.strip().lower())
        if match and len(match[1]) <= 30:
            return int(float(match[1]) * _UNITS[match[2] or ""])
    return value


def _split(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


_PLACE = re.compile(rf"/(?P<kind>ip4|ip6|dns|dns4|dns6)/(?P<host>[A-Za-z0-9.:_-]+)/tcp/(?!0+(/|$)){PORT}(/p2p/[A-Za-z0-9]+)?")


def _is_dialable(address: str) -> bool:
    """Whether it names a host and a TCP port in the form of the records, with or without a peer id."""
    match = _PLACE.fullmatch(address)
    if match is None or match["kind"].startswith("dns"):
        return match is not None
    try:
        return ipaddress.ip_address(match["host"]).version == int(match["kind"][2])
    except ValueError:
        return False


def announced(addresses: Sequence[str], peer_id: str) -> tuple[str, ...]:
    """The addresses without their peer id, which p2pd adds itself. Raises ConfigError when it is another peer's id."""
    hosts = {}
    for address in addresses:
        place, _, named = address.partition("/p2p/")
        if named and named != peer_id:
            raise ConfigError(
                f"announce: {address} belongs to peer {named}, but this node is {peer_id}; give an address of this node"
            )
        hosts[place] = True
    return tuple(hosts)


def _read_threads(value: Any) -> Any:
    return read_cap(value, lambda each: _within(each, 1, 1024, "threads"))


def _read_memory(value: Any) -> Any:
    return read_cap(value, lambda each: _within(parse_bytes(each), 1, 1 << 50, "bytes, like 20GB"))


def _within(value: Any, least: int, most: int, what: str) -> int:
    """Raises ValueError."""
    with contextlib.suppress(TypeError, ValueError):
        if least <= int(value) <= most:
            return int(value)
    raise ValueError(f"{value!r} is no number of {what} between {least} and {most}")


MIN_DUTY_CYCLE = 0.1
"""Lowest share of the time that the temperature limit leaves to training."""

Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]


class NodeSettings(BaseSettings):
    """Settings of `lutetia join`. Every field can be set by LUTETIA_<FIELD> too; unknown keys are refused."""

    model_config = SettingsConfigDict(env_prefix="LUTETIA_", extra="forbid", frozen=True)

    ticket: str = Field(description="Ticket of the run to join")
    state_folder: Path = Field(
        default_factory=default_state_folder, description="Folder for the node's identity, control socket, checkpoints and blobs"
    )
    listen: str = Field(default="/ip4/0.0.0.0/tcp/0", description="Address to listen on for peers; port 0 picks a free one")
    announce: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = Field(
        default=(),
        description="Addresses to announce to peers if they differ from `listen`, for instance /ip4/203.0.113.5/tcp/41000",
    )
    device: str = Field(
        default="auto",
        pattern=DEVICES,
        description="Devices to train on: auto (all cards, else the CPU), cpu, mps, cuda:N or xpu:N; several like cuda:0,cuda:2, "
        "or cpu:0,cpu:1 for parts of the CPU; cuda:0+cuda:1 trains one expert on both",
    )
    precision: PrecisionChoice = Field(
        default="auto",
        description="Data type of the forward pass; auto takes bfloat16 on GPUs that have it, on older ones float16",
    )
    kernels: KernelChoice = Field(
        default="auto",
        description="How attention is computed and whether torch.compile is used: plain, as torch does by itself; measured, the "
        "fastest of some steps; auto measures on cards and is plain on a CPU, where a replay then gives the same bits",
    )
    micro_batch: int | None = Field(default=None, ge=1, description="Clips per forward pass; by default the largest that fits")
    threads: Annotated[Cap | None, NoDecode, BeforeValidator(_read_threads)] = Field(
        default=None,
        description="CPU threads for training on each device, like 4 or cuda:0=4,cuda:1=2; by default torch chooses, and several "
        "devices share the cores",
    )
    memory_limit: Annotated[Cap | None, NoDecode, BeforeValidator(_read_memory)] = Field(
        default=None,
        description="Most memory that training takes of each device, like 20GB or cuda:0=20GB,cuda:1=8GB; by default all that is "
        "free",
    )
    duty: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Share of a card's or processor's time that training may use, above 0 and up to 1",
    )
    hours: str | None = Field(
        default=None,
        description="When the node may train, in local time: 22:00-07:00, or mon-fri 18:30-08:00, sat-sun; by default always",
    )
    max_temp: float | None = Field(
        default=None,
        ge=30,
        le=110,
        description="Temperature limit in degrees Celsius: training on a device slows down while its own sensor is above it",
    )
    base: Path | None = Field(
        default=None,
        description="Folder of the weights that the run's adapters are trained on; by default what the hub's cache or the "
        "run's owner has",
    )
    disk_limit: Bytes | None = Field(default=None, description="Most disk space for blobs, like 50GB; by default no limit")
    upload_rate: Bytes | None = Field(
        default=None, description="Most bytes per second sent to other peers, like 2MB; by default no limit"
    )
    bytes_per_day: Bytes | None = Field(
        default=None, description="Most bytes sent and received in a local day, like 20GB; by default no cap"
    )
    bytes_per_month: Bytes | None = Field(
        default=None, description="Most bytes sent and received in a calendar month, like 500GB; by default no cap"
    )
    copies: bool = Field(default=True, description="Keep copies of accepted checkpoints that too few peers hold")
    losses: str | None = Field(
        default=None,
        description="Where to export the loss of every step: a file that ends in .jsonl, tensorboard:FOLDER or trackio:PROJECT",
    )
    clips_every: int = Field(
        default=0,
        ge=0,
        description="Epochs from one export of clips of the run's prompts, beside the losses, to the next; 0: none",
    )
    save_every: float = Field(
        default=30.0, gt=0,
        description="Fewest seconds between local saves of the training state; more where they would cost above 2 % of the time",
    )  # fmt: skip
    local_bytes_per_day: Bytes = Field(
        default=300 * 10**9, description="Most bytes of local saves written in a day, like 300GB: they wear the disk"
    )
    stop_within: float = Field(
        default=75.0, ge=0, description="Seconds that the node has to finish its checkpoint after SIGTERM, SIGHUP or Ctrl-C"
    )
    hang_after: float = Field(
        default=300.0, ge=1, description="Seconds without a report after which the trainer is restarted; slow devices get more"
    )
    audits: bool = Field(
        default=True, description="Replay epochs and carry out lent checks for the coordinator while the node has no shard"
    )
    name: str | None = Field(
        default=None, description="What others see this node called: up to 32 letters and digits, with spaces, dots, dashes and "
        "underscores between; by default it has no name",
    )  # fmt: skip
    operator: str | None = Field(
        default=None, pattern=r"^[0-9a-f]{64}$", description="Public key of the node's operator, 64 hexadecimal digits"
    )

    @field_validator("device")
    @classmethod
    def _once_each(cls, value: str) -> str:
        read_devices(value)
        return value

    @field_validator("threads", "memory_limit")
    @classmethod
    def _known_devices(cls, value: Cap | None, info: ValidationInfo) -> Cap | None:
        devices = read_devices(info.data.get("device", "auto"))
        if name := unknown_cap(value, devices):
            raise ValueError(f"it names {name}, which is not among the devices {', '.join(devices)}")
        return value

    @field_validator("announce")
    @classmethod
    def _dialable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for address in value:
            if not _is_dialable(address):
                raise ValueError(f"{address!r} is not an address that peers can dial; write it as /ip4/203.0.113.5/tcp/41000")
        return value

    @field_validator("losses")
    @classmethod
    def _known_place(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                parse_place(value)
            except ConfigError as error:
                raise ValueError(str(error).removeprefix("losses: ")) from error
        return value

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str | None) -> str | None:
        if value and not peer_name(value):
            raise ValueError(
                f"{value!r} cannot be a name; use up to {LONGEST_PEER_NAME} letters of A to Z and digits, with spaces, dots, "
                "dashes or underscores only between them"
            )
        return value or None

    @field_validator("hours")
    @classmethod
    def _readable(cls, value: str | None) -> str | None:
        if value is not None:
            WeeklyHours.parse(value)
        return value

    @field_validator("state_folder")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        try:
            return value.expanduser().absolute()
        except RuntimeError as error:  # a user that this machine does not have
            raise ValueError(f"{value} begins with a home folder that does not exist") from error

    @property
    def devices(self) -> tuple[str, ...]:
        """Names of the devices to use; `("auto",)` where the node finds them."""
        return read_devices(self.device)

    @property
    def decoded_ticket(self) -> Ticket:
        """Raises ConfigError when the ticket is malformed."""
        return Ticket.decode(self.ticket)


def read_file(path: Path) -> dict[str, Any]:
    """The keys of a TOML file. Raises ConfigError when it cannot be read or holds unknown keys."""
    values = read_toml(path)
    if unknown := sorted(values.keys() - NodeSettings.model_fields.keys()):
        known = ", ".join(sorted(NodeSettings.model_fields))
        raise ConfigError(f"configuration {path} has the unknown key {unknown[0]!r}; known keys: {known}")
    return values


def load_settings(flags: Mapping[str, Any], file: Path | None = None) -> tuple[NodeSettings, dict[str, Origin]]:
    """The settings, and where each comes from (`config show --origin`).

    Args:
        flags: values from the command line; they come first.
        file: a TOML file; it comes after flags and environment.

    Raises ConfigError with the source and the key.
    """
    sources: list[tuple[Origin, Mapping[str, Any]]] = [
        ("file", read_file(file) if file else {}),
        ("environment", EnvSettingsSource(NodeSettings)()),
        ("flag", flags),
    ]
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = dict.fromkeys(NodeSettings.model_fields, "default")
    for origin, given in sources:
        values |= given
        origins |= dict.fromkeys(given, origin)
    try:
        return NodeSettings(**values), origins
    except ValidationError as error:
        field = str(error.errors()[0]["loc"][0])
        where = {"file": str(file), "environment": f"LUTETIA_{field.upper()}", "flag": "options"}.get(origins.get(field, "flag"))
        raise ConfigError(f"{where or 'settings'}: {describe_problem(error, NodeSettings)}; correct it") from error
