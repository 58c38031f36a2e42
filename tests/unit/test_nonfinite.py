"""Losses and gradients that are not finite: stop, skip the step, or go back and leave its data out."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import resilient

GLOBAL_BATCH, MICRO_BATCH, STEPS = 4, 2, 5


class Numbers(Dataset[Tensor]):
    """Samples 0, 1, 2... as vectors, without those of the steps in `without`, and with NaN in those of `bad`."""

    def __init__(self, bad: tuple[int, ...] = (), without: tuple[int, ...] = ()) -> None:
        self.bad = bad
        self.kept = [index for index in range(80) if index // GLOBAL_BATCH not in without]

    def __len__(self) -> int:
        return 60

    def __getitem__(self, place: int) -> Tensor:
        index = self.kept[place]
        # Only one sample of the step, in its last micro-batch.
        poisoned = index // GLOBAL_BATCH in self.bad and index % GLOBAL_BATCH == GLOBAL_BATCH - 1
        return torch.full((3,), math.nan if poisoned else math.sin(index))


def train(
    dataset: Dataset[Tensor], on_nonfinite: Literal["ignore", "stop", "skip", "rollback"] = "ignore", poison: int = -1
) -> Any:
    def main(run: resilient.Run) -> list[int]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        run.protect(model=model, optimizer=optimizer, scheduler=scheduler)
        committed = []
        for x in run.batches(dataset, global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH, steps=STEPS, shuffle=False):
            out = model(x)
            if run.step == poison:
                out.register_hook(lambda gradient: gradient * math.inf)
            out.square().mean().backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if run.committing:
                committed.append(run.step)
        return committed

    snapshot = resilient.Snapshot() if on_nonfinite == "rollback" else None
    return resilient.train(on_nonfinite=on_nonfinite, snapshot=snapshot)(main).local()


def test_by_default_what_is_not_finite_is_the_users_own_affair() -> None:
    assert train(Numbers(bad=(2,))).value == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("case", ["loss", "gradient"])
def test_stop_names_the_step(case: str) -> None:
    dataset, poison = (Numbers(bad=(2,)), -1) if case == "loss" else (Numbers(), 2)
    with pytest.raises(resilient.LoopError, match="loss or gradient of step 2 is not finite"):
        train(dataset, "stop", poison)


def test_a_skipped_step_changes_nothing_but_the_count() -> None:
    result = train(Numbers(bad=(2,)), "skip")
    assert result.step == STEPS and result.value == [0, 1, 3, 4]
    assert [row.get("skipped", 0.0) for row in result.metrics] == [0.0, 0.0, 1.0, 0.0, 0.0]
    assert math.isnan(result.metrics[2]["loss"]) and math.isfinite(result.metrics[3]["loss"])


def test_an_infinite_gradient_is_noticed_too() -> None:
    assert train(Numbers(), "skip", poison=1).value == [0, 2, 3, 4]


def test_a_rollback_leaves_the_data_out_as_if_it_had_never_been_there() -> None:
    result = train(Numbers(bad=(2, 3)), "rollback")
    without = train(Numbers(without=(2, 3)))
    assert result.value == without.value == [0, 1, 2, 3, 4]
    assert result.digest == without.digest
    assert result.metrics == without.metrics


def test_a_step_that_is_bad_with_any_data_ends_the_run() -> None:
    with pytest.raises(resilient.LoopError, match=r"step 2 is not finite.*nor was it with the data of 3 others"):
        train(Numbers(bad=tuple(range(2, 15))), "rollback")


def test_rollback_needs_snapshots() -> None:
    with pytest.raises(ValueError, match=r"on_nonfinite=.rollback. needs snapshots"):
        resilient.train(on_nonfinite="rollback")(lambda run: None)


def test_rollback_outside_of_a_commit_is_refused() -> None:
    def main(run: resilient.Run) -> None:
        model = nn.Linear(3, 1)
        run.protect(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
        for _ in run.batches(Numbers(), global_batch=4, micro_batch=2, steps=2):
            run.rollback(steps=1)

    with pytest.raises(resilient.LoopError, match="outside of a committing iteration"):
        resilient.train()(main).local()
