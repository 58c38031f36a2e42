"""In what two states differ, by the names that users know."""

import math
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from snapshot.capture import capture
from snapshot.state_differences import ABSENT, differences

Parts = dict[str, Any]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("mask", None)
        self.calls = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


def build() -> Parts:
    model = Network()
    optimizer = torch.optim.SGD(model.body[0].parameters(), lr=0.1, momentum=0.9)
    return {"model": model, "optimizer": optimizer, "run.state": {"count": 1, "best": math.nan, "ema": {"decay": 0.9}}}


def add_group(parts: Parts) -> None:
    parts["optimizer"].add_param_group({"params": list(parts["model"].body[1].parameters()), "lr": 1.0})


def replace_first_group(parts: Parts) -> None:
    parts["optimizer"].param_groups[0]["params"] = [parts["model"].body[1].bias]


def keep_momentum(parts: Parts) -> None:
    weight = parts["model"].body[0].weight
    parts["optimizer"].state[weight]["momentum_buffer"] = torch.zeros(3, 2)


def share(parts: Parts) -> None:
    parts["run.state"]["bias"] = parts["model"].body[0].bias.detach()


def put(path: str, value: object) -> Callable[[Parts], None]:
    *names, last = path.split("/")

    def change(parts: Parts) -> None:
        owner: Any = parts
        for name in names:
            owner = owner[name] if isinstance(owner, dict) else getattr(owner, name)
        owner.__setitem__(last, value) if isinstance(owner, dict) else setattr(owner, last, value)

    return change


CHANGES: dict[str, tuple[Callable[[Parts], object], list[str]]] = {
    "nothing": (lambda _: None, []),
    "bytes": (lambda parts: parts["model"].body[0].weight.data.zero_(), []),
    "dropout": (put("model/dropout/p", 0.1), ["model.dropout.p: 0.5, 0.1"]),
    "eval": (lambda parts: parts["model"].body[1].eval(), ["model.body.1.training: True, False"]),
    "frozen": (
        lambda parts: parts["model"].body[0].bias.requires_grad_(False),
        ["model.body.0.bias.requires_grad: True, False"],
    ),
    "new attribute": (put("model/tag", "x"), ["model.tag: absent, 'x'"]),
    "extra state": (put("model/calls", 2), ["model._extra_state.calls: 0, 2", "model.calls: 0, 2"]),
    "buffer": (put("model/mask", torch.ones(4)), ["model.mask: None, tensor float32 [4]"]),
    "shape": (
        lambda parts: setattr(parts["model"].body[1], "running_mean", torch.ones(5).half()),
        ["model.body.1.running_mean: tensor float32 [3], tensor float16 [5]"],
    ),
    "lr": (
        lambda parts: parts["optimizer"].param_groups[0].update(lr=0.2),
        ["optimizer.param_groups.0.lr: 0.1, 0.2"],
    ),
    "group": (add_group, ["optimizer.param_groups: 1, 2"]),
    "members": (
        replace_first_group,
        ["optimizer.param_groups.0.params: ['model.body.0.weight', 'model.body.0.bias'], ['model.body.1.bias']"],
    ),
    "state": (keep_momentum, ["optimizer.state.0.momentum_buffer: absent, tensor float32 [3, 2]"]),
    "count": (put("run.state/count", 2), ["run.state.count: 1, 2"]),
    "type": (put("run.state/count", True), ["run.state.count: 1, True"]),
    "nan": (
        put("run.state/best", struct.unpack("<d", struct.pack("<Q", 0x7FF8_0000_0000_0001))[0]),
        ["run.state.best: nan, nan"],
    ),
    "inner": (put("run.state/ema/decay", 0.99), ["run.state.ema.decay: 0.9, 0.99"]),
    "emptied": (put("run.state/ema", {}), ["run.state.ema.decay: 0.9, absent"]),
    "kind": (put("run.state", nn.Identity()), ["run.state: 'values', 'module'"]),
    "object": (put("more", {}), ["more: absent, 'values'"]),
    "shared": (share, ["run.state.bias: absent, tensor float32 [3], shared with model.body.0.bias"]),
    "numbers": (put("ahead", nn.Linear(1, 1)), ["ahead: absent, 'module'"]),
}


@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES)
def test_each_difference_has_a_name(change: Callable[[Parts], object], expected: list[str]) -> None:
    one, other = build(), build()
    change(other)
    found = compared(one, other)
    assert [f"{name}: {ours!r}, {theirs!r}" for name, ours, theirs in found] == expected
    back = [(name, theirs, ours) for name, ours, theirs in compared(other, one)]
    assert list(map(repr, back)) == list(map(repr, found))


def compared(one: Parts, other: Parts) -> list[tuple[str, Any, Any]]:
    ours, theirs = capture(one).layout, capture(other).layout
    found = differences(ours.objects, theirs.objects, ours.tensors, theirs.tensors)
    return [(each.name, each.one, each.other) for each in found]


def test_where_members_differ_no_state_is_compared() -> None:
    one, other = build(), build()
    replace_first_group(other)
    keep_momentum(one)
    assert [name for name, *_ in compared(one, other)] == ["optimizer.param_groups.0.params"]


def test_what_an_earlier_version_did_not_store_is_no_difference() -> None:
    one, other = capture({"model": Network()}).layout, capture({"model": Network().eval()}).layout
    node: Any = one.objects["model"]
    earlier = {"module": {key: node["module"][key] for key in ("parameters", "buffers", "extra")}}
    assert not list(differences({"model": earlier}, other.objects, one.tensors, other.tensors))
    assert not list(differences(other.objects, {"model": earlier}, other.tensors, one.tensors))


def test_what_is_absent_says_so() -> None:
    assert repr(ABSENT) == "absent"
