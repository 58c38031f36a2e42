"""On a CUDA device: the same loop, the same promises. Needs one GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import resilient
from tests.integration.loops import Noisy

pytestmark = pytest.mark.gpu


def on_gpu(run: resilient.Run, steps: int) -> str:
    model = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 3))
    model.to(run.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run.protect(model=model, optimizer=optimizer)
    for x, y in run.batches(Noisy(), global_batch=32, micro_batch=4, steps=steps):
        loss = nn.functional.cross_entropy(model(x.to(run.device)), y.to(run.device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return str(run.device)


def test_local_on_cuda_repeats_its_bits() -> None:
    train = resilient.train(name="cuda", resources={"CPU": 1, "GPU": 1})(on_gpu)
    first, second = train.local(steps=6), train.local(steps=6)
    assert first.digest == second.digest and first.metrics == second.metrics
    assert first.value == "cuda:0"
