"""Tensors whose bytes are elsewhere: what they still are, who is stopped, and how they are captured and loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snapshot.absent import (
    AbsentParameter,
    AbsentTensorUsed,
    absent,
    absent_like,
    bring,
    hold_parts,
    is_absent,
    parts_of,
    release,
)
from snapshot.capture import capture
from snapshot.load import load
from snapshot.recapture import Recapture
from snapshot.table import StateTable, still
from tests.checkpoints import Parts, build, leaves
from tests.stages import bytes_in, spread, trained

# What it is


def test_released_it_is_the_same_object_without_memory() -> None:
    model = nn.Linear(4, 3)
    weight, seen = model.weight, []
    weight.register_post_accumulate_grad_hook(lambda _: seen.append(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    release(weight)
    assert is_absent(weight) and weight.untyped_storage().nbytes() == 0
    assert (weight.shape, weight.stride(), weight.dtype, weight.device.type) == ((3, 4), (4, 1), torch.float32, "cpu")
    assert isinstance(weight, nn.Parameter) and weight.requires_grad and weight.is_leaf and weight.grad is None
    assert model.weight is weight and optimizer.param_groups[0]["params"][0] is weight
    assert [name for name, _ in model.named_parameters()] == ["weight", "bias"]
    assert "(3, 4)" in repr(weight) and repr(model) == repr(nn.Linear(4, 3))
    bring(weight)
    assert not is_absent(weight) and type(weight) is nn.Parameter and model.weight is weight
    with torch.no_grad():
        weight.fill_(2.0)
    model(torch.ones(1, 4)).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.ones(3, 4)) and seen == [1]


def test_a_step_passes_over_what_is_absent() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model[1].parameters():
        release(parameter)
    for _ in range(2):
        model[0](torch.ones(1, 2)).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert len(optimizer.state) == 2 and all(map(is_absent, model[1].parameters()))


def test_what_has_no_elements_is_never_absent() -> None:
    empty = torch.empty(0, 3)
    release(empty)
    assert not is_absent(empty) and type(empty) is Tensor
    assert not is_absent(absent((3, 0), torch.float32))
    assert not is_absent(torch.ones(2, 2).to_sparse()) and not is_absent(torch.empty(2, device="meta"))


def test_releasing_and_bringing_twice_is_once() -> None:
    tensor = torch.arange(6.0).view(2, 3).t()
    bring(tensor)
    assert torch.equal(tensor, torch.arange(6.0).view(2, 3).t())
    release(tensor)
    release(tensor)
    assert is_absent(tensor) and tensor.stride() == (1, 3)
    bring(tensor)
    bring(tensor)
    assert tensor.untyped_storage().nbytes() == 24 and type(tensor) is Tensor


def test_who_saw_the_memory_before_keeps_it() -> None:
    tensor, numbers = torch.ones(1000), torch.arange(3.0)
    view, array, part = tensor.detach(), tensor.numpy(), numbers[1:]
    release(tensor, part)
    view.add_(1)
    assert float(array.sum()) == 2000.0 and numbers.tolist() == [0, 1, 2]
    assert is_absent(tensor) and part.storage_offset() == 1
    bring(part)
    part.fill_(5.0)
    assert part.tolist() == [5, 5] and numbers.tolist() == [0, 1, 2]


def test_those_that_share_memory_are_brought_one_by_one() -> None:
    one = torch.zeros(4)
    other = one.view(2, 2)
    release(one, other)
    bring(one)
    one.fill_(3.0)
    with pytest.raises(AbsentTensorUsed):
        other.sum()
    bring(other)
    assert other.tolist() == [[3, 3], [3, 3]]


def test_only_plain_tensors_can_be_absent() -> None:
    class Strange(Tensor):
        pass

    with pytest.raises(ValueError, match="Strange; only a plain Tensor or Parameter"):
        release(torch.ones(3).as_subclass(Strange))


def test_new_ones() -> None:
    one = absent((2, 3), torch.bfloat16)
    assert is_absent(one) and (one.shape, one.dtype) == ((2, 3), torch.bfloat16)
    turned = absent_like(torch.empty(4, 3, 2, 2).to(memory_format=torch.channels_last))
    assert is_absent(turned) and turned.stride() == (12, 1, 6, 3)
    assert absent_like(turned).stride() == turned.stride()


def test_parts() -> None:
    tensor = absent((10,), torch.float32)
    assert parts_of(tensor) == () == parts_of(torch.ones(3))
    hold_parts(tensor, [(2, torch.ones(3)), (5, torch.ones(5))])
    assert [first for first, _ in parts_of(tensor)] == [2, 5] and parts_of(tensor) is parts_of(tensor)
    for wrong in (
        [(2, torch.ones(3)), (4, torch.ones(1))],
        [(8, torch.ones(3))],
        [(0, torch.ones(0))],
        [(0, torch.ones(2, dtype=torch.float64))],
        [(0, torch.ones(2, 2))],
        [(0, torch.ones(6)[::2])],
    ):
        with pytest.raises(AssertionError):
            hold_parts(tensor, wrong)
    with pytest.raises(AssertionError, match="only an absent tensor"):
        hold_parts(torch.ones(3), [])
    bring(tensor)
    assert parts_of(tensor) == ()


# Who is stopped

USES: dict[str, Callable[[Any], object]] = {
    "add": lambda p: p + 1,
    "in place": lambda p: p.add_(1),
    "another takes it": lambda p: torch.ones(600, 500).copy_(p),
    "it takes another": lambda p: p.copy_(torch.ones(600, 500)),
    "through data": lambda p: p.data.zero_(),
    "data is set": lambda p: setattr(p, "data", torch.ones(1)),
    "detached": lambda p: p.detach().zero_(),
    "transposed": lambda p: p.T.sum(),
    "real": lambda p: p.real.sum(),
    "matmul": lambda p: p @ p.T,
    "linear": lambda p: nn.functional.linear(torch.ones(2, 500), p),
    "embedding": lambda p: nn.functional.embedding(torch.tensor([1]), p),
    "item": lambda p: p[0, 0].item(),
    "numpy": lambda p: p.numpy(),
    "address": lambda p: p.data_ptr(),
    "list": lambda p: p.tolist(),
    "clone": lambda p: p.clone(),
    "sum": lambda p: p.sum(),
    "equal": lambda p: torch.equal(p, p),
    "in a list": lambda p: torch.cat([torch.ones(1, 500), p]),
    "foreach": lambda p: torch._foreach_add_([torch.ones(1), p], 1.0),
    "to": lambda p: p.to(torch.float64),
    "deepcopy": copy.deepcopy,
    "shared": lambda p: p.share_memory_(),
    "truth": bool,
    "backward": lambda p: (p * 1).sum().backward(),
    "written out": lambda p: f"{p.mean()}",
}


@pytest.mark.parametrize("is_parameter", [False, True])
@pytest.mark.parametrize("use", USES)
def test_whoever_uses_it_is_stopped(use: str, is_parameter: bool) -> None:
    tensor = nn.Parameter(torch.ones(600, 500)) if is_parameter else torch.ones(600, 500)
    release(tensor)
    with pytest.raises(AbsentTensorUsed, match="absent here: its bytes are on other ranks"):
        USES[use](tensor)
    assert is_absent(tensor)


def test_the_message_says_what_of_which_tensor() -> None:
    model = nn.Linear(4, 3)
    release(model.weight)
    with pytest.raises(AbsentTensorUsed, match=r"linear of a tensor of shape \(3, 4\) that is absent"):
        model(torch.ones(1, 4))
    with pytest.raises(AbsentTensorUsed, match=r"data of a tensor of shape \(3, 4\)"):
        _ = model.weight.data
    with pytest.raises(AbsentTensorUsed, match="detach"):
        model.state_dict()


def test_a_step_with_a_gradient_is_stopped() -> None:
    model = nn.Linear(4, 3)
    for optimizer in (torch.optim.SGD(model.parameters()), torch.optim.AdamW(model.parameters(), fused=True)):
        model.weight.grad = torch.ones(3, 4)
        release(model.weight)
        with pytest.raises(AbsentTensorUsed):
            optimizer.step()


# Captured


class Odd(nn.Module):
    """Parameters that lie in memory in unusual ways, and share it."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Parameter(torch.rand(3, 5))
        self.turned = nn.Parameter(torch.rand(5, 3).t())
        self.gaps = nn.Parameter(torch.rand(4, 6)[:, ::2])
        self.wide = nn.Parameter(torch.rand(4, 1).expand(4, 3))
        self.channels = nn.Parameter(torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last))
        self.thin = nn.Parameter(torch.rand(7, 1)[::3])
        self.complex = nn.Parameter(torch.rand(3, 2, dtype=torch.complex64).t().conj())
        self.imaginary = nn.Parameter(torch.rand(6, dtype=torch.complex64).conj().imag)
        self.same = self.plain
        self.alias = nn.Parameter(self.plain.data)
        self.scalar = nn.Parameter(torch.tensor(3.0))


