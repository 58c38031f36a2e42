"""Checkpoints that were written, read again, whole, in part, and damaged in every byte."""

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from snapshot.core.chunks import share_of
from snapshot.core.names import shard_file, shard_manifest
from snapshot.core.ranges import merged
from snapshot.core.spelling import ManifestError
from snapshot.files import Files, open_files
from snapshot.manifests import read_shard
from snapshot.store import commit
from snapshot.stored import RottenCheckpoint, Stored
from tests.shards import LARGE, LINEAGE, SAVED_AT, SMALL, Shape, State, flip, scattered, some_bit, state_of

TINY: tuple[Shape, ...] = (("weight", "float32", 4, (9, 10)), ("step", "int64", 8, (20,)), ("noise", "uint8", 1, (50,)))


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return open_files(str(tmp_path))


def saved(
    files: Files,
    compression: int | None = None,
    shapes: tuple[Shape, ...] = SMALL,
    world: int = 2,
    scatter: bool = False,
) -> State:
    state = state_of(shapes=shapes, world=world)
    state = scattered(state) if scatter else state
    state.save(files, compression)
    return state


@pytest.mark.parametrize("shapes", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("compression", [None, 1])
@pytest.mark.parametrize(("world", "scatter"), [(1, False), (3, False), (7, False), (2, True), (5, True)])
def test_what_was_saved_is_read(
    files: Files, shapes: tuple[Shape, ...], compression: int | None, world: int, scatter: bool
) -> None:
    state = saved(files, compression, shapes, world, scatter)
    stored = Stored.open(files, state.folder)
    assert stored.skeleton == state.skeleton
    size = stored.state_bytes
    for threads in (1, 3):
        read = bytearray(size)
        stored.read(0, size, memoryview(read), threads=threads)
        assert read == state.data
    told: list[int] = []
    assert stored.verify(lambda done, total: told.append(total - done)) == []
    assert told == sorted(told, reverse=True) and told[-1] == 0
    chance = random.Random(world)
    ranges = [sorted((chance.randint(0, size), chance.randint(0, size))) for _ in range(20)]
    buffers = [(start, bytearray(stop - start)) for start, stop in ranges]
    stored.fill([(start, memoryview(buffer)) for start, buffer in buffers])
    for start, buffer in buffers:
        assert buffer == state.data[start : start + len(buffer)]
        stored.check(start, start + len(buffer))


def test_empty_shares_of_version_1_are_read(files: Files) -> None:
    """Which said where they lie, although they have nothing."""
    state = state_of(world=7)
    for rank in range(state.world):
        state.write(files, rank)
        shard, _ = read_shard(files, state.folder, rank, state.world)
        if not shard.ranges:
            at = share_of(state.ends, rank, state.world)
            name = f"{state.folder}/{shard_manifest(rank, state.world)}"
            files.remove(name)
            files.write(name, [replace(shard, ranges=(at,)).to_bytes()])
    assert commit(files, state.folder, lineage=LINEAGE, saved_at=SAVED_AT) is not None
    stored = Stored.open(files, state.folder)
    read = bytearray(stored.state_bytes)
    stored.read(0, stored.state_bytes, memoryview(read))
    assert read == state.data and stored.verify() == []
    assert all(b'"version":1' in files.read(f"{state.folder}/{shard_manifest(rank, 7)}") for rank in range(7))


def test_a_chunk_that_two_shares_have_is_refused(files: Files) -> None:
    state = scattered(state_of(shapes=LARGE))
    assert state.spread is not None
    first, second = state.spread
    for wrong in ((first, merged((*second, first[0]))), (first, second[1:]), (first, ((first[0][0], second[-1][1]),))):
        folder = replace(state, spread=wrong, token="0000000a")
        for rank in range(2):
            folder.write(files, rank)
        with pytest.raises(ManifestError, match=r"start: |stop: "):
            commit(files, folder.folder, lineage=LINEAGE, saved_at=SAVED_AT)
        files.remove_folder(folder.folder)


def test_a_bad_chunk_is_named_by_its_tensors_in_scattered_shares_too(files: Files) -> None:
    state = saved(files, None, LARGE, 2, scatter=True)
    assert state.spread is not None
    for rank, ranges in enumerate(state.spread):
        path = files.path(f"{state.folder}/{shard_file(rank, 2)}")
        assert path is not None
        flip(path, path.stat().st_size - 1, 3)
        (bad,) = Stored.open(files, state.folder).verify()
        last = ranges[-1][1] - 1
        (tensor,) = (
            spec.name for spec, at in zip(state.skeleton.tensors, state.skeleton.offsets, strict=False)
            if at <= last < at + spec.nbytes
        )  # fmt: skip
        assert bad.tensors == (tensor,)
        flip(path, path.stat().st_size - 1, 3)


def test_ranges_that_are_refused(files: Files) -> None:
    stored = Stored.open(files, saved(files).folder)
    for start, stop in ((-1, 1), (0, stored.state_bytes + 1), (5, 3)):
        with pytest.raises(ValueError):
            stored.read(start, stop, memoryview(bytearray(max(0, stop - start))))
    with pytest.raises(ValueError, match="into: 3 bytes"):
        stored.read(0, 2, memoryview(bytearray(3)))


def test_a_range_is_mapped_if_it_lies_there_as_it_is(files: Files) -> None:
    state = saved(files, shapes=LARGE, world=3)
    stored, cut = Stored.open(files, state.folder), state.head(1).ranges[0][0]
    for start, stop in ((0, 10), (5000, cut), (cut, cut + 70_000), (cut + 12_345, cut + 600_000)):
        view = stored.mapped(start, stop)
        assert view is not None and view == state.data[start:stop]
        view[:] = bytes(len(view))  # private
        stored.check(start, stop)
    assert stored.mapped(cut - 1, cut + 1) is None  # of two shards
    assert stored.mapped(7, 7) is None


def test_what_is_compressed_is_not_mapped(files: Files) -> None:
    stored = Stored.open(files, saved(files, 1, LARGE, 1).folder)
    noise = stored.skeleton.offsets[1]
    assert stored.mapped(0, 10) is None and stored.mapped(noise - 4, noise + 4) is None
    view = stored.mapped(noise + 4, noise + 100)
    assert view is not None
    stored.check(noise + 4, noise + 100)


def test_a_bad_chunk_is_named_with_its_tensors(files: Files, tmp_path: Path) -> None:
    state = saved(files, shapes=LARGE, world=1)
    stored = Stored.open(files, state.folder)
    at = stored.skeleton.offsets[1] + 300_000
    flip(tmp_path / state.folder / "shard-00000-of-00001.bin", at, 3)
    (bad,) = stored.verify()
    assert (bad.chunk, bad.tensors) == (4, ("noise",))
    assert str(bad) == f"{state.folder}/shard-00000-of-00001.bin: chunk 4 (of noise): its checksum differs"
    whole = memoryview(bytearray(stored.state_bytes))
    for read in (
        lambda: stored.read(0, len(whole), whole),
        lambda: stored.read(at, at + 1, whole[:1]),
        lambda: stored.check(at, at + 1),
    ):
        with pytest.raises(RottenCheckpoint, match=r"chunk 4 \(of noise\): its checksum differs"):
            read()
    stored.read(0, at - 300_000, whole[: at - 300_000])  # what is not concerned can be read


def is_found(files: Files, folder: str) -> bool:
    try:
        return Stored.open(files, folder).verify() != []
    except (ManifestError, RottenCheckpoint) as error:
        assert folder in str(error)
        return True


def test_every_flipped_byte_is_found(files: Files, tmp_path: Path) -> None:
    state = saved(files, 1, TINY)
    stored_as = b"".join(path.read_bytes() for path in (tmp_path / state.folder).glob("shard-*.json"))
    assert b'"coding":"raw"' in stored_as and b'"coding":"zstd"' in stored_as
    assert not is_found(files, state.folder)
    for path in sorted((tmp_path / state.folder).iterdir()):
        data = path.read_bytes()
        for at in range(len(data)):
            for bit in {some_bit(at), *([some_bit(-at - 1)] if at % 7 == 0 else [])}:
                flip(path, at, bit)
                assert is_found(files, state.folder), (path.name, at, bit)
                path.write_bytes(data)
    assert not is_found(files, state.folder)


def test_files_that_are_cut_missing_or_too_many_are_found(files: Files, tmp_path: Path) -> None:
    state = saved(files, world=3)
    folder = tmp_path / state.folder
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for other in (data[:-1], data[: len(data) // 2], b"", data + b"\0", data + data):
            path.write_bytes(other)
            assert is_found(files, state.folder) or other == data, path
        path.unlink()
        assert is_found(files, state.folder), path
        path.write_bytes(data)
    for name in ("extra", "shard-00003-of-00004.json", "shard-00000-of-00003.bin.bak"):
        (folder / name).write_bytes(b"x")
        (bad,) = Stored.open(files, state.folder).verify()
        assert bad.file.endswith(name)
        (folder / name).unlink()
    (folder / ".manifest.json.0123abcd.tmp").write_bytes(b"what somebody was writing when he died")
    assert not is_found(files, state.folder)


def test_shards_of_another_checkpoint_are_found(files: Files, tmp_path: Path) -> None:
    state, other = saved(files), state_of(501)
    other.save(files)
    for name in ("shard-00001-of-00002", "shard-00000-of-00002"):
        for suffix in (".bin", ".json"):
            shutil.copy(tmp_path / other.folder / (name + suffix), tmp_path / state.folder / (name + suffix))
        assert is_found(files, state.folder)


def test_a_checkpoint_that_goes_while_it_is_open_is_found(files: Files) -> None:
    state = saved(files)
    stored = Stored.open(files, state.folder)
    files.remove_folder(state.folder)
    with pytest.raises(RottenCheckpoint, match="missing"):
        stored.read(0, 100, memoryview(bytearray(100)))
    with pytest.raises(RottenCheckpoint, match="missing"):
        stored.mapped(0, 100)
    with pytest.raises(RottenCheckpoint, match="missing"):
        stored.check(0, 100)
    assert len(stored.verify()) == 1
