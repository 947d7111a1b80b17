"""`python -m lutetia.cli`: the `lutetia` command with this interpreter."""

from lutetia.cli.main import main

main()