def test_the_skeleton_is_that_of_the_whole_however_tensors_lie_in_memory() -> None:
    expected = capture({"model": Odd()}).skeleton
    model = Odd()
    kinds = [(p.is_conj(), p.is_neg(), p.stride(), p.storage_offset()) for p in model.parameters()]
    release(*model.parameters())
    assert [(p.is_conj(), p.is_neg(), p.stride(), p.storage_offset()) for p in model.parameters()] == kinds
    table = capture({"model": model})
    assert table.skeleton == expected and table.held_ranges() == () and not table.is_whole
    assert all(isinstance(parameter, AbsentParameter) for parameter in model.parameters())
    recapture = Recapture()
    assert [recapture.capture({"model": model}).skeleton for _ in range(2)] == [expected] * 2 and recapture.full == 1


def test_ties_are_seen_and_no_others() -> None:
    model, optimizer = trained()["model"], trained()["optimizer"]
    whole = capture({"model": model, "optimizer": optimizer})
    release(*model.parameters(), *optimizer.param_groups[0]["params"])
    table = capture({"model": model, "optimizer": optimizer})
    assert table.skeleton == whole.skeleton and len(table.tensors) == len(whole.tensors)


def test_what_is_not_here_can_not_be_read() -> None:
    first, second = torch.rand(4), torch.rand(4)
    release(first)
    table = capture({"s": {"a": first, "b": second}})
    assert table.held_ranges() == ((16, 32),)
    assert table.held(16, 32) and table.held(20, 24) and not table.held(15, 32) and table.held(3, 3)
    assert bytes_in(table, ((16, 32),)) == second.numpy().tobytes()
    with pytest.raises(AssertionError, match=r"bytes 0\.\.16 of s\['a'\] are not held here"):
        list(table.pieces(0, 32))
    with pytest.raises(AssertionError, match="some are not held here"):
        table.digest()


