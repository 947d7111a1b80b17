"""`python -m lutetia.cli`: the same as the `lutetia` command, with this interpreter."""

from lutetia.cli.main import main

main()
