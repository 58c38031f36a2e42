"""Which checkpoints there are, which is the newest, and which go."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from snapshot.core.branches import Branch, Lineage
from snapshot.core.spelling import ManifestError
from snapshot.files import Files, open_files
from snapshot.slot import RottenSlot, chunk_sums
from snapshot.store import (
    Known,
    checkpoints,
    commit,
    newest,
    newest_attempt,
    other_run,
    other_runs,
    prune,
    write_shard,
)
from snapshot.stored import Stored
from tests.shards import LARGE, LINEAGE, SAVED_AT, TOKEN, State, state_of

OTHER = "00000002"


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return open_files(str(tmp_path))


def seen(files: Files) -> list[tuple[int, int, int, bool]]:
    return [(each.key.attempt, each.key.branch, each.key.step, each.complete) for each in checkpoints(files)]


def begin(files: Files, state: State) -> State:
    """Its first shard."""
    state.write(files, 0)
    return state


def test_nothing_is_there_at_first(files: Files) -> None:
    assert checkpoints(files) == [] and newest(files) is None and newest_attempt(files, "gpt") == 0
    assert prune(files, 1, run="gpt", attempt=1, token=TOKEN) == []


def test_a_checkpoint_is_complete_with_its_last_shard(files: Files) -> None:
    state = state_of(world=3)
    for rank in (2, 0):
        state.write(files, rank)
        assert commit(files, state.folder, lineage=LINEAGE, saved_at=SAVED_AT) is None
    assert [each.why for each in checkpoints(files)] == ["incomplete"]
    state.write(files, 1)
    manifest = commit(files, state.folder, lineage=LINEAGE, saved_at=SAVED_AT)
    found = newest(files)
    assert found is not None and found.manifest == manifest and found.folder == state.folder
    assert manifest is not None and manifest.lineage == LINEAGE and manifest.world == 3
    assert commit(files, state.folder, lineage=LINEAGE, saved_at="later") == manifest


def test_the_later_attempt_is_newer_then_the_branch_then_the_step(files: Files) -> None:
    for fields in ({"step": 90}, {"step": 50, "branch": 1}, {"step": 70, "branch": 1}, {"step": 10, "attempt": 2}):
        state_of(**fields).save(files)
    begin(files, state_of(20, attempt=3))
    assert seen(files) == [(1, 0, 90, True), (1, 1, 50, True), (1, 1, 70, True), (2, 0, 10, True), (3, 0, 20, False)]
    assert newest_attempt(files, "gpt") == 3
    line = Lineage(branches=(Branch(number=0), Branch(number=1, parent=0, at_step=40)))
    for wanted, lineage, step in (
        ((2, 10), None, None),
        ((2, 10), line, None),
        ((1, 70), line, 70),
        (None, line, 90),  # given up when branch 1 was opened
        ((1, 90), Lineage(branches=(Branch(number=0),)), 90),
        (None, None, 20),
        (None, None, 11),
    ):
        found = newest(files, lineage, step)
        assert (found and (found.key.attempt, found.key.step)) == wanted


def test_folders_of_others_are_not_touched(files: Files) -> None:
    for name in ("readme/x", "step-5-b0-a1-g1-1f2e3d4c/manifest.json", "step-000000005-b00-a1-g1-1f2e3d4c/x"):
        files.write(name, [b"x"])
    state_of().save(files)
    assert len(checkpoints(files)) == 1 and prune(files, 1, run="gpt", attempt=9, token=TOKEN) == []
    assert len(files.names()) == 4


def test_the_newest_stay(files: Files) -> None:
    states = [state_of(step) for step in (100, 200, 300, 400)]
    for state in states:
        state.save(files)
    assert prune(files, 2, run="gpt", attempt=1, token=TOKEN, verified=states[0].folder) == [states[1].folder]
    assert [step for _, _, step, _ in seen(files)] == [100, 300, 400]
    assert prune(files, 1, run="gpt", attempt=1, token=TOKEN) == [states[0].folder, states[2].folder]
    assert prune(files, 1, run="gpt", attempt=1, token=TOKEN) == []
    with pytest.raises(ValueError, match="keep: got 0"):
        prune(files, 0, run="gpt", attempt=1, token=TOKEN)


def test_incomplete_ones_go_when_nobody_completes_them_any_more(files: Files) -> None:
    gone = [begin(files, state_of(100, attempt=1)), begin(files, state_of(900, attempt=1, token=OTHER))]
    gone += [begin(files, state_of(100, attempt=2))]
    stays = [begin(files, state_of(step, attempt=2)) for step in (300,)]
    stays += [begin(files, state_of(50, attempt=2, token=OTHER)), begin(files, state_of(50, attempt=3))]
    assert prune(files, 1, run="gpt", attempt=2, token=TOKEN) == []  # there is no complete one yet
    state_of(200, attempt=2).save(files)
    assert sorted(prune(files, 1, run="gpt", attempt=2, token=TOKEN)) == sorted(state.folder for state in gone)
    assert {each.folder for each in checkpoints(files) if not each.complete} == {state.folder for state in stays}


def test_other_submissions_are_left_alone(files: Files) -> None:
    for fields in ({"attempt": 2, "token": OTHER}, {"attempt": 3}, {"attempt": 1}, {"attempt": 2}):
        for step in (1, 2):
            state_of(step, **fields).save(files)
    prune(files, 1, run="gpt", attempt=2, token=TOKEN)
    assert [(each.key.attempt, each.key.token, each.key.step) for each in checkpoints(files)] == [
        (2, OTHER, 1), (2, OTHER, 2), (3, TOKEN, 1), (3, TOKEN, 2)
    ]  # fmt: skip


def test_what_cannot_be_read_is_said_and_stays(files: Files, tmp_path: Path) -> None:
    for step in (100, 200, 300):
        state_of(step).save(files)
    path = tmp_path / state_of(100).folder / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"version":1', b'"version":2'))
    (tmp_path / state_of(300).folder / "manifest.json").write_bytes(b"{}")
    first, _, last = checkpoints(files)
    assert "newer version" in first.why and "manifest.json: format: None" in last.why
    found = newest(files)
    assert found is not None and found.key.step == 200
    assert prune(files, 1, run="gpt", attempt=9, token=TOKEN) == []


def test_a_manifest_in_a_folder_of_another_name_is_none(files: Files, tmp_path: Path) -> None:
    state = state_of()
    state.save(files)
    (tmp_path / state.folder).rename(tmp_path / replace(state, step=600).folder)
    assert newest(files) is None and f"it is that of {state.folder}" in checkpoints(files)[0].why


def test_what_is_written_is_not_written_again(files: Files, tmp_path: Path) -> None:
    state = state_of()
    state.write(files, 0)
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*")}
    state.write(files, 0, compression=1)
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*")} == before
    state.save(files)
    (tmp_path / state.folder / "shard-00000-of-00002.json").unlink()
    state.write(files, 0)  # no file of a complete checkpoint is ever written
    assert not (tmp_path / state.folder / "shard-00000-of-00002.json").exists()


@pytest.mark.parametrize("name", ["shard-00000-of-00002.json", "shard-00000-of-00002.bin", "skeleton.json"])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_what_is_damaged_before_the_commit_is_written_again(files: Files, tmp_path: Path, name: str, how: str) -> None:
    state = state_of()
    state.write(files, 0)
    path = tmp_path / state.folder / name
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    if (name, how) == ("skeleton.json", "cut"):
        state.write(files, 1)
        with pytest.raises(ManifestError, match=r"skeleton\.json"):
            commit(files, state.folder, lineage=LINEAGE, saved_at=SAVED_AT)
        return
    state.save(files)
    assert newest(files) is not None


@pytest.mark.parametrize("compression", [None, 1])
def test_memory_that_has_rotted_is_not_saved(files: Files, compression: int | None) -> None:
    state = state_of()
    head = state.head(1)
    sums = chunk_sums(state.payload(1), head)
    for at in (0, head.skeleton_bytes, head.payload_bytes - 1):
        payload = bytearray(state.payload(1))
        payload[at] ^= 1
        with pytest.raises(RottenSlot, match="rank 1, step 500: chunk"):
            write_shard(files, token=TOKEN, head=head, payload=memoryview(payload), sums=sums, compression=compression)
    assert files.names(state.folder) == []


def test_shards_that_do_not_fit_together_are_no_checkpoint(files: Files) -> None:
    state = state_of()
    state.write(files, 0)
    another = replace(state, skeleton=state_of(world=2, shapes=LARGE).skeleton, data=state_of(shapes=LARGE).data)
    another.write(files, 1)
    with pytest.raises(ManifestError, match=r"state_bytes: .*, but .* in shard-00000"):
        commit(files, state.folder, lineage=LINEAGE, saved_at=SAVED_AT)


def test_shards_of_two_worlds_are_no_checkpoint(files: Files) -> None:
    state_of(world=2).write(files, 0)
    state_of(world=3).write(files, 0)
    with pytest.raises(ManifestError, match=r"shards of \[2, 3\] ranks"):
        commit(files, state_of().folder, lineage=LINEAGE, saved_at=SAVED_AT)


def test_cuts_that_are_not_those_of_the_skeleton_are_no_checkpoint(files: Files) -> None:
    state = state_of(world=1)
    head, payload = state.head(0), state.payload(0)
    moved = replace(head, chunks=(head.chunks[0], head.chunks[1] + 4, *head.chunks[2:]))
    write_shard(files, token=TOKEN, head=moved, payload=payload, sums=chunk_sums(payload, moved))
    with pytest.raises(ManifestError, match="skeleton's tensors"):
        commit(files, state.folder, lineage=LINEAGE, saved_at=SAVED_AT)


def test_each_run_sees_and_prunes_its_own(files: Files) -> None:
    """Also at one URL, at the same time, and with the same attempts."""
    for step in (1, 2, 3):
        state_of(step).save(files)
    for step in (101, 102, 103):
        state_of(step, run="other", token=OTHER).save(files)
    begun = [begin(files, state_of(step, run="other", attempt=step, token=OTHER)) for step in (1, 5)]
    assert prune(files, 1, run="gpt", attempt=9, token=TOKEN) == [state_of(step).folder for step in (1, 2)]
    assert [each.key.step for each in checkpoints(files, "gpt")] == [3]
    assert len(checkpoints(files, "other")) == 3 + len(begun)
    found = newest(files, run="gpt"), newest(files, run="other"), newest(files)
    assert [each and each.key.step for each in found] == [3, 103, 103]
    assert newest(files, run="third") is None
    assert (newest_attempt(files, "gpt"), newest_attempt(files, "other")) == (1, 5)
    assert other_runs(files, "gpt") == {"other"} and other_run(files, "gpt") is None
    other = other_run(files, "third")
    assert other is not None and other.run == "other" and other.key.attempt == 5


class Counting:
    """Files, and how often each method was called."""

    def __init__(self, files: Files) -> None:
        self.calls: Counter[str] = Counter()
        self._files = files
        self.url, self.lanes = files.url, files.lanes

    def __getattr__(self, name: str) -> Any:
        self.calls[name] += 1
        return getattr(self._files, name)


def test_what_a_place_with_many_folders_costs(files: Files) -> None:
    """Other runs' folders nothing but the listing; what was seen once is not read again."""
    for step in range(20):
        state_of(step, world=1).save(files)
        begin(files, state_of(step, run="other", token=OTHER))
        begin(files, state_of(step, attempt=2, token=OTHER))

    def calls(ask: Callable[[Any], object]) -> dict[str, int]:
        counting = Counting(files)
        ask(counting)
        return dict(counting.calls)

    assert calls(lambda files: newest_attempt(files, "gpt")) == {"names": 1}
    assert calls(lambda files: other_runs(files, "gpt")) == {"names": 1}
    assert calls(lambda files: newest(files, run="gpt", step=19)) == {"names": 1, "size": 2, "read": 1}
    assert calls(lambda files: checkpoints(files, "gpt")) == {"names": 1, "size": 40, "read": 20}
    known: Known = {}
    wanted: dict[str, Any] = {"run": "gpt", "attempt": 1, "token": TOKEN, "known": known}
    first = calls(lambda files: prune(files, 15, **wanted))
    assert first == {"names": 16, "size": 40, "read": 20, "settle": 1, "remove_folder": 5}
    state_of(20, world=1).save(files)
    then = calls(lambda files: prune(files, 15, **wanted))
    assert then == {"names": 2, "size": 21, "read": 1, "settle": 1, "remove_folder": 1}, "unfinished ones alone"


def without_run(state: State, path: Path) -> str:
    """As versions before this one named its folder."""
    folder = path / state.folder
    return folder.rename(path / state.folder.removesuffix(f"-{state.run}")).name


def test_folders_of_earlier_versions_are_the_runs_that_their_manifests_say(files: Files, tmp_path: Path) -> None:
    for state in (state_of(1), state_of(2), state_of(7, run="other", token=OTHER)):
        state.save(files)
        without_run(state, tmp_path)
    abandoned = without_run(begin(files, state_of(1, token="00000003")), tmp_path)
    foreign = without_run(begin(files, state_of(1, run="other", token="00000004")), tmp_path)
    files.write("step-000000009-b0-a1-g1-deadbeef/shard-00000-of-00002.bin", [b"whose?"])
    found = newest(files, run="gpt")
    assert found is not None and found.key.step == 2 and Stored.open(files, found).verify() == []
    other = other_run(files, "third")
    assert other is not None and (other.run, other.key.step) == ("other", 7) and other_run(files, "gpt") is None
    assert len(prune(files, 1, run="gpt", attempt=2, token=TOKEN)) == 2
    left = files.names()
    assert abandoned not in left and foreign in left and len(left) == 4
