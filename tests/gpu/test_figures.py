"""Figures of one device, printed by `make test-gpu`: what they show goes into the docs with the device's name."""

from __future__ import annotations

import subprocess
import time

import pytest
import torch
from torch import nn

from resilient.buffers import Buffers
from resilient.exchange import exchange_alone
from resilient.pinning import pin, unpin
from resilient.sums import StepSums

pytestmark = pytest.mark.gpu

COPIED_BYTES = 1 << 30
LANE_BYTES_PER_S = {3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
"""Of PCIe, by generation, one direction."""


def copied_s(target: torch.Tensor, source: torch.Tensor) -> float:
    """The best of five, since the first ones warm up."""
    found = []
    for _ in range(5):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        found.append(time.perf_counter() - begun)
    return min(found)


def test_copying_into_pinned_memory_against_the_bus() -> None:
    memory = memoryview(bytearray(COPIED_BYTES))
    host = torch.frombuffer(memory, dtype=torch.uint8)
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    pageable = COPIED_BYTES / copied_s(host, source)
    assert pin(memory)
    pinned = COPIED_BYTES / copied_s(host, source)
    unpin(memory)
    asked = ["nvidia-smi", "--query-gpu=name,pcie.link.gen.max,pcie.link.width.max", "--format=csv,noheader"]
    name, generation, lanes = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split(",")[:3]
    bus = LANE_BYTES_PER_S.get(int(generation), float("nan")) * int(lanes.split()[0])
    print(f"\n{name}: pinned {pinned / 1e9:.1f} GB/s, {pinned / bus:.2f} of PCIe; pageable {pageable / 1e9:.1f} GB/s")
    assert pinned > pageable


def test_memory_per_byte_of_gradient() -> None:
    """As the docstring of `resilient.sums` has it, with one micro-batch: sums, two results and `.grad`."""
    model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(8))).cuda()
    gradient_bytes = sum(parameter.numel() * 4 for parameter in model.parameters())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    sums = StepSums(list(model.named_parameters()), Buffers([]), 1)
    x = torch.ones(4, 2048, device="cuda")
    for _ in range(3):
        loss = model(x).square().mean()
        loss.backward()
        sums.fold_leaf(0, loss)
        sums.accept(exchange_alone(sums))
        sums.apply()
        model.zero_grad()
    peak = torch.cuda.max_memory_allocated() - before
    print(f"\n{torch.cuda.get_device_name()}: {peak / gradient_bytes:.2f} bytes per byte of gradient")
    assert peak < 6 * gradient_bytes
