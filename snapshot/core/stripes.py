"""Which keepers protect each other, and how: groups, and the stripes within them. (The words are those of RAID.)

A group of n keepers with m parity has n classes of blocks. Class c has its m parity blocks on keepers c..c+m-1
(modulo n), row j on keeper c+j, and its k = n-m data blocks on the others. A keeper cuts its node image into k
pieces of one length; piece q is its data block of the q-th class in which it holds data. Shorter blocks of a class,
and keepers without an image, count as padded with zeros.

    n = 4, m = 1      keeper 0  keeper 1  keeper 2  keeper 3
    class 0           parity    piece 0   piece 0   piece 0
    class 1           piece 0   parity    piece 1   piece 1
    class 2           piece 1   piece 1   parity    piece 2
    class 3           piece 2   piece 2   piece 2   parity

So every keeper holds its own image whole, and any m keepers may be lost. With images of s bytes each keeper holds
m parity blocks of s/k bytes: m/k of the data, in memory. It sends each of its k pieces to m keepers, m * s bytes in
all, and receives as many; summing parity on its way along a chain of keepers would not make that less.
n = 2 with m = 1 is mirroring.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PAGE_BYTES = 4096
MOST_NODES = 255
"""Of one group: the field of the code has no room for more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Nodes whose keepers hold parity for each other. A node alone has none, and one class.

    nodes: their order is that of the keepers above, and of a class's data blocks.
    parity: in force, m above: how many of the nodes may be lost.
    """

    nodes: tuple[str, ...]
    parity: int

    def __post_init__(self) -> None:
        if not self.nodes or len(self.nodes) > MOST_NODES:
            raise ValueError(f"nodes: got {len(self.nodes)}, must be 1..{MOST_NODES}")
        if len(set(self.nodes)) != len(self.nodes):
            raise ValueError(f"nodes: {', '.join(self.nodes)}: must differ")
        if not 0 <= self.parity < len(self.nodes):
            raise ValueError(f"parity: got {self.parity}, must be 0..{len(self.nodes) - 1} in a group of {self}")

    def __str__(self) -> str:
        return f"({', '.join(node[:8] for node in self.nodes)})"

    @property
    def size(self) -> int:
        """n."""
        return len(self.nodes)

    @property
    def data(self) -> int:
        """k: how many data blocks a class has, and how many blocks it takes to make the others."""
        return self.size - self.parity

    @property
    def classes(self) -> range:
        return range(self.size)

    def parity_nodes(self, class_index: int) -> tuple[str, ...]:
        """In order of their rows."""
        return tuple(self.nodes[(class_index + row) % self.size] for row in range(self.parity))

    def data_nodes(self, class_index: int) -> tuple[str, ...]:
        """In order of their blocks' indices 0..k-1."""
        parity = self.parity_nodes(class_index)
        return tuple(node for node in self.nodes if node not in parity)

    def row_of(self, node: str, class_index: int) -> int | None:
        """Which parity block of the class the node holds; None if it has a data block of it."""
        row = (self.nodes.index(node) - class_index) % self.size
        return row if row < self.parity else None

    def classes_of(self, node: str) -> tuple[int, ...]:
        """Those in which the node has data: piece q of its image is a block of the q-th of these."""
        return tuple(index for index in self.classes if self.row_of(node, index) is None)

    def piece_of(self, node: str, class_index: int) -> int:
        """The inverse of `classes_of`; the node must have data in the class."""
        assert self.row_of(node, class_index) is None, (node, class_index)
        position = self.nodes.index(node)
        return class_index - sum((position - row) % self.size < class_index for row in range(self.parity))

    def piece_bytes(self, image_bytes: int) -> int:
        """The length of each of the k pieces of an image, of which the last may reach beyond its end."""
        pages = -(-image_bytes // PAGE_BYTES)
        return -(-pages // self.data) * PAGE_BYTES

    def piece_bounds(self, piece: int, image_bytes: int) -> tuple[int, int]:
        """Start and stop of a piece within its image; empty if the image ends before it."""
        length = self.piece_bytes(image_bytes)
        return min(piece * length, image_bytes), min((piece + 1) * length, image_bytes)

    def block_bytes(self, class_index: int, image_bytes: Mapping[str, int]) -> int:
        """The length of the class's parity blocks. image_bytes: by node; those without an image may be left out."""
        return max(self.piece_bytes(image_bytes.get(node, 0)) for node in self.data_nodes(class_index))


def groups(nodes: Sequence[tuple[str, str]], parity: int, most: int = 8) -> tuple[Group, ...]:
    """Cuts nodes, given with their failure domains, into groups; the same for any order of `nodes`.

    Sizes differ by at most one, and so do the counts of a domain's nodes by group. A group has at most
    max(most, 2 * parity) nodes: beyond `most`, more nodes save little memory, yet all of them take part when one is
    lost; below 2 * parity, parity would take more memory than the data. One more is allowed where otherwise a group
    would be too small for the parity asked for. If all nodes together are, parity is what they can have.
    """
    if not 0 <= parity <= MOST_NODES // 2:
        raise ValueError(f"parity: got {parity}, must be 0..{MOST_NODES // 2}")
    if not 2 <= most < MOST_NODES:
        raise ValueError(f"most: got {most}, must be 2..{MOST_NODES - 1}")
    names = [node for node, _ in nodes]
    if len(set(names)) != len(names):
        raise ValueError(f"nodes: {len(names)} given, only {len(set(names))} differ")
    if not nodes:
        return ()
    fewest = max(parity + 1, 2)
    count = max(1, min(-(-len(nodes) // max(most, 2 * parity)), len(nodes) // fewest))
    # Dealt out like cards, domain after domain.
    dealt = [node for _, node in sorted((domain, node) for node, domain in nodes)]
    hands = (tuple(sorted(dealt[number::count])) for number in range(count))
    return tuple(Group(nodes=hand, parity=min(parity, len(hand) - 1)) for hand in sorted(hands))
