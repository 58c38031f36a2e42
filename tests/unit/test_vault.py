"""Vaults beside each other: what ranks commit is protected, and comes back bit for bit when nodes are lost."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import shutil
import socket
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors import parities
from actors.holdings import sealed_image
from actors.links import Links, Stalled
from actors.protecting import Attempt, _Delivery
from actors.ring import Ring, read_rings
from actors.standing import read_standing
from actors.transfer import Connection, NotAuthentic, PeerLost, TransferCancelled, TransferCorrupt, TransferRefused
from actors.vault import NotAsElected, Vault, fetch_slot, wake_vault
from snapshot.arena import Slot, SlotView, required_bytes
from snapshot.core.decoding import Decode, Read
from snapshot.core.election import Elected, NotRecoverable
from snapshot.core.inventory import NodeImage, SnapshotKey
from snapshot.core.stripes import Group
from snapshot.fields import image_fields, key_fields
from snapshot.image import ImageView
from snapshot.parity import PAYLOAD_AT
from snapshot.room import NoRoom
from snapshot.slot import PAGE_BYTES, SlotChanged, clear_words
from tests.vaults import (
    RUN,
    SECRET,
    Nodes,
    flip,
    head_of,
    key_of,
    nodes_of,
    packed,
    payload_of,
    ring_of,
    slots_in,
    wait_for,
    write_slots,
)


def check_all_slots(nodes: Nodes, elected: Elected | NotRecoverable, key: SnapshotKey) -> None:
    """Every rank's share can be fetched from whoever holds it, and is what the rank wrote."""
    assert isinstance(elected, Elected), elected
    assert elected.key == key
    ranks = []
    for image in elected.images:
        assert isinstance(image, Read), image
        for shard in image.image.shards:
            address = nodes.vaults[image.held_by].address
            view = fetch_slot(address, SECRET, key=key, node=image.image.node, rank=shard.rank)
            assert bytes(view.payload) == payload_of(view.head())
            ranks.append(shard.rank)
    assert sorted(ranks) == sorted(rank for ranks in nodes.ring.shares.values() for rank in ranks)


def lose(nodes: Nodes, names: str) -> None:
    """These nodes are gone, with all that was in their memory."""
    nodes.stop(names)
    for node in names:
        shutil.rmtree(nodes.folder(node))
    nodes.tell()


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Nodes]:
    with nodes_of(tmp_path, ring_of("abc", 1)) as nodes:
        yield nodes


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Nodes]:
    with nodes_of(tmp_path, ring_of("ab", 1)) as nodes:
        yield nodes


@pytest.mark.parametrize(
    ("names", "parity", "ranks_each", "lost"),
    [("ab", 1, 1, "a"), ("ab", 1, 2, "b"), ("abc", 1, 1, "b"), ("abc", 2, 1, "ac"), ("abcde", 2, 2, "ad")],
)
def test_lost_nodes_are_decoded(tmp_path: Path, names: str, parity: int, ranks_each: int, lost: str) -> None:
    with nodes_of(tmp_path, ring_of(names, parity, ranks_each)) as nodes:
        key = nodes.write_protected(7)
        assert all(read_standing(nodes.folder(node), 1).protected == 7 for node in names)
        check_all_slots(nodes, nodes.elect(), key)
        lose(nodes, lost)
        elected = nodes.rebuild()
        assert [image.image.node for image in elected.images if isinstance(image, Decode)] == sorted(lost)
        check_all_slots(nodes, nodes.elect(), key)
        for vault in nodes.vaults.values():
            assert not vault.tally().failures and not vault.tally().oddities and not vault.tally().dropped
        assert sum(vault.tally().decoded_bytes for vault in nodes.vaults.values()) > 0


def test_more_nodes_lost_than_there_is_parity(three: Nodes) -> None:
    three.write_protected(7)
    lose(three, "ab")
    found = three.elect()
    assert isinstance(found, NotRecoverable) and "step 7" in found.reason


def test_a_node_alone_protects_at_once(tmp_path: Path) -> None:
    with nodes_of(tmp_path, ring_of("a", 0, ranks_each=2)) as nodes:
        key = nodes.write_protected(3)
        check_all_slots(nodes, nodes.elect(), key)
        assert nodes.vaults["a"].tally().sent_bytes == 0


