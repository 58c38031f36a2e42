"""Whatever happens to the objects between two captures, Recapture gives what capture gives."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from snapshot.capture import capture
from snapshot.core.ranges import merged
from snapshot.recapture import Recapture
from snapshot.skeleton import Skeleton
from snapshot.table import StateTable

Parts = dict[str, Any]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.second = nn.Linear(4, 4, bias=False)
        self.register_buffer("mask", torch.rand(4, 4))
        self.register_buffer("slice", torch.rand(4, 6)[:, ::2])
        self.register_buffer("none", None)
        self.register_buffer("nothing", torch.empty(0, 3))
        self.calls = 0

    def get_extra_state(self) -> dict[str, Any]:
        return {"calls": self.calls, "last": torch.full((3,), float(self.calls))}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.second(self.norm(self.first(x))) @ self.mask


def build() -> Parts:
    torch.manual_seed(3)
    model = Network()
    optimizer = torch.optim.AdamW([{"params": model.first.parameters()}, {"params": model.second.parameters()}], lr=0.1)
    state = {"step": 0, "rng": torch.get_rng_state(), "array": np.arange(3), "alias": model.mask}
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100),
        "state": state,
    }


def step(parts: Parts) -> None:
    parts["model"](torch.rand(8, 4)).square().mean().backward()
    parts["optimizer"].step()
    parts["optimizer"].zero_grad()
    parts["scheduler"].step()
    parts["state"]["step"] += 1


def add_group(parts: Parts) -> None:
    model = parts["model"]
    if not hasattr(model, "extra"):
        model.extra = nn.Linear(2, 2)
        parts["optimizer"].add_param_group({"params": list(model.extra.parameters()), "lr": 0.5})


def each_state(parts: Parts, change: Callable[[dict[str, Any]], object]) -> None:
    for state in parts["optimizer"].state.values():
        change(state)


def count_in_int(state: dict[str, Any]) -> None:
    if isinstance(state.get("count"), int):
        state["count"] += 1000
    else:
        state["count"] = 1


def replace_parameter(parts: Parts) -> None:
    parts["model"].second.weight = nn.Parameter(torch.rand(4, 4))
    parts["optimizer"].param_groups[1]["params"][0] = parts["model"].second.weight
    parts["optimizer"].state.clear()


def share_memory(parts: Parts) -> None:
    parts["model"].first.weight.data.share_memory_()
    parts["state"]["shared"] = parts["model"].first.weight.detach()


def load_optimizer(parts: Parts) -> None:
    parts["optimizer"].load_state_dict(copy.deepcopy(parts["optimizer"].state_dict()))


def swap_two(parts: Parts) -> None:
    norm = parts["model"].norm
    norm.running_mean, norm.running_var = norm.running_var, norm.running_mean


def set_data(change: Callable[[Tensor], Tensor], of: Callable[[Network], Tensor]) -> Callable[[Parts], None]:
    def act(parts: Parts) -> None:
        of(parts["model"]).data = change(of(parts["model"]).data)

    return act


def replace_attributes(parts: Parts) -> None:
    norm = parts["model"].norm
    norm.__dict__ = {**vars(norm), "eps": 1e-3}


def put(where: str, key: str, value: Callable[[Parts], object]) -> Callable[[Parts], None]:
    def act(parts: Parts) -> None:
        if where == "model":
            setattr(parts["model"], key, value(parts))
        elif where == "group":
            parts["optimizer"].param_groups[0][key] = value(parts)
        elif where == "parts":
            parts[key] = value(parts)
        else:
            parts["state"][key] = value(parts)

    return act


CHANGES: dict[str, Callable[[Parts], object]] = {
    "step": step,
    "lr": put("group", "lr", lambda parts: parts["optimizer"].param_groups[0]["lr"] * 0.9),
    "lr as a tensor": put("group", "lr", lambda _: torch.tensor(0.3)),
    "lr in place": lambda parts: torch.as_tensor(parts["optimizer"].param_groups[0]["lr"]).mul_(0.5),
    "list in a group": put("group", "list", lambda _: [1]),
    "list in place": lambda parts: parts["optimizer"].param_groups[0].get("list", []).append(torch.ones(1)),
    "betas": put("group", "betas", lambda _: (0.5, 0.6)),
    "group": add_group,
    "load": load_optimizer,
    "clear": lambda parts: parts["optimizer"].state.clear(),
    "count": lambda parts: each_state(parts, count_in_int),
    "history": lambda parts: each_state(parts, lambda state: state.setdefault("old", []).append(torch.rand(2))),
    "moment": lambda parts: each_state(parts, lambda state: state.update(moment=torch.rand(4, 4))),
    "shared": lambda parts: parts["optimizer"].state.update(shared={"x": torch.rand(2)}),
    "buffer": put("model", "mask", lambda _: torch.rand(4, 4)),
    "buffer turned": put("model", "mask", lambda _: torch.rand(4, 4).t()),
    "buffer of another type": put("model", "mask", lambda _: torch.rand(4, 4).double()),
    "buffer in place": lambda parts: parts["model"].mask.mul_(2),
    "buffer left out": lambda parts: parts["model"].register_buffer("mask", parts["model"].mask, persistent=False),
    "buffer let in": lambda parts: parts["model"].register_buffer("mask", parts["model"].mask),
    "buffer from state": put("model", "mask", lambda parts: parts["state"].get("alias", torch.ones(4, 4))),
    "buffer that is a parameter": put("model", "mask", lambda parts: parts["model"].second.weight.detach()),
    "alias": put("state", "alias", lambda parts: parts["model"].mask),
    "alias of a moment": put("state", "m", lambda parts: [*parts["optimizer"].state.values(), None][0]),
    "buffer with gaps": put("model", "slice", lambda _: torch.rand(4, 6)[:, ::2]),
    "gaps in place": lambda parts: parts["model"].slice.add_(1),
    "later": put("model", "none", lambda _: torch.rand(2)),
    "none again": put("model", "none", lambda _: None),
    "empty": put("model", "nothing", lambda _: torch.empty(0, 3)),
    "empty as": put("model", "nothing", lambda _: torch.empty(3, 0)),
    "swap": swap_two,
    "data": set_data(torch.clone, lambda model: model.first.weight),
    "data turned": set_data(Tensor.t, lambda model: model.first.weight),
    "data of another type": set_data(Tensor.double, lambda model: model.first.weight),
    "data seen as another type": set_data(lambda data: data.view(torch.int32), lambda model: model.mask),
    "a part of data": set_data(lambda data: data[:2], lambda model: model.norm.running_mean),
    "set": lambda parts: parts["model"].mask.set_(parts["model"].mask.clone()),
    "transpose in place": lambda parts: parts["model"].mask.t_(),
    "parameter": replace_parameter,
    "tie": lambda parts: setattr(parts["model"].second, "weight", parts["model"].first.weight),
    "share memory": share_memory,
    "module": put("model", "second", lambda _: nn.Linear(4, 4, bias=False)),
    "tensor": put("state", "tensor", lambda _: torch.rand(4, 4)),
    "array": put("state", "array", lambda _: np.arange(5.0)),
    "removed": lambda parts: parts["state"].pop("tensor", None),
    "another object": put("parts", "more", lambda _: {"x": 1}),
    "another module": put("parts", "more", lambda _: nn.Linear(1, 2)),
    "model again": put("parts", "again", lambda parts: parts["model"]),
    "one object less": lambda parts: parts.pop("more", None),
    "frozen": lambda parts: parts["model"].first.bias.requires_grad_(False),
    "wants a gradient": lambda parts: parts["model"].first.bias.requires_grad_(),
    "eval": lambda parts: parts["model"].norm.eval(),
    "train": lambda parts: parts["model"].train(),
    "attribute": put("model", "tag", lambda parts: getattr(parts["model"], "tag", -1) + 1),
    "equal attribute": put("model", "tag", lambda parts: float(getattr(parts["model"], "tag", 0))),
    "attribute removed": lambda parts: vars(parts["model"]).pop("tag", None),
    "attribute in a list": put("model", "calls_at", lambda parts: [parts["model"].calls]),
    "attribute out of it": put("model", "calls_at", lambda parts: parts["model"].calls),
    "attributes replaced": replace_attributes,
    "open state": lambda parts: each_state(parts, lambda state: state.setdefault("open", []).append(1)),
    "nothing": lambda _: None,
}  # fmt: skip


def assert_equal(found: StateTable, expected: StateTable) -> None:
    assert found.skeleton == expected.skeleton
    assert found.layout == expected.layout == Skeleton.from_bytes(found.skeleton)
    assert found.calm == expected.calm
    assert (found.nbytes, found.chunk_ends()) == (expected.nbytes, expected.chunk_ends())
    for spec, ours, theirs in zip(found.layout.tensors, found.tensors, expected.tensors, strict=True):
        assert ours.stride() == theirs.stride() and ours.dtype == theirs.dtype, spec
        copied = any(name in spec.name for name in ("slice", "last", "rng", "array"))
        assert copied or ours.data_ptr() == theirs.data_ptr(), spec
    assert found.digest() == expected.digest()


def front_and_rest(table: StateTable, start: int, stop: int) -> bytes:
    """The bytes as a rank copies them."""
    front, behind = table.front_share(merged([(start, stop)]))
    views = dict(front.calm) | dict(
        zip([which for which, _, _ in front.moving], front.moving_views(table), strict=True)
    )
    assert [views[which].numel() for which in range(len(views))] == list(front.sizes)
    assert sum(front.sizes) == front.nbytes
    pieces = [views[which] for which in range(len(views))]
    pieces += [piece for _, piece in (each for pair in behind for each in table.numbered_pieces(*pair))]
    return b"".join(piece.numpy().tobytes() for piece in pieces)


def can_step(parts: Parts) -> bool:
    model = parts["model"]
    tensors = (model.mask, model.first.weight, model.second.weight)
    fits = all(tensor.dtype is torch.float32 and tensor.shape == (4, 4) for tensor in tensors)
    return fits and len(model.norm.running_mean) == len(model.norm.running_var) == 4


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(sorted(CHANGES)), max_size=12), st.floats(0, 1), st.floats(0, 1))
def test_equal_after_any_changes(names: list[str], one: float, other: float) -> None:
    parts, recapture = build(), Recapture()
    assert_equal(recapture.capture(parts), capture(parts))
    for name in ["step", *names, "nothing"]:
        if name == "step" and not can_step(parts):
            continue
        with torch.no_grad() if name != "step" else torch.enable_grad():
            CHANGES[name](parts)
        found, expected = recapture.capture(parts), capture(parts)
        assert_equal(found, expected)
        start, stop = sorted(int(share * found.nbytes) for share in (one, other))
        assert front_and_rest(found, start, stop) == front_and_rest(expected, start, stop)


def test_nothing_takes_a_second_full_capture_that_needs_none() -> None:
    cheap = ["lr", "lr in place", "betas", "buffer", "buffer in place", "gaps in place", "tensor", "removed", "array",
             "alias", "step", "another object", "frozen", "eval", "attribute", "equal attribute", "attribute removed",
             "attribute in a list", "attribute out of it", "attributes replaced", "nothing"]  # fmt: skip
    parts, recapture = build(), Recapture()
    step(parts)
    recapture.capture(parts)
    for name in cheap:
        CHANGES[name](parts) if name == "step" else torch.no_grad()(CHANGES[name])(parts)
        assert_equal(recapture.capture(parts), capture(parts))
        assert recapture.full == 1, name
