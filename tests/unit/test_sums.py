"""From micro-batches to `.grad`: low precision loses nothing on the way, and what the user keeps stays as it was."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import resilient
from resilient.buffers import Buffers
from resilient.core.tree import Node, split
from resilient.payload import abandon
from resilient.sums import StepSums

LEAVES, STEPS = 6, 4


class Values:
    """Sample i is the i-th of these."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Tensor:
        return self.values[index]


def random_values(width: int = 3, count: int = LEAVES * STEPS) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0))


class Still(Optimizer):
    """Of parameters that torch's optimizers can't update."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


def each_step(
    function: Callable[[nn.Module], Any],
    model: Callable[[], nn.Module],
    values: Tensor,
    optimizer: Callable[[Any], Optimizer] = lambda parameters: Still(parameters, {}),
    leaves: int = LEAVES,
) -> list[Any]:
    """Samples are micro-batches, in their order; the gradient of the sum of the model's output. What the function
    makes of the model before each update."""

    def main(run: resilient.Run) -> list[Any]:
        torch.manual_seed(0)
        own = model()
        updates = optimizer(own.parameters())
        run.protect(model=own, optimizer=updates)
        found, steps = [], len(values) // leaves
        for step in run.steps(Values(values), global_batch=leaves, micro_batch=1, steps=steps, shuffle=False):
            for x in step:
                own(x).sum().backward()
            found.append(function(own))
            updates.step()
            updates.zero_grad()
        return [*found, own]

    found: list[Any] = resilient.train(name="test")(main).local().value
    return found


def grad_of(model: nn.Module) -> Tensor:
    gradient = next(model.parameters()).grad
    assert gradient is not None
    return gradient


class Scale(nn.Module):
    """Its gradient is the sample itself, in the parameter's type."""

    def __init__(self, dtype: torch.dtype, width: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.to(x.dtype)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 40000.0), (torch.float8_e4m3fn, 416.0)])
def test_the_sum_may_be_larger_than_the_type_has_room_for(dtype: torch.dtype, value: float) -> None:
    values = torch.full((16, 3), value)
    gradient, _ = each_step(lambda model: grad_of(model).clone(), lambda: Scale(dtype), values, leaves=16)
    assert gradient.dtype == dtype and gradient.float().tolist() == [value] * 3


def tree_sum(values: list[Tensor]) -> Tensor:
    """The obvious twin, in fp32."""

    def add(node: Node) -> Tensor:
        left, right = split(node) if node.size > 1 else (node, node)
        return values[node.start].float() if node.size == 1 else add(left) + add(right)

    return add(Node(0, len(values)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_the_mean_is_rounded_once(dtype: torch.dtype) -> None:
    values = random_values(50)
    found = each_step(lambda model: grad_of(model).clone(), lambda: Scale(dtype, 50), values)
    for step, mean in enumerate(found[:-1]):
        gradients = [value.to(dtype) for value in values[step * LEAVES : (step + 1) * LEAVES].unsqueeze(1).unbind()]
        expected = (tree_sum(gradients)[0] / LEAVES).to(dtype)
        assert mean.dtype == dtype and mean.float().equal(expected.float())


def test_types_are_part_of_what_ranks_compare() -> None:
    """fp16 and bf16 are both added in fp32."""
    prints = {
        StepSums([("weight", nn.Parameter(torch.zeros(3, dtype=dtype)))], Buffers([]), LEAVES).fingerprint()
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
    }
    assert len(prints) == 3


class Lookahead(Optimizer):
    """Steps along 2 g - g', of which the former gradient g' is kept as it is."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    former = self.state[parameter].get("former", torch.zeros_like(parameter))
                    parameter.sub_(group["lr"] * (2 * parameter.grad - former))
                    self.state[parameter]["former"] = parameter.grad


def squared() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 1), Square())


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square()


def test_an_optimizer_may_keep_gradients() -> None:
    values = random_values()
    *_, trained = each_step(lambda _: None, squared, values, functools.partial(Lookahead, lr=0.01), leaves=1)
    torch.manual_seed(0)
    plain = squared()
    optimizer = Lookahead(plain.parameters(), 0.01)
    for x in values:
        optimizer.zero_grad()
        plain(x[None]).sum().backward()
        optimizer.step()
    assert all(one.equal(other) for one, other in zip(trained.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("part", [lambda gradient: gradient, lambda gradient: gradient[:1].detach()])
def test_gradients_in_a_list_stay_as_they_were(part: Callable[[Tensor], Tensor]) -> None:
    *kept, _ = each_step(lambda model: (part(grad_of(model)), part(grad_of(model)).clone()), squared, random_values())
    assert all(one.equal(other) for one, other in kept)
    assert len({one.data_ptr() for one, _ in kept}) == STEPS


def test_memory_of_gradients_that_nobody_keeps_is_used_again() -> None:
    *found, _ = each_step(lambda model: grad_of(model).data_ptr(), squared, random_values())
    assert len(found) == STEPS and len(set(found)) == 1


@pytest.mark.parametrize("clipped", [True, False])
def test_so_it_is_in_a_pipeline(clipped: bool) -> None:
    def main(run: resilient.Run) -> list[int]:
        layers = [functools.partial(nn.Linear, 3, 3) for _ in range(2)]
        pipe = run.pipeline(layers, lambda out, target: (out - target).square().sum(), stages=2)
        optimizer = torch.optim.SGD(pipe.parameters(), 0.1)
        run.protect(model=pipe, optimizer=optimizer)
        found = []
        for step in run.steps(Pairs(), global_batch=4, micro_batch=2, steps=STEPS):
            pipe.train_step(step)
            found.append(grad_of(pipe).data_ptr())
            if clipped:
                run.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
        return found

    assert len(set(resilient.train(workers=1, name="test")(main).local().value)) == 1


class Pairs:
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return random_values()[index], random_values()[index] ** 2


def test_what_a_broken_link_leaves_half_received_keeps_its_addresses_and_no_memory() -> None:
    buffer = torch.ones(1 << 20)
    address = buffer.data_ptr()
    abandon([buffer, torch.ones(3, dtype=torch.int64)])
    assert buffer.data_ptr() == address
    inner = buffer[1024:-1024]  # whole pages of it
    assert not inner.any(), "they are fresh"
    buffer.fill_(2.0)  # late, and harmless
