"""The owner's orders: the next version of the manifest, put into the run's folder or sent to its coordinator."""

from __future__ import annotations

import time
from pathlib import Path

from lutetia.coordinator.admin.upgrade import publish_version
from lutetia.coordinator.run_folder import RunFolder
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.manifest_upgrade import next_version
from lutetia.protocol.schema.owner.orders import Order, with_order
from lutetia.system.errors import ConfigError


def ordered(manifest: Manifest, order: Order, now: float) -> Manifest:
    """The version of the manifest after one more order. Raises ConfigError where the order cannot be given.

    Args:
        manifest: the version in force.
        order: what the owner asks for.
        now: Unix seconds.
    """
    if order.kind == "ban" and order.peer in (manifest.owner, *manifest.coordinators):
        raise ConfigError("the owner and the coordinators of a run cannot be banned; to replace a coordinator use `run rotate`")
    orders = with_order(manifest.orders, order, now)
    return next_version(manifest, {"orders": orders.model_dump(mode="json")}, now)


def order_run(folder: RunFolder, order: Order, owner_key: Path | None = None) -> Manifest:
    """Sign the next version with `order` and put it into `folder`; a coordinator that serves the run adopts it within seconds.

    Raises ConfigError (no run there, or the order changes nothing), IdentityError (no owner's key) or AuthorisationError (not the
    owner's key).
    """
    old = folder.read_manifest(now=0.0)
    new = ordered(old.manifest, order, time.time())
    publish_version(folder, old, new, Identity.load(owner_key or folder.owner_key))
    return new
