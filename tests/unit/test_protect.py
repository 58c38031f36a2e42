"""Loops and objects that could not be made exact are refused, saying what to do instead."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import TensorDataset

import resilient


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def local(function: Callable[..., Any], **settings: Any) -> resilient.Result:
    return resilient.train(name="test", **settings)(function).local()


def parts() -> SimpleNamespace:
    model = nn.Linear(2, 1)
    return SimpleNamespace(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def protected(run: resilient.Run) -> SimpleNamespace:
    own = parts()
    run.protect(model=own.model, optimizer=own.optimizer)
    return own


def batches(run: resilient.Run, **changes: Any) -> Iterator[Any]:
    sizes: dict[str, Any] = {"global_batch": 4, "micro_batch": 2, "steps": 3}
    return run.batches(TensorDataset(torch.ones(10, 2)), **{**sizes, **changes})


def refused(error: type[Exception], *words: str) -> Any:
    """The message has these words, in this order."""
    return pytest.raises(error, match=".*".join(map(re.escape, words)))


def refuses(objects: Callable[[SimpleNamespace], dict[str, Any]], error: type[Exception], *words: str) -> None:
    def main(run: resilient.Run) -> None:
        run.protect(**objects(parts()))

    with refused(error, *words):
        local(main)


# What is given to protect


class FullyShardedDataParallel(nn.Module):
    """Stands for torch's, which needs a process group."""


def pruned(own: SimpleNamespace) -> dict[str, Any]:
    own.model.weight = nn.Parameter(torch.ones(1, 2))
    return vars(own)


def with_scheduler(own: SimpleNamespace) -> dict[str, Any]:
    own.scheduler = lr_scheduler.StepLR(own.optimizer, 1)
    return {"model": own.model, "adam": own.optimizer}


def with_frozen(own: SimpleNamespace) -> dict[str, Any]:
    own.model.requires_grad_(False)
    return vars(own)


