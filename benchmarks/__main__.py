"""`python -m benchmarks [NAME …] [--json]`: run all or the named benchmarks and print their tables.

A study is started by its name alone and has options of its own: `python -m benchmarks fuzz --help`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys

from benchmarks import measures
from benchmarks.report import Machine, Row, as_json, markdown

STUDIES = {
    "attacks": "benchmarks.attacks.main",
    "faults": "benchmarks.faults",
    "fuzz": "benchmarks.fuzz.main",
    "metrics": "benchmarks.metrics_validation.main",
    "simulate": "benchmarks.simulation.main",
}
NAMES = sorted(module.name for module in pkgutil.iter_modules(measures.__path__) if not module.name.endswith("_process"))


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in STUDIES:
        importlib.import_module(STUDIES[sys.argv[1]]).main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of: {', '.join(NAMES)} (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}; there are: {', '.join(NAMES)}")
    results: dict[str, list[Row]] = {}
    for name in arguments.names or NAMES:
        print(f"running {name} …", file=sys.stderr)
        results[name] = importlib.import_module(f"benchmarks.measures.{name}").run()
    if arguments.json:
        print(json.dumps(as_json(results), indent=1))
    else:
        print(f"{Machine.this()}\n")
        for name, rows in results.items():
            print(markdown(name, rows))


if __name__ == "__main__":
    main()
