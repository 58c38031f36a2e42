"""Checkpoints that were written, read again."""

from pathlib import Path

import pytest

from snapshot.files import open_files
from snapshot.stored import Stored
from tests.shards import LARGE, SMALL, state_of


@pytest.mark.parametrize("shapes", [SMALL, LARGE])
@pytest.mark.parametrize("compression", [None, 1])
@pytest.mark.parametrize("world", [1, 3, 7])
def test_what_was_saved_is_read(tmp_path: Path, shapes: tuple, compression: int | None, world: int) -> None:
    files = open_files(str(tmp_path / "deep" / "down"))
    state = state_of(shapes=shapes, world=world)
    state.save(files, compression)
    stored = Stored.open(files, state.folder)
    assert stored.skeleton == state.skeleton
    read = bytearray(stored.state_bytes)
    stored.read(0, stored.state_bytes, memoryview(read))
    assert read == state.data
    assert stored.verify() == []
