"""Fetches a run's mixture over py-libp2p: description and files are verified before the folder appears."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import ValidationError

from lutetia.cli.output import say
from lutetia.cli.workspace import arriving, check_replaceable, workspace
from lutetia.models.mixing.description import FILE, MixtureDocument, SignedMixture, signed_document, verify_mixture
from lutetia.models.mixing.layout import check_names
from lutetia.protocol.light_client.blobs import fetch_blobs
from lutetia.protocol.light_client.documents import fetch_document
from lutetia.protocol.light_client.transfer import ArrivingFolder
from lutetia.protocol.rpc.introduction import MANIFEST, MIXTURE, MIXTURE_BY_DIGEST
from lutetia.protocol.schema.manifest import MAX_MANIFEST_BYTES, first_problem, open_manifest
from lutetia.protocol.schema.ticket import Ticket
from lutetia.system.errors import IntegrityError, UnreachableError, UsageError
from lutetia.system.files import replace_folder


def asked_at(ticket: Ticket, peers: Sequence[str]) -> Ticket:
    """The ticket with the addresses `peers` instead of its own, if there are any. Raises UsageError for a malformed address."""
    if not peers:
        return ticket
    try:
        return Ticket(run=ticket.run, owner=ticket.owner, addresses=tuple(peers))
    except ValidationError as error:
        raise UsageError(
            f"{peers[0]} is no peer's address ({first_problem(error)}); write it like /ip4/203.0.113.5/tcp/41000/p2p/12D3…"
        ) from error


def fetch_mixture(
    ticket: Ticket, out: Path, timeout: float, on_bytes: Callable[[int, int], None], digest: str | None = None
) -> MixtureDocument:
    """Write a mixture of the ticket's run into `out`, whole or not at all.

    Args:
        ticket: the run, and the peers to ask.
        out: folder to make, or an earlier mixture to replace.
        timeout: seconds without progress after which to give up.
        on_bytes: (bytes so far, bytes in all).
        digest: of the mixture, or at least the first 12 letters of it; None: the current one.

    Raises:
        BootstrapError, UnreachableError: no peer serves it, or there is no such mixture.
        AuthorisationError: a signature is wrong.
        IntegrityError: bytes do not match their name, or the mixture could run other code than this package's pipeline.
        UsageError: `out` holds something else, or `digest` is none.
        DiskError: `out` cannot be written.
    """
    if digest is not None and not re.fullmatch(r"[0-9a-f]{12,64}", digest):
        raise UsageError(
            f"{digest} is no mixture's digest; give at least 12 of its 64 letters and digits, as logs and tables show"
        )
    check_replaceable(out, (FILE,))
    manifest = open_manifest(
        fetch_document(ticket, MANIFEST, timeout, MAX_MANIFEST_BYTES), now=time.time(), run=ticket.run, owner=ticket.owner
    ).manifest
    data = _description(ticket, digest, timeout)
    described = signed_document(read_description(data), manifest.coordinators, "that was offered")  # before any file is fetched
    if digest and not described.digest.startswith(digest):
        raise IntegrityError(f"mixture {described.digest[:12]} was offered in place of {digest[:12]}; ask another peer")
    if described.run != ticket.run:
        raise IntegrityError(f"the mixture that was offered is of run {described.run[:12]}, not {ticket.run[:12]}; ask again")
    files = described.known_files
    if others := described.files.keys() - files.keys():
        say(f"left out {len(others)} files that no mixture needs, for instance {min(others)}")
    with workspace(out) as work:
        folder = work / "mixture"
        folder.mkdir()
        (folder / FILE).write_bytes(data)
        with ArrivingFolder(arriving(out), files.values()) as folder_of_blobs:
            fetch_blobs(ticket, files.values(), folder_of_blobs, timeout, on_bytes)
            for name in files:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
            folder_of_blobs.move_into({folder / name: ref for name, ref in files.items()})
        document = verify_mixture(folder, manifest.coordinators)
        replace_folder(folder, out)
    return document


def _description(ticket: Ticket, digest: str | None, timeout: float) -> bytes:
    if digest is None:
        if data := fetch_document(ticket, MIXTURE, timeout):
            return data
        raise UnreachableError(f"run {ticket.run[:12]} has no mixture yet; see lutetia swarm status and try again later")
    if data := fetch_document(ticket, MIXTURE_BY_DIGEST, timeout, name=digest):
        return data
    raise UnreachableError(
        f"run {ticket.run[:12]} made no mixture {digest[:12]}, or several that begin so; its page lists all at /api/v1/mixtures"
    )


def read_description(data: bytes) -> SignedMixture:
    """Parse a description and check that it is safe to fetch; signatures are verified later. Raises IntegrityError."""
    try:
        signed = SignedMixture.model_validate_json(data)
    except ValidationError as error:
        raise IntegrityError(f"the mixture's description is malformed: {first_problem(error)}; ask another peer") from error
    check_names(signed.mixture.files)
    return signed
