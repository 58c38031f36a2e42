"""Device links in real processes of which one is killed, with the host in the device's place."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import resilient
from actors.device_link import NcclLink
from actors.group import Gloo, _gloo_options
from actors.pending import Waits
from resilient import member
from tests import crew
from tests.integration.loops import Fault, arm, fault
from tests.low_precision import flat
from tests.nccl import Nccl


def sharing(run: resilient.Run, fault: Fault) -> object:
    member.name_of = lambda device: "one for all"
    arm(run, fault)
    return flat(run)


def each_its_own(run: resilient.Run, fault: Fault) -> object:
    def connect(store: Any, rank: int, size: int, device: torch.device, waits: Waits) -> NcclLink:
        nccl = Nccl(Gloo(store, rank, size, _gloo_options("127.0.0.1")))
        nccl.may_abort.set()
        return NcclLink(nccl, device, waits)

    NcclLink.connect = connect  # type: ignore[method-assign]
    member.name_of = lambda device: str(os.getpid())
    arm(run, fault)
    return flat(run)


@pytest.mark.parametrize("function", [sharing, each_its_own])
def test_a_rank_dies_in_the_exchange_and_the_bits_are_the_same(
    tmp_path: Path, function: Callable[[resilient.Run, Fault], object]
) -> None:
    found = crew.run(function, fault(tmp_path, 1, 2, "reduce"), workers=(2, 3))
    assert found.end is not None and found.end.outcome == "finished", found.end
    assert found.end.digest == resilient.train(name="alone")(flat).local().digest
    assert any(plan.kind == "unplanned" for plan in found.plans)
