"""A small pipeline with what can go wrong: tied weights, dropout, buffers, a layer without parameters, clipping."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import resilient

WORDS, WIDTH, LENGTH = 11, 8, 6
GLOBAL_BATCH, MICRO_BATCH = 12, 2


class Text:
    """Pairs of random words."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        drawn = torch.Generator().manual_seed(index)
        return torch.randint(0, WORDS, (LENGTH,), generator=drawn), torch.randint(0, WORDS, (LENGTH,), generator=drawn)


class Mixing(nn.Module):
    """Changes buffers in forward, draws by chance, and hands on a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, hidden: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mixed = torch.nn.functional.dropout(self.linear(hidden), 0.2)
        mixed = self.norm(mixed.flatten(0, 1)).view_as(hidden)
        return mixed, hidden if kept is None else kept


class Joining(nn.Module):
    def forward(self, mixed: Tensor, kept: Tensor) -> Tensor:
        return torch.tanh(mixed) + kept


def layers() -> list[Callable[[], nn.Module]]:
    return [
        functools.partial(nn.Embedding, WORDS, WIDTH),
        Mixing,
        Mixing,
        Joining,
        functools.partial(nn.Linear, WIDTH, WORDS, bias=False),
    ]


def loss_of(scores: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(scores.flatten(0, 1), target.flatten())


class Death:
    """Ends a rank's process, once, where a test wants it to."""

    def __init__(self, phase: str, member: int, step: int, mark: Path) -> None:
        self.phase, self.member, self.step, self.mark = phase, member, step, mark

    def at(self, phase: str, run: Any) -> None:
        if (phase, run._team.number, run.step) == (self.phase, self.member, self.step) and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def train(
    run: resilient.Run,
    stages: int,
    steps: int,
    death: Death | None = None,
    checkpoint: bool = False,
    schedule: Any = "1f1b",
    beside: Callable[[resilient.Run], None] = lambda run: None,
    shard_optimizer: bool = False,
    *,
    rank_bytes: int | None = None,
) -> list[float]:
    """The losses."""
    pipe = run.pipeline(
        layers(),
        loss_of,
        stages=stages,
        tied={"layers.4.weight": "layers.0.weight"},
        checkpoint=checkpoint,
        schedule=schedule,
        shard_optimizer=shard_optimizer,
        rank_bytes=rank_bytes,
    )
    optimizer = torch.optim.AdamW(pipe.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    run.protect(model=pipe, optimizer=optimizer, scheduler=scheduler)
    if death is not None:
        _watch(pipe, run, death)
    losses = []
    for step in run.steps(Text(), global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH, steps=steps):
        losses.append(pipe.train_step(step))
        if death is not None:
            death.at("reduced", run)
        norm = run.clip_grad_norm_(0.5)
        optimizer.step()
        if death is not None:
            death.at("stepped", run)
        scheduler.step()
        optimizer.zero_grad()
        run.log(norm=norm)
        beside(run)
    return losses


def _watch(pipe: nn.Module, run: resilient.Run, death: Death) -> None:
    """Of every second micro-batch that a rank gets to."""
    seen = {"forward": 0, "backward": 0}

    def count(phase: str) -> None:
        seen[phase] += 1
        if seen[phase] % 2 == 0:
            death.at(phase, run)

    for layer in pipe.layers:  # type: ignore[union-attr]
        layer.register_forward_hook(lambda *_: count("forward"))
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda _: count("backward"))
