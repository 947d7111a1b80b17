"""The owner's request from another machine: the next version of the manifest, over a libp2p stream to the coordinator.

The stream is used, and not HTTP, because every run has it: the ticket says where, noise proves who answers, and no port, name or
certificate is needed besides. The request is signed by the owner's key, names its run, and expires within minutes. It cannot be
replayed: the manifest in it is the version that follows the one in force, and no other is taken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated

from pydantic import Field, ValidationError

from lutetia.protocol.rpc.framing import read_message, write_message
from lutetia.protocol.schema.canonical import Frozen, WireDocument, canonical
from lutetia.protocol.schema.fields import Count, Digest, Moment, Sentence, Signature
from lutetia.protocol.schema.identity import Identity, verify
from lutetia.protocol.schema.manifest import MAX_MANIFEST_BYTES, Manifest, SignedManifest, first_problem, open_manifest
from lutetia.protocol.transport.base import Stream, Transport
from lutetia.system.errors import AuthorisationError, LutetiaError

OWNER = "/lutetia/owner/1"
REQUEST_SECONDS = 300.0
"""For so long a request is valid."""
EXCHANGE_SECONDS = 60.0
MAX_ANSWER_BYTES = 8192
MAX_REQUEST_BYTES = 2 * MAX_MANIFEST_BYTES + 4096
"""A manifest's quotes are escaped in the request."""
_SIGNING_DOMAIN = b"lutetia-owner-request-1\n"


class RequestRefused(AuthorisationError):
    """The request is not carried out. The text says why."""


class OwnerRequest(WireDocument):
    """What the owner signs."""

    run: Digest = Field(description="Run id")
    version: Count = Field(description="Version of the manifest in the request: the one after the version in force")
    expires: Moment = Field(description="When the request stops being valid, in Unix seconds")
    manifest: Annotated[str, Field(max_length=MAX_MANIFEST_BYTES)] = Field(description="The signed manifest, as JSON")


class SignedRequest(Frozen):
    """A request and its signature."""

    request: OwnerRequest = Field(description="The request")
    signature: Signature = Field(description="The owner's Ed25519 signature over the request (hex)")


class OwnerAnswer(WireDocument):
    """What became of a request."""

    done: bool = Field(description="Whether it is carried out")
    version: Count = Field(description="Version of the manifest in force now")
    text: Sentence = Field(default="", description="Why it is not carried out, for people")


def sign_request(manifest: SignedManifest, owner: Identity, now: float) -> SignedRequest:
    """The request that `manifest` be in force from now on. `now`: Unix seconds."""
    given = manifest.manifest
    request = OwnerRequest(
        run=given.run_id, version=given.version, expires=now + REQUEST_SECONDS, manifest=manifest.to_bytes().decode()
    )
    return SignedRequest(request=request, signature=owner.sign(_SIGNING_DOMAIN + canonical(request)))


def open_request(data: bytes, current: Manifest, now: float, skew: float) -> SignedManifest:
    """The manifest in a request, once everything about it is right.

    Args:
        data: the request's bytes.
        current: the manifest in force.
        now: the coordinator's clock, in Unix seconds.
        skew: seconds by which the owner's clock may differ.

    Raises RequestRefused, or what `open_manifest` raises.
    """
    try:
        signed = SignedRequest.model_validate_json(data)
    except ValidationError as error:
        raise RequestRefused(f"the request is malformed: {first_problem(error)}") from error
    request = signed.request
    if request.run != current.run_id:
        raise RequestRefused(f"the request is for run {request.run[:12]}, not for {current.run_id[:12]}; check the ticket")
    if not now - skew < request.expires <= now + REQUEST_SECONDS + skew:
        raise RequestRefused("the request has expired, or this machine's clock and the coordinator's differ; ask again")
    if request.version != current.version + 1:
        raise RequestRefused(
            f"the request makes version {request.version}, but version {current.version} is in force: it was carried out before, "
            "or another came first; ask again"
        )
    if not verify(current.owner, _SIGNING_DOMAIN + canonical(request), signed.signature):
        raise RequestRefused("the request is not signed by the run's owner; give the owner's key with --owner-key")
    manifest = open_manifest(request.manifest.encode(), now=now, run=current.run_id, owner=current.owner)
    if manifest.manifest.version != request.version:
        raise RequestRefused("the request holds another version of the manifest than it says; refused")
    return manifest


Carry = Callable[[bytes], Awaitable[OwnerAnswer]]
"""Carries a request out. May raise LutetiaError, whose text is the answer."""
Admit = Callable[[Stream], str]
"""Why this stream is refused before anything is read; empty: it is not."""


async def serve_owner(transport: Transport, carry: Carry, version: Callable[[], int], admit: Admit) -> None:
    """Answer the owner's requests, each on a stream of its own.

    The coordinator speaks first: it says that it reads the request, or why it does not, before a byte of it is sent.
    """

    async def carried(data: bytes) -> OwnerAnswer:
        try:
            return await carry(data)
        except LutetiaError as error:
            return OwnerAnswer(done=False, version=version(), text=str(error))

    async def handle(stream: Stream) -> None:
        try:
            async with asyncio.timeout(EXCHANGE_SECONDS):
                refused = admit(stream)
                await write_message(stream, canonical(OwnerAnswer(done=False, version=version(), text=refused)))
                if not refused:
                    answer = await carried(await read_message(stream, MAX_REQUEST_BYTES))
                    await write_message(stream, canonical(answer))
                await stream.read_exactly(1)  # closing first could cut the answer off
        except (TimeoutError, ConnectionError):
            return

    await transport.serve(OWNER, handle)
