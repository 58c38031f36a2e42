"""Slots as pinned memory, so that a GPU copies into them by itself while the next kernels run."""

from __future__ import annotations

import torch


def pin(memory: memoryview) -> bool:
    """Register this memory with the CUDA driver. False if the driver refuses: copies are then slower, not wrong."""
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    return int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.numel(), 0)) == 0  # type: ignore[no-untyped-call]


def unpin(memory: memoryview) -> None:
    """Before the memory is unmapped. Nothing may still be copied into it."""
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())  # type: ignore[no-untyped-call]
