"""The ranks of a generation find each other, and strangers neither read nor write where."""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from actors import group as groups
from actors import group_store, pending
from actors.group import Group, LinkBroken
from actors.group_store import GroupStore, GroupStoreServer
from actors.transfer import NotAuthentic, PeerLost, TransferRefused
from resilient.core.limits import Limits

LIMIT_S = 30.0
HOST = "127.0.0.1"


@pytest.fixture
def server() -> Iterator[GroupStoreServer]:
    server = GroupStoreServer(HOST, "secret")
    yield server
    server.close()


@pytest.fixture
def client(server: GroupStoreServer) -> Iterator[Callable[..., GroupStore]]:
    with contextlib.ExitStack() as stack:

        def opened(space: str = "1") -> GroupStore:
            store = GroupStore((HOST, server.port), "secret", space, LIMIT_S)
            stack.callback(store.close)
            return store

        yield opened


def together(*runs: Callable[[], Any]) -> list[Any]:
    """What each returns, at the same time, or the exception that it ends with."""
    with ThreadPoolExecutor(len(runs)) as threads:
        futures = [threads.submit(run) for run in runs]
        return [future.exception(LIMIT_S) or future.result() for future in futures]


def test_what_one_writes_the_others_read(server: GroupStoreServer, client: Callable[..., GroupStore]) -> None:
    one, other = client(), client()
    one.set("0/0", b"zero")
    assert together(lambda: other.get("0/1"), lambda: one.set("0/1", "one")) == [b"one", None]
    assert other.get("0/0") == b"zero" and other.check(["0/0"]) and not other.check(["0/2"])
    assert not client("2").check(["0/0"]), "of another generation"
    with contextlib.closing(one.clone()) as clone:
        assert clone.get("0/0") == b"zero"


