"""Slots as ranks write them, and vaults beside each other, in one process or in one each."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from actors.ring import Ring
from actors.transfer import Stream
from actors.vault import Vault, wake_vault
from snapshot.arena import Slot, SlotHead, find_slots, required_bytes
from snapshot.core.branches import Branch, Lineage
from snapshot.core.election import Elected, NotRecoverable, elect
from snapshot.core.inventory import Inventory, SnapshotKey
from snapshot.core.lifecycle import Ordinal
from snapshot.core.ranges import merged
from snapshot.core.stripes import Group

RUN, SECRET, SKELETON_BYTES = "gpt", "between us", 100
LINEAGE = Lineage(branches=(Branch(number=0),))


def key_of(step: int, *, attempt: int = 1, branch: int = 0, generation: int = 1) -> SnapshotKey:
    return SnapshotKey(attempt=attempt, branch=branch, step=step, generation=generation)


def packed(step: int, branch: int = 0) -> int:
    return Ordinal(branch, step).packed()


def ring_of(nodes: str, parity: int, ranks_each: int = 1, generation: int = 1) -> Ring:
    """nodes: of one letter each. Ranks are numbered through."""
    shares = {node: tuple(range(n * ranks_each, (n + 1) * ranks_each)) for n, node in enumerate(nodes)}
    return Ring(generation=generation, group=Group(nodes=tuple(nodes), parity=parity), shares=shares)


def head_of(ring: Ring, key: SnapshotKey, rank: int, share_bytes: int, more_bytes: int = 1000) -> SlotHead:
    """Shares of different lengths: rank r has r * more_bytes more than share_bytes."""
    world = sum(len(ranks) for ranks in ring.shares.values())
    cuts = [share_bytes * number + more_bytes * number * (number - 1) // 2 for number in range(world + 1)]
    length = cuts[rank + 1] - cuts[rank]
    ends = (*range(SKELETON_BYTES, SKELETON_BYTES + length, 1 << 18), SKELETON_BYTES + length)
    return SlotHead(
        run=RUN,
        attempt=key.attempt,
        branch=key.branch,
        generation=key.generation,
        step=key.step,
        member=rank + 100,
        rank=rank,
        world=world,
        ranges=merged([(cuts[rank], cuts[rank + 1])]),
        state_bytes=cuts[-1],
        chunks=ends,
        skeleton="5ce1e704",
        skeleton_bytes=SKELETON_BYTES,
    )


def payload_of(head: SlotHead) -> bytes:
    """Another one for each rank and snapshot."""
    return random.Random(f"{head.rank} {head.key}").randbytes(head.payload_bytes)


def write_slots(
    folder: Path,
    ring: Ring,
    key: SnapshotKey,
    ranks: Sequence[int],
    share_bytes: int = 300_000,
    more_bytes: int = 1000,
    durable: bool = False,
) -> None:
    """As the ranks of a node do, each into another one of its three slots than the two steps before."""
    for rank in ranks:
        head = replace(head_of(ring, key, rank, share_bytes, more_bytes), durable=durable)
        path = folder / f"rank-{head.member}.slot-{key.step % 3}"
        if path.exists():
            path.unlink()
        with contextlib.closing(Slot.create(path, required_bytes(head))) as slot:
            slot.begin(head)[:] = payload_of(head)
            slot.commit()


def wait_for(what: Callable[[], object], limit_s: float = 10.0) -> None:
    """Until it is true."""
    deadline = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


@dataclass
class Nodes:
    """Vaults in one process, each with a folder of its own."""

    base: Path
    ring: Ring
    vaults: dict[str, Vault] = field(default_factory=dict)

    def folder(self, node: str) -> Path:
        return self.base / f"{RUN}-1-{node}"

    def start(self, nodes: str, older: Sequence[Path] = ()) -> None:
        for node in nodes:
            self.vaults[node] = Vault(
                run=RUN, attempt=1, node=node, folder=self.folder(node), secret=SECRET, ip="127.0.0.1", older=older
            )
        self.tell()

    def tell(self) -> None:
        """What the controller would."""
        addresses = {node: vault.address for node, vault in self.vaults.items()}
        for node, vault in self.vaults.items():
            if node in self.ring.group.nodes:
                vault.ring(self.ring)
            vault.peers(addresses)

    def stop(self, nodes: str) -> None:
        for node in nodes:
            self.vaults.pop(node).close()

    def write(self, step: int, nodes: str = "", share_bytes: int = 300_000) -> SnapshotKey:
        """All ranks capture this step, and tell their keepers."""
        key = key_of(step, generation=self.ring.generation)
        for node in nodes or self.ring.shares:
            write_slots(self.folder(node), self.ring, key, self.ring.ranks_on(node), share_bytes)
            wake_vault(self.folder(node))
        return key

    def protected(self, key: SnapshotKey, nodes: str = "") -> bool:
        return all(self.vaults[node].tally().protected == key for node in nodes or self.vaults)

    def write_protected(self, step: int, share_bytes: int = 300_000) -> SnapshotKey:
        key = self.write(step, share_bytes=share_bytes)
        wait_for(lambda: self.protected(key))
        return key

    def inventories(self) -> list[Inventory]:
        return [vault.inventory() for vault in self.vaults.values()]

    def elect(self) -> Elected | NotRecoverable:
        return elect(self.inventories(), LINEAGE)

    def rebuild(self) -> Elected:
        elected = self.elect()
        assert isinstance(elected, Elected), elected
        for vault in self.vaults.values():
            vault.decode(elected)
        for vault in self.vaults.values():
            vault.assemble(elected)
        return elected


@contextlib.contextmanager
def nodes_of(base: Path, ring: Ring, started: str | None = None) -> Iterator[Nodes]:
    nodes = Nodes(base, ring)
    try:
        nodes.start("".join(ring.group.nodes) if started is None else started)
        yield nodes
    finally:
        nodes.stop("".join(nodes.vaults))


def slots_in(folder: Path) -> Mapping[tuple[SnapshotKey, int], Path]:
    """By snapshot and rank."""
    found = {}
    for slot in find_slots(folder, "rank-*.slot-*"):
        if slot.head is not None:
            attempt, branch, step, generation = slot.head.key
            found[key_of(step, attempt=attempt, branch=branch, generation=generation), slot.head.rank] = slot.path
    return found


def flip(path: Path, at: int) -> None:
    """One bit of a file, as broken memory would."""
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 16]))


PUT_PAUSE_S = 0.0
"""So long a SlowVault leaves a PUT waiting before it reads on."""


class SlowVault(Vault):
    """It makes a file `put-seen` when a PUT is under way."""

    def _serve(self, request: dict[str, Any], stream: Stream) -> dict[str, Any]:
        if PUT_PAUSE_S and request["op"] == "put":
            (self._folder / "put-seen").touch()
            time.sleep(PUT_PAUSE_S)
        return super()._serve(request, stream)


class KeeperProcess:
    """A vault in a process of its own, as a keeper has it; its methods are called from here."""

    def __init__(self, base: Path, ring: Ring, node: str, limits: Mapping[str, float] | None = None) -> None:
        """limits: other values for limits of modules, by full name."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.node = node
        self.folder = base / f"{RUN}-1-{node}"
        self.process = context.Process(target=_keep, args=(theirs, self.folder, node, ring, dict(limits or {})))
        self.process.start()
        theirs.close()
        self._address: tuple[str, int] | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Waits until the process is there."""
        if self._address is None:
            self._address = self._answer(30.0)
        return self._address

    def call(self, method: str, *arguments: object, limit_s: float = 20.0) -> Any:
        """What the method returns; raises what it raises, AssertionError if it takes too long."""
        assert self.address
        self._pipe.send((method, arguments))
        return self._answer(limit_s)

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait until it has gone."""
        self.process.kill()
        self.process.join()
        self._pipe.close()
        self.process.close()

    def _answer(self, limit_s: float) -> Any:
        assert self._pipe.poll(limit_s), f"keeper {self.node} does not answer"
        kind, answer = self._pipe.recv()
        if kind == "raised":
            raise answer
        return answer


def _keep(pipe: Connection, folder: Path, node: str, ring: Ring, limits: Mapping[str, float]) -> None:
    for name, value in limits.items():
        module, _, attribute = name.rpartition(".")
        setattr(importlib.import_module(module), attribute, value)
    vault = SlowVault(run=RUN, attempt=1, node=node, folder=folder, secret=SECRET, ip="127.0.0.1")
    vault.ring(ring)
    pipe.send(("returned", vault.address))
    with contextlib.suppress(EOFError):  # the test has ended
        while True:
            method, arguments = pipe.recv()
            try:
                pipe.send(("returned", getattr(vault, method)(*arguments)))
            except Exception as error:  # noqa: BLE001 - it is raised in the test
                pipe.send(("raised", error))
