"""A training function of any size is read back as it was stored, whatever died while it was read."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RpcError

from actors import launch
from resilient import function_store
from resilient.function_store import drop_stored, opened, store_function
from resilient.job import StoredFunction
from tests.cluster_keys import keys_in_memory

KEY = "gpt/1"
LARGE = bytes(range(256)) * 40


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    monkeypatch.setattr(function_store, "PIECE_BYTES", 1000)
    monkeypatch.setattr(function_store, "TRY_AGAIN_S", 0.0)
    return keys_in_memory(monkeypatch)


def stored(function: Any = LARGE) -> StoredFunction:
    return store_function(KEY, ["train.py", "--lr", "1"], pickle.dumps(function))


def read(what: StoredFunction, folder: Path) -> Any:
    with opened(KEY, what, folder) as (argv, file):
        assert argv == ["train.py", "--lr", "1"]
        return pickle.load(file)


def test_a_small_one_leaves_no_file(keys: dict[str, bytes], tmp_path: Path) -> None:
    assert read(stored("small"), tmp_path) == "small"
    assert not list(tmp_path.iterdir())


def test_a_large_one_is_read_once_per_node(keys: dict[str, bytes], tmp_path: Path) -> None:
    what = stored()
    assert len(keys) > 10 and max(map(len, keys.values())) == 1000
    assert read(what, tmp_path) == LARGE
    keys.clear()
    assert read(what, tmp_path) == LARGE


def test_a_copy_that_was_damaged_or_never_completed_is_made_anew(keys: dict[str, bytes], tmp_path: Path) -> None:
    what = stored()
    (tmp_path / f"function-{what.digest}.new").write_bytes(b"half")
    (tmp_path / f"function-{what.digest}").write_bytes(b"damaged")
    assert read(what, tmp_path) == LARGE


def test_without_room_for_a_copy_it_is_read_all_the_same(keys: dict[str, bytes], tmp_path: Path) -> None:
    what = stored()
    (tmp_path / f"function-{what.digest}.new").symlink_to("/dev/full")
    assert read(what, tmp_path) == LARGE
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_the_head_may_be_away_for_a_while(
    keys: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what, away = stored(), [True] * 3

    def answer(key: str) -> bytes | None:
        if away:
            away.pop()
            raise RpcError("the head has gone")
        return keys.get(key)

    monkeypatch.setattr(launch, "read_key", answer)
    assert read(what, tmp_path) == LARGE and not away


def test_what_is_gone_or_another_is_refused(keys: dict[str, bytes], tmp_path: Path) -> None:
    what = stored()
    keys[f"{KEY}/function/000003"] = b"other bytes"
    with pytest.raises(RuntimeError, match="not in the cluster's keys as it was put there"):
        read(what, tmp_path)
    del keys[f"{KEY}/function/000003"]
    with pytest.raises(RuntimeError, match="no longer in the cluster's keys"):
        read(what, tmp_path)


def test_what_earlier_attempts_have_left_is_removed_and_nothing_else(keys: dict[str, bytes]) -> None:
    stored()
    keys |= {"gpt/1/began": b"", "gpt2/1/function/000000": b"another run's"}
    drop_stored("gpt")
    assert sorted(keys) == ["gpt/1/began", "gpt2/1/function/000000"]


def test_nothing_stays_of_one_that_could_not_be_stored(keys: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def write(key: str, value: bytes) -> None:
        if len(keys) == 5:
            raise RpcError("the head has gone")
        keys[key] = value

    monkeypatch.setattr(launch, "write_key", write)
    with pytest.raises(RpcError):
        stored()
    assert not keys
