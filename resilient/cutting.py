"""Breaking connections between two living processes of this machine, as a failing network would.

A connection's descriptor is borrowed from the process that owns it (pidfd_getfd, Linux 5.6) and shut down: both ends
see it break at that moment, and nothing else of them is touched. It needs the right to trace the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Callable, Iterable

import psutil

PIDFD_GETFD = 438
"""The system call's number, the same on all architectures."""

Link = tuple[str, int]
_libc = ctypes.CDLL(None, use_errno=True)


def cut_between(pid: int, others: Iterable[int], chosen: Callable[[Link, Link], bool] = lambda own, peer: True) -> int:
    """Break all established TCP connections of this process with any of the others, or those chosen by both ends. How
    many those were.

    Raises PermissionError where the kernel does not let this process do so.
    """
    ends = {own for other in others for own in _ends(other).values()}
    found = {descriptor for descriptor, own, peer in _connections(pid) if peer in ends and chosen(own, peer)}
    pidfd = os.pidfd_open(pid)
    try:
        return sum(_shut(pidfd, descriptor) for descriptor in sorted(found))
    finally:
        os.close(pidfd)


def _connections(pid: int) -> list[tuple[int, Link, Link]]:
    """Descriptor, own address and the peer's, of each that is established."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [
            (each.fd, (each.laddr.ip, each.laddr.port), (each.raddr.ip, each.raddr.port))
            for each in psutil.Process(pid).net_connections("tcp")
            if each.status == psutil.CONN_ESTABLISHED
        ]
    return []


def _ends(pid: int) -> dict[int, Link]:
    return {descriptor: own for descriptor, own, _ in _connections(pid)}


def _shut(pidfd: int, descriptor: int) -> bool:
    borrowed = _libc.syscall(PIDFD_GETFD, pidfd, descriptor, 0)
    if borrowed < 0:
        error = ctypes.get_errno()
        if error == 1:  # EPERM
            raise PermissionError(error, "the kernel does not let this process borrow another one's connections")
        return False  # it has been closed meanwhile
    with socket.socket(fileno=borrowed) as connection, contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
        return True
    return False
