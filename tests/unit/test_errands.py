"""What waits for the cluster's head, and what that means for keys that are created once."""

from __future__ import annotations

import queue
import threading
from typing import Any

import pytest
from ray.exceptions import RpcError

from actors import launch
from resilient.errands import Done, Errands


def test_errands_are_done_in_order_and_nobody_waits_for_them() -> None:
    done: queue.Queue[Done] = queue.Queue()
    errands, head, results = Errands(done.put), threading.Event(), list[Any]()
    errands.run(lambda: head.wait(10.0), results.append)
    errands.run(lambda: "second", results.append)
    assert done.empty()
    assert "has not answered" in (errands.remark(-1.0) or "") and errands.remark(-1.0) is None
    head.set()
    for _ in range(2):
        done.get(timeout=10.0).finish()
    assert results == [True, "second"]
    assert errands.remark(1e9) == "the cluster's head answers again"


def test_what_an_errand_raises_is_raised_where_it_was_ordered() -> None:
    done: queue.Queue[Done] = queue.Queue()
    Errands(done.put).run(lambda: {}["absent"])
    with pytest.raises(KeyError, match="absent"):
        done.get(timeout=10.0).finish()


def test_who_is_to_be_told_of_an_error_is_told_and_nothing_is_raised() -> None:
    done, told, results = queue.Queue[Done](), list[Exception](), list[Any]()
    errands = Errands(done.put)
    errands.run(lambda: {}["absent"], results.append, told.append)
    errands.run(lambda: "second", results.append, told.append)
    for _ in range(2):
        done.get(timeout=10.0).finish()
    assert [str(error) for error in told] == ["'absent'"] and results == ["second"]


def test_a_connection_that_breaks_repeats_the_errand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resilient.errands.TRY_AGAIN_S", 0.0)
    done: queue.Queue[Done] = queue.Queue()
    answers = [RpcError("the head has gone"), "answer"]

    def ask() -> object:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    Errands(done.put).run(ask)
    assert done.get(timeout=10.0).result == "answer"


class Keys:
    """The cluster's keys, and a head that stores the first value, and dies before it answers: Ray asks the next."""

    def __init__(self, answers_lost: int = 0) -> None:
        self.stored: dict[bytes | str, bytes] = {}
        self.answers_lost = answers_lost

    def _internal_kv_put(self, key: str, value: bytes, *, overwrite: bool, namespace: bytes) -> bool:
        existed = key in self.stored
        if overwrite or not existed:
            self.stored[key] = value
        if self.answers_lost:
            self.answers_lost -= 1
            return self._internal_kv_put(key, value, overwrite=overwrite, namespace=namespace)
        return existed

    def _internal_kv_get(self, key: str, *, namespace: bytes) -> bytes | None:
        return self.stored.get(key)


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Keys:
    found = Keys()
    monkeypatch.setattr(launch, "internal_kv", found)
    return found


def test_a_key_is_created_once(keys: Keys) -> None:
    assert launch.create_key("a", b"plan")
    assert not launch.create_key("a", b"plan"), "of two who create the same only one has"
    assert launch.read_key("a") == b"plan"
    assert launch.read_key("b") is None
    assert not launch.create_key("a", b"another plan") and launch.read_key("a") == b"plan"
    launch.write_key("a", b"other")
    assert launch.read_key("a") == b"other"


def test_a_key_that_was_created_by_a_head_that_died_before_it_said_so_is_ones_own(keys: Keys) -> None:
    """The controller believed that another one ruled, and yielded to nobody."""
    keys.answers_lost = 1
    assert launch.create_key("a", b"plan")


def test_an_errand_that_is_repeated_finds_the_key_its_own(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Creating a generation asks the head for more than one thing: the second may be what fails."""
    done: queue.SimpleQueue[Done] = queue.SimpleQueue()
    monkeypatch.setattr("resilient.errands.TRY_AGAIN_S", 0.0)
    creator, failures = launch.new_creator(), [RpcError("the head is away")]

    def create() -> bool:
        created = launch.create_key("a", b"plan", creator)
        if failures:
            raise failures.pop()
        return created

    Errands(done.put).run(create)
    assert done.get(timeout=30.0).result is True
    assert not launch.create_key("a", b"plan", launch.new_creator())
