"""`python -m lutetia.coordinator.worker`: the process that does the coordinator's heavy work."""

from lutetia.coordinator.worker.process import main

main()
