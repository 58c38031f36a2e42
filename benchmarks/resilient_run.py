"""A run of ours with its own cluster: `python -m benchmarks.resilient_run TRACE RANKS PLACES`. Ends when it is killed.

Reads commands from its standard input, a line each: "join" adds a node with room for one more rank, "drain PID" empties
the node on which that process runs.
"""

from __future__ import annotations

import functools
import sys
import threading
from typing import Any

import ray
import torch

import resilient
from actors import launch
from benchmarks import ray_nodes
from benchmarks.peer_rank import MICRO_BATCHES, SAMPLES, Trace, loss_of, model, samples
from resilient.drain import drain

NAME = "against-peers"


class Data(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    def __len__(self) -> int:
        return SAMPLES * 10_000

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = samples(index, 0, 1)
        return x[0], y[0]


def body(run: resilient.Run, folder: str) -> None:
    trained = model()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    run.protect(model=trained, optimizer=optimizer)
    trace, micro_batch = Trace(folder), SAMPLES // MICRO_BATCHES
    computed = 0
    for x, y in run.batches(Data(), global_batch=SAMPLES, micro_batch=micro_batch, steps=1_000_000):
        loss_of(trained, x, y).backward()
        computed += 1
        committing, step = run.committing, run.step
        optimizer.step()
        optimizer.zero_grad()
        if committing:
            trace.step(step, computed * micro_batch, committed=True)
            computed = 0


def main() -> None:
    folder, ranks, places = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    cluster = ray_nodes.start(places)
    train = resilient.train(
        name=NAME, workers=(1, ranks), resources={"CPU": 1, "place": 1}, snapshot=resilient.Snapshot(every=1)
    )(body)
    training = functools.partial(train.watched, lambda news: None, folder=folder)
    threading.Thread(target=training, daemon=True).start()
    _obey(cluster)


def _obey(cluster: Any) -> None:
    """In the main thread, where alone nodes can be added."""
    for line in sys.stdin:
        command, _, pid = line.strip().partition(" ")
        if command == "join":
            ray_nodes.add_place(cluster)
        elif command == "drain":
            _drain(int(pid))


def _drain(pid: int) -> None:
    """The node of this rank, as `resilient drain` does it."""
    (controller,) = (launch.find(name) for name in launch.names(f"{NAME}/") if name.endswith("/controller"))
    for member, node in ray.get(controller.processes.remote())["ranks"]:
        (rank,) = (launch.find(name) for name in launch.names(f"{NAME}/") if name.endswith(f"/rank/{member}"))
        if ray.get(rank.process.remote()) == pid:
            drain(node, NAME, print)


if __name__ == "__main__":
    main()
