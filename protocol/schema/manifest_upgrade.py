"""What a later version of a manifest may change. Pure: owner, coordinator and every peer apply the same rule.

All epochs of a lineage must mean the same, so data, expert, batches and interval are fixed. What may change is how much is
trained, how it is checked, by which coordinators and how fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError

from lutetia.protocol.schema.manifest import Manifest, first_problem
from lutetia.protocol.schema.model.team_spec import TeamSpec
from lutetia.protocol.schema.problems import unknown_key
from lutetia.system.errors import ConfigError

Reason = Literal["run", "version", "lineage", "budget", "value"]

CHANGEABLE = frozenset({
    "coordinators", "expires", "samples_per_shard", "holdout_tolerance", "raw_tolerance", "sampling", "timing", "audit",
    "hardware", "allowlist", "needs", "card", "orders", "team",
})  # fmt: skip
"""Fields of the manifest that a later version may change. Tables can also be changed key by key (`timing.heartbeat`)."""
CHANGEABLE_OF_TEAM = frozenset({"quorum", "deadline"})
"""Of `team` only these may change: when an epoch is merged, not what its lanes train."""

_BOOKKEEPING = frozenset({"run", "version"})
_DAY = 86_400.0


class UpgradeRefused(ConfigError):
    """A version that cannot follow the one before it. `reason` is the kind of problem, `field` the place."""

    def __init__(self, reason: Reason, field: str, text: str) -> None:
        super().__init__(text)
        self.reason, self.field = reason, field


def check_upgrade(old: Manifest, new: Manifest, accepted_epochs: int = 0) -> None:
    """Raises UpgradeRefused unless `new` may follow `old`.

    `accepted_epochs` is the largest number of accepted epochs of any shard: the budget must not fall below it.
    """
    if (new.run_id, new.owner) != (old.run_id, old.owner):
        raise UpgradeRefused(
            "run", "run", f"the manifest is of run {new.run_id[:12]}, not of {old.run_id[:12]}; check the folder"
        )
    if new.version <= old.version:
        text = f"manifest version {new.version} does not follow version {old.version}; sign a newer one"
        raise UpgradeRefused("version", "version", text)
    for field in Manifest.model_fields:
        if field not in CHANGEABLE | _BOOKKEEPING and getattr(new, field) != getattr(old, field):
            raise _fixed(field)
    _check_team(old.team, new.team)
    if new.epochs < accepted_epochs:
        raise UpgradeRefused(
            "budget",
            "samples_per_shard",
            f"samples_per_shard {new.samples_per_shard} is less than the samples accepted already "
            f"({accepted_epochs * new.checkpoint_samples}); set at least that",
        )


def _check_team(old: TeamSpec | None, new: TeamSpec | None) -> None:
    if old is None or new is None:
        if old is not new:
            raise _fixed("team")
        return
    for field in TeamSpec.model_fields:
        if field not in CHANGEABLE_OF_TEAM and getattr(new, field) != getattr(old, field):
            raise _fixed(f"team.{field}")


def next_version(old: Manifest, changes: Mapping[str, Any], now: float, accepted_epochs: int = 0) -> Manifest:
    """The manifest that follows `old`.

    Args:
        old: The version in force.
        changes: New values by dotted field. `valid_days` sets `expires`, counted from `now`.
        now: Unix seconds.
        accepted_epochs: The largest number of accepted epochs of any shard.

    Raises UpgradeRefused when a field may not change or does not exist, or a value is invalid.
    """
    document = old.model_dump(mode="json")
    for name, value in changes.items():
        if name == "valid_days":
            if not isinstance(value, int | float) or value <= 0:
                raise UpgradeRefused("value", name, "valid_days must be a number of days above 0")
            name, value = "expires", now + value * _DAY
        _set(old, document, name, value)
    document |= {"run": old.run_id, "version": old.version + 1}
    try:
        new = Manifest.model_validate(document)
    except ValidationError as error:
        raise UpgradeRefused("value", first_problem(error).partition(":")[0], f"{first_problem(error)}; correct it") from error
    check_upgrade(old, new, accepted_epochs)
    return new


def training_changed(old: Manifest, new: Manifest) -> bool:
    """Whether the upgrade changes training steps: a cosine schedule depends on the end of the budget."""
    return old.optimisation.schedule == "cosine" and old.samples_per_shard != new.samples_per_shard


def _set(old: Manifest, document: dict[str, Any], name: str, value: Any) -> None:
    top, _, key = name.partition(".")
    if top not in Manifest.model_fields:
        known = ", ".join(sorted({*CHANGEABLE, "valid_days"}))
        raise UpgradeRefused("value", name, f"a manifest has no {name!r}; what may change: {known}")
    if top not in CHANGEABLE:
        raise _fixed(top)
    if not key:
        if unknown := unknown_key({top: value}, Manifest):
            raise UpgradeRefused("value", name, f"{unknown}; look at `lutetia run show`")
        document[top] = value
    elif (table := _table(old, top)) and key in table.model_fields:
        document[top] = {**(document.get(top) or {}), key: value}  # also a field that is not written while it has its default
    else:
        raise UpgradeRefused("value", name, f"the manifest's {top} has no {key!r}; look at `lutetia run show`")


def _table(old: Manifest, name: str) -> type[BaseModel] | None:
    """The model of a field that is a table, also while it has none; None for a plain value."""
    if isinstance(table := getattr(old, name), BaseModel):
        return type(table)
    choices = get_args(Manifest.model_fields[name].annotation)
    return next((each for each in choices if isinstance(each, type) and issubclass(each, BaseModel)), None)


def _fixed(field: str) -> UpgradeRefused:
    text = f"{field} cannot change in a run, because all epochs of a lineage must mean the same; create a new run"
    return UpgradeRefused("lineage", field, text)