def test_parts_are_read_where_they_are() -> None:
    data = torch.arange(10.0)
    tensor = absent_like(data)
    hold_parts(tensor, [(1, data[1:4].clone()), (4, data[4:6].clone()), (8, data[8:9].clone())])
    table = capture({"s": {"a": tensor}})
    assert table.held_ranges() == ((4, 24), (32, 36))
    assert bytes_in(table, ((6, 23), (32, 36))) == data.numpy().tobytes()[6:23] + data.numpy().tobytes()[32:36]
    for start, stop in ((0, 8), (22, 28), (32, 37), (24, 32)):
        with pytest.raises(AssertionError, match="not held here"):
            list(table.pieces(start, stop))
    parts_of(tensor)[0][1].fill_(7)
    assert bytes_in(table, ((4, 16),)) == torch.full((3,), 7.0).numpy().tobytes()
    copied = still(table)
    parts_of(tensor)[0][1].fill_(8)
    assert bytes_in(copied, ((4, 16),)) == torch.full((3,), 7.0).numpy().tobytes()


def test_a_table_with_memory_for_a_part() -> None:
    whole = capture({"s": {"a": torch.rand(4), "b": torch.rand(4, 2).t(), "c": torch.empty(0), "d": torch.ones(2)}})
    table = StateTable.empty(whole.skeleton, ((0, 16), (20, 28), (32, 36)))
    assert table.held_ranges() == ((0, 16), (20, 28), (32, 36)) and table.skeleton == whole.skeleton
    assert [is_absent(tensor) for tensor in table.tensors] == [False, True, False, True]
    for start, stop in table.held_ranges():
        for target, source in zip(table.pieces(start, stop), whole.pieces(start, stop), strict=True):
            target.copy_(source)
    assert bytes_in(table, table.held_ranges()) == bytes_in(whole, table.held_ranges())
    assert StateTable.empty(whole.skeleton, ((0, 56),)).is_whole and StateTable.empty(whole.skeleton).is_whole
    with pytest.raises(AssertionError, match="not whole elements"):
        StateTable.empty(whole.skeleton, ((0, 5),))


def changed_parts(values: Parts) -> None:
    hold_parts(values["partial"], [(0, torch.ones(2))])


def moved_part(values: Parts) -> None:
    ((_, part),) = parts_of(values["partial"])
    part.data = torch.full((3,), 5.0)


