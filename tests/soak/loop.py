"""What the soak trains: small, but with everything that has a state, and slow enough to be hit."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import nn

import resilient
from tests.integration.loops import Noisy

NAME = "soak"
NODES, RANKS = 4, 3
WIDTH = 256
STEP_S = 0.1
CHECKPOINT_EVERY, KEPT = 30, 3
DETECTION_S = 3.0
"""Above the default, because all nodes share one machine, which may be slow for all at once."""


def soak(checkpoints: Path | None) -> resilient.api.TrainFunction:
    """None: without any, for one that begins at the beginning."""
    checkpoint = resilient.Checkpoint(str(checkpoints), every=CHECKPOINT_EVERY, keep=KEPT) if checkpoints else None
    return resilient.train(
        name=NAME,
        workers=(1, RANKS),
        resources={"CPU": 1},
        seed=5,
        detection_s=DETECTION_S,
        snapshot=resilient.Snapshot(every=1, parity=1, linger_s=60.0),
        checkpoint=checkpoint,
    )(train)


def train(run: resilient.Run, end: str, step_s: float) -> int:
    """Until the step that the file `end` names."""
    model = nn.Sequential(
        *(nn.Linear(12, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Dropout(0.2)),
        *(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3)),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    run.protect(model=model, optimizer=optimizer, scheduler=scheduler)
    run.state["seen"] = 0
    loss_of = nn.CrossEntropyLoss()
    due = time.monotonic()
    for x, y in run.batches(Noisy(), global_batch=24, micro_batch=4, steps=10_000_000):
        loss = loss_of(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if run.committing:
            run.state["seen"] += 24
            time.sleep(max(0.0, due - time.monotonic()))
            due = time.monotonic() + step_s
            if run.step >= last_step(end):
                break
    return run.step


def tell_last_step(end: Path, step: int) -> None:
    """It has to be so far ahead that every rank reads it before it gets there."""
    draft = end.with_suffix(".draft")
    draft.write_text(str(step))
    draft.rename(end)


def last_step(end: str) -> float:
    return int(Path(end).read_text()) if os.path.exists(end) else float("inf")
