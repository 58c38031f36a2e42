"""The loop of two levels in one process: what runs when, what is refused, and what evaluation leaves alone."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import IterableDataset, TensorDataset

import resilient
from snapshot import store
from snapshot.files import open_files

SIZES: dict[str, Any] = {"global_batch": 8, "micro_batch": 2}
X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, X.sum(1, keepdim=True))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def local(function: Callable[..., Any], *args: Any, **settings: Any) -> resilient.Result:
    return resilient.train(name="test", **settings)(function).local(*args)


@contextmanager
def refused(*words: str, error: type[Exception] = resilient.LoopError) -> Iterator[None]:
    with pytest.raises(error, match=re.compile(".*".join(map(re.escape, words)), re.DOTALL)):
        yield


class Own:
    """A small model with all that belongs to it, protected."""

    def __init__(self, run: resilient.Run, **more: Any) -> None:
        torch.manual_seed(1)
        self.run = run
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        run.protect(model=self.model, optimizer=self.optimizer, **more)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.model(x), y)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def test_steps_and_what_they_know() -> None:
    def main(run: resilient.Run) -> list[tuple[Any, ...]]:
        own, seen = Own(run), []
        for step in run.steps(DATA, **SIZES, epochs=2):
            batches = 0
            for batch in step:
                own.loss(batch).backward()
                step.log(batches=1.0, halves=batches % 2)
                batches += 1
            assert run.committing and run.step == step.number
            own.update()
            step.log(once=step.number)
            seen.append((step.number, step.epoch, step.ends_epoch, batches, float(step.loss), step.skipped))
        return seen

    result = local(main)
    assert [row[:4] for row in result.value] == [(n, n // 4, n % 4 == 3, 4) for n in range(8)]
    assert [row["loss"] for row in result.metrics] == [row[4] for row in result.value]
    rows = [(row["batches"], row["halves"], row["once"]) for row in result.metrics]
    assert rows == [(1.0, 0.5, float(number)) for number in range(8)]


def test_several_backwards_and_tensors_that_are_no_scalars_add_up() -> None:
    def main(run: resilient.Run, form: str) -> list[Tensor]:
        own = Own(run)
        for step in run.steps(DATA, **SIZES, steps=3):
            for x, y in step:
                each = (own.model(x) - y).square()
                match form:
                    case "one":
                        (each[0] + each[1]).sum().backward()
                    case "two":
                        each[0].sum().backward(retain_graph=True)
                        each[1].sum().backward()
                    case "roots":
                        torch.autograd.backward([each[0], each[1]])
                    case "weights":
                        each.backward(torch.ones_like(each))
            own.update()
        return [parameter.detach() for parameter in own.model.parameters()]

    expected = local(main, "one")
    for form in ("two", "roots", "weights"):
        found = local(main, form, on_nonfinite="skip")
        for one, other in zip(found.value, expected.value, strict=True):
            torch.testing.assert_close(one, other)
        losses, others = ([row["loss"] for row in result.metrics] for result in (found, expected))
        assert losses == pytest.approx(others)


def test_a_penalty_behind_the_inner_loop_adds_to_the_mean_gradient() -> None:
    plain, more = (_first_gradient(penalty) for penalty in (0.0, 0.5))
    torch.testing.assert_close(more, plain + 0.5)


def _first_gradient(penalty: float) -> Tensor:
    def main(run: resilient.Run) -> Tensor:
        own = Own(run)
        for step in run.steps(DATA, **SIZES, steps=1):
            for batch in step:
                own.loss(batch).backward()
            (penalty * own.model[3].weight.sum()).backward()
            assert own.model[3].weight.grad is not None
            run.state["gradient"] = own.model[3].weight.grad.clone()
            own.update()
        gradient: Tensor = run.state["gradient"]
        return gradient

    found: Tensor = local(main).value
    return found


# What is refused, in the first step

Body = Callable[[Own, Any, Any], None]


def loop(prepare: Callable[[resilient.Run], Own], inner: Body, outer: Body, top: Body) -> Callable[..., None]:
    def main(run: resilient.Run) -> None:
        own = prepare(run)
        for step in run.steps(DATA, **SIZES, steps=2):
            top(own, step, None)
            for batch in step:
                inner(own, step, batch)
            outer(own, step, None)

    return main


def backward(own: Own, step: Any, batch: Any) -> None:
    own.loss(batch).backward()


def update(own: Own, step: Any, _: Any) -> None:
    own.update()


def nothing(own: Own, step: Any, _: Any) -> None:
    pass


def run_with(
    inner: Body = backward,
    outer: Body = update,
    top: Body = nothing,
    prepare: Callable[[resilient.Run], Own] = Own,
) -> None:
    local(loop(prepare, inner, outer, top))


def both(*bodies: Body) -> Body:
    def body(own: Own, step: Any, batch: Any) -> None:
        for each in bodies:
            each(own, step, batch)

    return body


def test_updates_within_the_inner_loop() -> None:
    with refused("optimizer.step(): in step 0", "behind that loop", "do not accumulate by hand"):
        run_with(inner=both(backward, update))


def test_no_update() -> None:
    with refused("step 0 was committed without optimizer.step()"):
        run_with(outer=nothing)


def test_no_backward_in_a_micro_batch() -> None:
    with refused("a micro-batch of step 0 ended without backward"):
        run_with(inner=nothing)


def test_backward_before_the_inner_loop() -> None:
    with refused("backward was called in step 0 outside of the loop over its micro-batches", "behind it"):
        run_with(top=lambda own, step, _: own.loss((X[:2], X[:2, :1])).backward())


def test_a_break_of_the_inner_loop() -> None:
    def main(run: resilient.Run) -> None:
        own = Own(run)
        for step in run.steps(DATA, **SIZES, steps=2):
            for batch in step:
                own.loss(batch).backward()
                break

    with refused("step 0 was left before all of its micro-batches were gone through", "without break"):
        local(main)


def test_micro_batches_twice() -> None:
    with refused("the micro-batches of step 0 are gone through once"):
        run_with(outer=both(update, lambda own, step, _: list(step)))


@pytest.mark.parametrize("where", ["top", "inner"])
def test_committing_before_it_can_be_known(where: str) -> None:
    asked: Body = lambda own, step, _: print(own.run.committing)  # noqa: E731
    with refused("run.committing was asked in step 0 before it can be known", "behind the loop over the step's micro"):
        run_with(**{where: both(asked, backward) if where == "inner" else asked})


def test_committing_at_the_top_of_a_flat_loop() -> None:
    def main(run: resilient.Run) -> None:
        own = Own(run)
        for batch in run.batches(DATA, **SIZES, steps=2):
            if run.committing:
                raise AssertionError
            own.loss(batch).backward()
            own.update()

    with refused("run.committing was asked in step 0 before it can be known", "ask after backward"):
        local(main)


def test_accumulation_by_hand_in_a_flat_loop() -> None:
    def main(run: resilient.Run) -> None:
        own = Own(run)
        for number, batch in enumerate(run.batches(DATA, **SIZES, steps=2)):
            (own.loss(batch) / 2).backward()
            if number % 2:
                own.update()

    with refused("an iteration of step 0 ended without optimizer.step()", "Do not accumulate gradients by hand"):
        local(main)


def test_the_loss_of_a_step_before_it_is_known() -> None:
    with refused("step 0: step.loss was read before"):
        run_with(inner=lambda own, step, _: print(step.loss))


def test_a_layer_that_comes_later() -> None:
    def grow(own: Own, step: Any, _: Any) -> None:
        own.model.add_module("extra", nn.Linear(1, 1))
        own.optimizer.add_param_group({"params": own.model.extra.parameters()})  # type: ignore[union-attr,operator]

    with refused("parameter model.extra.weight is another one than at protect, or new", "frozen"):
        run_with(outer=both(update, grow))


def test_a_parameter_of_no_protected_module() -> None:
    with refused("optimizer updates a parameter that belongs to no module given to protect"):
        run_with(outer=both(update, lambda own, step, _: own.optimizer.add_param_group({"params": [nn.Parameter(X)]})))


def test_a_parameter_that_was_replaced_before_the_loop() -> None:
    def prepare(run: resilient.Run) -> Own:
        own = Own(run)
        own.model[0].weight = nn.Parameter(torch.zeros(8, 6))
        return own

    with refused("parameter model.0.weight is another one than at protect", "fully_shard"):
        run_with(prepare=prepare)


def test_an_average_that_is_not_protected() -> None:
    with refused("an AveragedModel was updated that is not protected", "protect(..., ema=ema)"):
        run_with(outer=both(update, lambda own, step, _: AveragedModel(own.model).update_parameters(own.model)))


def test_a_model_in_ddp() -> None:
    class Wrapped(DistributedDataParallel):
        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module = module

    with refused("a model runs within DistributedDataParallel", "call the plain one"):
        run_with(inner=lambda own, step, batch: Wrapped(own.model)(batch[0]))


def test_weights_that_change_before_the_inner_loop() -> None:
    def shrink(own: Own, step: Any, _: Any) -> None:
        with torch.no_grad():
            own.model[0].weight.mul_(0.9)

    with refused("model.0.weight changed within step 0", "behind that loop"):
        run_with(top=shrink)


def test_what_forward_counts() -> None:
    def count(own: Own, step: Any, batch: Any) -> None:
        own.model[2].p += 0.01
        backward(own, step, batch)

    with refused("model.2.p was 0.11", "as one micro-batch of step 0 ended, and 0.12", "registered buffer"):
        run_with(inner=count)


def test_keywords_reach_the_optimizer() -> None:
    class Scaled(torch.optim.SGD):
        def step(self, closure: Any = None, *, scale: float = 1.0) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.add_(parameter.grad, alpha=-group["lr"] * scale)

    def main(run: resilient.Run) -> bool:
        model = nn.Linear(6, 1)
        before = model.weight.detach().clone()
        optimizer = Scaled(model.parameters(), lr=0.1)
        run.protect(model=model, optimizer=optimizer)
        for step in run.steps(DATA, **SIZES, steps=1):
            for x, y in step:
                nn.functional.mse_loss(model(x), y).backward()
            optimizer.step(scale=0.0)
        return torch.equal(before, model.weight)

    assert local(main).value is True


# Evaluation


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("place", ["top", "inner", "outer"])
def test_training_does_not_notice_an_evaluation(levels: int, place: str) -> None:
    def main(run: resilient.Run, evaluate: bool) -> list[list[float]]:
        own, drawn = Own(run), []

        def here(name: str) -> None:
            if evaluate and name == place:
                with run.evaluating():
                    assert not own.model.training and not torch.is_grad_enabled()
                    draws()
                    own.model.train()
                    own.model(X)  # changes statistics
                assert own.model.training and torch.is_grad_enabled()
            drawn.append(draws())

        if levels == 2:
            for step in run.steps(DATA, **SIZES, steps=3):
                here("top")
                for batch in step:
                    here("inner")
                    own.loss(batch).backward()
                own.update()
                here("outer")
        else:
            for batch in run.batches(DATA, **SIZES, steps=3):
                here("top")
                own.loss(batch).backward()
                here("inner")
                own.update()
                here("outer")
        return drawn

    one, other = local(main, False), local(main, True)
    assert (one.digest, one.value) == (other.digest, other.value)


def test_a_plateau_on_a_validation_loss() -> None:
    def main(run: resilient.Run) -> float:
        model = nn.Linear(6, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
        run.protect(model=model, optimizer=optimizer, plateau=plateau)
        for _ in run.epochs(3):
            for step in run.steps(DATA, **SIZES):
                for x, y in step:
                    nn.functional.mse_loss(model(x), y).backward()
                optimizer.step()
            with run.evaluating():
                loss = nn.functional.mse_loss(model(X), X.sum(1, keepdim=True))
            plateau.step(loss)
        return float(optimizer.param_groups[0]["lr"])

    assert local(main).value == pytest.approx(0.05 / 1000)


# Epochs, and loops that follow one another


def test_an_epoch_is_a_number() -> None:
    def main(run: resilient.Run) -> list[Any]:
        own, seen = Own(run), []
        for epoch in run.epochs(3):
            for step in run.steps(DATA, **SIZES):
                for batch in step:
                    own.loss(batch).backward()
                own.update()
            seen.append(
                [epoch == 1, 0.5**epoch, f"{epoch:02d}", [10, 20, 30][epoch], epoch + 1, bool(epoch), {epoch: 1}]
            )
        return [[*row[:-1], list(map(int, row[-1]))] for row in seen]

    assert local(main).value == [
        [n == 1, 0.5**n, f"0{n}", 10 * (n + 1), n + 1, n > 0, [2]] for n in range(3)
    ]  # what is kept is looked up when it is used


@pytest.mark.parametrize(
    ("form", "words"),
    {
        "no steps": "an epoch went by without a loop over run.steps",
        "twice": "run.steps was called twice within one epoch",
        "left": "the loop over an epoch's steps was left before the epoch's end",
    }.items(),
)
def test_epochs_in_disorder(form: str, words: str) -> None:
    def main(run: resilient.Run) -> None:
        own = Own(run)
        for _ in run.epochs(2):
            for _ in range({"no steps": 0, "twice": 2, "left": 1}[form]):
                for step in run.steps(DATA, **SIZES):
                    for batch in step:
                        own.loss(batch).backward()
                    own.update()
                    if form == "left":
                        break

    with refused(words):
        local(main)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"steps": 3}, "takes neither steps nor epochs"),
        ({"dataset": DATA.tensors[0]}, "another object: build it once, before run.epochs"),
    ],
)
def test_arguments_within_epochs(arguments: dict[str, Any], words: str) -> None:
    def main(run: resilient.Run) -> None:
        own = Own(run)
        for epoch in run.epochs(2):
            for step in run.steps(**{"dataset": DATA, **SIZES, **(arguments if epoch else {})}):
                for batch in step:
                    own.loss(batch).backward()
                own.update()

    with refused(words, error=ValueError):
        local(main)


class Interrupted(Exception):
    """Stands for Ctrl-C."""


def epochs_of(run: resilient.Run, form: str, interrupt: tuple[int, str]) -> int:
    """Three epochs in different forms; interrupted in a step, at a place of it."""
    own = Own(run)

    def train(steps: Any) -> None:
        for step in steps:
            for batch in step:
                own.loss(batch).backward()
            own.optimizer.step()
            if interrupt == (step.number, "half done"):
                raise Interrupted
            run.state["steps"] = run.state.get("steps", 0) + 1

    def end_epoch(number: int) -> None:
        with torch.no_grad():
            own.model[3].bias.add_(1.0)
        run.state["ended"] = [*run.state.get("ended", []), number]
        if interrupt == (number, "epoch's end"):
            raise Interrupted

    if form == "run.epochs":
        for epoch in run.epochs(3):
            train(run.steps(DATA, **SIZES))
            end_epoch(int(epoch))
    else:
        for number in range(3):
            train(run.steps(DATA, **SIZES, epochs=1))
            end_epoch(number)
    return int(run.state["steps"])


@pytest.mark.parametrize("form", ["run.epochs", "range"])
@pytest.mark.parametrize(
    "interrupt",
    [(0, "half done"), (1, "half done"), (4, "half done"), (6, "half done"), (0, "epoch's end"), (1, "epoch's end")],
)
def test_an_interrupted_run_goes_on_from_its_last_whole_step(
    form: str, interrupt: tuple[int, str], tmp_path: Path
) -> None:
    whole = local(epochs_of, form, (-1, ""))
    assert whole.value == 12
    checkpoint = resilient.Checkpoint(str(tmp_path), every=1000)
    with pytest.raises(Interrupted):
        local(epochs_of, form, interrupt, checkpoint=checkpoint)
    again = local(epochs_of, form, (-1, ""), checkpoint=checkpoint)
    assert (again.digest, again.value) == (whole.digest, 12)
    done = local(epochs_of, form, (-1, ""), checkpoint=checkpoint)
    assert done.digest == whole.digest and done.metrics == []


def test_loops_of_one_run_have_as_many_micro_batches() -> None:
    def main(run: resilient.Run) -> None:
        own = Own(run)
        for micro_batch in (2, 4):
            for step in run.steps(DATA, global_batch=8, micro_batch=micro_batch, steps=1):
                for batch in step:
                    own.loss(batch).backward()
                own.update()

    with refused("2 micro-batches per step, but the loop before this one had 4", error=ValueError):
        local(main)


def test_a_loop_within_a_loop() -> None:
    def main(run: resilient.Run) -> None:
        Own(run)
        for _ in run.batches(DATA, **SIZES, steps=2):
            run.batches(DATA, **SIZES, steps=2)

    with refused("run.batches was called before the loop before it had ended", error=ValueError):
        local(main)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(DATA)


@pytest.mark.parametrize("ending", ["end", "break", "break at the top", "stream"])
def test_the_last_state_is_on_storage_however_the_loop_ends(ending: str, tmp_path: Path) -> None:
    def main(run: resilient.Run) -> int:
        own = Own(run)
        source = Stream() if ending == "stream" else DATA
        for step in run.steps(source, **SIZES, steps=None if ending == "stream" else 4 if ending == "end" else 50):
            if ending == "break at the top" and step.number == 4:
                break
            for batch in step:
                own.loss(batch).backward()
            own.update()
            if ending == "break" and step.number == 3:
                break
        return run.step

    result = local(main, checkpoint=resilient.Checkpoint(str(tmp_path), every=1000))
    assert (result.value, result.step) == (4, 4)
    assert [each.key.step for each in store.checkpoints(open_files(str(tmp_path))) if each.complete] == [4]


@pytest.mark.parametrize("leaves", ["at the end", "behind the update", "at the top"])
def test_what_the_function_does_behind_the_loop_is_not_the_run_s_state(leaves: str) -> None:
    def main(run: resilient.Run, evaluate: bool) -> None:
        own = Own(run)
        for step in run.steps(DATA, **SIZES, steps=2 if leaves == "at the end" else 9):
            if leaves == "at the top" and step.number == 2:
                break
            for batch in step:
                own.loss(batch).backward()
            own.update()
            if leaves == "behind the update" and step.number == 1:
                break
        if evaluate:
            own.model.eval()
            run.state["accuracy"] = 1.0

    assert local(main, True).digest == local(main, False).digest


def test_a_bit_that_a_machine_changes_is_not_blamed_on_the_script() -> None:
    def flip(own: Own, step: Any, batch: Any) -> None:
        backward(own, step, batch)
        own.model[0].weight.detach().numpy().view("uint8").flat[3] ^= 1

    def write(own: Own, step: Any, batch: Any) -> None:
        backward(own, step, batch)
        own.model[0].weight.data.mul_(0.9)

    run_with(inner=flip)
    with refused("model.0.weight changed within step 0"):
        run_with(inner=write)


CALLS: dict[str, Callable[[Any], Any]] = {
    "optimizer.step()": lambda own: own.optimizer.step(),
    "LRScheduler.step": lambda own: own.scheduler.step(),
    "AveragedModel.update_parameters": lambda own: own.average.update_parameters(own.model),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("levels", [1, 2])
def test_updates_before_backward_would_never_act(name: str, levels: int) -> None:
    def main(run: resilient.Run) -> None:
        own: Any = Own.__new__(Own)
        own.model = nn.Linear(6, 1)
        own.optimizer = torch.optim.SGD(own.model.parameters(), lr=0.1)
        own.scheduler, own.average = torch.optim.lr_scheduler.StepLR(own.optimizer, 1), AveragedModel(own.model)
        run.protect(model=own.model, optimizer=own.optimizer, scheduler=own.scheduler, average=own.average)
        loop: Any = run.batches(DATA, **SIZES, steps=2) if levels == 1 else run.steps(DATA, **SIZES, steps=2)
        for each in loop:
            CALLS[name](own)
            for x, y in [each] if levels == 1 else each:
                nn.functional.mse_loss(own.model(x), y).backward()
            own.optimizer.step()

    with refused(name, "in step 0 it was called before"):
        local(main)


def test_clipping_by_value_in_a_flat_loop() -> None:
    def main(run: resilient.Run, flat: bool) -> None:
        own = Own(run)
        if flat:
            for batch in run.batches(DATA, **SIZES, steps=3):
                own.loss(batch).backward()
                nn.utils.clip_grad_value_(own.model.parameters(), 0.01)
                own.update()
        else:
            for step in run.steps(DATA, **SIZES, steps=3):
                for batch in step:
                    own.loss(batch).backward()
                nn.utils.clip_grad_value_(own.model.parameters(), 0.01)
                own.update()

    assert local(main, True).digest == local(main, False).digest


def test_an_update_may_be_left_out() -> None:
    def main(run: resilient.Run) -> None:
        own = Own(run)
        for step in run.steps(DATA, **SIZES, steps=3):
            for batch in step:
                own.loss(batch).backward()
            if step.number == 1:
                own.optimizer.zero_grad()
            before = own.model[0].weight.detach().clone()
            own.update()
            assert before.equal(own.model[0].weight) == (step.number == 1)
            run.state["loss"] = step.loss

    local(main)


@pytest.mark.parametrize("different", [False, True])
def test_what_is_computed_is_compared_where_machines_have_the_same_bits(different: bool) -> None:
    def main(run: resilient.Run) -> list[str]:
        own = Own(run)
        run.state["loss"] = 0.5
        for step in run.steps(DATA, **SIZES, steps=1):
            for batch in step:
                own.loss(batch).backward()
            assert run._loop is not None
            names, digest = run._loop.control_state(), run._loop.control()
            own.update()
        assert 0 <= digest < 2**62
        return [name for name in names if name.startswith(("run.state", "optimizer"))]

    names = local(main, allow_different_bits=different).value
    assert any(name.startswith("optimizer") and name.endswith(".lr") for name in names)
    assert ("run.state.loss" in names) != different
