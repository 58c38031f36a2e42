"""Whether ranks can reach each other."""

from __future__ import annotations

import contextlib
import socket
import threading

from actors.group_store import GroupStoreServer
from actors.reachability import unreachable

SECRET = "s"


def test_who_answers_is_reached_and_who_does_not_is_named() -> None:
    well, silent = GroupStoreServer("127.0.0.1", SECRET), socket.create_server(("127.0.0.1", 0))
    with socket.create_server(("127.0.0.1", 0)) as found:
        closed = found.getsockname()[1]
    addresses = {7: ("127.0.0.1", well.port), 3: ("127.0.0.1", closed), 5: silent.getsockname()}
    assert unreachable(addresses, SECRET, 0.5) == (3, 5)
    assert unreachable({7: addresses[7]}, "another run's", 0.5) == (7,)
    silent.close()
    well.close()


def test_a_link_that_drops_all_but_small_packets_is_no_link() -> None:
    """The greeting passes; what is larger never comes back."""
    well, front = GroupStoreServer("127.0.0.1", SECRET), socket.create_server(("127.0.0.1", 0))

    def one_way(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):  # either end may be gone
            while data := source.recv(1 << 16):
                if len(data) < 1000:
                    target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)

    def pass_on() -> None:
        with front.accept()[0] as here, socket.create_connection(("127.0.0.1", well.port)) as there:
            back = threading.Thread(target=one_way, args=(there, here))
            back.start()
            one_way(here, there)
            back.join()

    passing = threading.Thread(target=pass_on)
    passing.start()
    assert unreachable({1: front.getsockname()}, SECRET, 0.5) == (1,)
    passing.join()
    front.close()
    well.close()


def test_nobody_is_asked_for_nothing() -> None:
    assert unreachable({}, SECRET, 0.5) == ()
