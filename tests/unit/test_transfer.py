"""Byte streams between keepers: what arrives is what was sent, and whatever goes wrong ends soon and is named."""

from __future__ import annotations

import contextlib
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors import greeting
from actors import stream as wires
from actors.transfer import (
    Connection,
    NotAuthentic,
    PeerLost,
    Server,
    Stream,
    TransferCancelled,
    TransferCorrupt,
    TransferError,
    TransferRefused,
)

ROOT = Path(__file__).parents[2]
SOON_S = 5.0
"""Promised within a second; machines that run tests are busy."""
LIMIT_S = 30.0
MIB = 1 << 20


class Keeper:
    """Stores what it is sent, sends what it stores, and does worse when it is asked to."""

    def __init__(self) -> None:
        self.stored = bytearray()
        self.asleep = threading.Event()
        self.wake = threading.Event()

    def __call__(self, request: dict[str, Any], stream: Stream) -> dict[str, Any]:
        return getattr(self, request["do"])(request, stream)

    def echo(self, request: dict[str, Any], stream: Stream) -> dict[str, Any]:
        return request

    def put(self, request: dict[str, Any], stream: Stream) -> dict[str, Any]:
        self.stored = bytearray(request["bytes"])
        return {"received": stream.receive_into(self.stored)}

    def put_by_frames(self, request: dict[str, Any], stream: Stream) -> dict[str, Any]:
        self.stored = bytearray()
        sizes = []
        for frame in stream.frames():
            self.stored += frame
            sizes.append(len(frame))
        return {"frames": sizes}

    def get(self, request: dict[str, Any], stream: Stream) -> dict[str, Any]:
        stream.send([memoryview(self.stored)])
        return {"sent": len(self.stored)}

    def sleep(self, request: dict[str, Any], stream: Stream) -> dict[str, Any]:
        self.asleep.set()
        self.wake.wait(LIMIT_S)
        return {}

    def refuse(self, request: dict[str, Any], stream: Stream) -> dict[str, Any]:
        raise ValueError("generation 4 is over")

    def refuse_in_the_middle(self, request: dict[str, Any], stream: Stream) -> dict[str, Any]:
        stream.send([bytes(3 * MIB)])
        raise KeyError("chunk 3")

    def send_for_ever(self, request: dict[str, Any], stream: Stream) -> dict[str, Any]:
        stream.send(bytes(MIB) for _ in range(1 << 40))
        return {}

    def take_for_ever(self, request: dict[str, Any], stream: Stream) -> dict[str, Any]:
        return {"bytes": sum(len(frame) for frame in stream.frames())}


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    keeper = Keeper()
    yield keeper
    keeper.wake.set()


@pytest.fixture
def server(keeper: Keeper) -> Iterator[Server]:
    server = Server("127.0.0.1", "secret", keeper)
    yield server
    keeper.wake.set()
    server.close()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("transfer")] == []


@pytest.fixture
def connection(server: Server) -> Iterator[Connection]:
    with contextlib.closing(Connection.open(server.address, "secret", LIMIT_S, "the keeper of a")) as connection:
        yield connection


def assert_serves(server: Server) -> None:
    with contextlib.closing(Connection.open(server.address, "secret", LIMIT_S)) as known:
        assert known.request({"do": "echo"}) == {"do": "echo"}


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


@contextlib.contextmanager
def soon(expected: type[TransferError], match: str | None = None) -> Iterator[None]:
    begun = time.monotonic()
    with pytest.raises(expected, match=match):
        yield
    assert time.monotonic() - begun < SOON_S


@contextlib.contextmanager
def after(delay_s: float, act: Callable[[], None]) -> Iterator[None]:
    timer = threading.Timer(delay_s, act)
    timer.start()
    try:
        yield
    finally:
        timer.join()


# Round trips


@pytest.mark.parametrize("size", [0, 1, 12_345, MIB - 1, MIB, MIB + 1, 64 * MIB])
def test_there_and_back(connection: Connection, keeper: Keeper, size: int) -> None:
    data = content(size)
    assert connection.request({"do": "put", "bytes": size}, send=[data]) == {"received": size}
    assert keeper.stored == data
    target = bytearray(size)
    assert connection.request({"do": "get"}, receive_into=target) == {"sent": size}
    assert target == data


