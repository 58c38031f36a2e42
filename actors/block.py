"""One parity block while its data comes, and afterwards."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Literal

from actors.agenda import BlockState
from actors.ring import Ring
from snapshot.core.inventory import NodeImage, ParityFound, SnapshotKey
from snapshot.parity import ParityFile


@dataclass(slots=True, eq=False)
class Block:
    """`state` and the sets change under the lock of `Parities`, the bytes under `lock`.

    delivered: by node, the images whose pieces have been added. delivering: the nodes that are just doing so.
    users: how many threads may be in its memory.
    """

    key: SnapshotKey
    ring: Ring
    class_index: int
    row: int
    state: Literal["open", "complete", "dropped"] = "open"
    delivered: dict[str, NodeImage] = field(default_factory=dict)
    delivering: set[str] = field(default_factory=set)
    users: int = 0
    file: ParityFile | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def told(self) -> BlockState:
        missing = set() if self.state == "complete" else set(self.ring.origins(self.class_index)) - set(self.delivered)
        return BlockState(key=self.key, class_index=self.class_index, missing=frozenset(missing))

    @property
    def found(self) -> ParityFound:
        nodes = self.ring.group.data_nodes(self.class_index)
        return ParityFound(
            key=self.key,
            ring=self.ring.generation,
            group=self.ring.group,
            class_index=self.class_index,
            row=self.row,
            images=tuple(self.delivered[node] for node in nodes if node in self.delivered),
        )
