"""Which optimizers may be cut into chunks, and what the others are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resilient.elementwise import check_elementwise
from tests.lion import Lion

Build = Callable[[list[nn.Parameter]], Optimizer]


class HandWritten(Optimizer):
    """Each subclass says how one parameter is updated."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.update(parameter, parameter.grad, self.state[parameter], group)

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError


class ByNorm(HandWritten):
    """As LAMB does."""

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        parameter.sub_(gradient * (parameter.norm() / gradient.norm()), alpha=group["lr"])


class Orthogonal(HandWritten):
    """As Muon does."""

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        parameter.sub_(torch.linalg.qr(gradient.view(parameter.shape[0], -1).T)[0].T.view_as(parameter))


class Blending(HandWritten):
    """Of neighbours: of the last element of a block, with the first."""

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        flat = gradient.reshape(-1)
        parameter.view(-1).sub_(flat + torch.cat([flat[:1], flat[:-1]]) * (torch.arange(flat.numel()) % 1024 != 0))


class Counting(HandWritten):
    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["steps"] = state.get("steps", 0) + 1
        parameter.sub_(gradient, alpha=group["lr"])


class Adapting(HandWritten):
    """Its learning rate depends on all that it sees."""

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        parameter.sub_(gradient.sign(), alpha=0.5)
        group["seen"] = group.get("seen", 0) + gradient.numel()


class Drawing(HandWritten):
    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        parameter.sub_(gradient + torch.randn_like(gradient))


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(4, 3, dtype=dtype)), nn.Parameter(torch.ones(3, dtype=dtype))]


FIT: dict[str, Build] = {
    "SGD": lambda given: torch.optim.SGD(given, 0.1),
    "momentum": lambda given: torch.optim.SGD(given, 0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda given: torch.optim.SGD(given, 0.1, momentum=0.9, nesterov=True),
    "Adam": lambda given: torch.optim.Adam(given, 1e-2),
    "AdamW": lambda given: torch.optim.AdamW(given, 1e-2, amsgrad=True),
    "foreach": lambda given: torch.optim.AdamW(given, 1e-2, foreach=True),
    "Adagrad": lambda given: torch.optim.Adagrad(given, 1e-2, initial_accumulator_value=0.1),
    "RMSprop": lambda given: torch.optim.RMSprop(given, 1e-2, momentum=0.9, centered=True),
    "Lion": lambda given: Lion(given, 1e-3),
    "groups": lambda given: torch.optim.AdamW([{"params": given[:1]}, {"params": given[1:], "lr": 0.0}]),
}
UNFIT: dict[str, tuple[Build, str]] = {
    "by norm": (ByNorm, "ByNorm.*other bits when it has only some chunks"),
    "orthogonal": (Orthogonal, "Orthogonal.*can't be tried on chunks .RuntimeError"),
    "neighbours": (Blending, "Blending.*gradient of one element change others"),
    "no tensor": (Counting, "Counting.*keeps steps=4 of a parameter, which is no tensor"),
    "group": (Adapting, "Adapting.*other bits"),
    "chance": (Drawing, "Drawing.*other bits"),
    "Adafactor": (torch.optim.Adafactor, r"Adafactor.*keeps row_var of shape \(2, 1\)"),
    "Muon": (lambda given: torch.optim.Muon(given[:1]), "Muon.*can't be tried on chunks"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FIT)
def test_element_by_element(name: str, dtype: torch.dtype) -> None:
    given = parameters(dtype)
    optimizer = FIT[name](given)
    before = [each.clone() for each in given], optimizer.state_dict(), torch.get_rng_state()
    check_elementwise("optimizer", optimizer)
    assert all(torch.equal(one, two) for one, two in zip(given, before[0], strict=True)), "its own are not touched"
    assert repr(optimizer.state_dict()) == repr(before[1]) and torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("name", UNFIT)
def test_refused_with_what_it_does_and_the_remedy(name: str) -> None:
    build, said = UNFIT[name]
    with pytest.raises(ValueError, match=f"shard_optimizer=True.*second, {said}.*leave shard_optimizer out"):
        check_elementwise("second", build(parameters()))


def test_the_step_of_an_instance_may_be_replaced() -> None:
    """By a scheduler, or by the loop's own gates."""
    optimizer = torch.optim.AdamW(parameters(), 1e-2)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step = lambda *_: pytest.fail("that of a fresh one is asked")  # type: ignore[method-assign,misc]
    check_elementwise("optimizer", optimizer)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["AdamW", "momentum"])
def test_with_several_threads_long_tensors_are_tried_too(name: str) -> None:
    torch.set_num_threads(2)
    check_elementwise("optimizer", FIT[name](parameters()))
