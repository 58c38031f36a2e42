"""python -m tests.soak [--minutes M] [--seed N]: exits with 1 unless the bits are the same and nothing leaked."""

from __future__ import annotations

import argparse
import json
import sys

from .soak import OUT, run_soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="A run that is hit for some minutes.")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long faults are drawn")
    parser.add_argument("--seed", type=int, default=1, help="decides which, and when")
    chosen = parser.parse_args()
    result = run_soak(minutes=chosen.minutes, seed=chosen.seed)
    shown = {name: value for name, value in result.items() if name not in ("acts", "leaks", "versions")}
    print(json.dumps({**shown, "leaks": result["leaks"]["found"]}, indent=1))
    print(f"{'PASSED' if result['passed'] else 'FAILED'}; written: {OUT / 'result.json'}")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