def test_a_node_without_ranks_holds_parity_and_has_none(tmp_path: Path) -> None:
    ring = replace(ring_of("abc", 1), shares={"a": (0,), "b": (1,)})
    with nodes_of(tmp_path, ring) as nodes:
        key = nodes.write(2)
        wait_for(lambda: nodes.protected(key, "ab"))
        assert nodes.vaults["c"].tally().snapshots_protected == 0
        lose(nodes, "a")
        nodes.rebuild()
        check_all_slots(nodes, nodes.elect(), key)


@pytest.mark.parametrize("lost", "abcd")
def test_images_of_very_different_lengths(tmp_path: Path, lost: str) -> None:
    """Those who come late have more, so blocks turn out to be longer than they were begun."""
    with nodes_of(tmp_path, ring_of("abcd", 1)) as nodes:
        for node in "abcd":
            ranks = nodes.ring.ranks_on(node)
            write_slots(nodes.folder(node), nodes.ring, key_of(1), ranks, share_bytes=1, more_bytes=700_000)
            vault = nodes.vaults[node]
            vault.wake()
            wait_for(lambda vault=vault: vault.tally().sent_bytes > 0)
        wait_for(lambda: nodes.protected(key_of(1)))
        lose(nodes, lost)
        nodes.rebuild()
        check_all_slots(nodes, nodes.elect(), key_of(1))


@pytest.mark.parametrize("at", [PAGE_BYTES * 4 + 77, 9, PAGE_BYTES + 20, 2 * PAGE_BYTES + 3])
def test_flipped_bits_in_a_slot_are_found_and_decoded(tmp_path: Path, at: int) -> None:
    """In the payload, the preamble, the head and the sums."""
    with nodes_of(tmp_path, ring_of("abcd", 1, ranks_each=2)) as nodes:
        key = nodes.write_protected(7, share_bytes=1_000_000)
        flip(slots_in(nodes.folder("b"))[key, 3], at)
        elected = nodes.rebuild()
        (decode,) = (image for image in elected.images if isinstance(image, Decode))
        assert decode.image.node == "b" and 1 <= len(decode.pieces) <= 3
        if at >= 2 * PAGE_BYTES:
            assert decode.held_by == "b", "only what is damaged is decoded"
        assert nodes.vaults["b"].tally().oddities
        check_all_slots(nodes, nodes.elect(), key)


def test_flipped_bits_in_parity_are_found_and_other_parity_is_used(tmp_path: Path) -> None:
    with nodes_of(tmp_path, ring_of("abcd", 2)) as nodes:
        key = nodes.write_protected(7)
        lose(nodes, "a")
        assert all(len(inventory.parities) == 2 for inventory in nodes.inventories())
        for path in nodes.folder("b").glob("parity-*"):
            flip(path, PAYLOAD_AT + 50)
        left = {inventory.keeper: len(inventory.parities) for inventory in nodes.inventories()}
        assert left == {"b": 0, "c": 2, "d": 2}
        assert nodes.vaults["b"].tally().dropped == {"rotten": 2}
        nodes.rebuild()
        check_all_slots(nodes, nodes.elect(), key)


def test_old_parity_goes_and_its_memory_is_used_again(three: Nodes) -> None:
    files: set[tuple[str, int]] = set()
    for step in range(1, 9):
        three.write_protected(step)
        for vault in three.vaults.values():
            vault.wake(packed(step))
        held = {(path.name, path.stat().st_ino) for path in three.folder("a").glob("parity-*")}
        assert len(held) <= 3
        files |= held
    assert len(files) <= 3, "no file was made anew"
    assert all(len(inventory.parities) == 1 for inventory in three.inventories())
    assert three.vaults["a"].tally().snapshots_protected == 8
    lose(three, "c")
    three.rebuild()
    check_all_slots(three, three.elect(), key_of(8))


def test_decoded_images_go_with_the_old_parity(two: Nodes) -> None:
    two.write_protected(1)
    lose(two, "a")
    two.rebuild()
    assert two.vaults["b"].tally().decoded_bytes > 0
    two.vaults["b"].wake(packed(1))
    assert two.vaults["b"].tally().decoded_bytes > 0
    two.vaults["b"].wake(packed(2))
    assert two.vaults["b"].tally().decoded_bytes == 0


