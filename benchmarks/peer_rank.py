"""The loop that every contestant trains in the comparison of recoveries, and what it writes down.

One line per step and process: when it was committed (CLOCK_MONOTONIC, one for all processes), which step, how many
samples it brought, or that it was thrown away.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, SAMPLES = 64, 48
"""Features; samples per step, over all ranks together."""
MICRO_BATCHES = 12
COMPUTE_S = 0.01
"""Of each micro-batch beside the arithmetic, so that the two cores are not what is compared."""


class Trace:
    """Of this process; lines are whole when it is killed between two."""

    def __init__(self, folder: str) -> None:
        self._file = open(Path(folder) / f"{os.getpid()}.jsonl", "a", buffering=1)  # noqa: SIM115  as long as the process

    def step(self, step: int, samples: int, *, committed: bool) -> None:
        row = {"at": time.monotonic(), "step": step, "samples": samples, "committed": committed, "pid": os.getpid()}
        self._file.write(json.dumps(row) + "\n")


def read_traces(folder: Path) -> list[dict[str, Any]]:
    """All rows, by time."""
    rows = [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text().splitlines()
        if line.endswith("}")
    ]
    return sorted(rows, key=lambda row: float(row["at"]))


def model() -> nn.Module:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 1))


def samples(step: int, rank: int, count: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step * 1000 + rank)
    x = torch.randn(count, WIDTH, generator=draw)
    return x, x.sum(1, keepdim=True)


def loss_of(trained: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Takes as long as its share of micro-batches says."""
    time.sleep(COMPUTE_S * len(x) * MICRO_BATCHES / SAMPLES)
    return functional.mse_loss(trained(x), y)
