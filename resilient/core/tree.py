"""The fixed tree over a step's micro-batches, along which everything is summed.

Floating-point addition is not associative, so a sum is only reproducible if its order is. The order
here is a binary tree over the M micro-batches (leaves) of a step that depends on M alone: a node
[start, stop) splits at the largest power of two below its size. A rank adds up only *complete
subtrees* of the leaves it owns; whoever adds two siblings, and whenever, the bits are the same.

    M = 6                 [0,6)
                    [0,4)       [4,6)
                 [0,2) [2,4)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Node(NamedTuple):
    """The subtree over the leaves start..stop-1."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def split(node: Node) -> tuple[Node, Node]:
    """The two children of a node of at least two leaves."""
    assert node.size >= 2, node
    middle = node.start + (1 << ((node.size - 1).bit_length() - 1))
    return Node(node.start, middle), Node(middle, node.stop)


def leaf(index: int) -> Node:
    return Node(index, index + 1)


def roots(micro_batches: int, leaves: Iterable[int]) -> tuple[Node, ...]:
    """The largest complete subtrees within a set of leaves, from left to right.

    A contiguous run of L leaves has at most 2 log2 L of them.
    """
    owned = sorted(set(leaves))
    assert not owned or (owned[0] >= 0 and owned[-1] < micro_batches), (micro_batches, owned)
    found: list[Node] = []
    pending = [(Node(0, micro_batches), owned)]
    while pending:
        node, inside = pending.pop()
        if len(inside) == node.size:
            found.append(node)
        elif inside:
            left, right = split(node)
            pending.append((right, [index for index in inside if index >= left.stop]))
            pending.append((left, [index for index in inside if index < left.stop]))
    return tuple(found)


def parents(micro_batches: int, node: Node) -> tuple[Node, ...]:
    """The ancestors of a node, nearest first, ending with the whole tree."""
    path: list[Node] = []
    at = Node(0, micro_batches)
    while at != node:
        path.append(at)
        left, right = split(at)
        at = left if node.start < left.stop else right
    return tuple(reversed(path))


class Fold(NamedTuple):
    """One addition: `target` = `left` + `right`, each a node whose sum is at hand by then."""

    target: Node
    left: Node
    right: Node


def fold_order(micro_batches: int, available: Iterable[Node]) -> tuple[Fold, ...]:
    """The additions that take the given disjoint subtrees, covering all leaves, to the whole tree."""
    present = frozenset(available)
    order: list[Fold] = []

    def visit(node: Node) -> None:
        if node in present:
            return
        assert node.size > 1, f"leaf {node.start} is covered by none of {sorted(present)}"
        left, right = split(node)
        visit(left)
        visit(right)
        order.append(Fold(node, left, right))

    visit(Node(0, micro_batches))
    return tuple(order)


def owned(owners: Sequence[int]) -> tuple[dict[Node, int], tuple[Fold, ...]]:
    """For the rank that owns each leaf: whose every root is, and the additions that take them to the whole tree.

    What `roots` finds rank by rank, and `fold_order` of that, in one pass: its time grows with the roots there are.
    """
    same_until = [len(owners)] * len(owners)
    for at in reversed(range(len(owners) - 1)):
        same_until[at] = same_until[at + 1] if owners[at] == owners[at + 1] else at + 1
    found: dict[Node, int] = {}
    order: list[Fold] = []

    def visit(node: Node) -> None:
        if same_until[node.start] >= node.stop:
            found[node] = owners[node.start]
            return
        left, right = split(node)
        visit(left)
        visit(right)
        order.append(Fold(node, left, right))

    visit(Node(0, len(owners)))
    return found, tuple(order)
