"""python -m tests.sim [--seeds N] [--first K] [--seed K] [--loops] [--silent]"""

from __future__ import annotations

import argparse
import sys
import time

from .swarm import replay, swarm


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description="A seeded world of faults.")
    parser.add_argument("--seeds", type=int, default=10_000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="replay this one, with the story of its last events")
    parser.add_argument("--loops", action="store_true", help="runs have two loops, one after the other")
    parser.add_argument("--silent", action="store_true", help="links between living nodes may fall silent")
    chosen = parser.parse_args()
    if chosen.seed is not None:
        return replay(chosen.seed, looped=chosen.loops, silenced=chosen.silent)
    began = time.monotonic()
    outcome = swarm(
        range(chosen.first, chosen.first + chosen.seeds), keep_going=False, looped=chosen.loops, silenced=chosen.silent
    )
    for name, count in sorted(outcome.seen.items()):
        print(f"{count:9d}  {name}")
    for seed, error in outcome.failures[:10]:
        print(f"seed {seed} FAILED: {error}\n    replay: python -m tests.sim --seed {seed}", file=sys.stderr)
    print(f"{outcome.seeds} seeds, {len(outcome.failures)} failed, {time.monotonic() - began:.0f} s")
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