REFUSED: dict[str, tuple[Callable[[SimpleNamespace], dict[str, Any]], type[Exception], tuple[str, ...]]] = {
    "nothing": (lambda own: {}, ValueError, ("no model", "protect(model=...")),
    "no model": (lambda own: {"optimizer": own.optimizer}, ValueError, ("no model", "protect(model=...")),
    "no optimizer": (lambda own: {"model": own.model}, ValueError, ("no optimizer", "optimizer=...")),
    "foreign parameters": (
        lambda own: {"model": nn.Linear(2, 1), "adam": own.optimizer},
        ValueError,
        ("adam updates a parameter that the model does not have", "group 0, place 0", "(1, 2)", "protect too"),
    ),
    "a replaced parameter": (pruned, ValueError, ("optimizer updates a parameter", "after the model has its final")),
    "all frozen": (with_frozen, ValueError, ("no parameter", "requires_grad=True")),
    "an unprotected scheduler": (with_scheduler, ValueError, ("attached to adam but not protected", "scheduler=")),
    "LBFGS": (
        lambda own: {"model": own.model, "lbfgs": torch.optim.LBFGS(own.model.parameters())},
        ValueError,
        ("lbfgs is LBFGS", "steps once per gradient"),
    ),
    "DataParallel": (
        lambda own: {**vars(own), "model": nn.DataParallel(own.model)},
        ValueError,
        ("model is wrapped in DataParallel", "plain module"),
    ),
    "FSDP": (
        lambda own: {**vars(own), "net": FullyShardedDataParallel()},
        ValueError,
        ("net is wrapped in FullyShardedDataParallel", "plain module"),
    ),
    "FSDP inside": (
        lambda own: {**vars(own), "net": nn.Sequential(FullyShardedDataParallel())},
        ValueError,
        ("net is wrapped in FullyShardedDataParallel", "plain module"),
    ),
    "no state": (
        lambda own: {**vars(own), "counter": [1, 2]},
        TypeError,
        ("counter is a list without state_dict", "run.state"),
    ),
    "another device": (
        lambda own: {**vars(own), "model": nn.Sequential(own.model, nn.Linear(1, 1, device="meta"))},
        ValueError,
        ("parameter model.1.weight is on meta", "model.to(run.device)"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_protect(case: str) -> None:
    objects, error, words = REFUSED[case]
    refuses(objects, error, *words)


def test_distributed_data_parallel() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        own = parts()
        model = nn.parallel.DistributedDataParallel(own.model)
        with refused(ValueError, "model is wrapped in DistributedDataParallel", "plain module"):
            resilient.run.Protected.of({"model": model, "optimizer": own.optimizer}, torch.device("cpu"))
    finally:
        torch.distributed.destroy_process_group()


def test_protect_twice() -> None:
    def main(run: resilient.Run) -> None:
        protected(run)
        protected(run)

    with refused(ValueError, "protect was called twice", "one call"):
        local(main)


def test_protect_after_the_loop_began() -> None:
    def main(run: resilient.Run) -> None:
        own = protected(run)
        batches(run)
        run.protect(model=own.model)

    with refused(ValueError, "protect was called after run.batches", "before the loop"):
        local(main)


def test_never_protected() -> None:
    with refused(resilient.LoopError, "without calling run.protect"):
        local(lambda run: None)


def test_without_a_loop() -> None:
    with refused(resilient.LoopError, "without calling run.steps or run.batches"):
        local(lambda run: protected(run) and None)


def test_a_loop_that_is_never_entered() -> None:
    def main(run: resilient.Run) -> None:
        protected(run)
        batches(run)

    with refused(resilient.LoopError, "without iterating"):
        local(main)


# What is given to batches


def test_batches_before_protect() -> None:
    with refused(ValueError, "run.batches was called before run.protect", "first"):
        local(lambda run: batches(run) and None)


def test_batches_twice() -> None:
    def main(run: resilient.Run) -> None:
        protected(run)
        batches(run)
        batches(run)

    with refused(ValueError, "run.batches was called before the loop before it had ended", "follow one another"):
        local(main)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"global_batch": 5}, ValueError, ("global_batch must be a multiple of micro_batch", "5", "2")),
        ({"global_batch": 12}, ValueError, ("10 samples", "global_batch=12", "at least 12")),
        ({"micro_batch": 0}, ValueError, ("micro_batch", "at least 1", "0")),
        ({"micro_batch": 2.0}, TypeError, ("micro_batch", "integer", "2.0")),
        ({"steps": None}, ValueError, ("steps or epochs",)),
        ({"epochs": 2}, ValueError, ("steps=3", "epochs=2", "only one")),
        ({"batch_size": 4}, ValueError, ("batch_size=4", "use global_batch")),
    ],
)
def test_refused_by_batches(changes: dict[str, Any], error: type[Exception], words: tuple[str, ...]) -> None:
    def main(run: resilient.Run) -> None:
        protected(run)
        batches(run, **changes)

    with refused(error, *words):
        local(main)


def test_more_workers_than_micro_batches() -> None:
    def main(run: resilient.Run) -> None:
        own = protected(run)
        for (x,) in batches(run):
            own.model(x).sum().backward()
            own.optimizer.step()

    with refused(ValueError, "workers allows 3 ranks", "2 micro-batches", "at most 2"):
        local(main, workers=(1, 3))
    assert local(main, workers=2).step == 3


# What is done in the loop


def loop(body: Callable[[resilient.Run, SimpleNamespace, Any], object]) -> Callable[[resilient.Run], None]:
    def main(run: resilient.Run) -> None:
        own = protected(run)
        for (x,) in batches(run):
            if body(run, own, own.model(x).sum()) == "break":
                break

    return main


def trained(own: SimpleNamespace, loss: Any) -> None:
    loss.backward()
    own.optimizer.step()


