"""What is trained on a device: dropout, autocast and a GradScaler. It runs on a CPU too, as the tests' own check."""

from __future__ import annotations

import os
import threading
from typing import Any

import torch
from torch import nn

import resilient
from tests.integration.loops import Noisy


def mixed_precision(run: resilient.Run, steps: int, hold: str = "") -> str:
    """Slow while the file `hold` is missing, so that processes have the time to start and join."""
    model = nn.Sequential(nn.Linear(12, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 3))
    model.to(run.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler(run.device.type, init_scale=256.0, growth_interval=4)
    run.protect(model=model, optimizer=optimizer, scaler=scaler)
    pace = threading.Event()
    for x, y in run.batches(Noisy(), global_batch=32, micro_batch=4, steps=steps):
        with torch.autocast(run.device.type, dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x.to(run.device)), y.to(run.device))
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)  # type: ignore[no-untyped-call]
        scaler.update()
        optimizer.zero_grad()
        if hold and run.committing and not os.path.exists(hold):
            pace.wait(0.3)
    return str(run.device)


def train(name: str, **settings: Any) -> Any:
    """A training function of this name, for ranks of half a GPU each unless the settings say otherwise."""

    def main(run: resilient.Run, steps: int, hold: str = "") -> str:
        return mixed_precision(run, steps, hold)

    return resilient.train(**{"name": name, "resources": {"CPU": 1, "GPU": 0.5}, "seed": 3, **settings})(main)
