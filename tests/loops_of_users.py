"""Training loops as people write them, small, for tests that run them in several layouts.

Each is a function of a run, at the top of a module so that processes can load it, with 6 micro-batches per step.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
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


def loop_after_loop(run: resilient.Run, count: int = 3) -> Any:
    """The usual epoch loop around a flat one, then another loop with other data, of which the end is left out."""
    model = network()
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.05)
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.9)
    run.protect(model=model, optimizer=optimizer, scheduler=scheduler)
    for number in range(count):
        if number == 1:
            optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.02, "initial_lr": 0.02})
            scheduler.base_lrs.append(0.02)
        for x, y in run.batches(DATA, **SIZES, epochs=1):
            loss_of(model, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()
        with torch.no_grad():
            model[4].bias.mul_(0.5)
        run.state["epochs"] = run.state.get("epochs", 0) + 1
    model[0].requires_grad_(False)
    for step in run.steps(DATA, **SIZES, steps=10, shuffle=False):
        for x, y in step:
            loss_of(model, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step.number == 4 * count + 5:
            break
    return run.state["epochs"], run.step


class Average:
    """An average of weights as many write it: tensors in a dict, changed through `.data`."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self.updates = 0

    def update(self, model: nn.Module) -> None:
        self.updates += 1
        for name, parameter in model.named_parameters():
            self.shadow[name].data.mul_(0.9).add_(parameter.data, alpha=0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow, self.updates = state["shadow"], state["updates"]


@dataclass(frozen=True, kw_only=True)
class Program:
    """A loop, put together from what people write. What stands in `wrong` can't be the same on any number of ranks."""

    levels: int = 2
    optimizer: str = "AdamW"
    clip: bool = False
    average: bool = False
    schedule: bool = False
    evaluate: str = ""
    """ "rank 0" or "all": where, in the step's end."""
    counter: bool = False
    switch: str = ""
    """At step 1: "freeze", "thaw", "eval", "dropout" or "group"."""
    wrong: str = ""
    """In each micro-batch: "counter", "average", "flag", "rate", "weights", or "forward" after backward."""

    def run(self, run: resilient.Run) -> str:
        model = network()
        model[0].bias.requires_grad_(self.switch != "thaw")
        trained = list(model[4].parameters() if self.switch == "group" else model.parameters())
        optimizer = getattr(torch.optim, self.optimizer)(trained, lr=0.01)
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
        average = Average(model)
        run.protect(model=model, optimizer=optimizer, scheduler=scheduler, average=average)
        own = (run, model, optimizer, scheduler, average)
        if self.levels == 2:
            for step in run.steps(DATA, **SIZES, steps=4):
                for x, y in step:
                    self._micro_batch(own, x, y)
                self._update(own)
                self._once(own)
        else:
            for x, y in run.batches(DATA, **SIZES, steps=4):
                self._micro_batch(own, x, y)
                self._update(own)
                if run.committing:
                    self._once(own)
        return ""

    def _micro_batch(self, own: Any, x: Tensor, y: Tensor) -> None:
        run, model, optimizer, _, average = own
        loss_of(model, x, y).backward()
        match self.wrong:
            case "counter":
                run.state["seen"] = run.state.get("seen", 0) + 1
            case "average":
                average.update(model)
            case "flag":
                model[3].p *= 0.9
            case "rate":
                optimizer.param_groups[0]["lr"] *= 0.99
            case "weights":
                with torch.no_grad():
                    model[4].weight.mul_(0.999)
            case "forward":
                model(x)

    def _update(self, own: Any) -> None:
        _, model, optimizer, scheduler, _ = own
        if self.clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        if self.schedule:
            scheduler.step()
        optimizer.zero_grad()

    def _once(self, own: Any) -> None:
        run, model, optimizer, _, average = own
        if self.average:
            average.update(model)
        if self.counter:
            run.state["steps"] = run.state.get("steps", 0) + 1
        if self.evaluate == "all" or (self.evaluate == "rank 0" and run.is_main):
            with run.evaluating():
                loss = loss_of(model, *DATA.tensors) + 0 * torch.rand(())
            if self.evaluate == "all":
                run.state["best"] = min(run.state.get("best", 9.0), float(loss))
        if run.step == 1:
            self._switch(model, optimizer)

    def _switch(self, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        match self.switch:
            case "freeze":
                model[4].requires_grad_(False)
            case "thaw":
                model[0].bias.requires_grad_(True)
            case "eval":
                model[1].eval()
            case "dropout":
                model[3].p = 0.5
            case "group":
                optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.002})


def composed(run: resilient.Run, program: Program) -> str:
    return program.run(run)


def last_step_differs(run: resilient.Run) -> None:
    """Each rank puts something of its own into the state, when nobody compares any more."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    run.protect(model=model, optimizer=optimizer)
    for step in run.steps(DATA, **SIZES, steps=3):
        for x, y in step:
            loss_of(model, x, y).backward()
        optimizer.step()
        if step.number == 2:
            run.state["mine"] = run.rank


def one_rank_alone(run: resilient.Run, what: str) -> None:
    """What rank 0 alone does to the state, where all should."""
    model = network()
    average = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    run.protect(model=model, optimizer=optimizer, average=average)
    run.state["tensor"] = torch.zeros(3)
    for step in run.steps(DATA, **SIZES, steps=4):
        for x, y in step:
            model.train()
            loss_of(model, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if run.is_main and step.number == 1:
            match what:
                case "eval":
                    model.eval()
                case "state":
                    run.state["best"] = 0.5
                case "rate":
                    optimizer.param_groups[0]["lr"] = 0.01
                case "average":
                    average.update_parameters(model)
                case "tensor":
                    run.state["tensor"] += 1


def goes_back(run: resilient.Run, form: str, marker: str) -> Any:
    """In step 6 all ranks ask once to go back by two steps, in each form of a loop by epochs."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    run.protect(model=model, optimizer=optimizer)

    def train(steps: Any) -> None:
        for step in steps:
            for x, y in step:
                loss_of(model, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
            run.state["steps"] = run.state.get("steps", 0) + 1
            if step.number == 6 and not os.path.exists(f"{marker}{run.rank}"):
                Path(f"{marker}{run.rank}").touch()
                run.rollback(steps=2)

    if form == "run.epochs":
        for epoch in run.epochs(4):
            train(run.steps(DATA, **SIZES))
            run.state.setdefault("epochs", []).append(int(epoch))
    else:
        for number in range(4):
            train(run.steps(DATA, **SIZES, epochs=1))
            run.state.setdefault("epochs", []).append(number)
    return run.state["steps"], run.state["epochs"]
