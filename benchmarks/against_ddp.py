"""Step time without failures against DistributedDataParallel, in the same processes, turn by turn.

After every few steps of the run, all ranks pause it and train a copy of the model with DDP for as
many steps: same micro-batches per rank, `no_sync` but for the last, same clipping and optimizer.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

import resilient
from resilient.core.planner import even_runs
from resilient.demo_model import GPT, SourceText

BLOCK_STEPS = 8
BLOCKS = 6
GLOBAL_BATCH, MICRO_BATCH = 48, 4
MICRO_BATCHES = GLOBAL_BATCH // MICRO_BATCH
WARM_UP_BLOCKS = 1


class Peer:
    """The DDP side, on this rank."""

    def __init__(self, run: resilient.Run, meeting: str) -> None:
        store = dist.FileStore(meeting, run.world_size)
        dist.init_process_group("gloo", store=store, rank=run.rank, world_size=run.world_size)
        torch.manual_seed(0)
        self.model = DistributedDataParallel(GPT(), gradient_as_bucket_view=True, broadcast_buffers=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.mine = len(even_runs(MICRO_BATCHES, run.world_size)[run.rank])
        samples = Subset(SourceText(), range(run.rank * 1000, run.rank * 1000 + 500))
        self.loader = DataLoader(samples, batch_size=MICRO_BATCH, shuffle=True, drop_last=True)
        self.batches = iter(self.loader)

    def step(self) -> None:
        for number in range(self.mine):
            last = number == self.mine - 1
            with contextlib.nullcontext() if last else self.model.no_sync():
                x, y = self.batch()
                loss = functional.cross_entropy(self.model(x).flatten(0, 1), y.flatten()) / self.mine
                loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def batch(self) -> Any:
        try:
            return next(self.batches)
        except StopIteration:
            self.batches = iter(self.loader)
            return next(self.batches)


def body(run: resilient.Run, meeting: str, out: str) -> None:
    torch.manual_seed(0)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run.protect(model=model, optimizer=optimizer)
    peer: Peer | None = None
    ours: list[float] = []
    theirs: list[float] = []
    began = time.monotonic()
    steps = BLOCKS * BLOCK_STEPS
    for x, y in run.batches(SourceText(), global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH, steps=steps):
        loss = functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if run.committing:
            ours.append(time.monotonic() - began)
            if (run.step + 1) % BLOCK_STEPS == 0:
                with run.pause("DDP's turn"):
                    peer = peer or Peer(run, meeting)
                    theirs += turn_of(peer)
            began = time.monotonic()
    Path(out, f"rank-{run.rank}.json").write_text(json.dumps({"ours": ours, "theirs": theirs}))
    dist.destroy_process_group()


def turn_of(peer: Peer) -> list[float]:
    dist.barrier()
    times = []
    for _ in range(BLOCK_STEPS):
        began = time.monotonic()
        peer.step()
        times.append(time.monotonic() - began)
    dist.barrier()
    return times


def measure(ranks: int, folder: Path) -> dict[str, Any]:
    """Seconds per step of both, on rank 0, block by block; the first block of each is warm-up."""
    out = folder / f"ddp-{ranks}"
    out.mkdir()
    train = resilient.train(name=f"against-ddp-{ranks}", workers=ranks)(body)
    train(meeting=str(out / "meeting"), out=str(out))
    samples: dict[str, Any] = json.loads((out / "rank-0.json").read_text())
    skip = WARM_UP_BLOCKS * BLOCK_STEPS
    return {side: times[skip:] for side, times in samples.items()}
