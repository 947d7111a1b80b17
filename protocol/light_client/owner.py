"""Send an owner's request to a run's coordinator without joining the run: py-libp2p in this process, for a second or two."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio
from pydantic import ValidationError

from lutetia.protocol.light_client.dial import LightStream, dial
from lutetia.protocol.rpc.framing import framed, read_framed
from lutetia.protocol.rpc.introduction import ACK
from lutetia.protocol.rpc.owner_request import MAX_ANSWER_BYTES, OWNER, OwnerAnswer, SignedRequest
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.ticket import Ticket
from lutetia.system.errors import BootstrapError


@dataclass
class _Outcome:
    answer: OwnerAnswer | None = None
    failures: dict[str, str] = field(default_factory=dict)


def send_request(ticket: Ticket, request: SignedRequest, timeout: float = 20.0) -> OwnerAnswer:
    """Send the request to the first coordinator of the ticket that answers.

    Args:
        ticket: Where the coordinator is.
        request: What the owner asks for.
        timeout: Seconds for each address.

    Raises BootstrapError when none answers; the text names every address with its reason.
    """
    outcome = _Outcome()
    trio.run(_try_each, ticket.addresses, canonical(request), timeout, outcome)
    if outcome.answer is None:
        reasons = "; ".join(f"{address}: {reason}" for address, reason in outcome.failures.items())
        raise BootstrapError(f"no coordinator of the ticket took the request ({reasons}); check your network, or ask again")
    return outcome.answer


async def _try_each(addresses: tuple[str, ...], request: bytes, seconds: float, outcome: _Outcome) -> None:
    """One after the other: a second coordinator must not be given what the first has carried out."""
    for address in addresses:
        try:
            with trio.fail_after(seconds):
                outcome.answer = await _send(address, request)
            return
        except trio.TooSlowError:
            outcome.failures[address] = f"no answer within {seconds:.0f} s"
        except ConnectionError as error:
            outcome.failures[address] = str(error)


async def _send(address: str, request: bytes) -> OwnerAnswer:
    async with dial(address) as connection:
        stream = await connection.open_stream(OWNER)
        answer = await _read_answer(stream)
        if not answer.text:
            await stream.write(framed(request))
            answer = await _read_answer(stream)
        await stream.write(ACK)
        await stream.close()
    return answer


async def _read_answer(stream: LightStream) -> OwnerAnswer:
    try:
        return OwnerAnswer.model_validate_json(await read_framed(stream.read_exactly, MAX_ANSWER_BYTES))
    except ValidationError as error:
        raise ConnectionError("it does not answer owners") from error
