"""`python -m lutetia.cli`: the same as the `lutetia` command, with this interpreter."""

from .main import main

main()
