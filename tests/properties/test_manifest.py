"""Manifests that were changed in any way are refused, with an error of our own, or are what they were."""

import copy
import json
import re
import string
import tracemalloc
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshot.core.branches import Branch, Lineage
from snapshot.core.manifest import Manifest, ShardEntry, ShardManifest, StoredChunk, check_cover
from snapshot.core.names import CheckpointKey, is_temporary, shard_file, temporary, world_of
from snapshot.core.spelling import ManifestError, spelled
from tests.shards import LINEAGE

COMMON: dict[str, Any] = {
    "run": "gpt", "attempt": 1, "branch": 0, "generation": 7, "step": 500, "token": "1f2e3d4c", "world": 2,
    "state_bytes": 3000, "skeleton": "0123456789abcdef" * 2, "skeleton_bytes": 77,
}  # fmt: skip
CHUNKS = (
    StoredChunk(end=1000, stored_bytes=1000, coding="raw", shuffle=1, xxh3_64=5, stored_xxh3_64=5),
    StoredChunk(end=1400, stored_bytes=100, coding="zstd", shuffle=4, xxh3_64=1 << 63, stored_xxh3_64=6),
)
SHARD = ShardManifest(
    **COMMON, member=100, rank=0, ranges=((0, 1400),), file=shard_file(0, 2), file_bytes=1100, chunks=CHUNKS
)
OTHER = ShardManifest(
    **COMMON, member=101, rank=1, ranges=((1400, 3000),), file=shard_file(1, 2), file_bytes=1600,
    chunks=(StoredChunk(end=1600, stored_bytes=1600, coding="raw", shuffle=1, xxh3_64=9, stored_xxh3_64=9),),
)  # fmt: skip
SEVERAL = ShardManifest(
    **COMMON, member=100, rank=0, ranges=((0, 1000), (2000, 2400)), file=shard_file(0, 2), file_bytes=1100,
    chunks=CHUNKS,
)  # fmt: skip
NOTHING = ShardManifest(
    **COMMON, member=100, rank=0, ranges=(), file=shard_file(0, 2), file_bytes=0, chunks=()
)  # fmt: skip
OLD_NOTHING = ShardManifest(
    **COMMON, member=100, rank=0, ranges=((700, 700),), file=shard_file(0, 2), file_bytes=0, chunks=()
)  # fmt: skip
MANIFEST = Manifest(
    **COMMON,
    lineage=LINEAGE,
    saved_at="2026-01-02T03:04:05Z",
    writer="resilient-runtime 0.1.0",
    shards=tuple(ShardEntry.of(shard, shard.to_bytes()) for shard in (SHARD, OTHER)),
)
EACH = pytest.mark.parametrize(
    "value", [SHARD, SEVERAL, NOTHING, OLD_NOTHING, MANIFEST], ids=["shard", "several", "none", "old none", "manifest"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
    | st.sampled_from([-1, 0, 2, 3001, 1 << 40, 1 << 62, 1 << 63, 1 << 200, "../x", "a/b", "shard-00001-of-00002.bin"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(string.ascii_lowercase, max_size=5), inner),
    max_leaves=4,
)  # fmt: skip


def read(value: ShardManifest | Manifest, data: bytes) -> ShardManifest | Manifest:
    return type(value).from_bytes(data, file="here.json")


def respelled(node: dict[str, Any]) -> bytes:
    """With a checksum that is right, as somebody would who means it."""
    body = dict(node)
    form = body.pop("format", "")
    version = body.pop("version", None)
    body.pop("checksum", None)
    if type(version) is int and version in (1, 2):
        return spelled(form, body, version)
    data = spelled(form, body)
    front = data[: data.rfind(b'"checksum":')].replace(b'"version":1,', b'"version":%b,' % json.dumps(version).encode())
    return front + b'"checksum":"%b"\n}\n' % xxhash.xxh3_128_hexdigest(front).encode()


@EACH
def test_a_manifest_is_read_as_it_was_written(value: ShardManifest | Manifest) -> None:
    data = value.to_bytes()
    assert read(value, data) == value
    node = json.loads(data)
    assert next(iter(node)) == "format" and list(node)[-1] == "checksum"
    assert respelled(node) == data
    assert value.key.folder == "step-000000500-b0-a1-g7-1f2e3d4c-gpt"


def test_version_1_is_spelled_as_it_ever_was() -> None:
    found = [xxhash.xxh3_128_hexdigest(each.to_bytes()) for each in (SHARD, OTHER, MANIFEST)]
    assert found == [
        "6ff5028738d6eb2959025d54be4284c5",
        "b9a8e83218fb4ed67910f8779c4fa96c",
        "af6b57ff9e709717b91137805bfe2f59",
    ]


def test_only_what_version_1_can_not_say_is_version_2() -> None:
    assert [json.loads(each.to_bytes())["version"] for each in (SHARD, SEVERAL, NOTHING, OLD_NOTHING)] == [1, 2, 2, 1]
    fields = {("ranges" if name == "start" else name): value for name, value in json.loads(SHARD.to_bytes()).items()}
    fields |= {"ranges": [[0, fields.pop("stop")]], "version": 2}
    with pytest.raises(ManifestError, match="not spelled as it must be"):
        ShardManifest.from_bytes(respelled(fields), file="here.json")
    for ranges in (((0, 1000), (1000, 1400)), ((0, 900), (2000, 2500)), ((700, 700), (800, 800)), ((5000, 5000),)):
        with pytest.raises(ManifestError):
            replace(SEVERAL, ranges=ranges)


def places(node: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [here, *(place for key, each in inside for place in places(each, (*here, key)))]


@EACH
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_other_value_is_refused(value: ShardManifest | Manifest, data: st.DataObject) -> None:
    node = json.loads(value.to_bytes())
    place = data.draw(st.sampled_from(places(node)[1:]))
    changed = copy.deepcopy(node)
    holder: Any = changed
    for key in place[:-1]:
        holder = holder[key]
    how = data.draw(st.sampled_from(["other", "gone", "twice"]))
    if how == "other":
        holder[place[-1]] = data.draw(VALUES)
    elif how == "gone":
        del holder[place[-1]]
    elif isinstance(holder, list):
        holder.append(holder[place[-1]])
    else:
        holder[f"{place[-1]}2"] = holder[place[-1]]
    try:
        found = read(value, respelled(changed))
    except ManifestError as error:
        assert str(error).startswith("here.json: ")
    else:
        # Somebody else's true manifest: every value is one that could have been written.
        assert found.to_bytes() == respelled(changed)
        if place[0] in ("file", "file_bytes", "chunks", "rank", "start", "stop", "shards", "world") and how != "other":
            assert changed == node


@EACH
@given(data=st.data())
def test_any_other_bytes_are_refused(value: ShardManifest | Manifest, data: st.DataObject) -> None:
    right = value.to_bytes()
    start = data.draw(st.integers(0, len(right)))
    stop = data.draw(st.integers(start, len(right)))
    wrong = right[:start] + data.draw(st.binary(max_size=20)) + right[stop:]
    if wrong == right:
        return
    with pytest.raises(ManifestError, match=r"here\.json"):
        read(value, wrong)


@given(st.binary(max_size=100) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    for value in (SHARD, MANIFEST):
        with pytest.raises(ManifestError, match=r"here\.json"):
            read(value, data)


def test_a_manifest_that_promises_much_costs_nothing() -> None:
    node = json.loads(SHARD.to_bytes())
    node |= {"world": 1 << 40, "state_bytes": 1 << 60, "stop": 1 << 60, "file_bytes": 1 << 60}
    node["chunks"][-1] |= {"end": 1 << 60, "stored_bytes": 1 << 50}
    top = json.loads(MANIFEST.to_bytes()) | {"world": 1 << 60}
    for value, promise in ((SHARD, node), (MANIFEST, top)):
        data = respelled(promise)
        tracemalloc.start()
        with pytest.raises(ManifestError):
            read(value, data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


@pytest.mark.parametrize("version", [2, 99])
def test_a_newer_version_asks_for_an_upgrade(version: int) -> None:
    node = json.loads(MANIFEST.to_bytes()) | {"version": version, "checksum": "another way"}
    with pytest.raises(ManifestError, match=f"version: {version}, written by a newer version of this package; upgrade"):
        Manifest.from_bytes(json.dumps(node).encode(), file="here.json")


@pytest.mark.parametrize(
    ("shards", "why"),
    [
        ([SHARD], "must be those of ranks 0..1"),
        ([OTHER, SHARD], "must be those of ranks 0..1"),
        ([SHARD, SHARD], "must be those of ranks 0..1"),
        ([SHARD, SHARD, OTHER], "must be those of ranks 0..1"),
    ],
)
def test_shards_that_are_not_all_are_refused(shards: list[ShardManifest], why: str) -> None:
    check_cover([SHARD, OTHER])
    with pytest.raises(ManifestError, match=why):
        check_cover(shards)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"ranges": ((1399, 3000),)}, "start: 1399, must be 1400"),
        ({"ranges": ((1401, 3000),)}, "start: 1401, must be 1400"),
        ({"ranges": ((1400, 2999),)}, "stop: 2999, must be 3000"),
        ({"ranges": ((0, 100), (1400, 3000))}, "start: 0, must be 100"),
        ({"ranges": ((1400, 1500), (1600, 3000))}, "start: 1600, must be 1500"),
        ({"ranges": ()}, "stop: 1400, must be 3000"),
        ({"state_bytes": 3001}, "state_bytes: 3001, but 3000"),
        ({"token": "00000000"}, "token"),
        ({"skeleton_bytes": 78}, "skeleton_bytes: 78, but 77"),
    ],
)
def test_shards_that_do_not_cover_the_state_are_refused(change: dict[str, Any], why: str) -> None:
    fields = {name: getattr(OTHER, name) for name in OTHER.__slots__} | change
    sizes = [stop - start for start, stop in fields["ranges"]]
    chunks = tuple(
        StoredChunk(end=end, stored_bytes=size, coding="raw", shuffle=1, xxh3_64=9, stored_xxh3_64=9)
        for end, size in zip(accumulate(sizes), sizes, strict=True)
    )
    with pytest.raises(ManifestError, match=why):
        check_cover([SHARD, ShardManifest(**fields | {"file_bytes": sum(sizes), "chunks": chunks})])


COUNTS = st.integers(0, (1 << 63) - 1)


RUNS = st.text(max_size=100).filter(lambda name: len(name.encode()) <= 100) | st.from_regex(
    r"[A-Za-z0-9._=/ -]{1,100}", fullmatch=True
)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"stored_bytes": 400}, "stored_bytes: 400, must be 1..399"),
        ({"stored_bytes": 0}, "stored_bytes: 0, must be 1..399"),
        ({"shuffle": 3}, "shuffle: 3, must be .* divide 400"),
        ({"shuffle": 0}, "shuffle: 0"),
        ({"coding": "lz4"}, "coding: 'lz4'"),
        ({"coding": "raw"}, "not stored as they are"),
    ],
)
def test_a_coding_that_can_not_be_is_refused(change: dict[str, Any], why: str) -> None:
    CHUNKS[1].check(400)
    with pytest.raises(ManifestError, match=why):
        replace(CHUNKS[1], **change).check(400)


