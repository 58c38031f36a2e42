"""What acts once per step, and that everything is as before when the loop has ended."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

import resilient

LEAVES, STEPS = 4, 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def data() -> TensorDataset:
    numbers = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    return TensorDataset(numbers, numbers.sum(1, keepdim=True) * 0.3)


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def batches(run: resilient.Run, steps: int = STEPS) -> Iterator[tuple[Tensor, Tensor]]:
    yield from run.batches(data(), global_batch=2 * LEAVES, micro_batch=2, steps=steps)


def local(function: Callable[..., Any], *args: Any) -> resilient.Result:
    return resilient.train(name="test")(function).local(*args)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x), y)


def as_plain(value: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in value.parameters()]


# GradScaler


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(unscale: bool) -> None:
    def main(run: resilient.Run, scaled: bool) -> tuple[list[Tensor], float]:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2, enabled=scaled)
        run.protect(model=model, optimizer=optimizer, scaler=scaler)
        for x, y in batches(run):
            scaler.scale(loss_of(model, x, y)).backward()
            if unscale:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return as_plain(model), scaler.get_scale()

    scaled, plain = local(main, True), local(main, False)
    losses, expected = ([row["loss"] for row in result.metrics] for result in (scaled, plain))
    assert losses == pytest.approx(expected)
    torch.testing.assert_close(scaled.value[0], plain.value[0])
    assert scaled.value[1] == 2.0**10 * 2 ** (STEPS // 2)


def test_an_infinite_gradient_skips_a_step() -> None:
    def main(run: resilient.Run) -> tuple[list[bool], list[float]]:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        run.protect(model=model, optimizer=optimizer, scaler=scaler)
        moved, scales = [], []
        for number, (x, y) in enumerate(batches(run)):
            before = as_plain(model)
            infinite = float("inf") if number == LEAVES + 1 else 1.0
            scaler.scale(loss_of(model, x, y) * infinite).backward()
            scaler.step(optimizer)
            scaler.update()
            if run.committing:
                moved.append(any(not one.equal(other) for one, other in zip(before, as_plain(model), strict=True)))
                scales.append(scaler.get_scale())
        return moved, scales

    result = local(main)
    assert result.value == ([True, False, True, True], [4.0, 2.0, 2.0, 2.0])
    assert [row["loss"] == float("inf") for row in result.metrics] == [False, True, False, False]


# Ways to call backward, and parameters without gradient


@pytest.mark.parametrize("way", ["reentrant", "not reentrant", "autograd.backward", "a list", "retained"])
def test_ways_to_call_backward(way: str) -> None:
    def main(run: resilient.Run, way: str) -> list[Tensor]:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run.protect(model=model, optimizer=optimizer)
        for x, y in batches(run):
            if "reentrant" in way:
                x.requires_grad_()
                hidden = checkpoint(model[:2], x, use_reentrant=way == "reentrant")
                out = checkpoint(model[2], hidden, use_reentrant=way == "reentrant")
                nn.functional.mse_loss(out, y).backward()
            elif way == "autograd.backward":
                torch.autograd.backward(loss_of(model, x, y))
            elif way == "a list":
                torch.autograd.backward([loss_of(model, x, y)])
            else:
                loss_of(model, x, y).backward(retain_graph=way == "retained")
            optimizer.step()
        return as_plain(model)

    plain, other = local(main, "plain"), local(main, way)
    assert plain.digest == other.digest
    assert plain.metrics == other.metrics


def test_unused_and_rarely_used_parameters() -> None:
    class Rare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(6, 1)
            self.rare = nn.Parameter(torch.ones(1))
            self.unused = nn.Parameter(torch.ones(3))
            self.empty = nn.Parameter(torch.ones(0, 4))

    def main(run: resilient.Run) -> tuple[list[bool], list[float]]:
        model = Rare()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        run.protect(model=model, optimizer=optimizer)
        unused, rare = [], []
        for number, (x, y) in enumerate(batches(run)):
            loss = loss_of(model.body, x, y) + model.empty.sum()
            if number in (LEAVES + 1, LEAVES + 3):
                loss = loss + model.rare.sum() * 3
            loss.backward()
            optimizer.step()
            if run.committing:
                unused.append(model.unused.grad is None)
                rare.append(float("nan") if model.rare.grad is None else float(model.rare.grad))
        assert model.unused.equal(torch.ones(3))
        assert model.unused not in optimizer.state
        assert float(optimizer.state[model.rare]["step"]) == 1
        return unused, rare

    unused, rare = local(main).value
    assert unused == [True] * STEPS
    assert rare == pytest.approx([float("nan"), 3 * 2 / LEAVES, float("nan"), float("nan")], nan_ok=True)


def test_tied_and_frozen_parameters() -> None:
    def main(run: resilient.Run) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 1))
        model[2].weight = model[0].weight
        model[3].weight.requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        frozen, tied = model[3].weight.detach().clone(), model[0].weight.detach().clone()
        run.protect(model=model, again=model, optimizer=optimizer)
        expected = torch.zeros(6, 6)
        for x, y in batches(run, steps=1):
            loss = loss_of(model, x, y)
            expected += torch.autograd.grad(loss, model[0].weight, retain_graph=True)[0] / LEAVES
            loss.backward()
            optimizer.step()
        assert model[2].weight is model[0].weight
        assert model[3].weight.equal(frozen)
        assert model[3].weight.grad is None
        torch.testing.assert_close(model[0].weight.detach(), tied - 0.1 * expected)

    local(main)


def test_a_parameter_thaws_and_another_freezes() -> None:
    def main(run: resilient.Run) -> None:
        model, plain = net(), net()
        optimizer, its_own = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, plain))
        model[0].requires_grad_(False)
        run.protect(model=model, optimizer=optimizer)
        for step in run.steps(data(), global_batch=2 * LEAVES, micro_batch=2, steps=STEPS):
            for each in (model, plain):
                each[0].requires_grad_(step.number >= 1)
                each[2].requires_grad_(step.number < 2)
            for x, y in step:
                with run.pause("a plain loop beside it"):
                    (loss_of(plain, x, y) / LEAVES).backward()
                loss_of(model, x, y).backward()
            for one in (optimizer, its_own):
                one.step()
                one.zero_grad()
        torch.testing.assert_close(as_plain(model), as_plain(plain))

    local(main)


def test_two_models_and_two_optimizers() -> None:
    def main(run: resilient.Run) -> list[int]:
        one, other = net(), net()
        optimizers = torch.optim.SGD(one.parameters(), lr=0.1), torch.optim.AdamW(other.parameters(), lr=0.1)
        steps = [0, 0]
        for number, optimizer in enumerate(optimizers):
            optimizer.register_step_post_hook(lambda *_, n=number: steps.__setitem__(n, steps[n] + 1))
        run.protect(one=one, other=other, first=optimizers[0], second=optimizers[1])
        for x, y in batches(run):
            (loss_of(one, x, y) + loss_of(other, x, y)).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
        return steps

    assert local(main).value == [STEPS, STEPS]


def test_average_of_weights() -> None:
    def main(run: resilient.Run) -> tuple[int, bool]:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        run.protect(model=model, optimizer=optimizer, average=average)
        expected = as_plain(model)
        for x, y in batches(run):
            loss_of(model, x, y).backward()
            optimizer.step()
            if run.committing:
                average.update_parameters(model)
                first = run.step == 0
                for value, new in zip(expected, as_plain(model), strict=True):
                    value.lerp_(new, 1.0 if first else 0.5)
        torch.testing.assert_close(as_plain(average), expected)
        return int(average.n_averaged), all(parameter.grad is None for parameter in average.parameters())

    assert local(main).value == (STEPS, True)


# Schedulers


def schedulers(optimizer: torch.optim.Optimizer) -> dict[str, Callable[[], Any]]:
    def sequential() -> lr_scheduler.SequentialLR:
        parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2), lr_scheduler.ExponentialLR(optimizer, 0.5)]
        return lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])

    return {
        "lambda": lambda: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        "sequential": sequential,
        "one cycle": lambda: lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=STEPS + 1),
        "multi-step": lambda: lr_scheduler.MultiStepLR(optimizer, [1, 3]),
        "plateau": lambda: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0),
    }


@pytest.mark.parametrize("name", ["lambda", "sequential", "one cycle", "multi-step", "plateau"])
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # SequentialLR gives it itself
def test_schedulers_step_once_per_step(name: str) -> None:
    def main(run: resilient.Run, name: str) -> list[float]:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        scheduler = schedulers(optimizer)[name]()
        kind, step = type(scheduler), optimizer.step
        run.protect(model=model, optimizer=optimizer, scheduler=scheduler)
        rates = []
        for x, y in batches(run):
            loss_of(model, x, y).backward()
            optimizer.step()
            scheduler.step(run.reduced("loss")) if name == "plateau" else scheduler.step()
            assert type(scheduler) is not kind
            assert isinstance(scheduler, kind)
            file = io.BytesIO()
            torch.save({"scheduler": scheduler.state_dict(), "optimizer": optimizer.state_dict()}, file)
            assert "step" not in scheduler.state_dict()
            if run.committing:
                rates.append(optimizer.param_groups[0]["lr"])
        assert type(scheduler) is kind
        assert optimizer.step == step
        return rates

    optimizer = torch.optim.SGD(net().parameters(), lr=0.1, momentum=0.5)
    scheduler = schedulers(optimizer)[name]()
    expected = []
    for _ in range(STEPS):
        optimizer.step()
        scheduler.step(1.0) if name == "plateau" else scheduler.step()
        expected.append(optimizer.param_groups[0]["lr"])
    assert local(main, name).value == expected
    assert len(set(expected)) > 1


def test_a_plateau_needs_what_is_equal_on_all_ranks() -> None:
    def main(run: resilient.Run) -> None:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer)
        run.protect(model=model, optimizer=optimizer, plateau=scheduler)
        for x, y in batches(run):
            loss = loss_of(model, x, y)
            loss.backward()
            optimizer.step()
            scheduler.step(float(loss.detach()))

    with pytest.raises(resilient.LoopError, match=r'plateau\.step was given \d\.\d+.*run\.reduced\("loss"\)'):
        local(main)


# Everything as before


@pytest.mark.parametrize("ending", ["end", "break", "break in a step", "exception", "no iteration"])
def test_gates_come_off(ending: str) -> None:
    def main(run: resilient.Run, ending: str) -> str:
        model = net()
        optimizer, plain = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
        scaler = torch.amp.GradScaler("cpu")
        scheduler = lr_scheduler.StepLR(optimizer, 1)
        before = optimizer.step, type(scheduler), dict(scaler.__dict__), torch.autograd.backward
        run.protect(model=model, optimizer=optimizer, plain=plain, scaler=scaler, scheduler=scheduler)
        try:
            if ending != "no iteration":
                for x, y in batches(run):
                    assert optimizer.step != before[0]
                    scaler.scale(loss_of(model, x, y)).backward()
                    for one in (optimizer, plain):
                        scaler.step(one)
                    scaler.update()
                    if ending == "exception":
                        raise KeyError
                    if ending == "break in a step" or (ending == "break" and run.committing):
                        break
        except KeyError:
            pass
        assert (optimizer.step, type(scheduler), torch.autograd.backward) == (before[0], before[1], before[3])
        assert "step" not in plain.__dict__
        assert set(scaler.__dict__) == set(before[2])
        return "as before"

    if ending in ("end", "break"):
        assert local(main, ending).value == "as before"
    else:
        with pytest.raises(resilient.LoopError):
            local(main, ending)
