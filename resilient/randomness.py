"""Generators set to a known state, so that what is drawn depends on what it is for and not on who draws it.

Seeds come from `resilient.core.order.derive_seed`. Only the process-wide generators are set: `random`, the
legacy `numpy.random` functions, torch. What makes a generator of its own must seed it itself;
`numpy.random.default_rng()` without a seed asks the operating system and can't be repeated.
"""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_everything(seed64: int) -> None:
    """Seed `random`, `numpy.random`, torch on the CPU, and torch on every CUDA device, from one 64-bit seed.

    Cheap enough for every micro-batch: about 10 us on a CPU. Where CUDA is there but not yet in use, its
    generators get the seed when it is first used. Raises ValueError unless 0 <= seed64 < 2**64.
    """
    seed_host(seed64)
    # In a forked worker CUDA is unusable, and reports itself as not available or not initialised.
    if torch.cuda.is_initialized() or (torch.cuda.is_available() and not torch.cuda._is_in_bad_fork()):  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed64)


def seed_host(seed64: int) -> None:
    """`seed_everything` without CUDA: for loading samples, which happens in processes that have none.

    Raises ValueError unless 0 <= seed64 < 2**64.
    """
    if not 0 <= seed64 < 2**64:
        raise ValueError(f"seed64 must be in [0, 2**64), not {seed64}")
    random.seed(seed64)
    # The legacy generator takes 32 bits. (It takes an array of words too, seven times slower.) The low
    # half will do: every purpose has its own hash, and torch and `random` still see all 64 bits.
    np.random.seed(seed64 & 0xFFFF_FFFF)
    # Not torch.manual_seed: it also formats a stack trace for every backend that isn't there, 200 us.
    torch.default_generator.manual_seed(seed64)


@contextlib.contextmanager
def kept_generators(device: torch.device) -> Iterator[None]:
    """The same generators, the device's among them, go on afterwards as if nothing had been drawn within it."""
    python, numpy, host = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(host)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Torch on one thread within the block, as DataLoader's worker processes have it.

    The number of threads decides how sums are cut, hence bits: what is loaded here must be what a worker
    would have loaded. Takes about 1 us.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