def test_a_keeper_that_takes_over_adopts_all_that_is_there(three: Nodes) -> None:
    key = three.write_protected(5)
    sent = three.vaults["b"].tally().sent_bytes
    three.stop("b")
    (three.folder("b") / "decoding-half").write_bytes(b"half")
    three.vaults["b"] = Vault(
        run=RUN, attempt=1, node="b", folder=three.folder("b"), secret=SECRET, ip="127.0.0.1"
    )  # knows no peers yet, but its ring
    assert read_standing(three.folder("b"), 1).protected == -1
    (inventory,) = (found for found in three.inventories() if found.keeper == "b")
    assert len(inventory.images) == 1 and len(inventory.parities) == 1
    three.tell()
    wait_for(lambda: three.protected(key))
    assert read_standing(three.folder("b"), 1).protected == 5
    # Its peers have all of it already; at most what was on its way when they said so was sent again.
    assert three.vaults["b"].tally().sent_bytes <= sent
    assert not list(three.folder("b").glob("decoding-*"))


def test_a_lost_keeper_is_replaced_and_what_it_held_is_protected_again(three: Nodes) -> None:
    three.write_protected(5)
    three.stop("b")
    shutil.rmtree(three.folder("b"))
    key = three.write(6, nodes="ac")
    wait_for(lambda: "peer lost" in three.vaults["a"].tally().failures)
    assert "can't be reached" in three.vaults["a"].tally().last_failure
    three.start("b")
    three.write(6, nodes="b")
    wait_for(lambda: three.protected(key))
    lose(three, "a")
    three.rebuild()
    check_all_slots(three, three.elect(), key)


def put_fields(nodes: Nodes, node: str, class_index: int, step: int, image_bytes: int) -> dict[str, object]:
    image = NodeImage(node=node, image_bytes=image_bytes)
    fields = {"run": RUN, "attempt": 1, "everywhere": -1, "op": "put", "key": key_fields(key_of(step))}
    return {**fields, "class": class_index, "image": image_fields(image)}


@contextlib.contextmanager
def connected(nodes: Nodes, node: str) -> Iterator[Connection]:
    connection = Connection.open(nodes.vaults[node].address, SECRET, 3.0)
    try:
        yield connection
    finally:
        connection.close()


def settled(connection: Connection, node: str, class_index: int, step: int) -> dict[str, object]:
    fields = {"run": RUN, "attempt": 1, "everywhere": -1, "op": "settled", "key": key_fields(key_of(step))}
    return connection.request({**fields, "node": node, "classes": [class_index]})


def test_a_put_that_breaks_off_spoils_the_block_and_all_deliver_again(three: Nodes) -> None:
    """Class 2 has its parity on c, and data of a and b."""
    size, data = 4 * PAGE_BYTES, os.urandom(2 * PAGE_BYTES)
    with connected(three, "c") as good, connected(three, "c") as broken:
        good.request(put_fields(three, "a", 2, 9, size), send=[data])

        def half() -> Iterator[memoryview]:
            yield memoryview(data)[:PAGE_BYTES]
            broken.cancel()
            yield memoryview(data)[PAGE_BYTES:]

        with pytest.raises(TransferCancelled):
            broken.request(put_fields(three, "b", 2, 9, size), send=half())
        assert settled(good, "a", 2, 9) == {"complete": [], "again": [2]}
        assert three.vaults["c"].tally().dropped == {"PeerLost": 1}
        for node in "ab":
            good.request(put_fields(three, node, 2, 9, size), send=[data])
        assert settled(good, "a", 2, 9) == {"complete": [2], "again": []}
    (parity,) = three.vaults["c"].inventory().parities
    assert [image.node for image in parity.images] == ["a", "b"]
    (path,) = three.folder("c").glob("parity-*")
    assert not any(path.read_bytes()[PAYLOAD_AT : PAYLOAD_AT + len(data)]), "equal data, and row 0 is their XOR"


