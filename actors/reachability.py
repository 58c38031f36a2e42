"""Whether ranks can reach each other: a greeting, and a few packets there and back.

A connection alone would not tell: a link may carry small packets and drop large ones.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from .transfer import Address, Connection, Fields, Stream, TransferError

ECHO_BYTES = 64 << 10
AT_ONCE = 16


def unreachable(addresses: Mapping[int, Address], secret: str, limit_s: float) -> tuple[int, ...]:
    """Those that have not answered, ascending. Takes a few times `limit_s` at most for each sixteen of them."""
    if not addresses:
        return ()
    with ThreadPoolExecutor(min(AT_ONCE, len(addresses)), "reach") as threads:
        answers = threads.map(lambda address: _answers(address, secret, limit_s), addresses.values())
        return tuple(sorted(number for number, well in zip(addresses, answers, strict=True) if not well))


def _answers(address: Address, secret: str, limit_s: float) -> bool:
    try:
        connection = Connection.open(address, secret, limit_s)
    except TransferError:
        return False
    too_late = threading.Timer(limit_s, connection.cancel)
    too_late.daemon = True
    too_late.start()
    try:
        connection.request({"echo": True}, send=[bytes(ECHO_BYTES)], receive_into=bytearray(ECHO_BYTES))
    except TransferError:
        return False
    finally:
        too_late.cancel()
        connection.close()
    return True


def echo(stream: Stream) -> Fields:
    """What a server answers whoever tries to reach it."""
    sent = bytearray(ECHO_BYTES)
    stream.receive_into(sent)
    stream.send([sent])
    return {}
