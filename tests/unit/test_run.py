"""The loop in one process: the same numbers as plain PyTorch, randomness by micro-batch, what is recorded."""

from __future__ import annotations

import gc
import random
import traceback
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import resilient
from resilient.core.order import Batching, derive_seed, sample_indices
from resilient.payload import Payload

GLOBAL, MICRO, STEPS = 12, 2, 5
LEAVES = GLOBAL // MICRO


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """Thirty fixed samples of six numbers, and a target."""

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(6, generator=torch.Generator().manual_seed(index))
        return x, (x.sum() * 0.3).reshape(1)


class Numbered(Dataset[Tensor]):
    """Every sample is its own number."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index, dtype=torch.float64)


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def local(function: Callable[..., Any], *args: Any, **settings: Any) -> resilient.Result:
    return resilient.train(name="test", **settings)(function).local(*args)


def batches(run: resilient.Run, dataset: Any = None, **changes: Any) -> Iterator[Any]:
    sizes: dict[str, Any] = {"global_batch": GLOBAL, "micro_batch": MICRO, "steps": STEPS}
    return run.batches(dataset or Samples(), **{**sizes, **changes})


def simple(run: resilient.Run, **changes: Any) -> Iterator[tuple[Any, nn.Module, torch.optim.Optimizer]]:
    """A loop of which the caller writes only what is special about it, after backward and before step."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.protect(model=model, optimizer=optimizer)
    for x, y in batches(run, **changes):
        nn.functional.mse_loss(model(x), y).backward()
        yield x, model, optimizer
        optimizer.step()
        optimizer.zero_grad()


def test_equals_plain_gradient_accumulation() -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.3)

    def main(run: resilient.Run) -> dict[str, Any]:
        model, optimizer, scheduler = make()
        steps = []
        optimizer.register_step_post_hook(lambda *_: steps.append(run.step))
        run.protect(model=model, optimizer=optimizer, scheduler=scheduler)
        seen, committing, unset, rates = [], [], [], []
        for x, y in batches(run):
            seen.append((x, y))
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            committing.append(run.committing)
            unset.append(all(parameter.grad is None for parameter in model.parameters()))
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            run.log(loss=loss)
            rates.append(scheduler.get_last_lr()[0])
        parameters = [parameter.detach() for parameter in model.parameters()]
        places = (run.step, run.rank, run.world_size, run.is_main, run.generation, run.device)
        facts = {"seen": seen, "committing": committing, "unset": unset, "rates": rates}
        return {**facts, "steps": steps, "parameters": parameters, "places": places}

    result = local(main)
    got = result.value
    model, optimizer, scheduler = make()
    rates, losses = [], []
    for step in range(STEPS):
        total = 0.0
        for x, y in got["seen"][step * LEAVES : (step + 1) * LEAVES]:
            loss = nn.functional.mse_loss(model(x), y) / LEAVES
            loss.backward()
            total += float(loss.detach())
            rates.append(scheduler.get_last_lr()[0])
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        rates[-1] = scheduler.get_last_lr()[0]
        losses.append(total)
    for mine, plain in zip(got["parameters"], model.parameters(), strict=True):
        torch.testing.assert_close(mine, plain.detach(), rtol=1e-4, atol=1e-6)
    assert got["rates"] == rates
    assert got["steps"] == list(range(STEPS))
    assert got["committing"] == ([False] * (LEAVES - 1) + [True]) * STEPS
    assert got["unset"] == [not committing for committing in got["committing"]]
    assert got["places"] == (STEPS, 0, 1, True, 1, torch.device("cpu"))
    assert [row["loss"] for row in result.metrics] == pytest.approx(losses, rel=1e-4)


def test_result() -> None:
    def main(run: resilient.Run, factor: float) -> float:
        for _ in simple(run):
            pass
        return factor * 2

    result = local(main, 1.5)
    assert (result.step, result.value, result.recoveries) == (STEPS, 3.0, [])
    assert [row["step"] for row in result.metrics] == [float(step) for step in range(STEPS)]
    assert all(set(row) == {"step", "loss"} for row in result.metrics)
    assert result.digest == local(main, 7.0).digest
    assert result.digest != local(main, 1.5, seed=1).digest


def test_state_is_part_of_the_digest() -> None:
    def main(run: resilient.Run, value: object) -> None:
        for _ in simple(run, steps=1):
            if run.committing:
                run.state["value"] = value

    digests = {local(main, value).digest for value in (0, 1, [1], torch.tensor(1))}
    assert len(digests) == 4
    assert local(main, 1).digest in digests


