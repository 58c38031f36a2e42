"""What a device does behind the host's back: moments in its streams, its errors, its name.

Kernels and copies are only enqueued by the calls that ask for them, and NCCL's `wait` too orders streams without
waiting (torch.distributed, "Synchronous and asynchronous collective operations"). A `Mark` says when all that a thread
has enqueued is done. On a CPU every mark has come already, so callers need not ask which device they have.
"""

from __future__ import annotations

import os
import re

import torch
import torch.distributed as dist

NCCL_SETTINGS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # by default (3) a rank is torn down with its peer
    "TORCH_NCCL_BLOCKING_WAIT": "0",  # a blocking wait polls, for each chunk anew
    "TORCH_NCCL_ENABLE_MONITORING": "0",  # a watchdog that is held up, by an abort say, would end the process
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",  # asks the store for others' failures, which the controller decides on
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",  # the watchdog would end the process before the error is told
}
"""Read when a group is made. With these nothing but `Group` ends or aborts anything: a transfer that ends, of a group
that has not been given up, has brought its bytes."""

_BROKEN_LIBRARY = re.compile(r"(CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR)")
_NO_MEMORY = re.compile(r"out of memory|(CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_ALLOC_FAILED", re.IGNORECASE)


def survive_peers() -> None:
    """Have NCCL leave this process alone when a peer dies. To be called before torch.distributed makes a group."""
    os.environ.update(NCCL_SETTINGS)


def is_out_of_memory(error: BaseException) -> bool:
    """Of the device; also where a library says so in its own words."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return _is_cudas(error) and _NO_MEMORY.search(str(error)) is not None


def is_device_error(error: BaseException) -> bool:
    """Whether the device has failed for this process: after such an error every further call fails too.

    What a library says of wrong arguments is the caller's mistake and no such error, nor is a lack of memory.
    """
    if is_out_of_memory(error) or not _is_cudas(error):
        return False
    if "_STATUS_" in str(error):
        return _BROKEN_LIBRARY.search(str(error)) is not None
    return True


def _is_cudas(error: BaseException) -> bool:
    accelerator = getattr(torch, "AcceleratorError", None)  # torch 2.8 and later
    if accelerator is not None and isinstance(error, accelerator):
        return True
    # Before, and for libraries still, a RuntimeError tells by its text alone (c10/cuda/CUDAException.h and
    # ATen/cuda/Exceptions.h). Errors of torch.distributed have classes of their own, and are a link's.
    if not isinstance(error, RuntimeError) or isinstance(error, dist.DistError):
        return False
    return str(error).startswith(("CUDA error:", "CUDA driver error:", "cuDNN error:", "cusolver error:"))


def name_of(device: torch.device) -> str:
    """The same for two processes if they share the device; "" for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


class Mark:
    """All that this thread has enqueued on its stream of the device so far. May be asked from any thread."""

    __slots__ = ("_device", "_event")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))

    def precede(self) -> None:
        """What the calling thread enqueues from now on comes after it."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)

    def has_come(self) -> bool:
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Until it has come."""
        if self._event is not None:
            self._event.synchronize()
