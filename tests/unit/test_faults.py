"""What a seed chooses to do to a run, and how it is done to files and processes that are no run's."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest

from actors.processes import is_stopped, record_process
from resilient.chaos import NotNow, corrupt, end_at_once
from resilient.cutting import cut_between
from resilient.faults import KINDS, Kind, Seat, Seen, choose, kinds_from, possible
from snapshot.arena import Slot, SlotView, required_bytes
from snapshot.slot import SlotHead

SEATS = tuple(Seat(rank=rank, member=rank + 4, node=f"node{rank}") for rank in range(3))
ALL = Seen(
    seats=SEATS, keepers=("node0", "node1"), nodes=("node1",), slots=(("node0", "rank-4.slot-0"), ("node1", "x"))
)
EVERY_KIND = tuple(KINDS)


def acts(seed: int, seen: Seen = ALL, kinds: tuple[Kind, ...] = EVERY_KIND) -> list[object]:
    source = random.Random(seed)
    return [choose(seen, kinds, source) for _ in range(40)]


def test_a_seed_always_chooses_the_same() -> None:
    assert acts(7) == acts(7) != acts(8)


def test_the_order_in_which_kinds_are_given_does_not_matter() -> None:
    assert acts(7, kinds=("node", "kill")) == acts(7, kinds=("kill", "node"))


def test_weights_say_how_often_and_every_kind_comes() -> None:
    source, weights = random.Random(1), {**dict.fromkeys(EVERY_KIND, 1.0), "kill": 20.0}
    kinds = Counter(act.kind for _ in range(400) if (act := choose(ALL, EVERY_KIND, source, weights)) is not None)
    assert set(kinds) == set(EVERY_KIND) and kinds.most_common(1)[0][0] == "kill"


def test_only_what_is_there_is_chosen_and_the_rest_is_said() -> None:
    seen = Seen(keepers=("node0",), controller=False)
    assert [kind for kind in EVERY_KIND if possible(kind, seen)] == ["keeper"]
    act = choose(seen, ("kill", "keeper"), random.Random(0))
    assert act is not None and (act.kind, act.node) == ("keeper", "node0")
    assert act.why == "drawn from keeper (nothing to do now for kill); the only keeper"
    assert choose(seen, ("kill", "node"), random.Random(0)) is None


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_act_names_its_target_and_why(kind: Kind) -> None:
    act = choose(ALL, (kind,), random.Random(3))
    assert act is not None and act.kind == kind and act.target and act.why.startswith(f"only {kind} was asked for")


def test_kinds_are_read_and_checked() -> None:
    assert kinds_from("node, kill,node") == ("kill", "node")
    with pytest.raises(ValueError, match="kind 'burn': is one of kill, stop, cut, all, node"):
        kinds_from("kill,burn")


TALKER = """
import socket, sys
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
accepted = [server.accept()[0] for _ in range(2)]
print("accepted", flush=True)
print(*(peer.recv(10) for peer in accepted), flush=True)
input()
"""


def test_only_connections_between_these_processes_are_cut() -> None:
    with (
        subprocess.Popen([sys.executable, "-c", TALKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other,
        contextlib.ExitStack() as opened,
    ):
        opened.callback(other.kill)
        assert other.stdout is not None
        port = int(other.stdout.readline())
        ours, too = (opened.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(2))
        assert other.stdout.readline() == b"accepted\n"
        stranger = opened.enter_context(socket.create_server(("127.0.0.1", 0)))
        apart = opened.enter_context(socket.create_connection(stranger.getsockname()))
        assert cut_between(os.getpid(), [other.pid]) == 2
        assert other.stdout.readline() == b"b'' b''\n" and other.poll() is None
        assert ours.recv(1) == too.recv(1) == b""
        apart.sendall(b"still there")
        assert cut_between(os.getpid(), [other.pid]) == 0


def slot_of(folder: Path, *, seal: bool = True) -> Path:
    head = SlotHead(
        run="r", attempt=1, branch=0, generation=1, step=4, member=2, rank=0, world=1, ranges=((0, 500),),
        state_bytes=500, chunks=(10, 510), skeleton="0123456789abcdef", skeleton_bytes=10,
    )  # fmt: skip
    path = folder / "rank-2.slot-0"
    slot = Slot.create(path, required_bytes(head))
    slot.begin(head)[:] = random.Random(0).randbytes(510)
    slot.commit()
    slot.close()
    if seal:
        view = SlotView.open(path)
        view.seal()
        view.close()
    return path


def test_a_flipped_bit_is_found_by_the_checksums_and_its_rank_goes_on(tmp_path: Path) -> None:
    path = slot_of(tmp_path)
    before = path.read_bytes()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as rank:
        record_process(tmp_path / "rank-2.process", rank.pid)
        assert corrupt(tmp_path, path.name, 0.999, 3).startswith("bit 3 of byte ")
        assert not is_stopped(rank.pid)
        rank.kill()
    assert sum((one ^ other).bit_count() for one, other in zip(before, path.read_bytes(), strict=True)) == 1
    view = SlotView.open(path)
    assert view.verify() == (1,)
    view.close()


def test_what_is_not_sealed_is_left_alone(tmp_path: Path) -> None:
    path = slot_of(tmp_path, seal=False)
    before = path.read_bytes()
    with pytest.raises(NotNow, match="is being written anew"):
        corrupt(tmp_path, path.name, 0.5, 0)
    with pytest.raises(NotNow, match="has gone"):
        corrupt(tmp_path, "rank-9.slot-1", 0.5, 0)
    assert path.read_bytes() == before


def test_processes_end_together_even_if_stopped() -> None:
    children = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2)]
    os.kill(children[0].pid, signal.SIGSTOP)
    end_at_once([psutil.Process(child.pid) for child in children])
    for child in children:
        assert not psutil.pid_exists(child.pid)
        with child:
            child.wait(10)