def test_every_sample_is_used_once() -> None:
    """The losses encode which samples were in which micro-batch, exactly, in float64."""
    length, steps, seed = 26, 7, 5

    def main(run: resilient.Run) -> list[tuple[int, list[int], bool]]:
        model = nn.Linear(1, 1).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        run.protect(model=model, optimizer=optimizer)
        seen = []
        for x in batches(run, Numbered(length), global_batch=8, micro_batch=2, steps=steps):
            loss = (2**x).sum() + 0.0 * model(x[:, None]).sum()
            loss.backward()
            optimizer.step()
            seen.append((run.step, [int(index) for index in x], run.committing))
        return seen

    result = local(main, seed=seed)
    batching = Batching(global_batch=8, micro_batch=2)
    data_seed = derive_seed("data", seed)
    expected = [
        (step, sample_indices(batching, step=step, leaf=leaf, length=length, seed=data_seed).tolist(), leaf == 3)
        for step in range(steps)
        for leaf in range(4)
    ]
    assert result.value == expected
    for row in result.metrics:
        used = [index for step, indices, _ in expected if step == row["step"] for index in indices]
        assert len(used) == len(set(used)) == 8
        assert int(row["loss"] * 4) == sum(2**index for index in used)
    for epoch in range(2):
        used = [index for step, indices, _ in expected if step // 3 == epoch for index in indices]
        assert len(set(used)) == 24


def test_logged_values_are_averaged_over_the_step() -> None:
    def main(run: resilient.Run) -> None:
        for leaf, _ in enumerate(simple(run, steps=2)):
            run.log(leaf=leaf % LEAVES, double=torch.tensor(2.0 * leaf), loss=1e9)
            if leaf % 2:
                run.log(odd=float(leaf % LEAVES))

    first, second = local(main).metrics
    assert (first["leaf"], first["double"], first["odd"]) == (2.5, 5.0, 3.0)
    assert (second["leaf"], second["double"], second["odd"]) == (2.5, 17.0, 3.0)
    assert first["loss"] < 1e3


def test_the_loss_is_the_mean_in_the_order_of_micro_batches() -> None:
    values = [1e16, 1.0, -1e16, 3.0, 0.1, 0.7]

    def main(run: resilient.Run) -> list[float]:
        weight = nn.Linear(1, 1).double()
        optimizer = torch.optim.SGD(weight.parameters(), lr=0.0)
        run.protect(model=weight, optimizer=optimizer)
        reduced = []
        for leaf, _ in enumerate(batches(run, steps=1)):
            (values[leaf] + 0.0 * weight.bias).backward()  # of shape (1,), which backward takes too
            optimizer.step()
            reduced.append(run.reduced("loss"))
        return [float(value) for value in reduced]

    result = local(main)
    mean = sum(values) / len(values)
    assert result.metrics == [{"step": 0.0, "loss": mean}]
    assert all(np.isnan(value) for value in result.value[:-1])
    assert result.value[-1] == mean


def test_randomness_belongs_to_step_and_micro_batch() -> None:
    def draws(extra: int) -> tuple[float, float, float]:
        found = random.random(), float(np.random.rand()), float(torch.rand(()))
        for _ in range(extra):
            random.random(), np.random.rand(), torch.rand(3)
        return found

    def main(run: resilient.Run, extra: int) -> dict[str, Any]:
        found: dict[str, Any] = {"function": draws(0), "micro-batches": [], "commits": []}
        for count, _ in enumerate(simple(run)):
            (found["commits"] if run.committing else found["micro-batches"]).append(draws(extra * (count % 3)))
        return found

    once, again = local(main, 0).value, local(main, 2).value
    assert once == again
    every = [once["function"], *once["micro-batches"], *once["commits"]]
    assert len(set(every)) == len(every) == 1 + LEAVES * STEPS
    assert local(main, 0, seed=1).value["micro-batches"][0] != once["micro-batches"][0]


def test_dropout_does_not_depend_on_what_came_before() -> None:
    def main(run: resilient.Run, nuisance: int) -> list[list[float]]:
        model = nn.Sequential(nn.Linear(6, 20), nn.Dropout(0.5))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        torch.rand(nuisance)
        run.protect(model=model, optimizer=optimizer)
        masks = []
        for x, _ in batches(run, steps=2):
            out = model(x)
            masks.append((out == 0).flatten().tolist())
            out.sum().backward()
            torch.rand(nuisance)
            optimizer.step()
        return masks

    masks = local(main, 0).value
    assert masks == local(main, 5).value
    assert len({tuple(mask) for mask in masks}) == len(masks)


@pytest.mark.parametrize("fails", [False, True])
def test_the_callers_generators_and_threads_come_back(fails: bool) -> None:
    def main(run: resilient.Run) -> int:
        for _ in simple(run, steps=1):
            if fails:
                raise KeyError("mine")
        return torch.get_num_threads()

    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    expected = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    if fails:
        with pytest.raises(KeyError, match="mine"):
            local(main, resources={"CPU": 2})
    else:
        assert local(main, resources={"CPU": 2}).value == 2
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected
    assert torch.get_num_threads() == 1


def test_a_break_at_a_commit_ends_the_run_at_that_step() -> None:
    def main(run: resilient.Run) -> int:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run.protect(model=model, optimizer=optimizer)
        for x, y in batches(run):
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            run.log(ones=1)
            if run.committing and run.step == 2:
                break
        return run.step

    result = local(main)
    assert (result.value, result.step) == (3, 3)
    assert [row["ones"] for row in result.metrics] == [1.0] * 3


def test_a_break_counts_although_the_iterator_is_kept() -> None:
    kept = []

    def main(run: resilient.Run, stop_in_step: bool) -> None:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run.protect(model=model, optimizer=optimizer)
        run.kept = iterator = batches(run)  # type: ignore[attr-defined]
        kept.append(iterator)
        for x, y in iterator:
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            if run.step == 1 and run.committing != stop_in_step:
                break

    original = torch.autograd.backward
    assert local(main, False).step == 2
    assert torch.autograd.backward is original
    with pytest.raises(resilient.LoopError, match="in the middle of step 1"):
        local(main, True)
    assert torch.autograd.backward is original


def test_an_exception_ends_the_loop_although_its_iterator_is_kept() -> None:
    """The traceback holds the frame, the frame the iterator: what was put around torch must go all the same."""

    def main(run: resilient.Run) -> None:
        model = net()
        run.protect(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
        iterator = batches(run)
        for _ in iterator:
            raise KeyError("mine")

    original = torch.autograd.backward
    with pytest.raises(KeyError, match="mine") as caught:
        local(main)
    assert torch.autograd.backward is original
    assert "raise KeyError" in "".join(traceback.format_exception(caught.value))


def test_an_error_in_the_dataset_shows_where() -> None:
    class Broken(Samples):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            raise OSError("sample is gone")

    def main(run: resilient.Run) -> None:
        for _ in simple(run, dataset=Broken()):
            pass

    with pytest.raises(OSError, match="sample is gone") as caught:
        local(main)
    assert "in __getitem__" in "".join(traceback.format_exception(caught.value))


def test_epochs_and_unequal_trees() -> None:
    def main(run: resilient.Run) -> None:
        for _ in simple(run, steps=None, epochs=2, global_batch=10, micro_batch=2):
            pass

    assert local(main).step == 2 * 3


def test_a_stream() -> None:
    class Stream(torch.utils.data.IterableDataset[tuple[Tensor, Tensor]]):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return (Samples()[index] for index in range(30))

    def main(run: resilient.Run) -> None:
        for _ in simple(run, dataset=Stream(), steps=None):
            pass

    assert local(main).step == 30 // GLOBAL


def test_pause() -> None:
    def main(run: resilient.Run) -> None:
        for _ in simple(run, steps=1):
            with run.pause("validation"):
                pass
            with pytest.raises(KeyError), run.pause("validation"):
                raise KeyError

    assert local(main).step == 1


@pytest.mark.parametrize(("leaves", "most"), [(1, 1), (4, 2), (16, 4)])
def test_a_run_in_one_process_holds_few_sums_and_nothing_of_it_stays(
    leaves: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In units of all gradients. Sums of complete subtrees that wait for each other: no copy of the result."""
    made: list[weakref.ref[Any]] = []
    begin = Payload.__init__

    def counted(self: Payload, *args: Any) -> None:
        begin(self, *args)
        made.append(weakref.ref(self.flat))

    monkeypatch.setattr(Payload, "__init__", counted)

    def main(run: resilient.Run) -> None:
        model = net()
        optimizer = torch.optim.AdamW(model.parameters())
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
        run.protect(model=model, optimizer=optimizer, scheduler=scheduler)
        for x, y in run.batches(Samples(), global_batch=16, micro_batch=16 // leaves, steps=3):
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    gc.disable()  # what refers to itself would be found sooner or later
    try:
        local(main)
    finally:
        gc.enable()
    assert len(made) == most
    assert [ref() for ref in made] == [None] * most