def test_to_deliver_twice_changes_nothing(three: Nodes) -> None:
    size, data = 4 * PAGE_BYTES, os.urandom(2 * PAGE_BYTES)
    with connected(three, "c") as connection:
        for node in "aabba":
            reply = connection.request(put_fields(three, node, 2, 9, size), send=[data])
            assert reply == {"have": True}
        assert settled(connection, "b", 2, 9) == {"complete": [2], "again": []}
        with pytest.raises(TransferRefused, match="another image"):
            connection.request(put_fields(three, "a", 2, 9, size + PAGE_BYTES), send=[data])
        assert settled(connection, "b", 2, 9) == {"complete": [2], "again": []}


def test_a_newer_put_overtakes_a_block_that_waits_for_the_same_node(
    three: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parities, "SETTLE_LIMIT_S", 0.05)
    size, data = 4 * PAGE_BYTES, os.urandom(2 * PAGE_BYTES)
    with connected(three, "c") as connection:
        connection.request(put_fields(three, "a", 2, 9, size), send=[data])
        assert settled(connection, "a", 2, 9) == {"complete": [], "again": []}, "not yet"
        connection.request(put_fields(three, "b", 2, 10, size), send=[data])
        assert settled(connection, "a", 2, 9) == {"complete": [], "again": [2]}
        assert three.vaults["c"].tally().dropped == {"overtaken": 1}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"run": "bert"}, "this is the keeper of run 'gpt', attempt 1"),
        ({"attempt": 0}, "this is the keeper of run"),
        ({"attempt": 2}, "this is the keeper of run"),
        ({"key": [1, 0, 9, 8]}, "generation 8: its ring is not known"),
        ({"key": [1, 0, 9]}, "key: got"),
        ({"class": 7}, "has no data in it"),
        ({"class": 1}, "has no data in it"),
        ({"class": 0}, "node c holds no parity of it"),
        ({"image": {"node": "z", "image_bytes": 4, "shards": []}}, "node z has no data"),
        ({"op": "nonsense"}, "which there is not"),
    ],
)
def test_what_is_none_of_ours_is_refused(
    three: Nodes, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], why: str
) -> None:
    monkeypatch.setattr(parities, "RING_LIMIT_S", 0.05)
    with connected(three, "c") as connection, pytest.raises(TransferRefused, match=why):
        fields = {**put_fields(three, "b", 2, 9, 4 * PAGE_BYTES), **change}
        connection.request(fields, send=[bytes(2 * PAGE_BYTES)])
    assert not list(three.folder("c").glob("parity-*"))


@pytest.mark.parametrize("sent_bytes", [PAGE_BYTES, 3 * PAGE_BYTES])
def test_a_piece_of_another_length_is_refused(three: Nodes, sent_bytes: int) -> None:
    with connected(three, "c") as connection:
        with pytest.raises(TransferRefused, match="piece"):
            connection.request(put_fields(three, "a", 2, 9, 4 * PAGE_BYTES), send=[bytes(sent_bytes)])
        assert settled(connection, "a", 2, 9) == {"complete": [], "again": [2]}


def test_older_than_what_is_protected_everywhere_is_refused(three: Nodes) -> None:
    three.vaults["c"].wake(packed(10))
    with connected(three, "c") as connection, pytest.raises(TransferRefused, match="nobody needs"):
        connection.request(put_fields(three, "a", 2, 9, PAGE_BYTES), send=[])


def test_no_room_for_parity_is_told_and_counted(two: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, size_bytes: int) -> None:
        raise NoRoom(f"no room for {path.name}")

    monkeypatch.setattr("snapshot.parity.reserve", full)
    two.write(1)
    wait_for(lambda: two.vaults["a"].tally().failures == {"peer refused": 1})
    assert "no room for parity-" in two.vaults["a"].tally().last_failure
    monkeypatch.undo()
    two.write_protected(2)


def test_a_slot_is_protected_when_its_ring_becomes_known(two: Nodes) -> None:
    two.ring = replace(two.ring, generation=2)
    key = two.write(3)
    for vault in two.vaults.values():
        vault.wake()
    assert two.vaults["a"].inventory().images == ()
    two.vaults["a"].ring(two.ring)  # b comes to know it while a's PUT waits there
    threading.Timer(0.3, two.tell).start()
    wait_for(lambda: two.protected(key))
    assert not two.vaults["a"].tally().failures


