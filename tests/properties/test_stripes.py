"""Real bytes under real parity: any m nodes of every group may be lost, and the election's plan gives all back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshot.codec import Codec
from snapshot.core.branches import Branch, Lineage
from snapshot.core.decoding import Decode, Read
from snapshot.core.election import Elected, NotRecoverable, elect
from snapshot.core.inventory import SnapshotKey
from snapshot.core.stripes import PAGE_BYTES, Group
from tests.keepers import key_of, left, protected

LINE = Lineage(branches=(Branch(number=0),))


class Memory:
    """The bytes that keepers hold of one snapshot."""

    def __init__(self, key: SnapshotKey, groups: Sequence[Group], image_bytes: Mapping[str, int], seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.inventories = protected(key, groups, image_bytes)
        self.images = {node: generator.bytes(length) for node, length in image_bytes.items()}
        self._parity = {
            (group, class_index, row): self._encoded(group, class_index, row)
            for group in groups
            for class_index in group.classes
            for row in range(group.parity)
        }

    def _encoded(self, group: Group, class_index: int, row: int) -> bytearray:
        lengths = {node: len(image) for node, image in self.images.items()}
        parity = bytearray(group.block_bytes(class_index, lengths))
        for column, node in enumerate(group.data_nodes(class_index)):
            start, stop = group.piece_bounds(group.piece_of(node, class_index), lengths[node])
            part = memoryview(parity)[: stop - start]
            Codec(group.data, group.parity).update(row, column, self.images[node][start:stop], part)
        return parity

    def read(self, image: Read | Decode, lost: Collection[str], rotten: Mapping[str, Sequence[int]]) -> bytes:
        """The image as the plan says to get it, touching nothing that was lost or has rotted."""
        node = image.image.node
        assert image.held_by not in lost
        if isinstance(image, Read):
            assert not rotten.get(node)
            return self.images[node]
        group = image.group
        found = bytearray(image.image.image_bytes) if image.held_by is None else bytearray(self.images[node])
        for bad in rotten.get(node, ()):
            start, stop = group.piece_bounds(bad, len(found))
            found[start:stop] = bytes(stop - start)
        for piece in image.pieces:
            code, length = Codec(group.data, group.parity), piece.stop - piece.start
            available = {index: bytes(length) for index in piece.zeros}
            for source in piece.sources:
                assert source.held_by not in lost
                if source.node is not None:
                    assert group.piece_of(source.node, piece.class_index) not in rotten.get(source.node, ())
                block = (
                    self._parity[group, piece.class_index, source.index - group.data]
                    if source.node is None
                    else self.images[source.node]
                )
                available[source.index] = bytes(block[source.start : source.stop]).ljust(length, b"\0")[:length]
            assert len(available) == group.data
            assert piece.decoder in {source.held_by for source in piece.sources}
            code.reconstruct(available, [piece.index], [memoryview(found)[piece.start : piece.stop]])
        return bytes(found)


@st.composite
def clusters(draw: st.DrawFn) -> list[Group]:
    """Groups of any sizes whose nodes are in no order."""
    counts = draw(st.lists(st.integers(2, 12), min_size=1, max_size=2))
    nodes = draw(st.permutations([f"node{number:02}" for number in range(sum(counts))]))
    found = []
    for count in counts:
        parity = draw(st.integers(1, min(4, count - 1)))
        found.append(Group(nodes=tuple(nodes[:count]), parity=parity))
        nodes = nodes[count:]
    return found


@st.composite
def lengths(draw: st.DrawFn, groups: Sequence[Group]) -> dict[str, int]:
    """None at all, tiny ones that leave pieces empty, and ragged ones."""
    drawn = st.one_of(st.just(0), st.integers(1, 2 * PAGE_BYTES), st.integers(1, 14 * PAGE_BYTES))
    found = {node: draw(drawn) for group in groups for node in group.nodes}
    return found if any(found.values()) else dict.fromkeys(found, 1)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), groups=clusters(), seed=st.integers(0, 99))
def test_any_m_nodes_of_every_group_may_be_lost(data: st.DataObject, groups: list[Group], seed: int) -> None:
    """Or their images may have rotted in some pieces."""
    memory = Memory(key_of(3), groups, data.draw(lengths(groups)), seed)
    lost: set[str] = set()
    rotten: dict[str, tuple[int, ...]] = {}
    for group in groups:
        for node in data.draw(st.permutations(group.nodes))[: data.draw(st.integers(0, group.parity))]:
            if data.draw(st.booleans()):
                lost.add(node)
            else:
                rotten[node] = tuple(sorted(data.draw(st.sets(st.integers(0, group.data - 1), min_size=1))))
    elected = elect(left(memory.inventories, lost=lost, rotten=rotten), LINE)
    assert isinstance(elected, Elected), elected
    assert [image.image.node for image in elected.images] == sorted(
        node for node, held in memory.images.items() if held
    )
    for image in elected.images:
        assert memory.read(image, lost, rotten) == memory.images[image.image.node]
        assert isinstance(image, Decode) == (image.image.node in {*lost, *rotten})


@settings(max_examples=60, deadline=None)
@given(data=st.data(), groups=clusters(), seed=st.integers(0, 99))
def test_an_older_snapshot_that_can_be_read_is_elected(data: st.DataObject, groups: list[Group], seed: int) -> None:
    """The newer one lost m+1 nodes of a group; the older one was made before some of these took part."""
    broken = groups[0]
    lost = set(data.draw(st.permutations(broken.nodes))[: broken.parity + 1])
    full = {
        node: data.draw(st.integers((group.data - 1) * PAGE_BYTES + 1, group.data * PAGE_BYTES))
        for group in groups
        for node in group.nodes
    }
    newer = Memory(key_of(4), groups, full, seed)
    spared = {node: 0 if node in lost else length for node, length in full.items()}
    older = Memory(key_of(2), groups, spared if any(spared.values()) else full, seed)
    alone = elect(left(newer.inventories, lost=lost), LINE)
    assert isinstance(alone, NotRecoverable)
    outcome = elect(left(newer.inventories, older.inventories, lost=lost), LINE)
    if not any(spared.values()):
        assert isinstance(outcome, NotRecoverable)
        return
    assert isinstance(outcome, Elected), outcome
    assert outcome.key == key_of(2)
    assert [passed.key for passed in outcome.passed_over] == [key_of(4)]
    for image in outcome.images:
        assert older.read(image, lost, {}) == older.images[image.image.node]
