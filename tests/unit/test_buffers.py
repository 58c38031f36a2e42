"""Buffers that forward changes: every micro-batch starts from the step's value, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import resilient
from resilient.buffers import Buffers
from resilient.core.tree import Node, split
from snapshot.table import DTYPES

LEAVES, STEPS = 6, 3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def data() -> TensorDataset:
    return TensorDataset(torch.randn(40, 3, generator=torch.Generator().manual_seed(0)))


def tree_mean(values: list[Tensor]) -> Tensor:
    """The obvious twin."""

    def add(node: Node) -> Tensor:
        if node.size == 1:
            return values[node.start]
        left, right = split(node)
        return add(left) + add(right)

    return add(Node(0, len(values))) / len(values)


def test_batch_norm_is_the_mean_along_the_tree() -> None:
    def main(run: resilient.Run) -> None:
        model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
        norm = model[1]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run.protect(model=model, optimizer=optimizer)
        twin = nn.BatchNorm1d(5)
        means: list[Tensor] = []
        for (x,) in run.batches(data(), global_batch=4 * LEAVES, micro_batch=4, steps=STEPS):
            before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
            twin.load_state_dict({**norm.state_dict(), **before})
            with torch.no_grad():
                twin(model[0](x))
            means.append(twin.running_mean.clone())
            model(x).square().sum().backward()
            if run.committing:
                assert norm.running_mean.equal(tree_mean(means))
                assert int(norm.num_batches_tracked) == run.step + 1
                means.clear()
            else:
                assert all(buffer.equal(before[name]) for name, buffer in norm.named_buffers())
            optimizer.step()

    resilient.train(name="test")(main).local()


def test_frozen_batch_norm_is_not_touched() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5).eval())
    model[1].running_mean.copy_(torch.tensor([0.1, -0.0, 0.3, float("nan"), 0.7]))
    before = [buffer.clone() for buffer in model.buffers()]

    def main(run: resilient.Run) -> list[int]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        run.protect(model=model, optimizer=optimizer)
        versions = [buffer._version for buffer in model.buffers()]
        for (x,) in run.batches(data(), global_batch=4 * LEAVES, micro_batch=4, steps=STEPS):
            model(x).nan_to_num().sum().backward()
            optimizer.step()
        assert [bits(buffer) for buffer in model.buffers()] == [bits(buffer) for buffer in before]
        return [buffer._version - old for buffer, old in zip(model.buffers(), versions, strict=True)]

    assert resilient.train(name="test")(main).local().value == [0, 0, 0]


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class Strange(nn.Module):
    """Buffers of all kinds. Some change in forward, some never."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        payloads = torch.tensor([0x7FC01234, -0x80000000, 0x3F800000], dtype=torch.int64).to(torch.int32)
        self.register_buffer("constant", payloads.view(torch.float32))
        self.register_buffer("reassigned", torch.zeros(2))
        self.register_buffer("flag", torch.tensor(False))
        self.register_buffer("counter", torch.tensor([0, 5]))
        self.register_buffer("brief", torch.zeros(3, dtype=torch.bfloat16), persistent=False)
        self.register_buffer("turn", torch.zeros(2, dtype=torch.complex64))
        self.register_buffer("rare", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("empty", torch.zeros(0, 2))
        self.register_buffer("none", None)

    def forward(self, x: Tensor, leaf: int) -> Tensor:
        self.reassigned = self.reassigned + leaf + 1
        self.flag.logical_not_()
        self.counter += leaf + 1
        self.brief.add_(leaf + 1)
        self.turn.add_(1j * (leaf + 1))
        if leaf in (2, 3):
            self.rare += leaf
        return (x * self.weight).sum()


def test_buffers_of_all_kinds() -> None:
    def main(run: resilient.Run) -> Strange:
        model = Strange()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        constant, reassigned = bits(model.constant), model.reassigned
        run.protect(model=model, optimizer=optimizer)
        batches = run.batches(data(), global_batch=4 * LEAVES, micro_batch=4, steps=STEPS)
        for number, (x,) in enumerate(batches):
            model(x, number % LEAVES).backward()
            optimizer.step()
            assert model.reassigned is reassigned
            assert bool(model.flag) == ((run.step + run.committing) % 2 == 1)
        assert bits(model.constant) == constant
        return model

    model = resilient.train(name="test")(main).local().value
    mean = sum(range(1, LEAVES + 1)) / LEAVES
    assert model.reassigned.tolist() == [STEPS * mean] * 2
    assert model.brief.tolist() == [STEPS * mean] * 3
    assert model.turn.tolist() == [STEPS * mean * 1j] * 2
    assert model.rare.tolist() == [STEPS * 2.5]  # of the two that changed it
    assert model.counter.tolist() == [STEPS, 5 + STEPS]
    assert model.none is None


def test_what_the_committing_iteration_sets_is_the_next_steps_value() -> None:
    def main(run: resilient.Run) -> list[float]:
        model = nn.Linear(3, 1)
        model.register_buffer("seen", torch.zeros(()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        run.protect(model=model, optimizer=optimizer)
        found: list[float] = []
        for (x,) in run.batches(data(), global_batch=4 * LEAVES, micro_batch=4, steps=STEPS):
            found.append(float(model.seen))
            model.seen += 1
            model(x).sum().backward()
            optimizer.step()
            if run.committing:
                model.seen.mul_(10)
        return [*found, float(model.seen)]

    found = resilient.train(name="test")(main).local().value
    assert found == [0.0] * LEAVES + [10.0] * LEAVES + [110.0] * LEAVES + [1110.0]


# Alone, without a loop


@pytest.mark.parametrize("value", [0.0, float("nan"), 1.5])
def test_only_other_bits_are_changes(value: float) -> None:
    model = nn.Module()
    model.register_buffer("buffer", torch.tensor([value, 1.0]))
    buffers = Buffers([("model", model)])
    model.buffer.copy_(torch.tensor([value, 1.0]))
    assert buffers.take_changes() == {}
    model.buffer.copy_(torch.tensor([-value, 1.0]))
    (name,) = changed = buffers.take_changes()
    assert name == "model.buffer"
    assert bits(changed[name]) == bits(torch.tensor([-value, 1.0]))
    assert bits(model.buffer) == bits(torch.tensor([value, 1.0]))
    assert buffers.take_changes() == {}


def test_complex_zeros_differ_by_sign() -> None:
    model = nn.Module()
    model.register_buffer("buffer", torch.zeros(1, dtype=torch.complex64))
    buffers = Buffers([("model", model)])
    model.buffer.copy_(torch.tensor([complex(-0.0, 0.0)]))
    assert list(buffers.take_changes()) == ["model.buffer"]


def test_a_shared_buffer_is_one() -> None:
    one, other = nn.Module(), nn.Module()
    shared: dict[str, Any] = {"buffer": torch.zeros(1)}
    one.register_buffer("buffer", shared["buffer"])
    other.register_buffer("buffer", shared["buffer"])
    buffers = Buffers([("one", one), ("other", other)])
    shared["buffer"].add_(1)
    assert list(buffers.take_changes()) == ["one.buffer"]
    assert float(other.buffer) == 0.0


CODES = [name for name in DTYPES if name.startswith(("float8", "float4"))]


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("writes", [False, True])
def test_types_without_arithmetic_are_kept_as_integers_are(dtype: str, writes: bool) -> None:
    class Coded(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 1)
            self.register_buffer("codes", torch.full((4,), 1, dtype=torch.uint8).view(DTYPES[dtype]))

        def forward(self, x: Tensor) -> Tensor:
            if writes:
                codes = self.codes.view(torch.uint8)
                codes[0] += 1 + (codes[1:] == codes[0]).sum()  # from the step's value, whatever others have written
            return super().forward(x)

    def main(run: resilient.Run) -> None:
        model = Coded()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run.protect(model=model, optimizer=optimizer)
        for (x,) in run.batches(data(), global_batch=12, micro_batch=2, steps=2):
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert model.codes.view(torch.uint8).tolist() == [6 if writes else 1, 1, 1, 1]

    resilient.train(workers=1)(main).local()
