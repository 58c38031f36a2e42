"""Parcels between processes: delivered once, whatever happens to connections."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator

import pytest
import torch

from actors.post import Parcel, Post
from actors.transfer import Connection

SECRET = "secret"
LIMIT_S = 30.0


class Office:
    """A post, and what it has told."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.broken: list[tuple[Hashable, str]] = []
        self.post = Post("127.0.0.1", SECRET, arrived=self.wake, broken=self.break_)

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.post.port

    def wake(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def break_(self, peer: Hashable, why: str) -> None:
        self.broken.append((peer, why))
        self.wake()

    def until_here(self, key: tuple[int, ...]) -> Parcel:
        with self.changed:
            assert self.changed.wait_for(lambda: self.post.get(key) is not None, LIMIT_S), f"{key} has not come"
        found = self.post.get(key)
        assert found is not None
        return found


@pytest.fixture
def offices() -> Iterator[tuple[Office, Office]]:
    pair = Office(), Office()
    yield pair
    for office in pair:
        office.post.close()


def parcel(*tensors: torch.Tensor) -> Parcel:
    return Parcel(tensors=tensors, marks=tuple(range(len(tensors))))


def test_tensors_arrive_as_they_were(offices: tuple[Office, Office]) -> None:
    here, there = offices
    sent = parcel(
        torch.randn(3, 5), torch.arange(7), torch.tensor(True), torch.empty(0, 4), torch.randn(3).to(torch.bfloat16),
        torch.randn(4, 6).t(), torch.tensor(2.5, dtype=torch.float64),
    )  # fmt: skip
    here.post.send("there", there.address, (0, 1), sent)
    found = there.until_here((0, 1))
    assert found.marks == sent.marks
    for one, other in zip(found.tensors, sent.tensors, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_what_comes_twice_is_dropped(offices: tuple[Office, Office]) -> None:
    here, there = offices
    here.post.send("there", there.address, (0, 1), parcel(torch.zeros(2)))
    first = there.until_here((0, 1))
    here.post.send("there", there.address, (0, 1), parcel(torch.ones(2)))
    here.post.send("there", there.address, (0, 2), parcel(torch.ones(2)))
    there.until_here((0, 2))
    assert there.post.get((0, 1)) is first
    assert there.post.counts["twice"] == 1


def test_an_age_that_is_over_is_refused(offices: tuple[Office, Office]) -> None:
    here, there = offices
    here.post.send("there", there.address, (0, 1), parcel(torch.zeros(2)))
    there.until_here((0, 1))
    there.post.begin_age(4)
    assert there.post.get((0, 1)) is None
    for key in ((3, 1), (4, 1)):
        here.post.send("there", there.address, key, parcel(torch.zeros(2)))
    there.until_here((4, 1))
    assert there.post.get((3, 1)) is None and there.post.counts["refused"] == 1


def test_a_connection_that_breaks_loses_nothing(
    offices: tuple[Office, Office], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = offices
    opened: list[Connection] = []
    original = Connection.open.__func__  # type: ignore[attr-defined]

    def opening(*arguments: object) -> Connection:
        opened.append(original(Connection, *arguments))
        return opened[-1]

    monkeypatch.setattr(Connection, "open", opening)
    here.post.send("there", there.address, (0, 1), parcel(torch.zeros(2)))
    there.until_here((0, 1))
    opened[0].cancel()
    here.post.send("there", there.address, (0, 2), parcel(torch.zeros(2)))
    there.until_here((0, 2))
    assert len(opened) == 2 and not here.broken, "one that broke for nothing is nobody's business"


def test_who_can_not_be_reached_is_told_once(offices: tuple[Office, Office]) -> None:
    here, there = offices
    address = there.address
    there.post.close()
    here.post.send("there", address, (0, 1), parcel(torch.zeros(2)))
    with here.changed:
        assert here.changed.wait_for(lambda: here.broken, LIMIT_S)
    here.post.keep_to({})
    assert [peer for peer, _ in here.broken] == ["there"]


def test_damaged_requests_are_refused(offices: tuple[Office, Office]) -> None:
    from actors.transfer import TransferRefused

    _, there = offices
    connection = Connection.open(there.address, SECRET, 3.0)
    for tensors in ([{"dtype": "nonsense", "shape": [1], "mark": 0}], [{"dtype": "int64", "shape": [-1], "mark": 0}]):
        with pytest.raises(TransferRefused, match=r"a parcel with a tensor of|no dtype of the name"):
            connection.request({"key": [0, 1], "tensors": tensors})
    with pytest.raises(TransferRefused, match="bytes"):
        connection.request({"key": [0, 1], "tensors": [{"dtype": "int64", "shape": [1 << 50], "mark": 0}]})
    connection.close()


def test_a_parcel_that_cannot_be_sent_is_told_and_the_next_one_goes(offices: tuple[Office, Office]) -> None:
    here, there = offices
    here.post.send("there", there.address, (1,), parcel(torch.ones(2, 2).to_sparse()))
    here.post.send("there", there.address, (2,), parcel(torch.ones(2)))
    there.until_here((2,))
    assert [peer for peer, _ in here.broken] == ["there"] and "(1,) could not be sent" in here.broken[0][1]
