"""`python -m benchmarks [NAME …] [--json]`: run all or the named benchmarks and print their tables."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys

from . import __path__ as folder
from .report import Machine, Row, as_json, markdown

NAMES = sorted(module.name for module in pkgutil.iter_modules(folder) if module.name not in {"__main__", "report", "swarm"})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of: {', '.join(NAMES)} (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}; there are: {', '.join(NAMES)}")
    results: dict[str, list[Row]] = {}
    for name in arguments.names or NAMES:
        print(f"running {name} …", file=sys.stderr)
        results[name] = importlib.import_module(f"benchmarks.{name}").run()
    if arguments.json:
        print(json.dumps(as_json(results), indent=1))
    else:
        print(f"{Machine.this()}\n")
        for name, rows in results.items():
            print(markdown(name, rows))


if __name__ == "__main__":
    main()
