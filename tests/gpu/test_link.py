"""NCCL as the runtime uses it, on a single device: what the fakes of the other tests take for granted."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from actors.device import NCCL_SETTINGS, Mark, is_device_error, name_of, survive_peers
from actors.device_link import wait_for_ended
from actors.group import Group
from actors.group_store import GroupStoreServer
from actors.pending import LinkBroken, Move

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[Group]:
    for name in NCCL_SETTINGS:
        monkeypatch.setenv(name, "")  # so that what is set below does not outlive the test
    survive_peers()
    server = GroupStoreServer("127.0.0.1", "secret")
    yield Group(
        store=("127.0.0.1", server.port),
        secret="secret",
        host="127.0.0.1",
        prefix="p",
        rank=0,
        size=1,
        device=DEVICE,
        device_name=name_of(DEVICE),
    )
    server.close()


def test_a_batch_to_itself_comes_and_an_empty_one_has_no_work(group: Group) -> None:
    assert not group.is_staged
    sent = torch.arange(200, dtype=torch.uint8, device=DEVICE)
    got = torch.zeros_like(sent)
    group.post([Move(data=sent, peer=0, tag=1)], [Move(data=got, peer=0, tag=1)]).wait()
    assert got.equal(sent)
    group.post([], []).wait()
    total = torch.ones(3, device=DEVICE)
    group.sum(total)
    assert total.tolist() == [1.0] * 3
    group.close()
    wait_for_ended()


def test_what_an_abort_ends_is_not_complete(group: Group) -> None:
    """A receive that nobody answers would last for ever."""
    got = torch.zeros(200, dtype=torch.uint8, device=DEVICE)
    torch.cuda._sleep(1 << 30)
    pending = group.post([Move(data=got.clone(), peer=0, tag=1)], [Move(data=got, peer=0, tag=1)])
    group.abandon(got)
    with pytest.raises(LinkBroken):
        pending.wait()
    wait_for_ended()
    Mark(DEVICE).wait()


def test_a_device_side_assert_is_the_devices_error() -> None:
    """In a process of its own, which can't use the device any more."""
    program = (
        "import torch; from actors.device import is_device_error, is_out_of_memory\n"
        "try:\n"
        "    torch.zeros(2, device='cuda')[torch.tensor([9], device='cuda')].sum().item()\n"
        "except RuntimeError as error:\n"
        "    raise SystemExit(0 if is_device_error(error) and not is_out_of_memory(error) else 3)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=120).returncode == 0
    with pytest.raises(torch.OutOfMemoryError) as found:
        torch.empty(1 << 50, dtype=torch.uint8, device=DEVICE)
    assert not is_device_error(found.value)