def test_many_buffers_by_frames(connection: Connection, keeper: Keeper) -> None:
    parts = [content(size) for size in (0, 7, 3 * MIB + 5, 1)]
    reply = connection.request({"do": "put_by_frames"}, send=iter(parts))
    assert reply == {"frames": [7, MIB, MIB, MIB, 5, 1]}
    assert keeper.stored == b"".join(parts)
    received = bytearray()
    assert connection.request({"do": "get"}, receive_into=received.extend) == {"sent": 3 * MIB + 13}
    assert received == b"".join(parts)


def test_small_requests_one_after_another(connection: Connection) -> None:
    for number in range(200):
        request = {"do": "echo", "number": number, "text": "Schlüssel", "none": None, "list": [1, [2.5]]}
        assert connection.request(request) == request


def test_ip_version_6(keeper: Keeper) -> None:
    try:
        server = Server("::1", "secret", keeper)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with contextlib.closing(server), contextlib.closing(Connection.open(server.address, "secret", LIMIT_S)) as one:
        assert one.request({"do": "echo"}) == {"do": "echo"}


def test_two_transfers_at_once(server: Server, keeper: Keeper) -> None:
    failed = []

    def stream(number: int) -> None:
        with contextlib.closing(Connection.open(server.address, "secret", LIMIT_S)) as connection:
            for _ in range(5):
                reply = connection.request({"do": "take_for_ever"}, send=[bytes(MIB + number)] * 4)
                if reply != {"bytes": 4 * (MIB + number)}:
                    failed.append(reply)

    threads = [threading.Thread(target=stream, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert failed == []
    assert not server.counts


# Refusals: the connection lives on


def test_a_refusal_has_its_reason(connection: Connection) -> None:
    with pytest.raises(TransferRefused, match=r"the keeper of a at 127.*ValueError: generation 4 is over"):
        connection.request({"do": "refuse"})
    assert connection.request({"do": "echo"}) == {"do": "echo"}
    with pytest.raises(TransferRefused, match="KeyError: 'do'"):
        connection.request({})
    assert connection.request({"do": "echo"}) == {"do": "echo"}


def test_a_refusal_stops_the_payload(connection: Connection) -> None:
    sent = 0

    def parts() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield bytes(MIB)

    with pytest.raises(TransferRefused, match="generation 4"):
        connection.request({"do": "refuse"}, send=parts())
    assert connection.request({"do": "echo"}) == {"do": "echo"}


def test_a_refusal_in_the_middle_of_the_reply(connection: Connection) -> None:
    with pytest.raises(TransferRefused, match="chunk 3"):
        connection.request({"do": "refuse_in_the_middle"}, receive_into=bytearray(10 * MIB))
    with pytest.raises(TransferRefused, match="chunk 3"):
        connection.request({"do": "refuse_in_the_middle"}, receive_into=lambda frame: None)
    assert connection.request({"do": "echo"}) == {"do": "echo"}


@pytest.mark.parametrize("difference", [-1, 1])
def test_a_payload_of_another_length_is_refused(connection: Connection, difference: int) -> None:
    data = content(3 * MIB)
    with pytest.raises(TransferRefused, match="the payload of"):
        connection.request({"do": "put", "bytes": len(data) + difference}, send=[data])
    connection.request({"do": "put", "bytes": len(data)}, send=[data])
    with pytest.raises(ValueError, match=r"the payload of the keeper of a"):
        connection.request({"do": "get"}, receive_into=bytearray(len(data) + difference))
    with pytest.raises(PeerLost):
        connection.request({"do": "echo"})


def test_an_unexpected_payload(connection: Connection, keeper: Keeper) -> None:
    keeper.stored = bytearray(10)
    with pytest.raises(ValueError, match="longer than 0 bytes"):
        connection.request({"do": "get"})


def test_a_consumer_that_fails(connection: Connection, keeper: Keeper) -> None:
    keeper.stored = bytearray(5 * MIB)

    def consume(frame: memoryview) -> None:
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="disk"):
        connection.request({"do": "get"}, receive_into=consume)
    with pytest.raises(PeerLost):
        connection.request({"do": "echo"})


def test_oversize_and_impossible_requests(connection: Connection) -> None:
    for fields, error in (
        ({"do": "x" * 65536}, ValueError),
        ({"do": float("nan")}, ValueError),
        ({"do": b""}, TypeError),
    ):
        with contextlib.closing(another(connection)) as each, pytest.raises(error):
            each.request(fields)


def another(connection: Connection) -> Connection:
    address = connection._wire._socket.getpeername()
    return Connection.open(address, "secret", LIMIT_S)


# Strangers


def test_a_client_with_a_wrong_secret(server: Server) -> None:
    with soon(NotAuthentic, "keeper of a"):
        Connection.open(server.address, "guess", LIMIT_S, "the keeper of a")
    assert server.counts == {"not greeted": 1}


def test_a_server_with_a_wrong_secret() -> None:
    """One that accepts anybody's proof, in the hope of getting their data."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def pretend() -> None:
            connected, _ = listener.accept()
            with connected:
                connected.sendall(greeting._MAGIC + bytes(32))
                proof = connected.recv(64, socket.MSG_WAITALL)
                connected.sendall(proof[32:])  # reflected: it has none of its own

        thread = threading.Thread(target=pretend)
        thread.start()
        with soon(NotAuthentic, "does not know the run's secret"):
            Connection.open(listener.getsockname(), "secret", LIMIT_S)
        thread.join()


def test_another_service_at_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connected, _ = listener.accept()
            with connected:
                connected.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        with soon(NotAuthentic, "greets otherwise"):
            Connection.open(listener.getsockname(), "secret", LIMIT_S)
        thread.join()


@pytest.mark.parametrize("seed", range(5))
def test_garbage_at_the_port(server: Server, seed: int) -> None:
    garbage = random.Random(seed).randbytes(100_000 if seed else 30)
    with socket.create_connection(server.address) as stranger:
        stranger.settimeout(LIMIT_S)
        with contextlib.suppress(OSError):
            stranger.sendall(garbage)
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(100):
                pass
    until(lambda: server.counts["not greeted"] == 1)
    assert_serves(server)


def test_strangers_that_say_nothing_are_hung_up_on(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greeting, "GREETING_LIMIT_S", 0.1)
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(server.address)) for _ in range(100)]
        for each in silent:
            each.settimeout(LIMIT_S)
            with contextlib.suppress(ConnectionResetError):
                assert len(each.recv(100, socket.MSG_WAITALL)) in (0, 40)  # hung up on, before or after the nonce
    until(lambda: server.counts.total() == 100)
    monkeypatch.undo()
    assert_serves(server)


def test_a_trickling_stranger_has_no_more_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greeting, "GREETING_LIMIT_S", 0.3)
    with socket.create_connection(server.address) as stranger, pytest.raises(ConnectionError):
        for _ in range(60):  # a proof ends at 64
            stranger.send(b"x")
            time.sleep(0.1)
    assert server.counts == {"not greeted": 1}


def test_a_greeting_may_come_in_pieces(server: Server) -> None:
    with socket.create_connection(server.address) as peer:
        peer.settimeout(LIMIT_S)
        nonce = peer.recv(40, socket.MSG_WAITALL)[8:]
        hello = bytes(32) + greeting._proof("secret", b"client", nonce, bytes(32))
        for start in range(0, 64, 20):
            peer.send(hello[start : start + 20])
            time.sleep(0.02)
        assert peer.recv(32, socket.MSG_WAITALL) == greeting._proof("secret", b"server", nonce, bytes(32))


def test_silent_strangers_shut_no_peer_out(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(greeting.STRANGERS_LIMIT + 50):
            stack.enter_context(socket.create_connection(server.address))
        threads = threading.active_count()
        assert_serves(server)
        assert threading.active_count() <= threads + 1, "strangers have no threads"
        assert len(server._door._strangers) <= greeting.STRANGERS_LIMIT
        assert server.counts["too many strangers"] >= 50


def test_whoever_knocks_most_often_makes_room(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        rare = socket.create_connection(server.address, source_address=("127.0.0.2", 0))
        stack.enter_context(rare)
        for _ in range(greeting.STRANGERS_LIMIT + 50):
            stack.enter_context(socket.create_connection(server.address))
        until(lambda: server.counts["too many strangers"] >= 51)
        assert any(stranger.host == "127.0.0.2" for stranger in server._door._strangers)


def test_the_end_of_a_greeted_connection_is_told() -> None:
    gone: queue.Queue[str] = queue.Queue()
    server = Server("127.0.0.1", "secret", lambda request, stream: {"you": stream.peer}, gone.put)
    socket.create_connection(server.address).close()
    with contextlib.closing(Connection.open(server.address, "secret", LIMIT_S)) as connection:
        peer = connection.request({})["you"]
    assert gone.get(timeout=LIMIT_S) == peer and gone.empty()
    server.close()


def test_nobody_there() -> None:
    with soon(PeerLost, "the keeper of b at 127.0.0.1:1 can't be reached"):
        Connection.open(("127.0.0.1", 1), "secret", LIMIT_S, "the keeper of b")


# Damage on the way


class Proxy:
    """Passes bytes on, but for what `change` does to the client's, given the number of those before."""

    def __init__(self, address: tuple[str, int], change: Callable[[bytearray, int], None]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._thread = threading.Thread(target=self._run, args=(address, change))
        self._thread.start()

    def _run(self, address: tuple[str, int], change: Callable[[bytearray, int], None]) -> None:
        near, _ = self._listener.accept()
        with near, socket.create_connection(address) as far:
            back = threading.Thread(target=self._pass, args=(far, near, lambda data, at: None))
            back.start()
            self._pass(near, far, change)
            back.join()

    def _pass(self, source: socket.socket, sink: socket.socket, change: Callable[[bytearray, int], None]) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(1 << 16)):
                change(data, passed)
                passed += len(data)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._thread.join(LIMIT_S)
        self._listener.close()


def flip(position: int) -> Callable[[bytearray, int], None]:
    def change(data: bytearray, at: int) -> None:
        if at <= position < at + len(data):
            data[position - at] ^= 0x40

    return change


GREETING_BYTES, REQUEST_BYTES = 64, 16 + len('{"do": "put_by_frames"}')


@pytest.mark.parametrize(
    "position",
    [
        0,  # nonce
        40,  # proof
        *(GREETING_BYTES + n for n in (0, 3, 4, 7, 8, 15, 16, 20)),  # a message: length, kind, sum, JSON
        *(GREETING_BYTES + REQUEST_BYTES + n for n in (0, 2, 4, 9, 16, 70_000, 16 + 99_999)),  # a frame
        *(GREETING_BYTES + REQUEST_BYTES + 16 + 100_000 + n for n in (0, 4, 12)),  # the end
    ],
)
def test_a_flipped_byte_is_noticed(server: Server, keeper: Keeper, position: int) -> None:
    proxy = Proxy(server.address, flip(position))
    with (
        contextlib.closing(proxy),
        pytest.raises(TransferError),
        contextlib.closing(Connection.open(proxy.address, "secret", 2.0)) as connection,
        # A length that became larger has its receiver wait for more; so that the test need not wait, too.
        after(1.0, connection.cancel),
    ):
        connection.request({"do": "put_by_frames"}, send=[content(100_000)])
    until(lambda: server.counts["broken"] + server.counts["not greeted"] == 1)


def test_damage_is_told_to_the_receiver(
    connection: Connection, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper.stored = bytearray(content(3 * MIB))
    target = bytearray(3 * MIB)
    original = wires.xxhash.xxh3_64_intdigest

    hashed: list[int] = []

    class Damaging:
        """As if a byte of the last frame changed after the sender had hashed it."""

        @staticmethod
        def xxh3_64_intdigest(data: Any, seed: int) -> int:
            checksum = original(data, seed=seed)
            if len(data) == MIB and threading.current_thread().name.startswith("transfer"):
                hashed.append(checksum)
                keeper.stored[2 * MIB] ^= len(hashed) == 3
            return checksum

    monkeypatch.setattr(wires, "xxhash", Damaging)
    with pytest.raises(TransferCorrupt, match=r"1048576 bytes from the keeper of a at 127.* arrived damaged"):
        connection.request({"do": "get"}, receive_into=target)
    with pytest.raises(PeerLost):
        connection.request({"do": "echo"})


# Cancelling and losing


def test_cancel_while_the_peer_does_not_read(connection: Connection, keeper: Keeper) -> None:
    with after(0.3, connection.cancel), soon(TransferCancelled, "keeper of a"):
        connection.request({"do": "sleep"}, send=(bytes(MIB) for _ in range(1 << 40)))
    with soon(TransferCancelled):
        connection.request({"do": "echo"})


def test_cancel_while_the_peer_does_not_answer(connection: Connection, keeper: Keeper) -> None:
    with after(0.3, connection.cancel), soon(TransferCancelled):
        connection.request({"do": "sleep"})


def test_a_server_closes_whatever_goes_on(keeper: Keeper) -> None:
    server = Server("127.0.0.1", "secret", keeper)
    outcomes: list[str] = []
    opened: list[Connection] = []

    def use(fields: dict[str, Any], **kwargs: Any) -> None:
        connection = Connection.open(server.address, "secret", LIMIT_S)
        opened.append(connection)
        with contextlib.closing(connection):
            try:
                connection.request(fields, **kwargs)
            except PeerLost:
                outcomes.append("lost")

    slow = threading.Event()
    uses = [
        threading.Thread(target=use, args=({"do": "send_for_ever"},), kwargs={"receive_into": lambda frame: None}),
        threading.Thread(
            target=use, args=({"do": "send_for_ever"},), kwargs={"receive_into": lambda frame: slow.wait(LIMIT_S)}
        ),
        threading.Thread(
            target=use, args=({"do": "take_for_ever"},), kwargs={"send": (bytes(MIB) for _ in range(1 << 40))}
        ),
    ]
    idle = Connection.open(server.address, "secret", LIMIT_S)
    stranger = socket.create_connection(server.address)
    for thread in uses:
        thread.start()
    until(lambda: len(server._live) == 4 and len(opened) == 3)
    begun = time.monotonic()
    server.close()
    assert time.monotonic() - begun < SOON_S
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("transfer")] == []
    slow.set()
    for thread in uses:
        thread.join(LIMIT_S)
    assert outcomes == ["lost"] * 3
    with pytest.raises(PeerLost):
        idle.request({"do": "echo"})
    with pytest.raises(PeerLost):
        Connection.open(server.address, "secret", LIMIT_S)
    stranger.close()
    server.close()


class Peer:
    """A keeper that is a process."""

    CODE = """
import sys
from actors.transfer import Server

def serve(request, stream):
    if request["do"] == "take":
        return {"bytes": sum(len(frame) for frame in stream.frames())}
    if request["do"] == "give":
        stream.send(bytes(1 << 20) for _ in range(request["frames"]))
    return {}

print(*Server("127.0.0.1", "secret", serve).address, flush=True)
sys.stdin.read()
"""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
        )
        assert self.process.stdout is not None
        ip, port = self.process.stdout.readline().split()
        self.connection = Connection.open((ip, int(port)), "secret", LIMIT_S, "the keeper of b")

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def close(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def peer() -> Iterator[Peer]:
    with contextlib.closing(Peer()) as peer:
        yield peer


def many(act: Callable[[], None]) -> Iterator[bytes]:
    """Endless; something happens on the way."""
    for number in range(1 << 40):
        if number == 20:
            act()
        yield bytes(MIB)


def test_a_peer_killed_while_it_receives(peer: Peer) -> None:
    with soon(PeerLost, "the keeper of b at 127"):
        peer.connection.request({"do": "take"}, send=many(lambda: peer.signal(signal.SIGKILL)))


def test_a_peer_killed_while_it_sends(peer: Peer) -> None:
    received = 0

    def consume(frame: memoryview) -> None:
        nonlocal received
        received += 1
        if received == 20:
            peer.signal(signal.SIGKILL)

    with soon(PeerLost, "the keeper of b at 127"):
        peer.connection.request({"do": "give", "frames": 1 << 40}, receive_into=consume)


def test_cancel_while_the_peer_is_stopped(peer: Peer) -> None:
    with after(0.5, peer.connection.cancel), soon(TransferCancelled):
        peer.connection.request({"do": "take"}, send=many(lambda: peer.signal(signal.SIGSTOP)))


def test_memory_does_not_grow(peer: Peer) -> None:
    ours, theirs = psutil.Process(), psutil.Process(peer.process.pid)
    data, target = bytes(8 * MIB), bytearray(8 * MIB)

    def transfer_both_ways(times: int) -> None:
        for _ in range(times):
            assert peer.connection.request({"do": "take"}, send=[data]) == {"bytes": len(data)}
            peer.connection.request({"do": "give", "frames": 8}, receive_into=target)

    transfer_both_ways(5)
    before = ours.memory_info().rss, theirs.memory_info().rss
    transfer_both_ways(100)
    assert ours.memory_info().rss - before[0] < 8 * MIB
    assert theirs.memory_info().rss - before[1] < 8 * MIB
