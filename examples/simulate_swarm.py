"""A swarm in virtual time, on the real decisions: `python examples/simulate_swarm.py [--peers 50] [--seconds 600] [--seed 0]`."""

from __future__ import annotations

import argparse

from lutetia.simulation.runner import simulate
from lutetia.simulation.scenarios.catalogue import scenario


def main(peers: int, seconds: float, seed: int) -> None:
    outcome = simulate(scenario("churn"), peers, seed, seconds=seconds)  # every node dies now and then and comes back
    print(f"{outcome.peers} peers, {outcome.seconds:g} virtual seconds in {outcome.wall:.1f} s: {outcome.events} events")
    print(f"{outcome.accepted} epochs accepted; holders per shard: {outcome.owners}")
    for promise, count in sorted(outcome.checks.items()):
        print(f"  {promise} checked {count} times")
    if outcome.violation:
        raise SystemExit(f"a promise was broken: {outcome.violation}")
    print("every promise held")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