def test_no_backward() -> None:
    with refused(resilient.LoopError, "iteration of step 0 ended without backward", "none can be skipped"):
        local(loop(lambda run, own, loss: None))


def test_backward_twice() -> None:
    def body(run: resilient.Run, own: SimpleNamespace, loss: Any) -> None:
        loss.backward(retain_graph=True)
        loss.backward()

    with refused(resilient.LoopError, "backward was called twice", "add the losses up"):
        local(loop(body))


def test_no_step() -> None:
    with refused(resilient.LoopError, "iteration of step 0 ended without optimizer.step()", "every iteration"):
        local(loop(lambda run, own, loss: loss.backward()))


def test_a_break_before_the_step() -> None:
    def body(run: resilient.Run, own: SimpleNamespace, loss: Any) -> str:
        loss.backward()
        return "break" if run.committing else ""

    with refused(resilient.LoopError, "in the middle of step 0", "after optimizer.step()"):
        local(loop(body))


@pytest.mark.parametrize("after_backward", [False, True])
def test_a_break_in_the_middle(after_backward: bool) -> None:
    def body(run: resilient.Run, own: SimpleNamespace, loss: Any) -> str:
        if run.step == 1 and not after_backward:
            return "break"
        trained(own, loss)
        return "break" if run.step == 1 else ""

    with refused(resilient.LoopError, "left in the middle of step 1", "run.committing"):
        local(loop(body))


def test_a_closure() -> None:
    def body(run: resilient.Run, own: SimpleNamespace, loss: Any) -> None:
        loss.backward()
        own.optimizer.step(lambda: 0.0)

    with refused(resilient.LoopError, "optimizer.step was given a closure", "without arguments"):
        local(loop(body))


def test_sparse_gradients() -> None:
    def main(run: resilient.Run) -> None:
        model = nn.Embedding(3, 2, sparse=True)
        optimizer = torch.optim.SparseAdam(model.parameters())
        run.protect(model=model, optimizer=optimizer)
        for _ in batches(run):
            model(torch.tensor([1])).sum().backward()

    with refused(resilient.LoopError, "parameter model.weight has a sparse gradient", "sparse=False"):
        local(main)


@pytest.mark.parametrize("when", ["before the loop", "in the loop"])
def test_a_scheduler_created_too_late(when: str) -> None:
    def main(run: resilient.Run) -> None:
        own = protected(run)
        scheduler = lr_scheduler.StepLR(own.optimizer, 1) if when == "before the loop" else None
        for (x,) in batches(run):
            trained(own, own.model(x).sum())
            if scheduler is None:
                scheduler = lr_scheduler.StepLR(own.optimizer, 1)

    error: type[Exception] = ValueError if when == "before the loop" else resilient.LoopError
    with refused(error, "protect(..., scheduler=scheduler)"):
        local(main)


def test_a_buffer_that_grows() -> None:
    def main(run: resilient.Run) -> None:
        own = parts()
        own.model.register_buffer("history", torch.zeros(1))
        run.protect(**vars(own))
        for (x,) in batches(run):
            own.model.history = torch.zeros(2)
            own.model(x).sum().backward()

    with refused(ValueError, "buffer", "(1,)", "(2,)", "keep type and shape"):
        local(main)


def test_log_outside_the_loop() -> None:
    def before(run: resilient.Run) -> None:
        run.log(accuracy=1.0)

    def after(run: resilient.Run) -> None:
        loop(lambda run, own, loss: trained(own, loss))(run)
        run.log(accuracy=1.0)

    for main in (before, after):
        with refused(resilient.LoopError, "run.log was called outside", "return values"):
            local(main)


def test_log_of_the_step() -> None:
    with refused(ValueError, "run.log(step=7)", "another name"):
        local(loop(lambda run, own, loss: run.log(step=7)))


def test_reduced_of_anything_else() -> None:
    with refused(ValueError, "run.reduced('other')", '"loss"'):
        local(loop(lambda run, own, loss: run.reduced("other")))