CHANGES: dict[str, Callable[[Parts], None]] = {
    "brought": lambda values: (bring(values["absent"]), values["absent"].fill_(1.0)),
    "released": lambda values: release(values["here"]),
    "other parts": changed_parts,
    "a part that moved": moved_part,
    "part of it": lambda values: hold_parts(values["absent"], [(1, torch.ones(1))]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_comes_and_goes_between_captures_is_noticed(change: str) -> None:
    parameter = nn.Parameter(torch.rand(3))
    optimizer = torch.optim.SGD([parameter])
    values = {"absent": absent((4,), torch.float32), "partial": absent((6,), torch.float32), "here": torch.rand(2)}
    hold_parts(values["partial"], [(1, torch.rand(3))])
    optimizer.state[parameter] = values
    recapture = Recapture()
    for _ in range(2):
        recapture.capture({"o": optimizer})
    assert recapture.full == 1
    CHANGES[change](values)
    found, expected = recapture.capture({"o": optimizer}), capture({"o": optimizer})
    assert found.skeleton == expected.skeleton and found.held_ranges() == expected.held_ranges()
    assert bytes_in(found, found.held_ranges()) == bytes_in(expected, expected.held_ranges())


# Loaded


def test_a_target_takes_what_it_needs() -> None:
    whole, parts = capture(trained()), build(3)
    before = dict(leaves(parts["run.state"]))
    needed = [name for name, _ in parts["model"].named_parameters() if "blocks.0" in name]
    for name, parameter in parts["model"].named_parameters():
        if name not in needed:
            release(parameter)
    load(parts, whole)
    assert dict(leaves(parts["run.state"])) != before
    expected = dict(trained()["model"].named_parameters())
    for name, parameter in parts["model"].named_parameters():
        assert is_absent(parameter) if name not in needed else torch.equal(parameter, expected[name])
    assert capture(parts).skeleton == whole.skeleton


def test_what_a_fresh_optimizer_gets_is_as_in_the_table() -> None:
    parts = trained()
    held = {name: tensor for name, tensor in spread(parts) if "blocks.1" in name}
    for name, tensor in spread(parts):
        if name not in held:
            release(tensor)
    fresh = build(5)
    for name, parameter in fresh["model"].named_parameters():
        if name not in held:
            release(parameter)
    table = capture(parts)
    load(fresh, table)
    for name, tensor in spread(fresh):
        assert is_absent(tensor) if name not in held else torch.equal(tensor, held[name])
    assert capture(fresh).skeleton == table.skeleton


@pytest.mark.parametrize("which", ["model.blocks.0.up.weight", "optimizer", "run.state"])
def test_what_is_needed_and_not_there_changes_nothing(which: str) -> None:
    whole, parts = capture(trained()), trained(4)
    at = next(number for number, spec in enumerate(whole.layout.tensors) if spec.name.startswith(which))
    start, stop = whole.layout.offsets[at : at + 2]
    table = StateTable.empty(whole.skeleton, ((0, start), (stop, whole.nbytes)) if start else ((stop, whole.nbytes),))
    before = capture(parts).digest()
    with pytest.raises(ValueError, match="the table lacks some of them: they are on other ranks"):
        load(parts, table)
    assert capture(parts).digest() == before


def test_objects_that_judge_for_themselves_need_all() -> None:
    class Judge:
        def __init__(self) -> None:
            self.tensor = torch.ones(3)

        def state_dict(self) -> Parts:
            return {"tensor": self.tensor}

        def load_state_dict(self, state: Parts) -> None:
            self.tensor = state["tensor"]

    table = StateTable.empty(capture({"judge": Judge()}).skeleton, ())
    with pytest.raises(ValueError, match=r"judge\['tensor'\]: expected all of its bytes"):
        load({"judge": Judge()}, table)


def test_parts_lie_alike_in_memory() -> None:
    table = capture({"s": {"a": torch.rand(4, 3)}})
    turned = torch.rand(3, 4).t()
    release(turned)
    hold_parts(turned, [(0, torch.zeros(2))])
    with pytest.raises(ValueError, match=r"expected its axes in memory as \(1, 0\), found \(0, 1\)"):
        load({"s": {"a": turned}}, table)


def test_numpy_arrays_are_never_absent() -> None:
    whole = capture({"s": {"a": torch.rand(4).numpy()}})
    with pytest.raises(ValueError, match="array of shape"):
        load({"s": {"a": None}}, StateTable.empty(whole.skeleton, ()))


# Where optimizers begin


@pytest.mark.parametrize("make", [torch.empty_like, torch.ones_like, torch.zeros_like])
def test_one_like_it_is_present(make: Callable[..., Tensor]) -> None:
    for like in (absent((2, 3), torch.bfloat16), nn.Linear(3, 2).weight):
        release(like)
        made = make(like, memory_format=torch.preserve_format)
        assert type(made) is Tensor and not is_absent(made)
        assert (made.shape, made.dtype) == (like.shape, like.dtype)


def test_an_optimizer_that_begins_with_state_can_be_built_of_absent_parameters() -> None:
    weight = nn.Linear(3, 2).weight
    release(weight)
    optimizer = torch.optim.Adagrad([weight], initial_accumulator_value=0.5)
    assert torch.equal(optimizer.state[weight]["sum"], torch.full((2, 3), 0.5))
