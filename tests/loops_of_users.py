"""Training loops as people write them, small, for tests that run them in several layouts.

Each is a function of a run, at the top of a module so that processes can load it, with 6 micro-batches per step.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import TensorDataset

import resilient

SIZES: dict[str, Any] = {"global_batch": 24, "micro_batch": 4}
MICRO_BATCHES = 6


class Samples(TensorDataset):
    """Ninety-six samples of eight numbers, each of which takes a while to read."""

    def __init__(self) -> None:
        x = torch.randn(96, 8, generator=torch.Generator().manual_seed(0))
        super().__init__(x, x.sum(1, keepdim=True) * 0.3)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        time.sleep(0.002)
        return super().__getitem__(index)


DATA = Samples()


def network(dropout: float = 0.1) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 1))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x), y)


def two_levels(run: resilient.Run, steps: int = 6) -> Any:
    """Everything that stands behind the loop over micro-batches: clip, update, schedule, average, counters, logs."""
    model = network()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = lr_scheduler.StepLR(optimizer, 2, 0.5)
    run.protect(model=model, optimizer=optimizer, scheduler=scheduler, average=average)
    for step in run.steps(DATA, **SIZES, steps=steps):
        for x, y in step:
            loss_of(model, x, y).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        run.state["norms"] = [*run.state.get("norms", []), float(norm)]
        step.log(rate=scheduler.get_last_lr()[0])
    return int(average.n_averaged), len(run.state["norms"])


def flat(run: resilient.Run, steps: int = 6) -> Any:
    """The same with one level."""
    model = network()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = lr_scheduler.StepLR(optimizer, 2, 0.5)
    run.protect(model=model, optimizer=optimizer, scheduler=scheduler, average=average)
    for x, y in run.batches(DATA, **SIZES, steps=steps):
        loss_of(model, x, y).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        if run.committing:
            run.state["norms"] = [*run.state.get("norms", []), float(norm)]
            run.log(rate=scheduler.get_last_lr()[0])
    return int(average.n_averaged), len(run.state["norms"])


def epochs(run: resilient.Run, count: int = 2) -> Any:
    """Validation, a plateau on its loss, and a schedule at each epoch's end."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
    decay = lr_scheduler.StepLR(optimizer, 1, 0.9)
    run.protect(model=model, optimizer=optimizer, plateau=plateau, decay=decay)
    held_out = DATA.tensors
    for epoch in run.epochs(count):
        for step in run.steps(DATA, **SIZES):
            for x, y in step:
                loss_of(model, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert step.epoch == epoch
        with run.evaluating():
            torch.randn(run.rank + 1)
            loss = loss_of(model, *held_out)
        plateau.step(loss)
        decay.step()
        run.state.setdefault("validated", []).append((int(epoch), float(loss)))
    return run.state["validated"]


def adversarial(run: resilient.Run, steps: int = 8) -> Any:
    """Two networks with an optimizer and a loss each, updated by turns on the same global batch."""
    torch.manual_seed(2)
    judge, maker = nn.Linear(8, 1), nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    optimizers = [torch.optim.Adam(each.parameters(), lr=0.01) for each in (judge, maker)]
    run.protect(judge=judge, maker=maker, judging=optimizers[0], making=optimizers[1])
    for step in run.steps(DATA, **SIZES, steps=steps, updates=2):
        for x, _ in step:
            made = maker(torch.randn(len(x), 4))
            if step.update == 0:
                nn.functional.softplus(-judge(x)).mean().backward()
                nn.functional.softplus(judge(made.detach())).mean().backward()
            else:
                nn.functional.softplus(-judge(made)).mean().backward()
        optimizers[step.update].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    return None


def switches(run: resilient.Run, steps: int = 6) -> Any:
    """What is switched on modules and optimizers at a step: freezing and thawing, modes, numbers, parameter groups."""
    model = network()
    optimizer = torch.optim.AdamW(model[4].parameters(), lr=0.01)
    run.protect(model=model, optimizer=optimizer)
    for step in run.steps(DATA, **SIZES, steps=steps):
        for x, y in step:
            loss_of(model, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step.number == 1:
            optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.003})
        if step.number == 2:
            model[4].bias.requires_grad_(False)
            model[3].p = 0.4
        if step.number == 3:
            model[1].eval()
            model[4].bias.requires_grad_(True)
    return len(optimizer.param_groups)