def test_a_new_generation_begins_with_nothing_protected(three: Nodes) -> None:
    three.write_protected(9)
    lost = three.ring
    three.stop("c")
    three.ring = ring_of("ab", 1, generation=2)
    three.tell()
    assert read_standing(three.folder("a"), 1) == (-1, -1, -1, None)
    assert {found.ring.generation for found in read_rings(three.folder("a"))} == {1, 2}
    key = three.write_protected(7)  # gone back
    assert read_standing(three.folder("a"), 2) == (7, 7, -1, None)
    assert read_standing(three.folder("a"), 1).protected == -1, "nothing is said to the members of another generation"
    found = {(image.key, image.ring) for image in three.vaults["a"].inventory().images}
    assert found == {(key_of(9), 1), (key, 2)}
    with pytest.raises(ValueError, match="not in its group"):
        three.vaults["a"].ring(ring_of("bc", 1, generation=3))
    assert lost.generation == 1


def test_what_a_rank_gives_up_while_it_is_protected_is_not_called_protected(three: Nodes) -> None:
    key = three.write(4, nodes="ac")
    (path,) = three.folder("a").glob("rank-*.slot-*")
    # All of a's data is where it belongs, and b's part of the parity is waited for.
    wait_for(lambda: three.vaults["a"].tally().sent_bytes > 300_000)
    with path.open("r+b") as slot:
        mapped = mmap.mmap(slot.fileno(), 0)
        clear_words(memoryview(mapped))
    three.write(4, nodes="b")
    wait_for(lambda: three.vaults["b"].tally().protected == key)
    wait_for(lambda: three.vaults["a"].tally().failures == {"slot changed": 1})
    assert three.vaults["a"].tally().protected is None


def test_a_piece_that_changes_while_it_is_sent_does_not_seem_whole(tmp_path: Path) -> None:
    """The peers would make parity of it, with which nobody's data could be decoded."""
    ring, key = ring_of("ab", 1), key_of(4)
    head = head_of(ring, key, 0, 300_000)
    with contextlib.closing(Slot.create(tmp_path / "rank-100.slot-0", required_bytes(head))) as slot:
        slot.begin(head)[:] = payload_of(head)
        slot.commit()
        image = sealed_image("a", {0: SlotView.open(slot.path)})
        link: Any = SimpleNamespace(request=lambda fields, send: [slot.invalidate() for _ in send])
        (class_index,) = ring.group.classes_of("a")
        delivery = _Delivery(Attempt(key, ring, image), link, dict, (class_index,))
        with pytest.raises(SlotChanged, match="written anew"):
            delivery.run()


