"""A run of Ray Train with its own cluster: `python -m benchmarks.ray_train_run TRACE RANKS`. Ends when it is killed.

Three workers, room for one more; a checkpoint every ten steps, which is what a restart goes back to.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import ray_nodes
from benchmarks.peer_rank import SAMPLES, Trace, loss_of, model, samples

CHECKPOINT_EVERY = 10


def train(config: dict[str, Any]) -> None:
    from ray import train as ray_train
    from ray.train.torch import prepare_model

    context = ray_train.get_context()
    rank, ranks = context.get_world_rank(), context.get_world_size()
    trained = model()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    begin = 0
    if (checkpoint := ray_train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            found = torch.load(Path(folder) / "state.pt")
        trained.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        begin = found["step"]
    distributed = prepare_model(trained, move_to_device=False)
    trace, share = Trace(config["trace"]), SAMPLES // ranks
    for step in range(begin, 1_000_000):
        x, y = samples(step, rank, share)
        optimizer.zero_grad()
        loss_of(distributed, x, y).backward()
        optimizer.step()
        trace.step(step, share, committed=True)
        if (step + 1) % CHECKPOINT_EVERY == 0:
            _report(rank, {"model": trained.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})


def _report(rank: int, state: dict[str, Any]) -> None:
    from ray import train as ray_train

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank == 0:
            torch.save(state, Path(folder) / "state.pt")
            checkpoint = ray_train.Checkpoint.from_directory(folder)
        ray_train.report({"step": state["step"]}, checkpoint=checkpoint)


def main() -> None:
    trace, ranks = sys.argv[1], int(sys.argv[2])
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2", "1")
    ray_nodes.start(ranks + 1)
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        train,
        train_loop_config={"trace": trace},
        scaling_config=ScalingConfig(num_workers=ranks, resources_per_worker={"CPU": 1, "place": 1}),
        run_config=RunConfig(
            storage_path=str(Path(trace).parent / "storage"),
            failure_config=FailureConfig(max_failures=-1),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
