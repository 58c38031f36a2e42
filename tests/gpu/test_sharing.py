"""Two ranks on one device over real processes: the same bits, also when one dies, another joins, or both are lost.

NCCL refuses two ranks on one device, so this is also the way through host memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

import resilient
from tests.gpu.loops import train
from tests.integration.processes import Watched, until

pytestmark = pytest.mark.gpu

STEPS = 150


@pytest.fixture(scope="module")
def one_gpu() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_two_ranks_share_a_device_through_a_kill_a_join_and_the_loss_of_both(one_gpu: None, tmp_path: Path) -> None:
    alone = train("gpu-alone").local(steps=STEPS)
    assert alone.value == "cuda:0"
    sharing = train("gpu-sharing", workers=(1, 2), snapshot=resilient.Snapshot(every=1))
    run = Watched(sharing, steps=STEPS, hold=str(tmp_path / "go"))
    run.at_step(2, ranks=2)
    run.until_said("ranks share a GPU")
    run.signal_rank(1)
    run.until(lambda news: any(item["kind"] == "joined" for item in news["recoveries"]), "a replacement joins")
    run.at_step(run.news["step"] + 2, ranks=2)
    for rank in (0, 1):
        run.signal_rank(rank)
    run.until(lambda news: any(item["restored_step"] >= 0 for item in news["recoveries"]), "a snapshot is restored")
    result = run.result()
    assert result.digest == alone.digest and result.value == "cuda:0"
    for item in result.recoveries:
        print({key: item[key] for key in ("kind", "source", "ranks") if key in item})


def test_a_rank_alone_on_its_device_needs_no_peer(one_gpu: None) -> None:
    """NCCL with one rank: its communicator is made, used and ended."""
    until(lambda: ray.available_resources().get("GPU", 0) == 1, "the GPU is free")
    alone = train("gpu-one", resources={"CPU": 1, "GPU": 1})
    assert alone(steps=6).digest == alone.local(steps=6).digest
