"""A model whose buffers are set, become None and change their shape, once per step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import resilient


class Growing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.register_buffer("mean", None)
        self.register_buffer("late", None)
        self.register_buffer("wide", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        for buffer in self.buffers():
            buffer.mul_(0.9).add_(0.1 * x.detach().mean())
        return self.linear(x if self.mean is None else x - self.mean)


def change(model: Any, step: int) -> None:
    """Behind the loop over micro-batches."""
    if step == 1:
        model.mean = torch.zeros(4)
    if step == 2:
        model.late = torch.zeros((), dtype=torch.bfloat16)
        model.wide = torch.zeros(3)
    if step == 140:
        model.mean = None


def train(run: resilient.Run, steps: int, wait_for: str = "") -> None:
    """wait_for: a file; steps are slow until it is there."""
    torch.manual_seed(0)
    model = Growing()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    run.protect(model=model, optimizer=optimizer)
    x = torch.randn(96, 4, generator=torch.Generator().manual_seed(1))
    for step in run.steps(TensorDataset(x, x.sum(1, keepdim=True)), global_batch=12, micro_batch=2, steps=steps):
        for inputs, target in step:
            nn.functional.mse_loss(model(inputs), target).backward()
        optimizer.step()
        optimizer.zero_grad()
        change(model, step.number)
        if wait_for and not Path(wait_for).exists():
            time.sleep(0.05)
