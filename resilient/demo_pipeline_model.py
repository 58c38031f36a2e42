"""What the pipeline demo trains: the demo's GPT, cut into layers."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

import resilient

from .demo_model import BYTES, CONTEXT, DROPOUT, LAYERS, WIDTH, Block, SourceText, warm_up_then_cosine

STAGES = 4


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(BYTES, WIDTH)
        self.places = nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        self.drop = nn.Dropout(DROPOUT)
        nn.init.normal_(self.words.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(self.words(x) + self.places)
        return out


class Head(nn.Module):
    """The embedding's weights are also its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.words = nn.Linear(WIDTH, BYTES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.words(self.norm(x))
        return logits


def loss_of(logits: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), y.flatten())


@resilient.train(
    workers=(2, 4),
    resources={"CPU": 1},
    name="demo-pipeline",
    detection_s=6.0,
    snapshot=resilient.Snapshot(every=1, linger_s=5.0),
)
def main(run: resilient.Run, steps: int, after_step: Callable[[int, float], None], lr: float = 3e-3) -> int:
    """Train for this many steps; returns the number of parameters.

    after_step: called with step and loss in every step, on every rank; touches nothing that is trained.
    """
    pipe = run.pipeline(
        [Embedding, *[Block] * LAYERS, Head],
        loss_of,
        stages=STAGES,
        tied={f"layers.{LAYERS + 1}.words.weight": "layers.0.words.weight"},
    )
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=lr, betas=(0.9, 0.95))
    schedule = functools.partial(warm_up_then_cosine, steps=steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    run.protect(model=pipe, optimizer=optimizer, scheduler=scheduler)
    for step in run.steps(SourceText(), global_batch=16, micro_batch=2, steps=steps):
        loss = pipe.train_step(step)
        run.clip_grad_norm_(1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        after_step(run.step, loss)
    return sum(parameter.numel() for parameter in pipe.parameters())
