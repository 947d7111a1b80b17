"""A run's status without joining it: `python examples/read_status.py TICKET`. Needs no GPU, no torch and no p2pd.

TICKET is the ticket or a file that holds it. docs/reference/status.md lists all fields of the document.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lutetia.protocol.light_client.documents import fetch_document
from lutetia.protocol.rpc.introduction import STATUS
from lutetia.protocol.schema.status import SwarmStatus
from lutetia.protocol.schema.ticket import Ticket


def read_status(ticket: str) -> SwarmStatus:
    text = Path(ticket).read_text().strip() if Path(ticket).is_file() else ticket
    return SwarmStatus.model_validate_json(fetch_document(Ticket.decode(text), STATUS))


def main(ticket: str) -> None:
    status = read_status(ticket)
    print(f"run {status.name}: {len(status.nodes)} nodes")
    for shard in status.shards:
        print(f"  expert {shard.shard} {shard.name}: epoch {shard.epoch} of {shard.epochs}, {shard.state}")


if __name__ == "__main__":
    main(sys.argv[1])
