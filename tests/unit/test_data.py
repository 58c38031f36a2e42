"""A rank's micro-batches: the same whoever loads them, in whatever order they are asked for."""

import os
import random
import select
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray import cloudpickle
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from resilient.data import Feed

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs prctl and /proc")


class Noisy(Dataset):
    """Every sample: its index, and a draw from each generator. `__getitems__` must not be used."""

    def __init__(self, length: int = 48) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        noise = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        return {"index": index, "noise": torch.tensor(noise), "threads": torch.get_num_threads()}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        raise AssertionError("samples fetched together would share a seed")


def noisy_collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "index": torch.tensor([sample["index"] for sample in samples]),
        "noise": torch.stack([sample["noise"] for sample in samples]),
        "threads": [sample["threads"] for sample in samples],
        "mask": torch.rand(3),
        "process": os.getpid(),
    }


def noisy_feed(workers: int = 0, **changes: Any) -> Feed:
    settings: dict[str, Any] = {"global_batch": 8, "micro_batch": 2, "steps": 12, "seed": 3}
    dataset = changes.pop("dataset", Noisy())
    return Feed(dataset, num_workers=workers, collate_fn=noisy_collate, **{**settings, **changes})


def content(batch: dict[str, Any]) -> list[bytes]:
    """All bits that must not depend on who loaded it."""
    tensors = [batch[name].numpy().tobytes() for name in ("index", "noise", "mask")]
    return [*tensors, bytes(batch["threads"])]


@pytest.fixture
def feed() -> Iterator[Feed]:
    feed = noisy_feed(workers=2)
    yield feed
    feed.close()


def by_worker(batch: dict[str, Any]) -> bool:
    return bool(batch["process"] != os.getpid())


def ended(process: int, timeout_s: float) -> bool:
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        return True
    watch = select.poll()
    watch.register(descriptor, select.POLLIN)
    gone = bool(watch.poll(timeout_s * 1000))
    os.close(descriptor)
    return gone


def test_workers_and_direct_loads_agree_to_the_last_bit(feed: Feed) -> None:
    direct = noisy_feed()
    feed.seek(4, [0, 2, 3])
    for step in range(4, 9):  # over the end of an epoch of 6 steps
        for leaf in (0, 2, 3):
            random.seed(step)  # whatever state the caller leaves behind
            torch.manual_seed(leaf)
            batch = feed.get(step, leaf)
            assert by_worker(batch)
            assert content(batch) == content(direct.get(step, leaf))


def test_randomness_belongs_to_the_sample_and_the_epoch() -> None:
    feed = noisy_feed()

    def noise(step: int) -> dict[int, bytes]:
        batches = [feed.get(step, leaf) for leaf in range(4)]
        return {
            int(index): noise.numpy().tobytes()
            for batch in batches
            for index, noise in zip(batch["index"], batch["noise"], strict=True)
        }

    first, second = ({k: v for step in steps for k, v in noise(step).items()} for steps in (range(6), range(6, 12)))
    assert first.keys() == second.keys() == set(range(48))
    assert len({*first.values(), *second.values()}) == 96


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_once_per_epoch_with_deaths_joins_and_redeals(workers: int) -> None:
    plans = [  # per step: the leaves that each rank owns, and the rank that dies in it
        ({0: [0, 1], 1: [2, 3]}, None),
        ({0: [0, 1], 1: [2, 3]}, 1),
        ({0: [0, 1, 2, 3]}, None),
        ({0: [0, 1], 2: [2], 3: [3]}, 3),
        ({0: [0, 1], 2: [2, 3]}, 0),
        ({2: [0, 1, 2, 3]}, None),
    ]
    feeds = {rank: noisy_feed(workers if rank == 2 else 0) for rank in range(4)}
    used: Counter[int] = Counter()
    for step, (owned, dead) in enumerate(plans):
        for rank, leaves in owned.items():
            feeds[rank].seek(step, leaves)
            if rank != dead:
                for leaf in leaves:
                    used.update(feeds[rank].get(step, leaf)["index"].tolist())
        survivor = next(rank for rank in owned if rank != dead)
        for leaf in owned.get(dead, []):
            used.update(feeds[survivor].get(step, leaf)["index"].tolist())
    assert used == Counter(range(48))
    for feed in feeds.values():
        feed.close()


