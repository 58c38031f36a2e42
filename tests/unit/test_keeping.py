"""What a keeper does with what is in its folder, apart from protecting it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.keeping import Keeping
from actors.standing import show_settled
from actors.vault import wake_vault
from snapshot.core.lifecycle import Ordinal
from tests.vaults import RUN, SECRET, key_of, packed, ring_of, wait_for, write_slots

RING = ring_of("a", 0)
MEMBER = 100
"""Of rank 0."""


@pytest.fixture
def keeping(tmp_path: Path) -> Iterator[Keeping]:
    keeping = Keeping(key=f"{RUN}/1", node="a", folder=tmp_path / f"{RUN}-1-a", secret=SECRET, ip="127.0.0.1")
    yield keeping
    keeping.close()


def left_of(keeping: Keeping, *, alive: bool = False) -> list[str]:
    keeping.sweep(lambda member: alive and member == MEMBER)
    return sorted(path.name for path in keeping.folders[0].glob("rank-*.slot-*"))


def test_slots_of_ranks_that_have_ended_go_unless_they_are_to_be_made_durable(keeping: Keeping) -> None:
    folder = keeping.folders[0]
    keeping.protect(RING, {})
    write_slots(folder, RING, key_of(1), (0,))
    write_slots(folder, RING, key_of(2), (0,), durable=True)
    assert len(left_of(keeping)) == 2, "nothing newer is protected"
    write_slots(folder, RING, key_of(3), (0,))
    wake_vault(folder, packed(3))
    wait_for(lambda: keeping.tally().everywhere == Ordinal(0, 3))
    assert len(left_of(keeping, alive=True)) == 3, "a rank's own slots are its own"
    assert left_of(keeping) == ["rank-100.slot-0", "rank-100.slot-2"], "the second is not on storage yet"
    show_settled(folder, Ordinal(0, 2))
    assert left_of(keeping) == ["rank-100.slot-0"], "the newest that is protected stays"
