"""`python -m lutetia.coordinator.snapshot`: the process that replays a ledger and writes a snapshot."""

from lutetia.coordinator.snapshot.process import main

main()