def test_out_of_order_is_right_and_keeps_the_queue(feed: Feed) -> None:
    direct = noisy_feed()
    feed.seek(0, [0, 1])
    asked = [(0, 1), (0, 3), (0, 0), (0, 2), (1, 0), (7, 2), (1, 1), (2, 1), (2, 0), (9, 0), (1, 0), (3, 0)]
    from_worker = []
    for step, leaf in asked:
        batch = feed.get(step, leaf)
        assert content(batch) == content(direct.get(step, leaf)), (step, leaf)
        from_worker.append(by_worker(batch))
    # Not in line: leaves 2 and 3, what is far ahead, and what was had before.
    assert [ticket for ticket, queued in zip(asked, from_worker, strict=True) if not queued] == [
        (0, 3), (0, 2), (7, 2), (9, 0), (1, 0),
    ]  # fmt: skip


def test_seek_keeps_what_is_under_way_and_the_workers(feed: Feed) -> None:
    direct = noisy_feed()
    processes = set()
    for step, leaves in [(0, [0, 1]), (1, [0, 1]), (2, [0, 1, 3]), (3, [1]), (4, [1]), (1, [2]), (10, [0])]:
        feed.seek(step, leaves)
        feed.seek(step, leaves)
        for leaf in leaves:
            batch = feed.get(step, leaf)
            assert by_worker(batch)
            assert content(batch) == content(direct.get(step, leaf))
            processes.add(batch["process"])
    assert len(processes) <= 2


def test_reading_ahead_stops_at_the_end_and_can_begin_again(feed: Feed) -> None:
    feed.seek(10, [0, 1, 2, 3])
    assert all(by_worker(feed.get(step, leaf)) for step in (10, 11) for leaf in range(4))
    feed.seek(12, [0, 1, 2, 3])
    assert not feed.has_step(12)
    with pytest.raises(ValueError, match="step 12 is not in this loop of 12 steps"):
        feed.get(12, 0)
    feed.seek(9, [0, 1, 2, 3])
    assert all(by_worker(feed.get(step, leaf)) for step in (9, 10, 11) for leaf in range(4))


def test_a_rank_without_leaves_reads_nothing_ahead(feed: Feed) -> None:
    feed.seek(0, [])
    assert not by_worker(feed.get(0, 1))


def test_epochs_and_positions() -> None:
    feed = noisy_feed(steps=None, epochs=2, dataset=Noisy(53))
    assert (feed.micro_batches, feed.steps) == (4, 12)
    assert [feed.has_step(step) for step in (-1, 0, 11, 12)] == [False, True, True, False]
    feed.seek(5, [0])
    assert position(feed) == {"step": 5}
    assert position(feed, 6) == {"step": 6}
    feed.load_state_dict({"step": 7})
    assert position(feed) == {"step": 7}


def position(feed: Feed, step: int | None = None) -> dict[str, Any]:
    """Without the settings that it counts in."""
    return {name: value for name, value in feed.state_dict(step).items() if name != "settings"}


OTHER_SETTINGS: dict[str, dict[str, Any]] = {
    "global_batch was 8 and is 4": {"global_batch": 4},
    "micro_batch was 2 and is 4": {"micro_batch": 4},
    "length was 53 and is 54": {"dataset": Noisy(54)},
    "the seed is another": {"seed": 4},
    "shuffle was True and is False": {"shuffle": False},
    "updates was 1 and is 2": {"updates": 2},
}


@pytest.mark.parametrize("words", OTHER_SETTINGS)
def test_a_position_in_other_data_is_refused(words: str) -> None:
    former = noisy_feed(dataset=Noisy(53), global_batch=8, micro_batch=2, seed=3).state_dict(2)
    changes: dict[str, Any] = {"dataset": Noisy(53), "global_batch": 8, "micro_batch": 2, "seed": 3}
    other = {**changes, **OTHER_SETTINGS[words]}
    with pytest.raises(ValueError, match=rf"trained on other data: .*{words}.*resume=\"never\".*allow_other_data=True"):
        noisy_feed(**other).load_state_dict(former)
    noisy_feed(**other, allow_other_data=True).load_state_dict(former)
    noisy_feed(**changes).load_state_dict(former)
    noisy_feed(**other).load_state_dict({"step": 2})  # of an earlier version


