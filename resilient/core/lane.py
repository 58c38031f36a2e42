"""What ranks tell each other about snapshots in every exchange, and what all of them do about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

NOBODYS = (1 << 63) - 1
"""In the place of a digest, from a rank that has none. Above every digest."""
DIGEST_BITS = 62


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a rank brings into the lane."""

    due: bool = False
    """A snapshot is."""
    room: bool = False
    save_due: bool = False
    """One that is to be made durable is."""
    save_room: bool = False
    interval: int = 1
    protected: int = -1
    """Packed ordinal of the newest snapshot its keeper holds protected, -1 for none."""
    digest: int | None = None
    """Of the state at the start of this step, if all capture it; None where it has not been captured."""

    def lane(self, stage: int = 0, stages: int = 1) -> list[int]:
        """Numbers of which the minimum over all ranks tells `agreed` all. Digests are compared within a stage."""
        own = (NOBODYS, NOBODYS) if self.digest is None else (self.digest, -self.digest)
        return [
            *(-int(self.due), int(self.room), -int(self.save_due), int(self.save_room)),
            *(-self.interval, self.protected, -self.protected),
            *by_stage(own, stage, stages),
        ]


def by_stage(own: Sequence[int], stage: int, stages: int) -> list[int]:
    """Columns of which each stage has its own: the others' leave the minimum alone."""
    return [number for at in range(stages) for number in (own if at == stage else [NOBODYS] * len(own))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """What all ranks do, as the lane says it."""

    capture: bool
    save: bool
    """What is captured is to be made durable."""
    interval: int
    """The longest that any rank wants."""
    protected: int
    """Packed ordinal of the newest protected snapshot, if that is the same on all nodes, else -1."""
    verified: bool = False
    """Whether ranks have compared the state at the start of this step, and all that did hold the same."""
    differs: bool = False
    """Whether they do not. Then nothing else of this counts."""

    @classmethod
    def of(cls, low: Sequence[int]) -> Agreed:
        """low: the minimum of every rank's `Wish.lane()`."""
        due, room, save_due, save_room, interval, oldest, newest, *digests = low
        pairs = [(least, most) for least, most in batched(digests, 2) if least != NOBODYS]
        save = bool(save_due) and bool(save_room)
        return cls(
            capture=save or (bool(due) and bool(room)),
            save=save,
            interval=-interval,
            protected=oldest if oldest == -newest else -1,
            verified=2 * len(pairs) == len(digests) and all(least == -most for least, most in pairs),
            differs=any(least != -most for least, most in pairs),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLane:
    """All that a rank brings into the lane of a step's exchange."""

    newest: int
    """The newest generation whose plan it holds."""
    control: int
    """Digest of learning rates and the like."""
    buffers: int
    """Digest of which buffers take part."""
    layout: int
    """Digest of the sums' layout, the same in all of a stage."""
    mask: int | None
    """Digest of which tensors are present, if in all micro-batches alike."""
    spelled_anew: bool
    """Whether the optimizer's state has another structure than this rank has told the others."""
    wish: Wish

    def row(self, stage: int = 0, stages: int = 1) -> list[int]:
        mask = self.mask or 0
        return [
            *(self.newest, self.control, -self.control, self.buffers, -self.buffers),
            *(int(self.mask is not None), -int(self.spelled_anew)),
            *by_stage((self.layout, -self.layout, mask, -mask), stage, stages),
            *self.wish.lane(stage, stages),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreedLane:
    """What the minimum of all rows says."""

    newest: int
    control_differs: bool
    layouts_differ: bool
    masks_differ: bool
    """Or somebody does not have one."""
    spell: bool
    snapshot: Agreed

    @classmethod
    def of(cls, low: Sequence[int], stages: int = 1) -> AgreedLane:
        newest, control, most_control, buffers, most_buffers, masked, spelled = low[:7]
        columns = list(batched(low[7 : 7 + 4 * stages], 4))
        return cls(
            newest=newest,
            control_differs=control != -most_control,
            layouts_differ=buffers != -most_buffers or any(layout != -most for layout, most, _, _ in columns),
            masks_differ=not masked or any(mask != -most for _, _, mask, most in columns),
            spell=bool(spelled),
            snapshot=Agreed.of(low[7 + 4 * stages :]),
        )


def batched(numbers: Sequence[int], count: int) -> Iterator[tuple[int, ...]]:
    return zip(*[iter(numbers)] * count, strict=True)
