"""On a CUDA device: the same loop, the same promises. Needs one GPU."""

from __future__ import annotations

import pytest
import torch
from tests.integration.loops import body

import resilient

pytestmark = pytest.mark.gpu


def on_gpu(run: resilient.Run, steps: int) -> str:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_default_device(run.device)
    try:
        body(run, steps=steps)
    finally:
        torch.set_default_device("cpu")
    return str(run.device)


def test_local_on_cuda_repeats_its_bits() -> None:
    train = resilient.train(name="cuda", resources={"CPU": 1, "GPU": 1})(on_gpu)
    first, second = train.local(steps=6), train.local(steps=6)
    assert first.digest == second.digest and first.metrics == second.metrics
    assert first.value == "cuda:0"