def test_several_updates_on_the_same_samples() -> None:
    feed = noisy_feed(steps=None, epochs=2, dataset=Noisy(53), updates=3)
    assert (feed.steps, feed.steps_per_epoch) == (36, 18)
    once = noisy_feed(steps=None, epochs=2, dataset=Noisy(53))
    for step in range(36):
        assert torch.equal(feed.get(step, 1)["index"], once.get(step // 3, 1)["index"])


def test_unshuffled_with_the_default_collate() -> None:
    feed = Feed([float(number) for number in range(8)], global_batch=4, micro_batch=2, epochs=1, seed=0, shuffle=False)
    assert torch.equal(feed.get(1, 1), torch.tensor([6.0, 7.0], dtype=torch.float64))


def test_pinned_memory_without_an_accelerator_is_no_warning() -> None:
    noisy_feed(pin_memory=True).get(0, 0)


class Failing(Noisy):
    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 13:
            raise LookupError("sample 13 is broken")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_of_the_dataset_comes_out_of_get(workers: int) -> None:
    feed = noisy_feed(workers, dataset=Failing(), shuffle=False)
    feed.seek(1, [1, 2])
    process = feed.get(1, 1)["process"]
    with pytest.raises(LookupError, match="sample 13 is broken") as raised:
        feed.get(1, 2)
    assert feed.get(2, 1)["index"].tolist() == [18, 19]
    feed.close()
    if workers and sys.platform == "linux":
        assert ended(process, 5), "the traceback of an exception kept the worker alive"
    del raised


def announce(worker: int) -> None:
    info = get_worker_info()
    assert isinstance(info.dataset, Noisy)
    info.dataset.__class__ = Renamed


class Renamed(Noisy):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "index": -1}


def test_worker_init_fn_sees_the_users_dataset() -> None:
    feed = noisy_feed(1, worker_init_fn=announce)
    feed.seek(0, [0])
    assert feed.get(0, 0)["index"].tolist() == [-1, -1]
    feed.close()


@linux_only
def test_close_ends_the_workers(feed: Feed) -> None:
    feed.seek(0, [0, 1])
    workers = {feed.get(0, leaf)["process"] for leaf in (0, 1)}
    feed.close()
    assert all(ended(process, 5) for process in workers)
    assert not by_worker(feed.get(1, 0))


class Sockets(Dataset):
    """Every sample lists the internet sockets of the process that loads it."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[int, list[str]]:
        found = []
        for name in os.listdir("/proc/self/fd"):
            try:
                with socket.socket(fileno=os.dup(int(name))) as opened:
                    if opened.family in (socket.AF_INET, socket.AF_INET6):
                        found.append(name)
            except OSError:
                continue
        return os.getpid(), found


def as_list(samples: list[Any]) -> list[Any]:
    return samples


@linux_only
def test_forked_workers_hold_no_inherited_sockets() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()) as client, listener.accept()[0] as server:
            feed = Feed(
                Sockets(),
                **{"global_batch": 2, "micro_batch": 1, "steps": 4, "seed": 0, "num_workers": 2},
                collate_fn=as_list,
                multiprocessing_context="fork",
            )
            feed.seek(0, [0, 1])
            for leaf in (0, 1):
                [(process, sockets)] = feed.get(0, leaf)
                assert process != os.getpid()
                assert sockets == []
            client.sendall(b"still open here")
            assert server.recv(100) == b"still open here"
        feed.close()


SCRIPT = """
import torch

class Numbers:
    def __init__(self): self.table = torch.arange(8.0)

    def __len__(self): return 8

    def __getitem__(self, index): return self.table[index]

class Batch:
    def __init__(self, numbers): self.numbers = numbers

def collate(samples): return Batch(torch.stack(samples))

def begin(worker):
    assert torch.utils.data.get_worker_info().dataset.table.is_shared()
"""


@linux_only
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_know_the_classes_of_a_script_that_is_not_theirs(method: str) -> None:
    """As on a rank, whose __main__ is not the user's script. Tensors still go to workers in shared memory."""
    script: dict[str, Any] = {"__name__": "__main__"}
    exec(SCRIPT, script)
    names = ("Numbers", "Batch", "collate", "begin")
    script = cloudpickle.loads(cloudpickle.dumps({name: script[name] for name in names}))
    feed = Feed(
        script["Numbers"](),
        **{"global_batch": 4, "micro_batch": 2, "steps": 2, "seed": 0, "shuffle": False, "num_workers": 1},
        collate_fn=script["collate"],
        worker_init_fn=script["begin"] if method != "fork" else None,
        multiprocessing_context=method,
    )
    try:
        feed.seek(0, [0, 1])
        batches = [feed.get(step, leaf) for step in (0, 1) for leaf in (0, 1)]
    finally:
        feed.close()
    assert [batch.numbers.tolist() for batch in batches] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert {type(batch) for batch in batches} == {script["Batch"]}


RANK = """
import os, socket, sys, threading
from resilient.data import Feed

class Stuck:
    def __len__(self):
        return 8
    def __getitem__(self, index):
        if index >= 2:
            threading.Event().wait()  # busy, so it won't look whether its parent is there
        return os.getpid()

if __name__ == "__main__":
    connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
    feed = Feed(Stuck(), global_batch=2, micro_batch=1, steps=4, seed=0, shuffle=False, num_workers=2,
                multiprocessing_context=sys.argv[2])
    feed.seek(0, [0, 1])
    connection.sendall(b"%d %d\\n" % (feed.get(0, 0), feed.get(0, 1)))
    threading.Event().wait()
"""


@linux_only
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_and_connections_die_with_the_rank(method: str, tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        rank = subprocess.Popen(
            [sys.executable, str(script), port, method],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        try:
            listener.settimeout(60)
            with listener.accept()[0] as connection:
                connection.settimeout(60)
                workers = [int(word) for word in connection.recv(100).split()]
                assert len(set(workers)) == 2
                rank.send_signal(signal.SIGKILL)
                connection.settimeout(3)
                assert connection.recv(1) == b""
                assert all(ended(worker, 3) for worker in workers)
        finally:
            rank.kill()
            rank.wait()


class Stream(IterableDataset):
    """Numbers with noise; starts anew each time. Has a length, which must not make it map-style."""

    def __init__(self, length: int = 45) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        for index in range(self.length):
            yield index, random.random() + float(torch.rand(()))


class Positioned(Stream):
    """A stream that knows where it is, and counts what is read from it."""

    def __init__(self, length: int = 45) -> None:
        super().__init__(length)
        self.position = {"next": 0}
        self.reads = 0

    def __iter__(self) -> Iterator[Any]:
        while self.position["next"] < self.length:
            self.position["next"] += 1
            self.reads += 1
            yield self.position["next"] - 1, random.random() + float(torch.rand(()))

    def state_dict(self) -> dict[str, int]:
        return self.position  # not a copy: what is kept must be

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = dict(state)


def stream_feed(dataset: Any, steps: int | None = None) -> Feed:
    return Feed(dataset, global_batch=8, micro_batch=2, steps=steps, seed=3)


def stream_batches(feed: Feed, step: int) -> list[tuple[list[int], bytes]]:
    batches = [feed.get(step, leaf) for leaf in range(4)]
    return [(index.tolist(), noise.numpy().tobytes()) for index, noise in batches]


@pytest.mark.parametrize("kind", [Stream, Positioned])
def test_stream_deals_everything_once_and_ends(kind: type[Stream]) -> None:
    feed = stream_feed(kind())
    seen, step = [], 0
    while feed.has_step(step):
        seen += [index for indices, _ in stream_batches(feed, step) for index in indices]
        step += 1
    assert seen == list(range(40))  # 45 without the remainder
    assert feed.steps is None
    assert not feed.has_step(5)
    with pytest.raises(ValueError, match="step 5 is past the end"):
        feed.get(5, 0)


def test_stream_ends_at_whichever_end_comes_first() -> None:
    assert [stream_feed(Stream(), steps=2).has_step(step) for step in (0, 1, 2)] == [True, True, False]
    assert [stream_feed(Stream(), steps=9).has_step(step) for step in (4, 5)] == [True, False]
    assert not stream_feed(Stream(7)).has_step(0)


def test_stream_randomness_does_not_depend_on_the_caller_or_the_leaves() -> None:
    one, other = stream_feed(Stream()), stream_feed(Stream())
    one.seek(0, [0])
    other.seek(0, [3])
    for step in range(3):
        torch.manual_seed(step)
        expected = stream_batches(one, step)
        assert other.has_step(step + 1)  # reading ahead takes nothing away
        assert [stream_batches(other, step)[leaf] for leaf in (3, 0)] == [expected[3], expected[0]]


@pytest.mark.parametrize("kind", [Stream, Positioned])
def test_stream_joiner_reads_and_skips_and_says_so(kind: type[Stream], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="resilient")
    feed = stream_feed(kind())
    feed.seek(3, [1])
    assert stream_batches(feed, 3) == stream_batches(stream_feed(kind()), 3)
    assert "skipped 3 steps (24 samples) of the iterable dataset to reach step 3" in caplog.text


def test_stream_position_leads_a_joiner_there_without_reading() -> None:
    feed = stream_feed(Positioned())
    feed.seek(0, [0])
    for step in range(3):
        expected = stream_batches(feed, step)
    assert feed.has_step(3)  # read ahead
    positions = {step: position(feed, step) for step in (2, 3, 4)}
    assert position(feed) == positions[2] == {"step": 2, "stream": {"next": 16}}
    assert positions[4] == {"step": 4, "stream": {"next": 32}}
    stream_batches(feed, 3)
    assert positions[2]["stream"] == {"next": 16}
    with pytest.raises(ValueError, match="start of step 2 is not kept"):
        feed.state_dict(2)

    dataset = Positioned()
    joiner = stream_feed(dataset)
    joiner.load_state_dict(positions[2])
    joiner.seek(2, [1])
    assert stream_batches(joiner, 2) == expected
    assert dataset.reads == 8


@pytest.mark.parametrize("kind", [Stream, Positioned])
def test_stream_goes_back(kind: type[Stream]) -> None:
    feed = stream_feed(kind())
    expected = [stream_batches(feed, step) for step in range(5)]
    assert not feed.has_step(5)
    feed.seek(1, [0])
    assert [stream_batches(feed, step) for step in range(1, 5)] == expected[1:]
    assert stream_batches(feed, 0) == expected[0]


def test_stream_that_can_not_go_back_says_so() -> None:
    feed = stream_feed(iter(range(45)))
    feed.seek(3, [0])
    feed.get(3, 0)
    with pytest.raises(ValueError, match="past step 2 and can't go back to it: give it state_dict"):
        feed.seek(2, [0])
    dataset = Positioned()
    joiner = stream_feed(dataset)
    joiner.load_state_dict({"step": 2, "stream": {"next": 16}})
    joiner.get(2, 0)
    with pytest.raises(ValueError, match="past step 1"):
        joiner.seek(1, [0])


GOOD = {"global_batch": 4, "micro_batch": 2, "steps": 1, "seed": 0}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"global_batch": True}, TypeError, "global_batch must be an integer, not True"),
        ({"global_batch": 4.0}, TypeError, "global_batch must be an integer, not 4.0"),
        ({"global_batch": 0}, ValueError, "global_batch must be at least 1, not 0"),
        ({"micro_batch": False}, TypeError, "micro_batch must be an integer, not False"),
        ({"micro_batch": -2}, ValueError, "micro_batch must be at least 1, not -2"),
        ({"micro_batch": 3}, ValueError, "multiple of micro_batch, but 4 is not one of 3"),
        ({"global_batch": 12}, ValueError, "dataset has 10 samples: with global_batch=12 .* at least 12"),
        ({"steps": 0}, ValueError, "steps must be at least 1, not 0"),
        ({"steps": "9"}, TypeError, "steps must be an integer, not '9'"),
        ({"steps": None, "epochs": 0}, ValueError, "epochs must be at least 1, not 0"),
        ({"steps": None, "epochs": True}, TypeError, "epochs must be an integer, not True"),
        ({"epochs": 2}, ValueError, "steps=1 and epochs=2 both"),
        ({"steps": None}, ValueError, "steps or epochs must say"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, not 1.5"),
        ({"num_workers": -1}, ValueError, "num_workers must be at least 0, not -1"),
        ({"dataset": 5}, TypeError, "dataset must have __getitem__ and __len__, or __iter__"),
        ({"dataset": DataLoader([1, 2])}, TypeError, "dataset is a DataLoader"),
        ({"batch_size": 4}, ValueError, "batch_size=4 can't be used here: use global_batch"),
        ({"sampler": [1]}, ValueError, "sampler="),
        ({"batch_sampler": [[1]]}, ValueError, "batch_sampler="),
        ({"drop_last": True}, ValueError, "drop_last=True .* always dropped"),
        ({"generator": None}, ValueError, "generator=None .* use seed"),
        ({"in_order": False}, ValueError, "in_order=False"),
        ({"persistent_workers": False}, ValueError, "persistent_workers=False"),
        ({"prefetch": 2}, TypeError, "prefetch is no option of this loader; .* prefetch_factor"),
        ({"prefetch_factor": 2}, ValueError, "prefetch_factor=2 needs num_workers of at least 1"),
        ({"multiprocessing_context": "fork"}, ValueError, "multiprocessing_context='fork' needs num_workers"),
        ({"dataset": Stream(), "num_workers": 2}, ValueError, "num_workers=2: an iterable dataset .* for now"),
        ({"dataset": Stream(), "shuffle": True}, ValueError, "shuffle=True: an iterable dataset"),
        ({"dataset": Stream(), "steps": None, "epochs": 2}, ValueError, "epochs=2: the dataset has no length"),
    ],
)
def test_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    settings = {"dataset": list(range(10)), **GOOD, **changes}
    with pytest.raises(error, match=message):
        Feed(**settings)


def test_integers_of_numpy_are_integers() -> None:
    feed = Feed(list(range(10)), global_batch=np.int64(4), micro_batch=np.int64(2), steps=np.int64(3), seed=0)
    assert (feed.micro_batches, feed.steps) == (2, 3)
