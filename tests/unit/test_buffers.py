"""Buffers that forward changes: every micro-batch starts from the step's value, and nothing else is touched."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import resilient
from resilient.buffers import Buffers
from resilient.core.tree import Node, split
from resilient.errors import LoopError
from snapshot.table import DTYPES

LEAVES, STEPS = 6, 3
FLOAT4 = getattr(torch, "float4_e2m1fn_x2", torch.float8_e5m2)
"""Older versions of torch don't have it."""


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
        self.register_buffer("code", torch.zeros(2).to(torch.float8_e4m3fn))
        self.register_buffer("fixed_code", torch.full((2,), -0.0).to(torch.float8_e5m2))
        self.register_buffer("bits", torch.zeros(2, dtype=torch.uint8).view(FLOAT4))
        self.register_buffer("turn", torch.zeros(2, dtype=torch.complex64))
        self.register_buffer("rare", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("empty", torch.zeros(0, 2))
        self.register_buffer("none", None)

    def forward(self, x: Tensor, leaf: int) -> Tensor:
        self.reassigned = self.reassigned + leaf + 1
        self.flag.logical_not_()
        self.counter += leaf + 1
        self.brief.add_(leaf + 1)
        self.code.copy_(self.code.float() + leaf + 1)
        self.bits.view(torch.uint8).add_(leaf + 1)
        self.turn.add_(1j * (leaf + 1))
        if leaf in (2, 3):
            self.rare += leaf
        return (x * self.weight).sum()


def test_buffers_of_all_kinds() -> None:
    def main(run: resilient.Run) -> Strange:
        model = Strange()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        constant, reassigned, fixed = bits(model.constant), model.reassigned, bits(model.fixed_code)
        run.protect(model=model, optimizer=optimizer)
        batches = run.batches(data(), global_batch=4 * LEAVES, micro_batch=4, steps=STEPS)
        for number, (x,) in enumerate(batches):
            model(x, number % LEAVES).backward()
            optimizer.step()
            assert model.reassigned is reassigned
            assert bool(model.flag) == ((run.step + run.committing) % 2 == 1)
        assert bits(model.constant) == constant and bits(model.fixed_code) == fixed
        return model

    model = resilient.train(name="test")(main).local().value
    mean = sum(range(1, LEAVES + 1)) / LEAVES
    assert model.reassigned.tolist() == [STEPS * mean] * 2
    assert model.brief.tolist() == [STEPS * mean] * 3
    assert model.turn.tolist() == [STEPS * mean * 1j] * 2
    assert model.rare.tolist() == [STEPS * 2.5]  # of the two that changed it
    assert model.counter.tolist() == [STEPS, 5 + STEPS]
    assert model.code.float().tolist() == [STEPS] * 2
    assert model.bits.view(torch.uint8).tolist() == [STEPS] * 2
    assert model.none is None


class Watching(nn.Module):
    """Does something to its buffers in each forward, and has a weight."""

    def __init__(self, watch: Callable[[Any, Tensor], object], **buffers: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.inner = nn.Module()
        self.watch = watch
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        self.watch(self, x)
        return x * self.weight


def trained(
    model: Callable[[], nn.Module],
    values: Tensor,
    behind: Callable[[Any, int], object] = lambda model, step: None,
    steps: int = STEPS,
) -> Any:
    """Samples are micro-batches, in their order."""

    def main(run: resilient.Run) -> nn.Module:
        own = model()
        optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
        run.protect(model=own, optimizer=optimizer)
        for step in run.steps(
            TensorDataset(values), global_batch=LEAVES, micro_batch=1, steps=steps, epochs=None, shuffle=False
        ):
            for (x,) in step:
                own(x).square().sum().backward()
            optimizer.step()
            behind(own, step.number)
        return own

    return resilient.train(name="test")(main).local().value


def values(seed: int = 1) -> Tensor:
    return torch.randn(LEAVES * STEPS, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mean_in_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """In fp16 the sum would overflow."""
    seen = (50_000 + 300 * values()).to(dtype)

    def look(model: Any, x: Tensor) -> None:
        model.seen = x[0].to(dtype)

    model = trained(lambda: Watching(look, seen=torch.zeros(3, dtype=dtype)), seen.float(), steps=1)
    assert bits(model.seen) == bits(tree_mean(list(seen[:LEAVES].float())).to(dtype))


def fill(model: Any, x: Tensor) -> None:
    model.mean = x.mean(0) if model.mean is None else 0.9 * model.mean + 0.1 * x.mean(0)


def fill_later(model: Any, x: Tensor) -> None:
    model.count += 1
    if model.training and model.mean is None and bool(x.sum() > 0):
        model.mean = x.mean(0)


APPEARING = [
    (fill, {"mean": None}, "buffer model.mean was None before a micro-batch, and a tensor after it"),
    (
        lambda model, x: setattr(model, "mean", None),
        {"mean": torch.zeros(3)},
        "buffer model.mean was a tensor before a micro-batch, and gone after it",
    ),
    (
        lambda model, x: delattr(model, "mean"),
        {"mean": torch.zeros(3)},
        "buffer model.mean was a tensor before a micro-batch, and gone after it",
    ),
    (
        lambda model, x: model.inner.register_buffer("late", x[0]),
        {},
        "buffer model.inner.late was not there before a micro-batch, and registered after it",
    ),
    (
        lambda model, x: model.inner.add_module("norm", nn.BatchNorm1d(3, affine=False)),
        {},
        "buffer model.inner.norm.running_mean was not there before a micro-batch",
    ),
    (
        lambda model, x: setattr(model, "other", x[0].detach()),
        dict.fromkeys(("mean", "other"), torch.zeros(3)),
        "buffer model.mean was the same in several modules before a micro-batch, and another in one of them",
    ),
]


@pytest.mark.parametrize(("watch", "buffers", "message"), APPEARING)
def test_buffers_that_come_or_go_in_forward_are_refused(watch: Any, buffers: Any, message: str) -> None:
    with pytest.raises(LoopError, match=re.escape(message)) as raised:
        trained(lambda: Watching(watch, **buffers), values())
    assert 'self.register_buffer("is_set", torch.tensor(False))' in str(raised.value)


def test_one_that_comes_in_a_later_micro_batch_is_refused_too() -> None:
    later = values()
    later[:4] = -1.0
    with pytest.raises(LoopError, match=r"buffer model\.mean was None before a micro-batch, and a tensor"):
        trained(lambda: Watching(fill_later, mean=None, count=torch.zeros(())), later)


def test_in_a_pipeline_they_are_refused_too() -> None:
    def main(run: resilient.Run) -> None:
        layers = [lambda: Watching(fill, mean=None), nn.Identity]
        pipe = run.pipeline(layers, lambda out, target: (out - target).square().sum(), stages=2)
        optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1)
        run.protect(model=pipe, optimizer=optimizer)
        for step in run.steps(TensorDataset(values(), values()), global_batch=4, micro_batch=2, steps=2):
            pipe.train_step(step)

    with pytest.raises(LoopError, match=r"buffer model.layers.0.mean was None before a micro-batch"):
        resilient.train(name="test", workers=1)(main).local()


def grow(model: Any, x: Tensor) -> None:
    for buffer in model.buffers():
        buffer.add_(x.mean())


def test_what_is_set_behind_the_commit_is_followed() -> None:
    def behind(model: Any, step: int) -> None:
        if step == 0:
            model.mean = torch.zeros((), dtype=torch.bfloat16)
            model.wide = torch.zeros(5)
            model.brief = None

    one = torch.ones(LEAVES * STEPS, 3)
    model = trained(lambda: Watching(grow, mean=None, wide=torch.zeros(2), brief=torch.zeros(2)), one, behind)
    assert model.brief is None
    assert (model.mean.item(), model.mean.dtype) == (2.0, torch.bfloat16)
    assert model.wide.tolist() == [2.0] * 5


@pytest.mark.parametrize(
    ("behind", "message"),
    [
        (
            lambda model, step: model.inner.register_buffer("late", torch.zeros(2)),
            "buffer model.inner.late was registered during training: a process that takes a lost one's place",
        ),
        (lambda model, step: delattr(model, "mean"), "buffer model.mean was deleted during training"),
        (
            lambda model, step: setattr(model, "mean", torch.zeros(2).double()),
            "buffer model.mean changed from torch.float32 to torch.float64",
        ),
    ],
)
def test_what_another_process_could_not_restore_is_refused(behind: Any, message: str) -> None:
    with pytest.raises(LoopError, match=re.escape(message)):
        trained(lambda: Watching(grow, mean=torch.zeros(2)), values(), behind)


def test_another_shape_in_forward_is_refused_by_name() -> None:
    def lengthen(model: Any, x: Tensor) -> None:
        model.seen = torch.cat([model.seen, x[0]])

    with pytest.raises(ValueError, match=r"buffer model.seen changed from torch.float32 \(3,\) to torch"):
        trained(lambda: Watching(lengthen, seen=torch.zeros(3)), values())


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


def test_a_shared_buffer_is_lent_to_all_that_share_it() -> None:
    layer = nn.Sequential(nn.Module(), nn.Module())
    shared = torch.zeros(1)
    for module in layer:
        module.register_buffer("buffer", shared)
    buffers = Buffers([("layer", layer)])
    buffers.lend("layer.")
    layer[1].buffer.add_(1)
    changed = buffers.take_lent("layer.")
    assert changed == {"layer.0.buffer": torch.ones(1)} and float(shared) == 0.0
    assert layer[0].buffer is shared and layer[1].buffer is shared


@pytest.mark.parametrize("view", [torch.Tensor.conj, lambda tensor: tensor.conj().imag, lambda tensor: tensor[::2]])
def test_views_of_all_kinds_are_compared(view: Callable[[Tensor], Tensor]) -> None:
    model = nn.Module()
    held = torch.randn(4, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    model.register_buffer("buffer", view(held))
    buffers = Buffers([("model", model)])
    assert buffers.take_changes() == {}
    held.view(torch.float32)[1] += 1
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
