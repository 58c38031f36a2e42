"""A list that is spilled behaves as a list does, and holds little."""

from __future__ import annotations

import gc
import io
import pickle
import tempfile
from typing import Any

import pytest

from resilient import spilled
from resilient.spilled import Spilled


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spilled, "BLOCK_ITEMS", 4)


def both(count: int) -> tuple[Spilled[int], list[int]]:
    found = Spilled[int]()
    found.extend(range(count))
    return found, list(range(count))


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 21])
def test_it_reads_like_a_list(count: int) -> None:
    found, like = both(count)
    assert found == like and like == list(found) and found != [*like, 1] and repr(found) == repr(like)
    assert [found[place] for place in range(-count, count)] == [like[place] for place in range(-count, count)]
    for place in (slice(None), slice(2, None), slice(None, None, -1), slice(-3, None), slice(1, 9, 3)):
        assert found[place] == like[place]
    for place in (count, -count - 1):
        with pytest.raises(IndexError):
            found[place]
    assert found + [7] == [*like, 7] and pickle.loads(pickle.dumps(found)) == like  # noqa: RUF005


@pytest.mark.parametrize("length", range(12))
def test_it_can_be_shortened_and_goes_on(length: int) -> None:
    found, like = both(11)
    found.truncate(length)
    del like[length:]
    assert found == like
    found.extend(range(50, 57))
    assert found == [*like, *range(50, 57)]


def test_two_readers_at_once() -> None:
    found, like = both(21)
    assert list(zip(found, reversed(found), strict=True)) == list(zip(like, reversed(like), strict=True))


class Full:
    """A file on a disk that is full until there is room."""

    room = False

    def __init__(self) -> None:
        self._file = io.BytesIO()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError("no space left on device")
        return self._file.write(data)


def test_without_room_on_the_disk_nothing_is_lost_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Full()
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: file)
    found, like = both(11)
    assert found == like and len(found._tail) == 11
    assert capsys.readouterr().err.count("TMPDIR") == 1
    found.truncate(10)
    file.room = True
    found.extend(range(10, 13))
    assert found == range(13) and len(found._tail) == 1


def test_a_million_rows_leave_a_block_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = Spilled[dict[str, float]]()
    before = len(gc.get_objects())
    for step in range(1_000_000):
        found.append({"step": float(step), "loss": 1.0 / (step + 1)})
    assert len(gc.get_objects()) - before < 2 * spilled.BLOCK_ITEMS
    assert found[999_999]["step"] == 999_999 and found[1234]["loss"] == 1 / 1235
