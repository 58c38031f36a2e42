"""How processes see each other live: status words, leases, lifelines."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.lease import Lease
from actors.lifeline import Lifeline, Lifelines
from actors.words import ACTIVITIES, Words, read_words

LIMIT_S = 10.0


class Clock:
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        patch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


# Words


def test_words_there_and_back(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "run" / "rank"
    words = Words(path)
    assert read_words(path) == (0, "starting", 0, 0, 0.0)
    words.moved("computing", 3, 2)
    assert read_words(path) == (1, "computing", 3, 2, 0.0)
    for activity in ACTIVITIES:
        words.activity(activity)
        assert read_words(path) == (1, activity, 3, 2, 0.0)
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_longest_movement_leaves_out_the_first_and_what_was_no_computing(tmp_path: Path, clock: Clock) -> None:
    words = Words(tmp_path / "rank")

    def moved_after(seconds: float, activity: str = "computing") -> float:
        clock.now += seconds
        words.moved(activity, 0, 1)
        found = read_words(tmp_path / "rank")
        assert found is not None
        return found[4]

    assert moved_after(50.0) == 0.0
    assert moved_after(40.0) == 0.0
    assert moved_after(2.0) == 2.0
    assert moved_after(1.0, "waiting") == 2.0
    assert moved_after(30.0) == 2.0
    words.activity("paused")
    assert moved_after(60.0) == 2.0
    assert moved_after(3.0) == 3.0


@pytest.mark.parametrize("content", [None, b"", b"\0" * 39])
def test_no_words(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "rank").write_bytes(content)
    assert read_words(tmp_path / "rank") is None


def test_a_new_incarnation_begins_anew(tmp_path: Path) -> None:
    Words(tmp_path / "rank").moved("computing", 9, 9)
    Words(tmp_path / "rank")
    assert read_words(tmp_path / "rank") == (0, "starting", 0, 0, 0.0)


# Leases


def test_a_lease_ends_without_renewal(clock: Clock) -> None:
    lease = Lease(10.0)
    for _ in range(10):
        clock.now += 1.0
        assert not lease.expired()
    clock.now += 1.0
    assert lease.expired()


def test_a_renewed_lease_lives(clock: Clock) -> None:
    lease = Lease(10.0)
    for second in range(100):
        clock.now += 1.0
        assert not lease.expired()
        if second % 9 == 0:
            lease.renew()


def test_time_in_which_this_process_stood_still_counts_against_nobody(clock: Clock) -> None:
    lease = Lease(10.0)
    clock.now += 1.0
    assert not lease.expired()
    clock.now += 3600.0
    assert not lease.expired()
    for _ in range(9):
        clock.now += 1.0
        assert not lease.expired()
    clock.now += 1.0
    assert lease.expired()


# Lifelines


class Server:
    def __init__(self) -> None:
        self.lost: queue.Queue[str] = queue.Queue()
        self.lifelines = Lifelines("127.0.0.1", "secret", self.lost.put)

    def next(self) -> str:
        return self.lost.get(timeout=LIMIT_S)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.lifelines.close()


def end(line: Lifeline) -> None:
    """As the kernel does when the process ends."""
    assert line._connection is not None
    line._connection.close()


def test_the_end_of_a_process_is_told_by_name(server: Server) -> None:
    one, other = Lifeline("rank 1 n", "secret"), Lifeline("rank 2 n", "secret")
    one.hold(server.lifelines.address)
    other.hold(server.lifelines.address)
    end(other)
    assert server.next() == "rank 2 n"
    end(one)
    assert server.next() == "rank 1 n"


@pytest.mark.parametrize(
    ("name", "secret"),
    [("rank 1 n", "guess"), ("", "secret"), ("rank one", "secret"), ("rank 1 n", ""), ("rank 1 n", "sécret")],
)
def test_who_does_not_know_the_secret_is_ignored(server: Server, name: str, secret: str) -> None:
    stranger, known = Lifeline(name, secret), Lifeline("rank 9 n", "secret")
    stranger.hold(server.lifelines.address)
    assert stranger._connection is None
    known.hold(server.lifelines.address)
    end(known)
    assert server.next() == "rank 9 n"
    assert server.lost.empty()


def test_the_secret_is_never_sent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        line = Lifeline("rank 1 n", "secret")
        thread = threading.Thread(target=line.hold, args=(listener.getsockname(),))
        thread.start()
        connected, _ = listener.accept()
        with connected:
            connected.sendall(b"RSLTRSF1" + bytes(32))
            assert b"secret" not in connected.recv(1000)
        thread.join(LIMIT_S)
    assert line._connection is None


def test_a_lifeline_moves_to_a_new_controller(server: Server) -> None:
    successor = Server()
    line = Lifeline("rank 1 n", "secret")
    line.hold(server.lifelines.address)
    line.hold(server.lifelines.address)
    assert server.lost.empty()
    line.hold(successor.lifelines.address)
    assert server.next() == "rank 1 n"
    assert successor.lost.empty()
    end(line)
    assert successor.next() == "rank 1 n"
    successor.lifelines.close()


def test_a_controller_that_has_gone_is_no_error() -> None:
    server = Server()
    address = server.lifelines.address
    server.lifelines.close()
    Lifeline("rank 1 n", "secret").hold(("127.0.0.1", 1))
    assert address[0] == "127.0.0.1"
