"""On a CUDA device: the same loop, the same promises. Needs one GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import resilient
from resilient.core.cadence import Cadence
from resilient.snapshots import Seating, Snapshots
from snapshot.arena import SlotView, find_slots
from snapshot.capture import capture
from snapshot.core.lifecycle import Ordinal
from tests.integration.loops import Noisy
from tests.vaults import wait_for

pytestmark = pytest.mark.gpu


def test_local_gives_the_devices_generator_back() -> None:
    torch.cuda.manual_seed(7)
    expected = torch.rand(4, device="cuda")
    torch.cuda.manual_seed(7)
    resilient.train(name="cuda-drawing", resources={"CPU": 1, "GPU": 1})(on_gpu).local(steps=2)
    assert torch.rand(4, device="cuda").equal(expected)


def on_gpu(run: resilient.Run, steps: int) -> str:
    model = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 3))
    model.to(run.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run.protect(model=model, optimizer=optimizer)
    for x, y in run.batches(Noisy(), global_batch=32, micro_batch=4, steps=steps):
        loss = nn.functional.cross_entropy(model(x.to(run.device)), y.to(run.device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return str(run.device)


def test_local_on_cuda_repeats_its_bits() -> None:
    train = resilient.train(name="cuda", resources={"CPU": 1, "GPU": 1})(on_gpu)
    first, second = train.local(steps=6), train.local(steps=6)
    assert first.digest == second.digest and first.metrics == second.metrics
    assert first.value == "cuda:0"


def test_a_side_stream_fills_pinned_slots_while_the_next_step_computes(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(1024, 1024), nn.BatchNorm1d(1024)).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    said: list[str] = []
    snapshots = Snapshots(
        run="r",
        attempt=1,
        folder=tmp_path,
        member=1,
        device=torch.device("cuda", 0),
        cadence=Cadence(every=1, budget=0.02),
        say=said.append,
    )
    objects, seating = {"model": model, "optimizer": optimizer}, Seating(generation=1, rank=0, world=1)
    expected = b""
    for step in range(1, 4):
        model(torch.randn(64, 1024, device="cuda")).square().mean().backward()
        snapshots.gate()
        optimizer.step()
        optimizer.zero_grad()
        wait_for(lambda: step == 1 or snapshots.wish(Ordinal(0, step), 1).room)  # noqa: B023
        table = capture(objects)
        expected = b"".join(piece.cpu().numpy().tobytes() for piece in table.pieces(0, table.nbytes))
        snapshots.boundary(Ordinal(0, step), objects, seating, wanted=step > 1)
    snapshots.gate()
    print(f"\n{torch.cuda.get_device_name()}: {snapshots.tally.blocked_s:.4f} s blocked in three snapshots")
    heads = {found.head.step: found.path for found in find_slots(tmp_path) if found.head is not None}
    view = SlotView.open(heads[3])
    assert bytes(view.payload[view.head().skeleton_bytes :]) == expected
    assert said == [], "the driver has pinned the memory"
