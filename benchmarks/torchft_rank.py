"""One replica of a torchft run: `python -m benchmarks.torchft_rank LIGHTHOUSE TRACE NAME RANKS STOP LIMIT_S`."""

from __future__ import annotations

import datetime
import logging
import os
import sys
from pathlib import Path

import torch

from benchmarks.peer_rank import SAMPLES, Trace, loss_of, model, samples


def main() -> None:
    from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo

    lighthouse, folder, name, ranks, stop, limit_s = sys.argv[1:]
    limit = datetime.timedelta(seconds=int(limit_s))
    logging.disable(logging.INFO)
    trained = model()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]

    def state() -> dict[str, object]:
        return {"model": trained.state_dict(), "optimizer": optimizer.state_dict()}

    def load(found: dict[str, dict[str, object]]) -> None:
        trained.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])

    manager = Manager(
        pg=ProcessGroupGloo(timeout=limit),
        min_replica_size=2,
        load_state_dict=load,
        state_dict=state,
        replica_id=name,
        lighthouse_addr=lighthouse,
        store_addr="127.0.0.1",
        store_port=store.port,
        rank=0,
        world_size=1,
        timeout=limit,
        hostname="127.0.0.1",
    )
    distributed = DistributedDataParallel(manager, trained)
    wrapped = Optimizer(manager, optimizer)
    trace, share = Trace(folder), SAMPLES // int(ranks)
    while not Path(stop).exists():
        wrapped.zero_grad()
        step = manager.current_step()
        x, y = samples(step, os.getpid() % 997, share)
        loss_of(distributed, x, y).backward()
        wrapped.step()
        trace.step(step, share, committed=manager.current_step() > step)
    manager.shutdown(wait=False)
    os._exit(0)


if __name__ == "__main__":
    main()
