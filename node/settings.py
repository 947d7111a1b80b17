"""What a volunteer may choose, and where each choice came from: flag, then environment, then file, then default."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, SettingsConfigDict

from lutetia.node.schedule import WeeklyHours
from lutetia.protocol.schema.manifest import first_problem
from lutetia.protocol.schema.ticket import PORT, Ticket
from lutetia.system.errors import ConfigError
from lutetia.system.files import read_toml
from lutetia.system.paths import default_state_folder

Origin = Literal["flag", "environment", "file", "default"]
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}


def parse_bytes(value: Any) -> Any:
    """`50 GB`, `500MiB` or a number -> bytes; anything else is left for the validator to refuse."""
    if isinstance(value, str):
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", value.strip().lower())
        if found and len(found[1]) <= 30:
            return int(float(found[1]) * _UNITS[found[2] or ""])
    return value


def _split(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


_PLACE = re.compile(rf"/(?P<kind>ip4|ip6|dns|dns4|dns6)/(?P<host>[A-Za-z0-9.:_-]+)/tcp/(?!0+(/|$)){PORT}(/p2p/[A-Za-z0-9]+)?")


def _is_dialable(address: str) -> bool:
    """Whether it is host and TCP port, as records may name them, with or without a peer id."""
    found = _PLACE.fullmatch(address)
    if found is None or found["kind"].startswith("dns"):
        return found is not None
    try:
        return ipaddress.ip_address(found["host"]).version == int(found["kind"][2])
    except ValueError:
        return False


def announced(addresses: Sequence[str], peer_id: str) -> tuple[str, ...]:
    """Addresses to tell others without the peer id that tickets show; p2pd adds it. Raises ConfigError when it is another's."""
    places = {}
    for address in addresses:
        place, _, named = address.partition("/p2p/")
        if named and named != peer_id:
            raise ConfigError(f"announce: {address} is of peer {named}, and this box is {peer_id}; give an address of this box")
        places[place] = True
    return tuple(places)


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]


class NodeSettings(BaseSettings):
    """Settings of `lutetia join`. Every field can be set by LUTETIA_<FIELD> too; unknown keys are refused."""

    model_config = SettingsConfigDict(env_prefix="LUTETIA_", extra="forbid", frozen=True)

    ticket: str = Field(description="The ticket of the run")
    state_folder: Path = Field(default_factory=default_state_folder, description="Identity, socket, checkpoints and blobs")
    listen: str = Field(default="/ip4/0.0.0.0/tcp/0", description="Where to listen for peers")
    announce: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = Field(
        default=(), description="Addresses to tell others, where they differ from `listen`: /ip4/203.0.113.5/tcp/41000"
    )
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda or cuda:N")
    precision: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description="Dtype of the forward pass")
    micro_batch: int | None = Field(default=None, ge=1, description="Clips at once; found by probing where not given")
    threads: int | None = Field(default=None, ge=1, le=1024, description="CPU threads that training may use")
    duty: float = Field(default=1.0, gt=0, le=1, description="Share of time that training may use")
    hours: str | None = Field(
        default=None, description="When this box may train, local time: 22:00-07:00, or mon-fri 18:30-08:00, sat-sun"
    )
    max_temp: float | None = Field(
        default=None, ge=30, le=110, description="Degrees Celsius above which training rests more, by the hottest sensor"
    )
    disk_limit: Bytes | None = Field(default=None, description="Most bytes of blobs kept, for instance 50GB")
    upload_rate: Bytes | None = Field(default=None, description="Most bytes per second sent to other peers")
    copies: bool = Field(default=True, description="Keep copies of accepted checkpoints that too few peers hold")
    save_every: float = Field(default=30.0, gt=0, description="Seconds between local checkpoints")
    stop_within: float = Field(default=75.0, ge=0, description="Seconds that a SIGTERM leaves for the checkpoint under way")
    hang_after: float = Field(default=300.0, ge=1, description="Seconds of silence after which a trainer counts as hung")
    audits: bool = Field(default=True, description="Replay others' training while this box has no shard")
    operator: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$", description="Public key of the operator of this box")

    @field_validator("announce")
    @classmethod
    def _dialable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for address in value:
            if not _is_dialable(address):
                raise ValueError(f"{address!r} is no address that others could dial; write it as /ip4/203.0.113.5/tcp/41000")
        return value

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
        except RuntimeError as error:  # of a user that this machine does not know
            raise ValueError(f"{value} begins with a home folder that does not exist") from error

    @property
    def decoded_ticket(self) -> Ticket:
        """Raises ConfigError when it is no ticket."""
        return Ticket.decode(self.ticket)


def read_file(path: Path) -> dict[str, Any]:
    """The keys of a TOML file. Raises ConfigError when it cannot be read or holds unknown keys."""
    values = read_toml(path)
    if unknown := sorted(values.keys() - NodeSettings.model_fields.keys()):
        known = ", ".join(sorted(NodeSettings.model_fields))
        raise ConfigError(f"configuration {path} has the unknown key {unknown[0]!r}; known keys: {known}")
    return values


def load_settings(flags: Mapping[str, Any], file: Path | None = None) -> tuple[NodeSettings, dict[str, Origin]]:
    """The settings and where each came from (`config show --origin`). Raises ConfigError naming the source and the key."""
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
        raise ConfigError(f"{where or 'settings'}: {first_problem(error)}; correct it") from error


LEAST_SHARE = 0.1
"""Of the time; who wants less can pause."""
