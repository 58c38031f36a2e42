"""A keeper's vault in a process of its own, without Ray: it ends when its standard input does.

    python -m benchmarks.snapshot_keeper FOLDER NODE SHARES [SAVE]

FOLDER has one folder per node. SHARES is JSON, the ranks on each node; SAVE too, a SaveSpec, if snapshots are to be
made durable. Prints its tally at the end.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from actors.priority import raise_priority
from actors.ring import Ring
from actors.saving import SaveSpec
from actors.vault import Vault
from snapshot.core.stripes import Group

RUN, ATTEMPT, GENERATION = "bench", 1, 1
START_LIMIT_S = 30.0


def main() -> None:
    base, node, raw_shares = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    shares = {name: tuple(ranks) for name, ranks in json.loads(raw_shares).items()}
    nodes = tuple(sorted(shares))
    raise_priority()
    save = SaveSpec(**json.loads(sys.argv[4])) if len(sys.argv) > 4 else None
    vault = Vault(
        run=RUN, attempt=ATTEMPT, node=node, folder=base / node, secret="benchmark", ip="127.0.0.1", save=save
    )
    new = base / f"{node}.new"
    new.write_text(json.dumps(vault.address))
    new.rename(base / f"{node}.address")
    addresses = {name: tuple(json.loads(_appeared(base / f"{name}.address"))) for name in nodes}
    vault.peers({name: (str(address[0]), int(address[1])) for name, address in addresses.items()})
    vault.ring(Ring(generation=GENERATION, group=Group(nodes=nodes, parity=len(nodes) - 1), shares=shares))
    (base / f"{node}.ready").touch()
    sys.stdin.read()
    tally = asdict(vault.tally())
    vault.close()
    print(json.dumps({**tally, "protected": str(tally["protected"])}))


def _appeared(path: Path) -> str:
    deadline = time.monotonic() + START_LIMIT_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} has not appeared within {START_LIMIT_S:.0f} s")
        time.sleep(0.01)
    return path.read_text()


if __name__ == "__main__":
    main()
