"""Parity blocks as files: what is committed is known again, what is damaged is found."""

from __future__ import annotations

import random
import stat
from pathlib import Path

import pytest

from snapshot.core.inventory import ParityFound
from snapshot.core.stripes import Group
from snapshot.fields import image_fields, image_from, key_from, parity_fields, parity_from
from snapshot.parity import (
    HEAD_BYTES,
    PAYLOAD_AT,
    SUMMED_BYTES,
    NotParity,
    ParityFile,
    ParityHead,
    RottenParity,
    file_bytes,
)
from snapshot.slot import PAGE_BYTES
from tests.keepers import images_of, key_of, protected
from tests.vaults import flip

BLOCK_BYTES = 2 * SUMMED_BYTES + 8192
GROUP = Group(nodes=("a", "b", "c"), parity=1)


def found_of(step: int = 7) -> ParityFound:
    inventories = protected(key_of(step), [GROUP], {"a": 5000, "b": 6000, "c": 7000})
    return inventories[0].parities[0]


def committed(path: Path, block_bytes: int = BLOCK_BYTES) -> bytes:
    data = random.Random(block_bytes).randbytes(block_bytes)
    file = ParityFile.create(path, block_bytes)
    file.begin(block_bytes, zeros=True)
    assert not any(file.payload)
    file.payload[:] = data
    file.commit("gpt", found_of())
    return data


@pytest.mark.parametrize("block_bytes", [0, 4096, SUMMED_BYTES, BLOCK_BYTES])
def test_what_was_committed_is_read_again(tmp_path: Path, block_bytes: int) -> None:
    data = committed(tmp_path / "parity-0", block_bytes)
    assert stat.S_IMODE((tmp_path / "parity-0").stat().st_mode) == 0o600
    assert (tmp_path / "parity-0").stat().st_size == file_bytes(block_bytes)
    file = ParityFile.open(tmp_path / "parity-0")
    assert file.read() == ParityHead(run="gpt", found=found_of(), block_bytes=block_bytes)
    assert bytes(file.payload) == data
    assert file.verify() == ()


def test_it_counts_only_when_committed(tmp_path: Path) -> None:
    file = ParityFile.create(tmp_path / "parity-0", BLOCK_BYTES)
    assert file.read() is None
    file.begin(BLOCK_BYTES, zeros=True)
    assert ParityFile.open(tmp_path / "parity-0").read() is None
    file.commit("gpt", found_of())
    assert ParityFile.open(tmp_path / "parity-0").read() is not None
    file.begin(4096, zeros=True)
    assert ParityFile.open(tmp_path / "parity-0").read() is None


def test_memory_is_used_again_as_zeros(tmp_path: Path) -> None:
    committed(tmp_path / "parity-0")
    file = ParityFile.open(tmp_path / "parity-0")
    file.begin(4096, zeros=True)
    assert len(file.payload) == 4096 and not any(file.payload)
    file.extend(BLOCK_BYTES)
    assert len(file.payload) == BLOCK_BYTES and not any(file.payload)
    file.extend(4096)
    assert len(file.payload) == BLOCK_BYTES
    assert not file.fits(3 * SUMMED_BYTES)
    with pytest.raises(ValueError, match="does not fit"):
        file.begin(3 * SUMMED_BYTES, zeros=False)


def test_a_flipped_bit_in_the_payload_is_found(tmp_path: Path) -> None:
    committed(tmp_path / "parity-0")
    flip(tmp_path / "parity-0", PAYLOAD_AT + SUMMED_BYTES + 5)
    flip(tmp_path / "parity-0", PAYLOAD_AT + BLOCK_BYTES - 1)
    file = ParityFile.open(tmp_path / "parity-0")
    assert file.read() is not None
    assert file.verify() == (1, 2)


@pytest.mark.parametrize("at", [0, 9, 17, 25, 33, 49, PAGE_BYTES + 3])
def test_a_flipped_bit_before_the_payload_is_found(tmp_path: Path, at: int) -> None:
    committed(tmp_path / "parity-0")
    flip(tmp_path / "parity-0", at)
    with pytest.raises(RottenParity, match="parity-0"):
        ParityFile.open(tmp_path / "parity-0").read()


def test_a_flipped_bit_in_the_sums_is_found(tmp_path: Path) -> None:
    committed(tmp_path / "parity-0")
    flip(tmp_path / "parity-0", PAYLOAD_AT + BLOCK_BYTES + 3)
    file = ParityFile.open(tmp_path / "parity-0")
    file.read()
    with pytest.raises(RottenParity, match="sums"):
        file.verify()


def test_what_is_no_parity_block(tmp_path: Path) -> None:
    short, holes, link = tmp_path / "short", tmp_path / "holes", tmp_path / "link"
    short.write_bytes(b"RSLPRTY1")
    with holes.open("wb") as file:
        file.truncate(file_bytes(4096))
    link.symlink_to(short)
    for path in (short, holes, link, tmp_path):
        with pytest.raises(NotParity):
            ParityFile.open(path)
    with pytest.raises(FileNotFoundError):
        ParityFile.open(tmp_path / "nothing")


def test_a_head_that_is_too_long_is_refused() -> None:
    images = images_of({"b": 6000, "c": 7000})
    shard = images["b"].shards[0]
    many = images["b"].__class__(node="b", image_bytes=1, shards=(shard,) * (HEAD_BYTES // 10))
    parity = protected(key_of(1), [GROUP], {"a": 1})[0].parities[0]
    parity = ParityFound(key=parity.key, ring=1, group=GROUP, class_index=0, row=0, images=(many,))
    with pytest.raises(ValueError, match="too many shards"):
        ParityHead(run="gpt", found=parity, block_bytes=0).to_bytes()


def test_facts_there_and_back() -> None:
    found = found_of()
    assert parity_from(parity_fields(found)) == found
    assert [image_from(image_fields(image)) for image in found.images] == list(found.images)


@pytest.mark.parametrize(
    "value", [None, [], [1, 2, 3], [1, 2, 3, -1], [1, 2, 3, 1.5], [1, 2, 3, True], [1, 2, 3, 1 << 63], "1234"]
)
def test_facts_that_nobody_has_written_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="key: got"):
        key_from(value)
    with pytest.raises(ValueError, match="must be"):
        image_from({"node": value, "image_bytes": value, "shards": value})
    with pytest.raises(ValueError, match="must be"):
        parity_from(value)
