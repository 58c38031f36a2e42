"""Transfers between the ranks of a group: what is to be moved, and what is under way."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .device import is_device_error, is_out_of_memory

PIECE_BYTES = 8 << 20
"""Larger moves go piece by piece, so that it is seen whether they go on: also where one sends its state to a hundred
others at once through one slow cable."""


class LinkBroken(RuntimeError):
    """A connection of the group failed: a peer has died, or the network between the two has.

    Nobody's mistake. It is a hint only: who is dead is for the controller to say.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Bytes to or from a peer: a contiguous uint8 tensor of shape (bytes,)."""

    data: Tensor
    peer: int
    tag: int


class Waits:
    """How long one thread has waited for its peers, to be read by others."""

    def __init__(self) -> None:
        self._since: float | None = None

    def __enter__(self) -> None:
        self.moved()

    def __exit__(self, *_: object) -> None:
        self._since = None

    def moved(self) -> None:
        """Something has come, or gone."""
        self._since = time.monotonic()

    def lasted_s(self) -> float:
        """Since anything came or went; 0 if nobody is waited for."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since


@contextlib.contextmanager
def link_errors(why: str = "") -> Iterator[None]:
    """What torch.distributed raises in the block is a broken link; an error of this process's own device is not: the
    next generation would have it too."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, LinkBroken) or is_device_error(error) or is_out_of_memory(error):
            raise
        raise LinkBroken(f"{why}{error}") from error


class Pending:
    """Transfers under way in host memory."""

    __slots__ = ("_held", "_waits", "_works")

    def __init__(self, works: list[Any], held: object, waits: Waits) -> None:
        self._works = works
        self._held = held
        self._waits = waits

    def wait(self) -> None:
        """Returns when they are complete, or raises LinkBroken."""
        with link_errors(), self._waits:
            for work in self._works:
                work.wait()
                self._waits.moved()

    def follow(self) -> None:
        """What this thread computes from now on, on its stream of the device, sees what they have brought. Only after
        `wait` has it come for certain. Raises LinkBroken."""
        self.wait()


def post_moves(group: Any, sends: Iterable[Move], receives: Iterable[Move]) -> tuple[list[Any], list[Tensor]]:
    """What is under way, and what must stay referenced."""
    works, held = [], []
    with link_errors():
        for move, begin in [(move, group.recv) for move in receives] + [(move, group.send) for move in sends]:
            for piece in torch.split(move.data, PIECE_BYTES):
                works.append(begin([piece], move.peer, move.tag))
                held.append(piece)
    return works, held
