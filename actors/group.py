"""The communicator of one generation: build it, move bytes over it, or give it up.

It knows ranks and bytes and decides nothing. A group is never repaired: after a failure it is
abandoned, and the next generation builds its own.

What gloo does and does not do, which shapes this file:
    * no wait is given a timeout: a timeout would close all connections of the group;
    * nothing wakes a wait but the peer's process ending, so a group is used by one thread, which can
      be left behind, and an abandoned group stays referenced, since destroying it would block.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import socket
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .device_link import NEVER, DeviceLink, NcclLink, StagedLink, wait_for_ended
from .group_store import GroupStore
from .pending import LinkBroken, Move, Pending, Waits, link_errors, post_moves
from .stream import TransferError, tune

FORM_LIMIT_S = 300.0
"""A formation that takes longer has failed: far beyond what any cluster needs."""
PROOF_TAG, PROOF_BYTES = 1 << 24, 32

# torch's stubs lack these.
Gloo: Any = dist.ProcessGroupGloo
PrefixStore: Any = dist.PrefixStore  # type: ignore[attr-defined]
MINIMUM: Any = dist.ReduceOp.MIN

_abandoned: list[Group] = []


class Group:
    """Connections between all ranks of one generation."""

    def __init__(
        self,
        *,
        store: tuple[str, int],
        secret: str,
        host: str,
        prefix: str,
        rank: int,
        size: int,
        device: torch.device,
        device_name: str = "",
        waits: Waits | None = None,
    ) -> None:
        """Connect to all others; blocks until they have come too.

        store: address of the store that the plan names (see `group_store`). secret: the run's. host: this rank's own
        address. prefix: unique per run, attempt and generation. device_name: the same for ranks that share the device;
        "" if its memory is the host's. waits: shows how long others have been waited for. Raises LinkBroken when the
        store or a peer cannot be reached.
        """
        self.rank, self.size, self.device = rank, size, device
        self._waits = Waits() if waits is None else waits
        self.is_staged = False
        """Whether ranks share a device, so that its bytes go through host memory."""
        self._link: DeviceLink | None = None
        before, why = _sockets(), "generation's group could not form: "
        try:
            with link_errors(why), self._waits:
                self._store = GroupStore(store, secret, prefix, FORM_LIMIT_S)
                with contextlib.closing(self._store):  # all connections are made by then
                    self._control = Gloo(self._store, self.rank, self.size, _gloo_options(host))
                    self._prove(secret, prefix)
                    if device_name:
                        self._link = self._device_link(device_name)
        except TransferError as error:
            raise LinkBroken(f"{why}{error}") from error
        for descriptor in _sockets() - before:
            _tune(descriptor)

    def _device_link(self, device_name: str) -> DeviceLink:
        """The same kind on all ranks: they all see the same names."""
        names = self.gather_bytes(device_name.encode())
        self.is_staged = len(set(names)) < len(names)
        if self.is_staged:
            return StagedLink(self._control, self.device, self._waits)
        wait_for_ended()
        with self._waits:
            return NcclLink.connect(PrefixStore("nccl", self._store), self.rank, self.size, self.device, self._waits)

    def _prove(self, secret: str, prefix: str) -> None:
        """gloo takes a connection for a peer's if it brings the right number, which is no secret. So each pair proves
        over its connection that both ends know the run's."""
        mine = {peer: secrets.token_bytes(PROOF_BYTES) for peer in range(self.size) if peer != self.rank}

        def proof(sender: int, receiver: int, nonce: bytes) -> bytes:
            return hmac.digest(secret.encode(), f"{prefix} {sender} {receiver} ".encode() + nonce, "sha256")

        proofs = self._swap({peer: proof(self.rank, peer, nonce) for peer, nonce in self._swap(mine).items()})
        for peer, found in proofs.items():
            if not hmac.compare_digest(found, proof(peer, self.rank, mine[peer])):
                raise LinkBroken(f"what is connected in the place of rank {peer} does not know the run's secret")

    def _swap(self, mine: dict[int, bytes]) -> dict[int, bytes]:
        """Send something to each peer; what has come from each."""
        sends = [
            Move(data=torch.frombuffer(bytearray(data), dtype=torch.uint8), peer=peer, tag=PROOF_TAG)
            for peer, data in mine.items()
        ]
        receives = [Move(data=torch.empty(PROOF_BYTES, dtype=torch.uint8), peer=peer, tag=PROOF_TAG) for peer in mine]
        self.post_host(sends, receives).wait()
        return {move.peer: move.data.numpy().tobytes() for move in receives}

    def minimum(self, values: Sequence[int]) -> list[int]:
        """The element-wise minimum over all ranks of a few 64-bit integers."""
        vector = torch.tensor(values, dtype=torch.int64)
        options = dist.AllreduceOptions()
        options.reduceOp = MINIMUM
        Pending([self._control.allreduce([vector], options)], vector, self._waits).wait()
        return [int(value) for value in vector.tolist()]

    def gather(self, values: Sequence[int]) -> list[list[int]]:
        """Every rank's few 64-bit integers, in rank order; all must give equally many."""
        vector = torch.tensor(values, dtype=torch.int64)
        everyone = [torch.empty_like(vector) for _ in range(self.size)]
        Pending([self._control.allgather([everyone], [vector])], everyone, self._waits).wait()
        return [other.tolist() for other in everyone]

    def gather_bytes(self, text: bytes) -> list[bytes]:
        """Every rank's bytes, in rank order, of any length."""
        lengths = [length for (length,) in self.gather([len(text)])]
        mine = torch.zeros(max(*lengths, 1), dtype=torch.uint8)
        mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else mine[:0]
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        Pending([self._control.allgather([everyone], [mine])], everyone, self._waits).wait()
        pairs = zip(everyone, lengths, strict=True)
        return [other[:length].numpy().tobytes() for other, length in pairs]

    def sum(self, data: Tensor) -> None:
        """Plain all-reduce in place: fast, and in whatever order the library likes."""
        if self._link is not None:
            self._link.sum(data)
        else:
            Pending([self._control.allreduce([data], dist.AllreduceOptions())], data, self._waits).wait()

    def post(self, sends: Iterable[Move], receives: Iterable[Move]) -> Pending:
        """Begin transfers on the group's device. Pairs match by peer and tag, in order.

        On CPU every move goes its own way at once; on CUDA they are one batch, and all ranks must
        post their batches in the same order.
        """
        return self.post_host(sends, receives) if self._link is None else self._link.post(sends, receives)

    def post_host(self, sends: Iterable[Move], receives: Iterable[Move]) -> Pending:
        """The same for data in host memory, whatever the group's device."""
        return Pending(*post_moves(self._control, sends, receives), self._waits)

    def abandon(self, held: object = None) -> None:
        """Never use it again. Its thread may still be in it. held: what that may still write into on the device. Takes
        no time."""
        _abandoned.append(self)
        self.close(held)

    def close(self, held: object = None) -> None:
        """Nobody is in it any more, and the next has formed: give back what it has of the device."""
        if self._link is not None:
            self._link.give_up(held)


def _sockets() -> set[int]:
    """Descriptors of this process's sockets."""
    folder, found = "/proc/self/fd", set()
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):  # the listing's own, or closed meanwhile
            if os.readlink(f"{folder}/{name}").startswith("socket:"):
                found.add(int(name))
    return found


def _tune(descriptor: int) -> None:
    """gloo opens its connections itself, and has them wait for ever for a host that acknowledges nothing. What others
    have opened at the same time may be among these: it is theirs to close, and none is hurt by the limit."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
        if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
            tune(connection)


def _gloo_options(host: str) -> Any:
    options = Gloo._Options()
    options._timeout = NEVER
    options._devices = [Gloo.create_device(hostname=host)]
    options._threads = 2
    return options
