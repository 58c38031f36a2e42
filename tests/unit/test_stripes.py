"""Groups of keepers and the stripes in them: even, spread over failure domains, every block in one place."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshot.core.stripes import MOST_NODES, PAGE_BYTES, Group, groups


def group_of(size: int, parity: int) -> Group:
    return Group(nodes=tuple(f"node{number}" for number in range(size)), parity=parity)


# Stripes


def test_the_drawing() -> None:
    group = group_of(4, 1)
    drawn = []
    for class_index in group.classes:
        row = [
            "parity" if group.row_of(node, class_index) is not None else f"piece {group.piece_of(node, class_index)}"
            for node in group.nodes
        ]
        drawn.append(row)
    assert drawn == [
        ["parity", "piece 0", "piece 0", "piece 0"],
        ["piece 0", "parity", "piece 1", "piece 1"],
        ["piece 1", "piece 1", "parity", "piece 2"],
        ["piece 2", "piece 2", "piece 2", "parity"],
    ]


@pytest.mark.parametrize(("size", "parity"), [(size, parity) for size in range(1, 13) for parity in range(size)])
def test_every_node_holds_as_much_as_any_other(size: int, parity: int) -> None:
    group = group_of(size, parity)
    held: Counter[str] = Counter()
    for class_index in group.classes:
        rows, data = group.parity_nodes(class_index), group.data_nodes(class_index)
        assert sorted([*rows, *data]) == sorted(group.nodes)
        assert (len(rows), len(data)) == (parity, group.data)
        assert [group.row_of(node, class_index) for node in rows] == list(range(parity))
        assert rows == tuple(group.nodes[(class_index + row) % size] for row in range(parity))
        held.update(rows)
    for node in group.nodes:
        assert held[node] == parity
        classes = group.classes_of(node)
        assert len(classes) == group.data
        assert [group.piece_of(node, class_index) for class_index in classes] == list(range(group.data))


def test_two_nodes_mirror_each_other() -> None:
    group = group_of(2, 1)
    assert [group.classes_of(node) for node in group.nodes] == [(1,), (0,)]
    assert group.piece_bounds(0, 10_000) == (0, 10_000)


@settings(deadline=None)
@given(size=st.integers(1, 12), parity=st.integers(0, 11), image_bytes=st.integers(0, 200_000))
def test_pieces_tile_the_image(size: int, parity: int, image_bytes: int) -> None:
    group = group_of(size, min(parity, size - 1))
    bounds = [group.piece_bounds(piece, image_bytes) for piece in range(group.data)]
    length = group.piece_bytes(image_bytes)
    assert length % PAGE_BYTES == 0
    assert length < -(-image_bytes // group.data) + PAGE_BYTES
    assert [position for start, stop in bounds for position in (start, stop)][1:-1] == [
        min(piece * length, image_bytes) for piece in range(1, group.data) for _ in range(2)
    ]
    assert (bounds[0][0], bounds[-1][1]) == (0, image_bytes)


def test_the_longest_piece_of_a_class_decides_its_length() -> None:
    group = group_of(3, 1)
    image_bytes = {"node0": 8 * PAGE_BYTES, "node1": 3 * PAGE_BYTES}
    assert [group.block_bytes(index, image_bytes) for index in group.classes] == [
        2 * PAGE_BYTES,
        4 * PAGE_BYTES,
        4 * PAGE_BYTES,
    ]


@pytest.mark.parametrize(
    ("nodes", "parity", "message"),
    [
        ((), 0, "nodes: got 0, must be 1..255"),
        (("a", "b", "a"), 1, "nodes: a, b, a: must differ"),
        (("a", "b"), 2, r"parity: got 2, must be 0..1 in a group of \(a, b\)"),
        (("a", "b"), -1, "parity: got -1"),
    ],
)
def test_impossible_groups(nodes: tuple[str, ...], parity: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Group(nodes=nodes, parity=parity)


# Groups


@settings(deadline=None)
@given(
    domains=st.lists(st.integers(0, 5), min_size=1, max_size=70),
    parity=st.integers(0, 5),
    most=st.integers(2, 12),
    order=st.randoms(use_true_random=False),
)
def test_groups_are_even_and_spread_domains(domains: list[int], parity: int, most: int, order: Random) -> None:
    nodes = [(f"node{number}", f"rack{domain}") for number, domain in enumerate(domains)]
    cut = groups(nodes, parity, most)
    assert sorted(node for group in cut for node in group.nodes) == sorted(node for node, _ in nodes)
    sizes = [group.size for group in cut]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= max(most, 2 * parity) + 1
    if len(nodes) > 1:
        assert min(sizes) > 1
    assert all(group.parity == min(parity, len(nodes) - 1) for group in cut)
    domain_of = dict(nodes)
    for domain in set(domain_of.values()):
        counts = [sum(domain_of[node] == domain for node in group.nodes) for group in cut]
        assert max(counts) - min(counts) <= 1
    order.shuffle(nodes)
    assert groups(nodes, parity, most) == cut


@pytest.mark.parametrize(
    ("count", "parity", "sizes"),
    [
        (0, 1, []),
        (1, 1, [1]),
        (2, 1, [2]),
        (3, 2, [3]),
        (8, 1, [8]),
        (9, 1, [5, 4]),
        (17, 2, [6, 6, 5]),
        (11, 5, [11]),
        (12, 5, [6, 6]),
    ],
)
def test_sizes(count: int, parity: int, sizes: list[int]) -> None:
    cut = groups([(f"node{number:02}", "rack") for number in range(count)], parity)
    assert [group.size for group in cut] == sizes


def test_nodes_of_one_rack_are_apart_where_that_is_possible() -> None:
    cut = groups([(f"node{number:02}", f"rack{number // 4}") for number in range(32)], 1)
    assert [group.size for group in cut] == [8, 8, 8, 8]
    for group in cut:
        assert len({int(node[4:]) // 4 for node in group.nodes}) == 8


def test_ten_thousand_nodes() -> None:
    cut = groups([(f"node{number}", f"rack{number % 250}") for number in range(10_000)], 2)
    assert {group.size for group in cut} == {8}


@pytest.mark.parametrize(
    ("nodes", "parity", "most", "message"),
    [
        (["a"], -1, 8, "parity: got -1, must be 0..127"),
        (["a"], 128, 8, "parity: got 128, must be 0..127"),
        (["a"], 1, 1, "most: got 1, must be 2..254"),
        (["a"], 1, MOST_NODES, "most: got 255, must be 2..254"),
        (["a", "a"], 1, 8, "nodes: 2 given, only 1 differ"),
    ],
)
def test_impossible_wishes(nodes: list[str], parity: int, most: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        groups([(node, "rack") for node in nodes], parity, most)
