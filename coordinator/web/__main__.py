"""`python -m lutetia.coordinator.web`: the process that serves a run's HTTP."""

from lutetia.coordinator.web.process import main

main()
