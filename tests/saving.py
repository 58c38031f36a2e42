"""What a cluster does with its checkpoints in a while, and what must be there whenever it was cut off."""

from __future__ import annotations

from collections.abc import Callable

from snapshot.core.names import is_temporary
from snapshot.files import Files
from snapshot.store import checkpoints, newest, prune
from snapshot.stored import Stored
from tests.shards import TOKEN, State, state_of

FORMER = (100, 200)
STEP = 300


def former(files: Files) -> None:
    for step in FORMER:
        state_of(step).save(files)


def save(
    files: Files, step: int = STEP, compression: int | None = None, token: str = TOKEN, attempt: int = 1, world: int = 2
) -> None:
    """All shards, the manifest, and the oldest one goes."""
    state_of(step, token=token, attempt=attempt, world=world).save(files, compression)
    prune(files, keep=2, run="gpt", attempt=attempt, token=token)


def check(files: Files, least_step: int) -> int:
    """The step of the newest complete checkpoint, at least this one, of which every byte is as it was saved."""
    found = newest(files)
    assert found is not None, checkpoints(files)
    assert found.key.step >= least_step, found.key
    for each in checkpoints(files):
        if each.complete:
            check_one(files, state_of(each.key.step, attempt=each.key.attempt, token=each.key.token))
        else:
            assert each.why == "incomplete", each.why
    return found.key.step


def check_one(files: Files, state: State) -> None:
    stored = Stored.open(files, state.folder)
    read = bytearray(stored.state_bytes)
    stored.read(0, stored.state_bytes, memoryview(read), threads=1)
    assert read == state.data


def check_next(files: Files) -> None:
    """Another attempt takes over, saves, and clears away what the former has left."""
    save(files, step=STEP, token="00000002", attempt=2)
    save(files, step=STEP + 100, token="00000002", attempt=2)
    assert [(each.key.step, each.complete) for each in checkpoints(files)] == [(STEP, True), (STEP + 100, True)]
    check(files, STEP + 100)
    left = [name for folder in files.names() for name in files.names(folder) if is_temporary(name)]
    assert left == []


def points(run: Callable[[int], bool], limit: int = 1000) -> int:
    """run(1), run(2) and so on, until one says that it came to its end. How many there were."""
    for point in range(1, limit):
        if run(point):
            return point
    raise AssertionError(f"it never ends: {limit} points")