def test_many_values_are_read(
    server: GroupStoreServer, client: Callable[..., GroupStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_store, "_AT_ONCE", 3)
    one = client()
    for number in range(10):
        one.set(str(number), bytes(number))
    assert client().get("9") == bytes(9)


def test_strangers_neither_read_nor_write(server: GroupStoreServer, client: Callable[..., GroupStore]) -> None:
    client().set("0/0", b"address")
    with pytest.raises(NotAuthentic):
        GroupStore((HOST, server.port), "guess", "1", LIMIT_S)
    with pytest.raises(RuntimeError):  # a DistError, but for torch 2.6
        dist.TCPStore(HOST, server.port, is_master=False, wait_for_workers=False, timeout=datetime.timedelta(seconds=1))
    listening = {each.laddr for each in psutil.Process().net_connections("tcp") if each.status == psutil.CONN_LISTEN}
    assert {address.ip for address in listening if address.port == server.port} == {HOST}


def test_a_key_is_written_once(server: GroupStoreServer, client: Callable[..., GroupStore]) -> None:
    one = client()
    one.set("0/0", b"address")
    one.set("0/0", b"address")
    with pytest.raises(TransferRefused, match="has been written before"):
        one.set("0/0", b"another")
    assert one.get("0/0") == b"address"


def test_memory_is_bounded(
    server: GroupStoreServer, client: Callable[..., GroupStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(10):
        client(str(number)).set("0/0", b"address")
    assert list(server._spaces) == ["6", "7", "8", "9"]
    monkeypatch.setattr(group_store, "LIMIT_BYTES", 100)
    with pytest.raises(TransferRefused, match="the store keeps 100 bytes"):
        client("9").set("0/1", bytes(90))
    monkeypatch.setattr(group_store, "VALUE_LIMIT_BYTES", 50)
    with pytest.raises(TransferRefused, match="51 bytes, more than 50"):
        client("9").set("0/2", bytes(51))
    client("9").set("0/3", bytes(50))


def test_what_nobody_writes_is_not_waited_for_for_ever(
    server: GroupStoreServer, client: Callable[..., GroupStore]
) -> None:
    with pytest.raises(TransferRefused, match="nobody has written 0/1"):
        client().wait(["0/1"], datetime.timedelta(seconds=0.05))


def test_the_end_of_the_server_ends_whoever_waits(server: GroupStoreServer, client: Callable[..., GroupStore]) -> None:
    waiting = client()
    lost, _ = together(lambda: waiting.get("0/1"), server.close)
    assert isinstance(lost, PeerLost | TransferRefused)


def test_a_store_that_is_away_is_a_broken_link(server: GroupStoreServer) -> None:
    server.close()
    with pytest.raises(LinkBroken, match="group could not form"):
        form(server, 0, 2)


# gloo's own connections


def form(server: GroupStoreServer, rank: int, size: int, secret: str = "secret") -> Group:
    device = torch.device("cpu")
    return Group(store=(HOST, server.port), secret=secret, host=HOST, prefix="g", rank=rank, size=size, device=device)


def listening() -> set[int]:
    return {each.laddr.port for each in psutil.Process().net_connections("tcp") if each.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize("says", [b"", b"x", bytes(5000), b"\xff" * 8])
def test_gloo_is_not_disturbed_by_strangers(server: GroupStoreServer, says: bytes) -> None:
    before = listening()

    def late() -> Group:
        while not (ports := listening() - before):
            pass
        for port, _ in itertools.product(ports, range(10)):
            stack.enter_context(socket.create_connection((HOST, port))).sendall(says)
        return form(server, 1, 2)

    with contextlib.ExitStack() as stack:
        formed = together(lambda: form(server, 0, 2), late)
        assert together(*(functools.partial(group.minimum, [rank]) for rank, group in enumerate(formed))) == [[0], [0]]


def test_whoever_takes_a_peers_place_must_prove_the_secret(
    server: GroupStoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gloo's numbers can be guessed, and the connection be taken by another process."""

    def wrong(self: Group, secret: str, prefix: str) -> None:
        prove(self, "guess" if self.rank else secret, prefix)

    prove = Group._prove
    monkeypatch.setattr(groups.Group, "_prove", wrong)
    failed = together(lambda: form(server, 0, 2), lambda: form(server, 1, 2))
    assert all(isinstance(error, LinkBroken) and "does not know the run's secret" in str(error) for error in failed)


def test_a_host_that_acknowledges_nothing_is_given_up_by_the_kernel(server: GroupStoreServer) -> None:
    """gloo itself would wait for ever."""
    before = {each.fd for each in psutil.Process().net_connections("tcp")}
    formed = together(lambda: form(server, 0, 2), lambda: form(server, 1, 2))
    pairs = [
        each
        for each in psutil.Process().net_connections("tcp")
        if each.fd not in before and each.status == psutil.CONN_ESTABLISHED
    ]
    limits = []
    for each in pairs:
        with socket.socket(fileno=os.dup(each.fd)) as connection:
            limits.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert len(limits) >= 2 and min(limits) > 0, "both ends of the pair"
    assert len(formed) == 2


def test_one_that_sends_its_state_to_a_hundred_others_is_seen_to_go_on() -> None:
    """At 1 Gbit/s, by which all go on at once. A generation that was formed again would only begin anew."""
    piece_s = 100 * pending.PIECE_BYTES / 125e6
    assert piece_s < Limits(min_workers=1, max_workers=101, detection_s=2.0).stall_s


def test_large_moves_go_in_pieces_and_each_is_progress(server: GroupStoreServer) -> None:
    one, other = together(lambda: form(server, 0, 2), lambda: form(server, 1, 2))
    count = 5 * pending.PIECE_BYTES // 2
    data, target, moved = (
        torch.arange(count, dtype=torch.int64).to(torch.uint8),
        torch.zeros(count, dtype=torch.uint8),
        [],
    )
    other._waits.moved = lambda: moved.append(1)
    sent = one.post_host([pending.Move(data=data, peer=1, tag=7)], [])
    other.post_host([], [pending.Move(data=target, peer=0, tag=7)]).wait()
    sent.wait()
    assert torch.equal(data, target)
    assert len(moved) == 1 + 3, "as it begins, and for each piece"