@given(COUNTS, COUNTS, COUNTS, COUNTS, st.from_regex("[0-9a-f]{8}", fullmatch=True), RUNS)
def test_folders_are_named_one_way(attempt: int, branch: int, step: int, generation: int, token: str, run: str) -> None:
    """Whatever the run is called, in signs that every storage takes as they are."""
    key = CheckpointKey(attempt=attempt, branch=branch, step=step, generation=generation, token=token, run=run)
    assert re.fullmatch("[A-Za-z0-9._=-]{1,255}", key.folder) and key.folder in key.folders
    assert CheckpointKey.of_folder(key.folder) == key
    assert not is_temporary(key.folder) and is_temporary(temporary("manifest.json", token))


@given(st.text(max_size=60) | st.from_regex(r"step-[0-9]+-b[0-9]+-a[0-9]+-g[0-9]+-[0-9a-f]{8}(-[a-zé=%]{1,9})?"))
def test_other_folders_are_none(name: str) -> None:
    key = CheckpointKey.of_folder(name)
    assert key is None or key.folder == name
    assert world_of(name) is None


def test_a_branch_of_another_lineage_is_refused() -> None:
    with pytest.raises(ManifestError, match="branch: 0 is not in the lineage"):
        Manifest(**{name: getattr(MANIFEST, name) for name in MANIFEST.__slots__} | {
            "lineage": Lineage(branches=(Branch(number=3),))
        })  # fmt: skip
