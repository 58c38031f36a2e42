"""Groups that a loop adds to an optimizer: with their parameters they go, and come back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from snapshot.capture import capture
from snapshot.load import load
from snapshot.recapture import Recapture

Parts = dict[str, Any]

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "foreach": lambda groups: torch.optim.AdamW(groups, lr=0.01, foreach=True),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "tensor-lr": lambda groups: torch.optim.Adam(groups, lr=torch.tensor(0.01), foreach=False),
}


def build(optimizer: str = "adamw", seed: int = 1) -> Parts:
    torch.manual_seed(seed)
    body, head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 1)
    return {"body": body, "head": head, "optimizer": OPTIMIZERS[optimizer](head.parameters())}


def unfreeze(parts: Parts, number: int = 1) -> None:
    parts["optimizer"].add_param_group({"params": list(parts["body"][number].parameters()), "lr": 0.05})


def train(parts: Parts, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x = torch.rand(8, 4, generator=torch.Generator().manual_seed(step))
        loss = parts["head"](parts["body"](x)).square().mean()
        loss.backward()
        parts["optimizer"].step()
        if "scheduler" in parts:
            parts["scheduler"].step()
        parts["head"].zero_grad()
        parts["body"].zero_grad()
        losses.append(loss.item())
    return losses


def members(parts: Parts) -> list[list[int]]:
    return [[id(parameter) for parameter in group["params"]] for group in parts["optimizer"].param_groups]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_added_groups_come_back_with_their_parameters_and_training_goes_on(optimizer: str) -> None:
    original, other = build(optimizer), build(optimizer, seed=2)
    train(original, range(2))
    unfreeze(original, 1)
    train(original, range(2, 4))
    unfreeze(original, 0)
    table = capture(original)
    load(other, table)
    assert capture(other).digest() == table.digest()
    expected = [[other["head"].weight, other["head"].bias], [*other["body"][1].parameters()]]
    expected.append([*other["body"][0].parameters()])
    assert members(other) == [[id(parameter) for parameter in group] for group in expected]
    assert train(other, range(4, 8)) == train(original, range(4, 8))
    assert capture(other).digest() == capture(original).digest()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_going_back_removes_them(optimizer: str) -> None:
    parts, alone = build(optimizer), build(optimizer)
    train(parts, range(2))
    train(alone, range(2))
    table = capture(alone)
    groups, first = parts["optimizer"].param_groups, parts["optimizer"].param_groups[0]
    unfreeze(parts)
    train(parts, range(2, 4))
    load(parts, table)
    assert capture(parts).digest() == table.digest()
    assert parts["optimizer"].param_groups is groups and groups == [first] and len(parts["optimizer"].state) == 2
    unfreeze(parts)
    unfreeze(alone)
    assert train(parts, range(2, 4)) == train(alone, range(2, 4))


def test_members_that_were_appended_to_a_group_or_stand_in_another_order() -> None:
    original, other = build(), build(seed=2)
    group = original["optimizer"].param_groups[0]
    group["params"].append(original["body"][0].weight)
    group["params"].reverse()
    train(original, range(2))
    before = capture(other)
    first = other["optimizer"].param_groups[0]["params"]
    load(other, capture(original))
    assert capture(other).digest() == capture(original).digest() and train(other, range(3)) == train(original, range(3))
    assert other["optimizer"].param_groups[0]["params"] is first
    load(other, before)
    assert members(other) == [[id(other["head"].weight), id(other["head"].bias)]] and not other["optimizer"].state


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 10),
        lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
        lambda optimizer: lr_scheduler.StepLR(optimizer, 2),
    ],
    ids=["cosine", "lambda", "step"],
)
def test_a_scheduler_that_was_attached_goes_on_as_it_did(schedule: Callable[[Optimizer], Any]) -> None:
    def scheduled(seed: int) -> Parts:
        parts = build("sgd", seed)
        return parts | {"scheduler": schedule(parts["optimizer"])}

    original, other = scheduled(1), scheduled(2)
    train(original, range(3))
    group = {"params": [original["body"][1].weight], "lr": 0.05, "initial_lr": 0.05}
    original["optimizer"].add_param_group(group)
    original["scheduler"].base_lrs.append(0.05)
    if isinstance(original["scheduler"], lr_scheduler.LambdaLR):
        for scheduler in (original["scheduler"], other["scheduler"]):
            scheduler.lr_lambdas.append(lambda step: 0.8**step)
    train(original, range(3, 5))
    load(other, capture(original))
    assert train(other, range(5, 9)) == train(original, range(5, 9))
    assert capture(other).digest() == capture(original).digest()
    assert other["optimizer"].param_groups[1]["initial_lr"] == 0.05


def test_a_wrapper_on_the_instance_does_not_see_a_load() -> None:
    original, other = build(), build(seed=2)
    unfreeze(original)
    seen: list[Any] = []
    other["optimizer"].add_param_group = seen.append
    load(other, capture(original))
    assert not seen and len(other["optimizer"].param_groups) == 2


def test_groups_with_names() -> None:
    def named(seed: int) -> Parts:
        parts = build(seed=seed)
        return parts | {"optimizer": torch.optim.SGD(parts["head"].named_parameters(), lr=0.1)}

    original, other = named(1), named(2)
    original["optimizer"].add_param_group({"params": list(original["body"][0].named_parameters())})
    load(other, capture(original))
    assert capture(other).digest() == capture(original).digest()


def test_tied_parameters() -> None:
    def tied(seed: int) -> Parts:
        parts = build(seed=seed)
        parts["body"][1].weight = parts["body"][0].weight
        return parts

    original, other = tied(1), tied(2)
    unfreeze(original)
    load(other, capture(original))
    assert other["optimizer"].param_groups[1]["params"][0] is other["body"][0].weight


def test_a_member_of_no_module_cannot_be_added_again_but_stays_where_it_is() -> None:
    original, other = build(), build(seed=2)
    table = capture(other)
    alone = nn.Parameter(torch.ones(3))
    original["optimizer"].add_param_group({"params": [alone]})
    before = capture(other).digest()
    with pytest.raises(ValueError, match=r"optimizer group 1: parameter 0, of shape \(3,\), is of no module here, so"):
        load(other, capture(original))
    assert capture(other).digest() == before
    load(original, capture(original))
    assert original["optimizer"].param_groups[1]["params"][0] is alone
    load(original, table)
    assert len(original["optimizer"].param_groups) == 1


def test_recapture_knows_the_members() -> None:
    parts, recapture = build(), Recapture()
    for number in (1, 0):
        for state in parts["optimizer"].state.values():
            state["list"] = [torch.ones(2)]
        assert recapture.capture(parts).skeleton == capture(parts).skeleton
        parts["head"].weight.data.share_memory_()
        assert recapture.capture(parts).skeleton == capture(parts).skeleton
        unfreeze(parts, number)
        train(parts, range(1))
        assert recapture.capture(parts).skeleton == capture(parts).skeleton
    assert recapture.full == 4


class Lookahead:
    """An optimizer around another, which it shares with whoever protects both."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.steps = optimizer, 0

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.optimizer.load_state_dict(state["optimizer"])


def test_an_optimizer_within_another_object_stays_one() -> None:
    def wrapped(seed: int) -> Parts:
        parts = build(seed=seed)
        return parts | {"ahead": Lookahead(parts["optimizer"])}

    original, other = wrapped(1), wrapped(2)
    train(original, range(3))
    train(other, range(1))
    load(other, capture(original))
    assert capture(other).skeleton == capture(original).skeleton
    assert train(other, range(3, 6)) == train(original, range(3, 6))
    assert capture(other).digest() == capture(original).digest()
