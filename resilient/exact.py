"""Partial sums of a step on one rank, folded along the fixed tree.

A rank adds up complete subtrees of its own micro-batches, as soon as both halves are there. The sums
are kept until the rank holds the complete result of the step: when another rank dies, nothing that
was computed here is computed again.

From the moment an exchange may read them they are *frozen*: a merge then writes into a new payload,
because a rank that still follows an abandoned exchange must not receive half of a newer sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .core.tree import Node, leaf, parents, split
from .payload import Layout, Payload, Pool, fold_range, merged_counts


class PartialSums:
    """The sums over complete subtrees of the micro-batches folded so far in this step."""

    def __init__(self, micro_batches: int, pool: Pool) -> None:
        self.micro_batches = micro_batches
        self.pool = pool
        self.nodes: dict[Node, Payload] = {}
        self._frozen = False

    def add_leaf(self, index: int, tensors: Sequence[Tensor | None]) -> None:
        """Fold in what one micro-batch produced: for each entry of the layout its value, or None."""
        node = leaf(index)
        neighbour = self._left_neighbour(node)
        if neighbour is not None and not self._frozen:
            payload = self.nodes.pop(neighbour)
            _accumulate(payload, tensors)
            node = Node(neighbour.start, node.stop)
        else:
            payload = self.pool.take()
            _fill(payload, tensors)
        self._insert(node, payload)

    def freeze(self) -> None:
        """An exchange is about to read the sums."""
        self._frozen = True

    def clear(self) -> None:
        """Forget the step: its result is at hand, or its leaves belong to others now."""
        for payload in self.nodes.values():
            self.pool.give_back(payload)
        self.nodes.clear()
        self._frozen = False

    def widen(self, layout: Layout) -> None:
        """Make room for tensors that have turned up."""
        self.pool.widen(layout)
        self.nodes = {node: payload.repacked(layout) for node, payload in self.nodes.items()}

    def _left_neighbour(self, node: Node) -> Node | None:
        for parent in parents(self.micro_batches, node)[:1]:
            left, right = split(parent)
            if node == right and left in self.nodes:
                return left
        return None

    def _insert(self, node: Node, payload: Payload) -> None:
        self.nodes[node] = payload
        for parent in parents(self.micro_batches, node):
            left, right = split(parent)
            if left not in self.nodes or right not in self.nodes:
                return
            one, other = self.nodes.pop(left), self.nodes.pop(right)
            self.nodes[parent] = self._merge(one, other)

    def _merge(self, left: Payload, right: Payload) -> Payload:
        target = self.pool.take() if self._frozen else left
        masks = None if _same(left.counts, right.counts) else (left.counts, right.counts)
        fold_range(left.layout, target.flat, left.flat, right.flat, 0, masks)
        target.counts = merged_counts(left.counts, right.counts)
        if not self._frozen:
            self.pool.give_back(right)
        return target


def _fill(payload: Payload, tensors: Sequence[Tensor | None]) -> None:
    present = [number for number, tensor in enumerate(tensors) if tensor is not None]
    if present:
        torch._foreach_copy_([payload.views[n] for n in present], [t for t in tensors if t is not None])
    payload.counts = [int(tensor is not None) for tensor in tensors]


def _accumulate(payload: Payload, tensors: Sequence[Tensor | None]) -> None:
    """payload += tensors, the payload being the left side."""
    added: tuple[list[Tensor], list[Tensor]] = ([], [])
    copied: tuple[list[Tensor], list[Tensor]] = ([], [])
    for number, tensor in enumerate(tensors):
        if tensor is None:
            continue
        if not payload.counts[number]:
            copied[0].append(payload.views[number])
            copied[1].append(tensor)
        elif payload.layout.entries[number].rule == "sum":
            added[0].append(payload.views[number])
            added[1].append(tensor.float() if tensor.element_size() == 1 else tensor)  # torch adds no fp8
        payload.counts[number] += 1
    _foreach(torch._foreach_copy_, copied)
    _foreach(torch._foreach_add_, added)


def _foreach(
    operation: Callable[[list[Tensor], list[Tensor]], object], lists: tuple[list[Tensor], list[Tensor]]
) -> None:
    if lists[0]:
        operation(*lists)


def _same(left: Iterable[int], right: Iterable[int]) -> bool:
    return all(bool(one) == bool(other) for one, other in zip(left, right, strict=True))
