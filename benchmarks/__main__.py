"""`python -m benchmarks [NAME …] [--json]`: run all or the named benchmarks and print their tables."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import json
import pkgutil
import sys
from pathlib import Path

from benchmarks import measures
from benchmarks.report import Machine, Row, as_json, markdown

STUDIES = {
    "adapters": "benchmarks.adapters.main",
    "attacks": "benchmarks.attacks.main",
    "coordinator-attacks": "benchmarks.attacks.coordinator.main",
    "document-attacks": "benchmarks.attacks.documents",
    "faults": "benchmarks.faults",
    "fuzz": "benchmarks.fuzz.main",
    "gpu": "benchmarks.gpu.main",
    "judge-attacks": "benchmarks.attacks.judge_attacks",
    "lean-coordinator": "benchmarks.lending.lean_coordinator",
    "lying-checkers": "benchmarks.lending.lying_checkers",
    "metrics": "benchmarks.metrics_validation.main",
    "network-attacks": "benchmarks.attacks.network",
    "page": "benchmarks.page.main",
    "pipelines": "benchmarks.pipelines",
    "releases": "benchmarks.releases",
    "simulate": "benchmarks.simulation.main",
    "team-lanes": "benchmarks.teams.lanes.main",
    "team-swarm": "benchmarks.teams.swarm.main",
    "teams": "benchmarks.teams.main",
}
NAMES = sorted(module.name for module in pkgutil.iter_modules(measures.__path__) if not module.name.endswith("_process"))


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in STUDIES:
        importlib.import_module(STUDIES[sys.argv[1]]).main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Run all or the named benchmarks and print their tables, or run one study.",
        epilog=catalogue(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run (default: all), or one study")
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


def catalogue() -> str:
    """All benchmarks and studies with the first line of their docstrings."""
    lines = ["benchmarks:", *(f"  {name:<12} {_summary(f'benchmarks.measures.{name}')}" for name in NAMES), ""]
    lines += ["studies, each with options of its own (`python -m benchmarks fuzz --help`):"]
    return "\n".join([*lines, *(f"  {name:<12} {_summary(module)}" for name, module in STUDIES.items())])


def _summary(module: str) -> str:
    """The docstring's first line, without its command; read from the source, so that nothing heavy is imported."""
    spec = importlib.util.find_spec(module)
    assert spec
    assert spec.origin
    first = (ast.get_docstring(ast.parse(Path(spec.origin).read_text())) or "").splitlines()[0]
    text = first.rpartition("`: ")[2]
    return text[:1].upper() + text[1:]


if __name__ == "__main__":
    main()
