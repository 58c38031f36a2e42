"""Keepers as processes, which are killed and stopped: nothing is lost that should not be, and nobody hangs."""

from __future__ import annotations

import contextlib
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from actors.ring import Ring
from actors.transfer import PeerLost
from actors.vault import Tally, fetch_slot
from snapshot.core.decoding import Decode, Read
from snapshot.core.election import Elected, NotRecoverable, elect
from snapshot.core.inventory import SnapshotKey
from snapshot.parity import PAYLOAD_AT
from tests.vaults import (
    LINEAGE,
    SECRET,
    KeeperProcess,
    flip,
    key_of,
    payload_of,
    ring_of,
    slots_in,
    wait_for,
    write_slots,
)

LARGE_BYTES = 16 << 20
"""More than fits into the buffers of a connection."""
QUICK = {"actors.links.STALL_LIMIT_S": 1.0, "actors.links.CONNECT_LIMIT_S": 0.3}


class Cluster:
    def __init__(self, base: Path, ring: Ring, limits: Mapping[str, float] | None = None) -> None:
        self.base, self.ring, self.limits = base, ring, dict(limits or {})
        self.keepers: dict[str, KeeperProcess] = {}
        self.start(*ring.group.nodes)

    def start(self, *nodes: str) -> None:
        for node in nodes:
            self.keepers[node] = KeeperProcess(self.base, self.ring, node, self.limits)
        self.tell()

    def tell(self) -> None:
        addresses = {node: keeper.address for node, keeper in self.keepers.items()}
        for keeper in self.keepers.values():
            keeper.call("peers", addresses)

    def write(self, step: int, nodes: str = "", share_bytes: int = 200_000) -> SnapshotKey:
        for node in nodes or self.keepers:
            ranks = self.ring.ranks_on(node)
            write_slots(self.keepers[node].folder, self.ring, key_of(step), ranks, share_bytes, more_bytes=10_000)
            self.keepers[node].call("wake")
        return key_of(step)

    def tally(self, node: str) -> Tally:
        found: Tally = self.keepers[node].call("tally")
        return found

    def wait_protected(self, key: SnapshotKey, nodes: str = "") -> None:
        wait_for(lambda: all(self.tally(node).protected == key for node in nodes or self.keepers), 30.0)

    def kill(self, *nodes: str, folder_too: bool = False) -> None:
        for node in nodes:
            keeper = self.keepers.pop(node)
            keeper.kill()
            if folder_too:
                shutil.rmtree(keeper.folder)

    def elect(self) -> Elected | NotRecoverable:
        return elect([keeper.call("inventory") for keeper in self.keepers.values()], LINEAGE)

    def rebuild(self) -> Elected:
        elected = self.elect()
        assert isinstance(elected, Elected), elected
        for step in ("decode", "assemble"):
            for keeper in self.keepers.values():
                keeper.call(step, elected)
        return elected

    def check(self, key: SnapshotKey) -> None:
        """All that was captured is there, bit for bit."""
        elected = self.elect()
        assert isinstance(elected, Elected) and elected.key == key, elected
        ranks = []
        for image in elected.images:
            assert isinstance(image, Read), image
            for shard in image.image.shards:
                address = self.keepers[image.held_by].address
                view = fetch_slot(address, SECRET, key=key, node=image.image.node, rank=shard.rank)
                assert bytes(view.payload) == payload_of(view.head())
                ranks.append(shard.rank)
        assert sorted(ranks) == list(range(len(ranks))) and len(ranks) == view.head().world


