"""A ring: whose parity is where in one generation, as one keeper needs to know it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from snapshot.core.branches import Branch
from snapshot.core.stripes import Group
from snapshot.fields import Fields, group_fields, group_from, mapping, sequence, text, whole
from snapshot.tree import to_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """The stripes that the snapshots of one generation are protected with.

    group: the keeper's own.
    shares: the ranks on each of the group's nodes, ascending; nodes without ranks may be left out.
    branches: the run's lines of steps, of which the generation goes on with the newest.
    """

    generation: int
    group: Group
    shares: Mapping[str, tuple[int, ...]]
    branches: tuple[Branch, ...] = (Branch(number=0),)

    def __post_init__(self) -> None:
        whole(self.generation, "ring: generation")
        if strangers := sorted(set(self.shares) - set(self.group.nodes)):
            raise ValueError(f"ring {self.generation}: shares: nodes {strangers} are not in the group")
        for node, ranks in self.shares.items():
            if list(ranks) != sorted({whole(rank, "ring: rank") for rank in ranks}):
                raise ValueError(f"ring {self.generation}: shares: {node}: got ranks {ranks}, must ascend")

    def ranks_on(self, node: str) -> tuple[int, ...]:
        return tuple(self.shares.get(node, ()))

    def origins(self, class_index: int) -> tuple[str, ...]:
        """The class's data nodes that have anything to protect."""
        return tuple(node for node in self.group.data_nodes(class_index) if self.ranks_on(node))

    def peers_of(self, node: str) -> dict[str, tuple[int, ...]]:
        """Which keepers hold parity of the node's data, and of which classes, ascending."""
        peers: dict[str, tuple[int, ...]] = {}
        for class_index in self.group.classes_of(node):
            for peer in self.group.parity_nodes(class_index):
                peers[peer] = (*peers.get(peer, ()), class_index)
        return peers

    def fields(self) -> Fields:
        shares = {node: list(ranks) for node, ranks in self.shares.items()}
        return {
            "generation": self.generation,
            "group": group_fields(self.group),
            "shares": shares,
            "branches": [{**asdict(branch), "skipped": list(branch.skipped)} for branch in self.branches],
        }

    @classmethod
    def from_fields(cls, value: object) -> Ring:
        """Raises ValueError for anything that `fields` can't have written."""
        fields = mapping(value, "ring")
        shares = {}
        for node, ranks in mapping(fields.get("shares"), "ring: shares").items():
            if not isinstance(ranks, list):
                raise ValueError(f"ring: shares: {node}: got {ranks!r:.80}, must be a list")
            shares[text(node, "ring: shares")] = tuple(whole(rank, "ring: rank") for rank in ranks)
        return cls(
            generation=whole(fields.get("generation"), "ring: generation"),
            group=group_from(fields.get("group")),
            shares=shares,
            branches=tuple(_branch_from(branch) for branch in sequence(fields.get("branches"), "ring: branches")),
        )


def _branch_from(value: object) -> Branch:
    fields = mapping(value, "ring: branches")
    parent = fields.get("parent")
    return Branch(
        number=whole(fields.get("number"), "ring: branch"),
        parent=None if parent is None else whole(parent, "ring: parent"),
        at_step=whole(fields.get("at_step"), "ring: at_step"),
        skipped=tuple(whole(step, "ring: skipped") for step in sequence(fields.get("skipped"), "ring: skipped")),
    )


def write_ring(folder: Path, ring: Ring, *, run: str, attempt: int, node: str) -> None:
    """Whoever finds the folder's slots can then tell what they are part of."""
    data = to_bytes({"run": run, "attempt": attempt, "node": node, "ring": ring.fields()})
    path = folder / f"ring-{ring.generation}.json"
    whole_new = path.with_suffix(".new")
    descriptor = os.open(whole_new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    whole_new.replace(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenRing:
    """A ring as it was written down: by which keeper, of which run and attempt."""

    run: str
    attempt: int
    node: str
    ring: Ring


def read_rings(folder: Path) -> list[WrittenRing]:
    """What `write_ring` has written here. Raises ValueError, naming the file, if one is damaged."""
    found = []
    for path in sorted(folder.glob("ring-*.json")):
        try:
            fields = mapping(json.loads(path.read_bytes()), "ring")
            found.append(
                WrittenRing(
                    run=text(fields.get("run"), "ring: run"),
                    attempt=whole(fields.get("attempt"), "ring: attempt"),
                    node=text(fields.get("node"), "ring: node"),
                    ring=Ring.from_fields(fields.get("ring")),
                )
            )
        except (ValueError, RecursionError) as error:  # JSON's and Unicode's errors are ValueErrors
            raise ValueError(f"{path}: {error}") from error
    return found
