"""Models in low precision, with what could be rounded differently: mixed types, buffers, shared weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import resilient

WIDTH, GLOBAL_BATCH, MICRO_BATCH = 6, 14, 2


class Rows:
    def __len__(self) -> int:
        return 70

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        drawn = torch.Generator().manual_seed(index)
        return torch.randn(WIDTH, generator=drawn), torch.randn(WIDTH, generator=drawn)


class Block(nn.Module):
    """Computes in bf16. Its scale is in fp32, statistics in bf16, and the code of what it saw last in fp8."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)
        self.norm = nn.BatchNorm1d(WIDTH, dtype=torch.bfloat16)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("code", torch.zeros(WIDTH).to(torch.float8_e4m3fn))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.tanh(self.norm(self.linear(x.bfloat16())))
        self.code = out[0].detach().float().to(torch.float8_e4m3fn)
        return x + out * self.scale


class Head(nn.Module):
    """In fp16, by the weight of the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH).half())

    def forward(self, x: Tensor) -> Tensor:
        return (x.half() @ self.weight).float()


def loss_of(out: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(out, target)


def flat(run: resilient.Run) -> Any:
    torch.manual_seed(1)
    model = nn.Sequential(Head(), Block(), Block())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, eps=1e-4)
    run.protect(model=model, optimizer=optimizer)
    for step in run.steps(Rows(), global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH, steps=5):
        for x, y in step:
            loss_of(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()


def pipeline(run: resilient.Run, stages: int) -> Any:
    layers = [Head, Block, Block, Head]
    pipe = run.pipeline(layers, loss_of, stages=stages, tied={"layers.3.weight": "layers.0.weight"})
    optimizer = torch.optim.AdamW(pipe.parameters(), 1e-2, eps=1e-4)
    run.protect(model=pipe, optimizer=optimizer)
    for step in run.steps(Rows(), global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH, steps=5):
        pipe.train_step(step)
        run.clip_grad_norm_(0.5)
        optimizer.step()
        optimizer.zero_grad()
