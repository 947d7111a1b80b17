"""Fetches a run's newest accepted checkpoints over py-libp2p from the peers that hold them; no coordinator is needed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from lutetia.cli.workspace import arriving, check_replaceable, workspace
from lutetia.protocol.light_client.blobs import fetch_blobs
from lutetia.protocol.light_client.documents import fetch_document
from lutetia.protocol.light_client.transfer import ArrivingFolder
from lutetia.protocol.rpc.accepted_checkpoints import ACCEPTED, read_accepted
from lutetia.protocol.rpc.introduction import MANIFEST
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.manifest import MAX_MANIFEST_BYTES, open_manifest
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import AcceptanceRecord
from lutetia.protocol.schema.ticket import Ticket
from lutetia.protocol.transport.reachability import policy_of
from lutetia.system.errors import UnreachableError
from lutetia.system.files import replace_folder

_MARK = "manifest.json"
_MOST_HOLDERS = 4
"""Addresses of holders that are asked before the ticket's own: holders are named by records, which may lie."""
_MOST_ADDRESSES = 16  # of a ticket


def fetch_checkpoints(ticket: Ticket, out: Path, timeout: float, on_bytes: Callable[[int, int], None]) -> list[AcceptanceRecord]:
    """Write the newest accepted weights and training state of every shard into `out`, whole or not at all.

    A fetch that was killed goes on where it was.

    `out` then holds the signed manifest and one folder per shard: `weights.safetensors`, `state.safetensors`, `acceptance.json`.

    Args:
        ticket: the run, and the peers to ask.
        out: folder to make, or an earlier result to replace.
        timeout: seconds without progress after which to give up.
        on_bytes: (bytes so far, bytes in all).

    Raises:
        BootstrapError, UnreachableError: no peer answers or holds the checkpoints.
        AuthorisationError: a signature is wrong.
        IntegrityError: bytes do not match their name.
        UsageError: `out` holds something else.
        DiskError: `out` cannot be written.
    """
    check_replaceable(out, (_MARK,))
    signed = open_manifest(
        fetch_document(ticket, MANIFEST, timeout, MAX_MANIFEST_BYTES), now=time.time(), run=ticket.run, owner=ticket.owner
    )
    accepted = read_accepted(fetch_document(ticket, ACCEPTED, timeout), signed.manifest, time.time())
    if not accepted:
        raise UnreachableError(
            f"that peer knows no accepted checkpoint of run {ticket.run[:12]}; ask another peer, or try again later"
        )
    policy = asyncio.run(policy_of(ticket.addresses))
    total = sum(given.weights.size + given.state.size for given, _ in accepted)
    refs = [ref for given, _ in accepted for ref in (given.weights, given.state)]
    before, files = 0, dict[Path, BlobRef]()
    with workspace(out) as work, ArrivingFolder(arriving(out), refs) as blobs:
        folder = work / "checkpoints"
        folder.mkdir()
        for given, holders in accepted:
            shard = folder / f"shard-{given.shard:04d}"
            shard.mkdir()
            named = [address for address in holders if policy.allows(address)][:_MOST_HOLDERS]
            places = tuple(dict.fromkeys((*named, *ticket.addresses)))[:_MOST_ADDRESSES]
            start = before
            fetch_blobs(
                ticket.model_copy(update={"addresses": places}), (given.weights, given.state), blobs, timeout,
                lambda done, _, start=start: on_bytes(start + done, total),
            )  # fmt: skip
            before += given.weights.size + given.state.size
            files |= {shard / "weights.safetensors": given.weights, shard / "state.safetensors": given.state}
            (shard / "acceptance.json").write_bytes(canonical(given))
        blobs.move_into(files)
        (folder / _MARK).write_bytes(signed.to_bytes())
        replace_folder(folder, out)
    return [given for given, _ in accepted]
