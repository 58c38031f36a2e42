"""Recapture: what it saves, what it keeps, and that it shows the present."""

import gc
import tracemalloc
from typing import Any

import pytest
import torch
from torch import nn

from snapshot.absent import bring, is_absent, release
from snapshot.capture import capture
from snapshot.recapture import Recapture

Parts = dict[str, Any]


def build() -> Parts:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5000)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "run.state": {"step": 0}}


def step(parts: Parts) -> None:
    parts["model"](torch.rand(8, 4)).square().mean().backward()
    parts["optimizer"].step()
    parts["optimizer"].zero_grad()
    parts["scheduler"].step()
    parts["run.state"]["step"] += 1


def test_the_common_loop_needs_one_full_capture() -> None:
    parts, recapture = build(), Recapture()
    step(parts)
    for _ in range(20):
        assert recapture.capture(parts).digest() == capture(parts).digest()
        step(parts)
    assert recapture.full == 1


def test_buffers_that_are_replaced_at_each_step_need_no_full_capture() -> None:
    parts, recapture = build(), Recapture()
    norm = parts["model"][1]
    for number in range(5):
        norm.running_mean, norm.running_var = torch.full((4,), float(number)), norm.running_var * 2
        assert recapture.capture(parts).digest() == capture(parts).digest()
    assert recapture.full == 1


def test_a_buffer_that_state_dict_leaves_out_from_now_on_is_noticed() -> None:
    parts, recapture = build(), Recapture()
    norm = parts["model"][1]
    for persistent in (True, False, True):
        norm.register_buffer("running_mean", norm.running_mean, persistent=persistent)
        assert recapture.capture(parts).skeleton == capture(parts).skeleton
        assert recapture.capture(parts).skeleton == capture(parts).skeleton


def test_plain_values_that_change_in_each_parameters_state_need_no_full_capture() -> None:
    parts, recapture = build(), Recapture()
    step(parts)
    for number in range(300, 305):
        for state in parts["optimizer"].state.values():
            state["count"] = number
        assert recapture.capture(parts).skeleton == capture(parts).skeleton
    assert recapture.full == 1


def test_earlier_tables_keep_their_structure() -> None:
    parts, recapture = build(), Recapture()
    step(parts)
    for state in parts["optimizer"].state.values():
        state["count"] = 1
    first = recapture.capture(parts)
    for state in parts["optimizer"].state.values():
        state["count"] = 2
    recapture.capture(parts)
    assert first.layout.to_bytes() == first.skeleton


def test_an_optimizer_with_lists_of_tensors() -> None:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    recapture = Recapture()

    def closure() -> float:
        optimizer.zero_grad()
        loss = (model(torch.eye(3)) - 1).square().sum()
        loss.backward()
        return loss.item()

    for _ in range(4):
        found, expected = recapture.capture({"m": model, "o": optimizer}), capture({"m": model, "o": optimizer})
        assert (found.digest(), found.calm) == (expected.digest(), expected.calm)
        optimizer.step(closure)


def test_a_module_with_a_say_of_its_own_is_always_captured_in_full() -> None:
    class Chosen(nn.Linear):
        def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
            return (pair for pair in super().named_parameters(*args, **kwargs) if pair[0] == self.chosen)

        chosen = "weight"

    module, recapture = Chosen(2, 2), Recapture()
    for chosen in ("weight", "bias"):
        module.chosen = chosen
        assert recapture.capture({"m": module}).digest() == capture({"m": module}).digest()
    assert recapture.full == 2


def test_after_a_refusal_nothing_stale_remains() -> None:
    parts, recapture = build(), Recapture()
    recapture.capture(parts)
    parts["run.state"]["thing"] = object()
    parts["model"][1].running_mean = torch.ones(4)
    with pytest.raises(TypeError, match=r"run.state\['thing'\]"):
        recapture.capture(parts)
    del parts["run.state"]["thing"]
    assert recapture.capture(parts).digest() == capture(parts).digest()


def test_a_tensor_that_went_to_meta_is_refused() -> None:
    parts, recapture = build(), Recapture()
    recapture.capture(parts)
    parts["model"].to_empty(device="meta")
    with pytest.raises(TypeError, match="to_empty"):
        recapture.capture(parts)


def test_views_are_kept_and_show_the_present() -> None:
    parts, recapture = build(), Recapture()
    step(parts)
    first = recapture.capture(parts)
    front = first.front_share(((0, first.nbytes),))[0]
    step(parts)
    second = recapture.capture(parts)
    assert second.front_share(((0, second.nbytes),))[0] is front
    (_, view), weight = front.calm[0], parts["model"][0].weight
    assert view.data_ptr() == weight.data_ptr() and view.numel() == weight.nbytes
    weight.data = torch.zeros(4, 4)
    third = recapture.capture(parts)
    (_, view) = third.front_share(((0, third.nbytes),))[0].calm[0]
    assert view.data_ptr() == weight.data_ptr() and not view.any()


def test_what_was_here_between_two_captures_only_is_not_in_the_second() -> None:
    parts, recapture = build(), Recapture()
    norm = parts["model"][1]
    release(norm.running_mean)
    recapture.capture(parts)
    bring(norm.running_mean)
    release(norm.running_mean)
    table = recapture.capture(parts)
    assert table.held_ranges() == capture(parts).held_ranges() and sum(map(is_absent, table.tensors)) == 1


def test_a_table_that_stands_alone_has_no_front() -> None:
    table = capture(build())
    assert table.front_share(((0, table.nbytes),))[0].nbytes == 0


def test_a_thousand_captures_take_no_more_memory() -> None:
    parts, recapture = build(), Recapture()
    step(parts)

    def some(times: int) -> int:
        for _ in range(times):
            parts["run.state"]["step"] += 1
            parts["model"][1].running_mean = torch.rand(4)
            parts["scheduler"].step()
            table = recapture.capture(parts)
            table.front_share(((0, table.nbytes),))
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    tracemalloc.start()
    try:
        tensors, (before, _) = some(100), tracemalloc.get_traced_memory()
        assert some(1000) <= tensors
        assert tracemalloc.get_traced_memory()[0] - before < 20_000
    finally:
        tracemalloc.stop()
    assert recapture.full == 1
