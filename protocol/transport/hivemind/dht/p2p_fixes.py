"""hivemind's client of p2pd, mended: nothing that peers or cancellations do ends its reader, and no finished call is kept."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

from lutetia.protocol.transport.hivemind.bindings import P2P


class _Unanswered(dict[UUID, "asyncio.Future[Any]"]):
    """Our calls. The reader sets the result of what is in here, and the second result of one call would end it.

    So a call that was answered, or cancelled in the moment in which its answer came, is not in here, though its caller has not
    taken it out yet.
    """

    def __contains__(self, call_id: object) -> bool:
        future = self.get(call_id)  # type: ignore[call-overload]  # whatever it is, it may be looked up
        return future is not None and not future.done()


class _Answering(dict[UUID, "asyncio.Task[Any]"]):
    """The calls of others. hivemind forgets to take out those that fail, are cancelled or do not fit, with all they hold."""

    def __setitem__(self, call_id: UUID, task: asyncio.Task[Any]) -> None:
        super().__setitem__(call_id, task)
        task.add_done_callback(lambda _: self.pop(call_id, None))


def mend(p2p: P2P) -> None:
    """Before the first call, from either side."""
    control = _control(p2p)
    control._pending_calls, control._handler_tasks = _Unanswered(control._pending_calls), _Answering(control._handler_tasks)


def speaks(p2p: P2P) -> bool:
    """Whether calls still come and go. What breaks that is a fault of p2pd or of hivemind; a new start is the only remedy."""
    control = _control(p2p)
    return not (control._read_task.done() or control._write_task.done())


def _control(p2p: P2P) -> Any:
    client: Any = p2p._client
    return client.control