@pytest.fixture
def cluster_of(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    with contextlib.ExitStack() as stack:

        def make(ring: Ring, limits: Mapping[str, float] | None = None) -> Cluster:
            cluster = Cluster(tmp_path, ring, limits)
            stack.callback(lambda: cluster.kill(*cluster.keepers))
            return cluster

        yield make


def test_as_many_nodes_lost_as_there_is_parity_and_then_one_more(cluster_of: Callable[..., Cluster]) -> None:
    cluster = cluster_of(ring_of("abcd", 2, ranks_each=2))
    key = cluster.write(7)
    cluster.wait_protected(key)
    cluster.kill("b", "c", folder_too=True)
    cluster.tell()
    elected = cluster.rebuild()
    assert [image.image.node for image in elected.images if isinstance(image, Decode)] == ["b", "c"]
    cluster.check(key)
    cluster.kill("d", folder_too=True)
    found = cluster.elect()
    assert isinstance(found, NotRecoverable) and "step 7" in found.reason


def test_a_lost_node_and_flipped_bits_elsewhere(cluster_of: Callable[..., Cluster]) -> None:
    cluster = cluster_of(ring_of("abcd", 2))
    key = cluster.write(7, share_bytes=1_000_000)
    cluster.wait_protected(key)
    cluster.kill("a", folder_too=True)
    cluster.tell()
    # In the first piece: data of class 0, whose parity b still has.
    flip(slots_in(cluster.keepers["c"].folder)[key, 2], 10 * 4096)
    for path in cluster.keepers["d"].folder.glob("parity-*"):
        flip(path, PAYLOAD_AT + 20_000)
    elected = cluster.rebuild()
    assert [image.image.node for image in elected.images if isinstance(image, Decode)] == ["a", "c"]
    cluster.check(key)
    assert set(cluster.tally("c").oddities) == {"rotten pieces"}
    assert cluster.tally("d").dropped == {"rotten": 2}


@pytest.mark.parametrize("killed", ["sender", "receiver"])
def test_killed_in_mid_transfer(cluster_of: Callable[..., Cluster], killed: str) -> None:
    cluster = cluster_of(ring_of("ab", 1), {"tests.vaults.PUT_PAUSE_S": 1.0})
    key = cluster.write(3, nodes="a", share_bytes=LARGE_BYTES)
    wait_for((cluster.keepers["b"].folder / "put-seen").exists)
    assert cluster.tally("a").sent_bytes < LARGE_BYTES
    cluster.limits.clear()
    if killed == "sender":
        cluster.kill("a")
        wait_for(lambda: cluster.tally("b").dropped == {"PeerLost": 1})
        cluster.start("a")
    else:
        cluster.kill("b")
        cluster.start("b")
    cluster.write(key.step, nodes="b", share_bytes=LARGE_BYTES)
    cluster.wait_protected(key)
    cluster.kill("a", folder_too=True)
    cluster.tell()
    cluster.rebuild()
    cluster.check(key)


def test_a_keeper_that_is_stopped_holds_nobody_up_for_ever(cluster_of: Callable[..., Cluster]) -> None:
    cluster = cluster_of(ring_of("abc", 1), QUICK)
    key = cluster.write(1)
    cluster.wait_protected(key)
    stopped = cluster.keepers["c"]
    stopped.signal(signal.SIGSTOP)
    cluster.write(2, nodes="ab")
    wait_for(lambda: sum(cluster.tally("a").failures.values()) == 1, 20.0)
    assert set(cluster.tally("a").failures) <= {"peer stalled", "peer lost"}
    # The next one is not held up by it, nor is what the others hold of the one before.
    cluster.write(3, nodes="ab")
    wait_for(lambda: sum(cluster.tally("a").failures.values()) == 2, 20.0)
    inventories = {node: cluster.keepers[node].call("inventory") for node in "ab"}
    elected = elect(list(inventories.values()), LINEAGE)
    assert isinstance(elected, Elected) and elected.key == key
    for node in "ab":
        with contextlib.suppress(PeerLost):
            cluster.keepers[node].call("decode", elected)
        started = time.monotonic()
        cluster.keepers[node].call("close", limit_s=5.0)
        assert time.monotonic() - started < 3.0
    stopped.signal(signal.SIGCONT)


def test_a_keeper_that_was_stopped_and_goes_on_catches_up(cluster_of: Callable[..., Cluster]) -> None:
    cluster = cluster_of(ring_of("abc", 1))
    cluster.wait_protected(cluster.write(1))
    cluster.keepers["c"].signal(signal.SIGSTOP)
    key = cluster.write(2, nodes="ab")
    time.sleep(0.2)
    cluster.keepers["c"].signal(signal.SIGCONT)
    cluster.write(2, nodes="c")
    cluster.wait_protected(key)
    cluster.kill("b", folder_too=True)
    cluster.tell()
    cluster.rebuild()
    cluster.check(key)
