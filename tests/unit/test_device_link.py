"""Transfers between devices, where there is none: a fake with NCCL's signatures, and the host as the device."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from actors.device_link import DeviceLink, NcclLink, StagedLink, _ending, wait_for_ended
from actors.group import Group
from actors.group_store import GroupStoreServer
from actors.pending import LinkBroken, Move, Waits
from tests.nccl import Nccl

CPU = torch.device("cpu")
LIMIT_S = 30.0


class Stream:
    """The device's: what is enqueued is done once `done` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done, self.asked = threading.Event(), threading.Event()
        monkeypatch.setattr("actors.device_link.Mark", lambda device: self)

    def has_come(self) -> bool:
        self.asked.set()
        return self.done.is_set()

    def wait(self) -> None:
        assert self.done.wait(LIMIT_S)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    return Stream(monkeypatch)


def move(count: int = 8, peer: int = 1) -> Move:
    return Move(data=torch.zeros(count, dtype=torch.uint8), peer=peer, tag=5)


def test_a_batch_is_posted_as_a_backend_takes_it_and_an_empty_one_is_none(stream: Stream) -> None:
    from torch._C._distributed_c10d import Backend

    assert "device" not in str(Backend._start_coalescing.__doc__ or "")
    nccl = Nccl()
    link = NcclLink(nccl, CPU, Waits())
    stream.done.set()
    link.post([move()], [move(), move()]).wait()
    link.post([], []).wait()
    assert nccl.batches == [["recv", "recv", "send"], []]


def test_a_transfer_is_complete_when_the_device_is(stream: Stream) -> None:
    waits = Waits()
    pending = NcclLink(Nccl(), CPU, waits).post([], [move()])
    pending.follow()  # does not wait
    thread = threading.Thread(target=pending.wait)
    thread.start()
    assert stream.asked.wait(LIMIT_S) and thread.is_alive() and waits.lasted_s() > 0
    stream.done.set()
    thread.join(LIMIT_S)
    assert not thread.is_alive() and waits.lasted_s() == 0


def test_what_an_abort_has_ended_is_not_taken_for_complete(stream: Stream) -> None:
    """It ends the kernels as if they had brought something. Neither does it keep the one who gives up."""
    nccl = Nccl()
    link = NcclLink(nccl, CPU, Waits())
    pending, failed = link.post([], [move()]), list[LinkBroken]()

    def wait() -> None:
        try:
            pending.wait()
        except LinkBroken as error:
            failed.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    assert stream.asked.wait(LIMIT_S)
    held: list[object] = []
    link.give_up(held)  # returns, though the abort takes its time
    link.give_up(held)
    assert nccl.aborting.wait(LIMIT_S)
    assert thread.is_alive(), "what it holds goes when it ends, and may still be written"
    stream.done.set()
    nccl.may_abort.set()
    thread.join(LIMIT_S)
    assert len(failed) == 1
    wait_for_ended()
    assert not _ending
    with pytest.raises(LinkBroken):
        link.post([], [move()]).wait()


def test_a_link_that_reports_an_error_is_broken(stream: Stream) -> None:
    nccl = Nccl()
    pending = NcclLink(nccl, CPU, Waits()).post([], [move()])
    nccl.error = "REMOTE_ERROR"
    with pytest.raises(LinkBroken, match="REMOTE_ERROR"):
        pending.wait()


def test_what_an_abandoned_exchange_may_write_into_stays_until_it_is_ended() -> None:
    nccl = Nccl()
    link = NcclLink(nccl, CPU, Waits())
    held: Any = torch.zeros(4)
    seen = [StorageWeakRef(held.untyped_storage())]  # type: ignore[no-untyped-call]
    link.give_up(held)
    del held
    assert nccl.aborting.wait(LIMIT_S) and not seen[0].expired()
    nccl.may_abort.set()
    wait_for_ended()
    assert seen[0].expired()


def test_what_could_not_be_ended_keeps_its_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept: list[object] = []
    monkeypatch.setattr("actors.device_link._unended", kept)
    held = torch.zeros(4)
    NcclLink(object(), CPU, Waits()).give_up(held)  # what it is given can't abort
    wait_for_ended()
    assert kept == [held] and "abort" in capsys.readouterr().err


# Through host memory


def formed(names: list[str], work: Callable[[Group], Any]) -> list[Any]:
    server = GroupStoreServer("127.0.0.1", "secret")

    def one(rank: int) -> Any:
        group = Group(
            store=("127.0.0.1", server.port),
            secret="secret",
            host="127.0.0.1",
            prefix="p",
            rank=rank,
            size=len(names),
            device=CPU,
            device_name=names[rank],
        )
        found = work(group)
        group.minimum([0])
        return found

    with ThreadPoolExecutor(len(names)) as threads:
        found = [each.result(LIMIT_S) for each in [threads.submit(one, rank) for rank in range(len(names))]]
    server.close()
    return found


def swapped(group: Group) -> tuple[bool, bytes, float]:
    peer = 1 - group.rank if group.rank < 2 else None
    got, total = torch.zeros(300, dtype=torch.uint8), torch.tensor([group.rank + 1.0])
    if peer is not None:
        mine = torch.full((300,), group.rank + 7, dtype=torch.uint8)
        group.post([Move(data=mine, peer=peer, tag=3)], [Move(data=got, peer=peer, tag=3)]).wait()
    group.sum(total)
    return group.is_staged, bytes(got[:2].tolist()), float(total)


def test_ranks_that_share_a_device_go_through_host_memory_all_of_them() -> None:
    """Whichever two it are: all ranks see the same names."""
    assert formed(["x", "x", "y"], swapped) == [
        (True, b"\x08\x08", 6.0),
        (True, b"\x07\x07", 6.0),
        (True, b"\0\0", 6.0),
    ]


def test_each_with_a_device_of_its_own_has_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def connect(store: Any, rank: int, size: int, device: torch.device, waits: Waits) -> DeviceLink:
        made.append(rank)
        return NcclLink(Nccl(), device, waits)

    monkeypatch.setattr(NcclLink, "connect", connect)
    assert formed(["x", "y"], lambda group: group.is_staged) == [False, False]
    assert sorted(made) == [0, 1]
    assert formed(["", ""], lambda group: group._link) == [None, None]


def test_host_memory_of_a_broken_transfer_stays_and_of_a_complete_one_goes() -> None:
    def fails() -> None:
        raise RuntimeError("connection reset")

    works = [SimpleNamespace(wait=lambda: None), SimpleNamespace(wait=fails)]
    gloo = SimpleNamespace(recv=lambda *_: works[0], send=lambda *_: works[1])
    link = StagedLink(gloo, CPU, Waits())
    link.post([], [move()]).wait()
    assert not link._under_way
    with pytest.raises(LinkBroken, match="connection reset"):
        link.post([move()], []).wait()
    assert len(link._under_way) == 1