def test_an_image_that_changes_while_it_is_verified_is_not_in_the_inventory(
    two: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.write_protected(4)
    (path,) = two.folder("a").glob("rank-*.slot-*")
    original = ImageView.bad_pieces

    def meanwhile(image: ImageView, group: Group) -> tuple[int, ...]:
        bad = original(image, group)
        with path.open("r+b") as slot, contextlib.closing(mmap.mmap(slot.fileno(), 0)) as mapped:
            clear_words(memoryview(mapped))
        return bad

    monkeypatch.setattr(ImageView, "bad_pieces", meanwhile)
    assert two.vaults["a"].inventory().images == ()


def test_a_peer_that_has_left_is_not_waited_for(three: Nodes) -> None:
    three.stop("c")
    for node in "ab":  # nobody knows an address of c: that might come
        three.vaults[node].peers({other: three.vaults[other].address for other in "ab"})
    three.write(1, nodes="ab")
    wait_for(lambda: three.vaults["a"].tally().sent_bytes > 0)
    assert not three.vaults["a"].tally().failures
    three.ring = ring_of("ab", 1, generation=2)
    three.tell()
    wait_for(lambda: three.vaults["a"].tally().failures == {"peer left": 1})
    three.write_protected(2)


def test_older_folders_are_read_served_and_forgotten(tmp_path: Path) -> None:
    """After the raylet of a machine has started again, it goes by another name."""
    with nodes_of(tmp_path, ring_of("abc", 1)) as nodes:
        key = nodes.write_protected(5)
        nodes.stop("abc")
        shutil.rmtree(nodes.folder("b"))
        for new, old in {"x": "a", "y": "c"}.items():
            nodes.vaults[new] = Vault(
                run=RUN,
                attempt=2,
                node=new,
                folder=tmp_path / new,
                secret=SECRET,
                ip="127.0.0.1",
                older=[nodes.folder(old), tmp_path / "nothing"],
            )
        addresses = {node: vault.address for node, vault in nodes.vaults.items()}
        for vault in nodes.vaults.values():
            vault.peers(addresses)
        nodes.rebuild()
        elected = nodes.elect()
        assert isinstance(elected, Elected)
        assert {(image.image.node, image.held_by) for image in elected.images if isinstance(image, Read)} >= {
            ("a", "x"), ("c", "y"),
        }  # fmt: skip
        check_all_slots(nodes, elected, key)
        assert nodes.vaults["x"].tally().parity_bytes > 0
        nodes.vaults["x"].forget_older(1)
        assert nodes.folder("a").exists()
        nodes.vaults["x"].forget_older(2)
        assert not nodes.folder("a").exists() and (tmp_path / "x").exists()
        assert nodes.vaults["x"].tally().parity_bytes == 0


def test_fetching_what_is_not_there_or_is_damaged(two: Nodes) -> None:
    key = two.write_protected(5)
    address = two.vaults["a"].address
    with pytest.raises(TransferRefused, match="rank 1"):
        fetch_slot(address, SECRET, key=key, node="a", rank=1)
    with pytest.raises(TransferRefused, match="step 6"):
        fetch_slot(address, SECRET, key=key_of(6), node="a", rank=0)
    with pytest.raises(TransferRefused, match="node b"):
        fetch_slot(address, SECRET, key=key, node="b", rank=1)
    with pytest.raises(NotAuthentic):
        fetch_slot(address, "another secret", key=key, node="a", rank=0)
    with pytest.raises(PeerLost):
        fetch_slot(("127.0.0.1", 9), SECRET, key=key, node="a", rank=0)
    flip(slots_in(two.folder("a"))[key, 0], 5 * PAGE_BYTES)
    with pytest.raises(TransferCorrupt, match="damaged"):
        fetch_slot(address, SECRET, key=key, node="a", rank=0)


def test_what_was_put_together_wrong_is_no_image(two: Nodes) -> None:
    two.write_protected(5)
    lose(two, "a")
    elected = two.elect()
    assert isinstance(elected, Elected)
    vault = two.vaults["b"]
    with pytest.raises(KeyError, match="not decoded"):
        vault.assemble(elected)
    for path in two.folder("b").glob("parity-*"):  # after the inventory
        flip(path, PAYLOAD_AT + 5 * PAGE_BYTES)
    vault.decode(elected)
    with pytest.raises(NotAsElected, match="node a"):
        vault.assemble(elected)
    assert not list(two.folder("b").glob("deco*"))


def test_a_peer_lost_while_decoding_is_told(tmp_path: Path) -> None:
    with nodes_of(tmp_path, ring_of("abcd", 1)) as nodes:
        nodes.write_protected(5)
        lose(nodes, "a")
        elected = nodes.elect()
        assert isinstance(elected, Elected)
        nodes.stop("b")
        caught = []
        for vault in nodes.vaults.values():
            try:
                vault.decode(elected)
            except PeerLost as error:
                caught.append(error)
        assert caught


def test_ranks_are_heard_and_strangers_counted(two: Nodes) -> None:
    folder = two.folder("a")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert wake_vault(folder, packed(4))
    wait_for(lambda: two.vaults["a"].tally().everywhere == (0, 4))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        descriptor = os.open(folder, os.O_PATH)
        sender.sendto(b"hello", f"/proc/self/fd/{descriptor}/keeper.socket")
        os.close(descriptor)
    wait_for(lambda: two.vaults["a"].tally().oddities == {"no wake-up": 1})
    two.stop("a")
    assert not wake_vault(folder)
    assert read_standing(folder / "nothing", 1) == (-1, -1, -1, None)


def test_a_folder_with_a_very_long_name(tmp_path: Path) -> None:
    folder = tmp_path / ("n" * 120)
    vault = Vault(run=RUN, attempt=1, node="n" * 120, folder=folder, secret=SECRET, ip="127.0.0.1")
    with contextlib.closing(vault):
        assert wake_vault(folder, packed(1))
        wait_for(lambda: vault.tally().everywhere == (0, 1))


def test_closing_is_quick_and_leaves_no_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with nodes_of(tmp_path, ring_of("abc", 1)) as nodes:
        nodes.write_protected(1)
        for vault in list(nodes.vaults.values()):
            started = time.monotonic()
            vault.close()
            assert time.monotonic() - started < 3.0
            vault.close()  # again is fine
        nodes.vaults.clear()
    assert set(threading.enumerate()) == before


def test_links_that_do_not_move_are_cancelled(monkeypatch: pytest.MonkeyPatch, two: Nodes) -> None:
    monkeypatch.setattr("actors.links.STALL_LIMIT_S", 0.3)
    monkeypatch.setattr(parities, "RING_LIMIT_S", 5.0)
    links = Links(SECRET)
    with contextlib.closing(links), links.open("b", two.vaults["b"].address) as link:
        image = image_fields(NodeImage(node="a", image_bytes=PAGE_BYTES))
        # It waits for a ring that nobody tells.
        fields = {"run": RUN, "attempt": 1, "op": "put", "key": [1, 0, 1, 9], "class": 1, "image": image}
        with pytest.raises(Stalled, match="has not moved"):
            link.request(fields)


def test_rings_there_and_back(tmp_path: Path) -> None:
    ring = ring_of("abc", 2, ranks_each=2)
    assert Ring.from_fields(ring.fields()) == ring
    assert ring.peers_of("a") == {"b": (1,), "c": (1,)}
    assert ring_of("abcd", 1).peers_of("a") == {"b": (1,), "c": (2,), "d": (3,)}
    for wrong in (None, {}, {**ring.fields(), "shares": {"a": 3}}, {**ring.fields(), "shares": {"z": [0]}}):
        with pytest.raises(ValueError, match=r"ring|group"):
            Ring.from_fields(wrong)
    with pytest.raises(ValueError, match="must ascend"):
        Ring(generation=1, group=Group(nodes=("a",), parity=0), shares={"a": (1, 0)})
    (tmp_path / "ring-1.json").write_text("{}")
    with pytest.raises(ValueError, match=r"ring-1\.json"):
        read_rings(tmp_path)


def test_a_block_is_not_begun_for_a_snapshot_that_others_have_left_behind(three: Nodes) -> None:
    """Else who is late would wait for them, and take the room of what they send now."""
    size, data = 4 * PAGE_BYTES, os.urandom(2 * PAGE_BYTES)
    with connected(three, "c") as connection:
        connection.request(put_fields(three, "b", 2, 10, size), send=[data])
        with pytest.raises(TransferRefused, match="node b has sent a newer snapshot"):
            connection.request(put_fields(three, "a", 2, 9, size), send=[data])
        connection.request(put_fields(three, "a", 2, 10, size), send=[data])
        assert settled(connection, "b", 2, 10) == {"complete": [2], "again": []}


def test_keepers_that_come_and_go_while_snapshots_are_taken(tmp_path: Path) -> None:
    """A late one, a lost one, and one that is told too late what is protected: in the end all is protected."""
    chance = random.Random(3)
    with nodes_of(tmp_path, ring_of("abcd", 2, ranks_each=2)) as nodes:
        for step in range(1, 25):
            key = nodes.write(step, share_bytes=chance.choice([50_000, 200_000]))
            if chance.random() < 0.3:
                node = chance.choice("abcd")
                time.sleep(0.02 * chance.random())
                nodes.stop(node)
                nodes.start(node)
            if chance.random() < 0.5 or step == 24:
                wait_for(lambda key=key: nodes.protected(key), 20.0)
                for vault in nodes.vaults.values():
                    vault.wake(packed(step))
        assert len(list(nodes.folder("a").glob("parity-*"))) <= 8
        lose(nodes, "bd")
        nodes.rebuild()
        check_all_slots(nodes, nodes.elect(), key)


def test_an_unforeseen_error_while_protecting_is_told_and_the_next_snapshot_is_protected(
    two: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> None:
        raise ZeroDivisionError("unforeseen")

    monkeypatch.setattr("actors.protecting.sealed_image", fails)
    two.write(1)
    wait_for(lambda: two.vaults["a"].tally().failures == {"other": 1})
    assert "unforeseen" in two.vaults["a"].tally().last_failure
    monkeypatch.undo()
    two.write_protected(2)
