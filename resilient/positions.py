"""What of a loop itself is part of the state: the position in the data, and which buffers are exchanged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .sums import StepSums

if TYPE_CHECKING:
    from .loop import TrainingLoop


class DataPosition:
    """The data position as an object with a state, asked at a boundary; and where loops have begun, if several have."""

    def __init__(self, loop: TrainingLoop) -> None:
        self._loop = loop

    def state_dict(self) -> dict[str, Any]:
        if self._loop.later is not None:
            return dict(self._loop.later)
        begun = self._loop.begun
        more = {"begun": list(begun)} if len(begun) > 1 else {}
        return {**self._loop.feed.state_dict(self._loop.position(self._loop.step)), **more}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        loop, begun = self._loop, state.get("begun", [0])
        loop.begun[:] = begun
        loop.later = None if loop.number == len(begun) - 1 else state
        if loop.later is None:
            loop.feed.load_state_dict(state)


class KnownBuffers:
    """Which buffers take part in the exchange: all ranks must agree."""

    def __init__(self, sums: StepSums) -> None:
        self._sums = sums

    def state_dict(self) -> dict[str, Any]:
        return {"names": list(self._sums.known_buffers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if tuple(state["names"]) != self._sums.known_buffers:
            self._sums.widen(state["names"])
