"""What an object shares with a module or an optimizer it shares again after a load; buffers of every kind."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snapshot.capture import capture
from snapshot.load import load
from snapshot.recapture import Recapture
from snapshot.state_differences import differences
from snapshot.table import DTYPES, StateTable

Parts = dict[str, Any]


class Keeps:
    """An object with tensors, which it keeps as it is given them, or as copies."""

    def __init__(self, *tensors: Tensor, copies: bool = False) -> None:
        self.tensors, self.copies = list(tensors), copies

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": self.tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tensors = [tensor.detach().clone() if self.copies else tensor for tensor in state["tensors"]]


class Refuses(Keeps):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert torch.equal(state["tensors"][0], torch.full((2, 2), 7.0))
        raise RuntimeError("no")


def build(seed: int, keeps: type[Keeps] = Keeps, *, copies: bool = False) -> Parts:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.rand(4, 2)).square().sum().backward()
    optimizer.step()
    weight: Any = model[0].weight
    shared = (weight, model[1].running_mean, optimizer.state[weight]["exp_avg"], torch.rand(3))
    return {
        "model": model,
        "optimizer": optimizer,
        "keeps": keeps(*shared, copies=copies),
        "also": Keeps(shared[3]),
        "values": {"weight": shared[0], "mean": shared[1]},
    }


def received(table: StateTable) -> StateTable:
    copied = StateTable.empty(table.skeleton)
    for target, source in zip(copied.tensors, table.tensors, strict=True):
        target.copy_(source)
    return copied


def test_what_was_shared_is_shared_again() -> None:
    original, other = build(1), build(2)
    load(other, received(capture(original)))
    model, optimizer = other["model"], other["optimizer"]
    weight = model[0].weight
    shared = [weight, model[1].running_mean, optimizer.state[weight]["exp_avg"]]
    assert all(found is expected for found, expected in zip(other["keeps"].tensors, shared, strict=False))
    assert other["values"]["weight"] is weight and other["values"]["mean"] is shared[1]
    assert other["also"].tensors[0] is other["keeps"].tensors[3]
    assert capture(other).digest() == capture(original).digest()


def test_what_was_not_shared_is_not() -> None:
    original, other = build(1, copies=True), build(2)
    load(original, received(capture(original)))  # from now on it has copies
    load(other, received(capture(original)))
    assert other["keeps"].tensors[0] is not other["model"][0].weight
    assert capture(other).digest() == capture(original).digest()


def test_who_copies_what_it_shares_copies_what_was_captured() -> None:
    original, other = build(1), build(2, copies=True)
    load(other, received(capture(original)))
    for found, expected in zip(other["keeps"].tensors, original["keeps"].tensors, strict=True):
        assert torch.equal(found, expected)


def test_who_refuses_leaves_what_it_shares_alone() -> None:
    original, other = build(1), build(2, Refuses)
    with torch.no_grad():
        original["model"][0].weight.fill_(7)
    original, other = ({name: parts[name] for name in ("model", "optimizer", "keeps")} for parts in (original, other))
    before = capture(other).digest()
    with pytest.raises(RuntimeError, match="no"):
        load(other, received(capture(original)))
    assert capture(other).digest() == before


class Later(nn.Module):
    def __init__(self, mean: Tensor | None) -> None:
        super().__init__()
        self.out = nn.Linear(2, 2)
        self.register_buffer("mean", mean)


@pytest.mark.parametrize("kept", [None, torch.rand(2)])
@pytest.mark.parametrize("here", [None, torch.rand(2), torch.rand(3)])
def test_a_buffer_is_none_or_a_tensor_as_captured(kept: Tensor | None, here: Tensor | None) -> None:
    original, other = {"model": Later(kept)}, {"model": Later(here)}
    load(other, received(capture(original)))
    assert capture(other).digest() == capture(original).digest()
    assert (other["model"].mean is None) == (kept is None)


def test_recapture_sees_a_buffer_that_comes_and_goes() -> None:
    module, recapture = Later(None), Recapture()
    for mean in (None, torch.ones(2), torch.zeros(2), None):
        module.mean = mean
        assert recapture.capture({"model": module}).digest() == capture({"model": module}).digest()


WITHOUT_ARITHMETIC = [name for name in DTYPES if name.startswith(("float8", "float4"))]


@pytest.mark.parametrize("dtype", WITHOUT_ARITHMETIC)
def test_types_without_arithmetic(dtype: str) -> None:
    def build(first: int) -> Parts:
        codes = [torch.arange(first, first + 6, dtype=torch.uint8).view(DTYPES[dtype]) for _ in range(3)]
        model = nn.Linear(2, 2)
        model.register_buffer("codes", codes[0])
        model.register_parameter("frozen", nn.Parameter(codes[1], requires_grad=False))
        return {"model": model, "values": {"codes": codes[2], "first": codes[0]}, "keeps": Keeps(codes[0])}

    original, other = build(250), build(3)
    recapture = Recapture()
    assert recapture.capture(other).digest() == capture(other).digest() != capture(original).digest()
    load(other, received(capture(original)))
    assert recapture.capture(other).digest() == capture(other).digest() == capture(original).digest()
    assert other["keeps"].tensors[0] is other["model"].codes is other["values"]["first"]
    assert other["model"].codes.view(torch.uint8).tolist() == [250, 251, 252, 253, 254, 255]
    one, two = capture(original).layout, capture(other).layout
    assert not list(differences(one.objects, two.objects, one.tensors, two.tensors))
