"""What a run returns, when what its function returned can't be had in the driver."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import pytest

import resilient
from resilient import driver
from resilient.packing import packed_value
from resilient.result import loaded


def end_of_run(value: bytes | None) -> dict[str, Any]:
    """The controller's last news."""
    told = {"step": 2, "rows": [{"step": 0.0}], "recoveries": [{"kind": "lost"}], "bubbles": [], "snapshots": {}}
    outcome = {"outcome": "finished", "reason": "", "digest": "d1"}
    return {**told, "checkpoints": {}, "outcome": outcome, "value": value}


class OnlyThere:
    """Can be made on a rank, and nowhere else."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _make, ("needs a device that is not here",)


def _make(why: str) -> None:
    raise OSError(why)


@pytest.mark.parametrize("value", [OnlyThere(), threading.Lock()], ids=["not loaded", "not sent"])
def test_a_value_that_cannot_be_had_costs_nothing_else(value: object) -> None:
    result = driver._result(end_of_run(packed_value(value)))
    assert (result.step, result.digest) == (2, "d1")
    assert result.metrics == [{"step": 0.0}] and result.recoveries == [{"kind": "lost"}]
    why = "loaded by the driver" if isinstance(value, OnlyThere) else "sent to the driver"
    with pytest.raises(resilient.ValueNotLoaded, match=f"can't be {why}.*return what every process can load") as caught:
        _ = result.value
    assert ("needs a device" if isinstance(value, OnlyThere) else "cannot pickle '_thread.lock'") in str(caught.value)
    assert "can't be" in repr(result)


def test_a_value_that_can() -> None:
    assert driver._result(end_of_run(packed_value({"accuracy": 0.5}))).value == {"accuracy": 0.5}
    assert driver._result(end_of_run(None)).value is None
    assert loaded(pickle.dumps(3)) == 3
