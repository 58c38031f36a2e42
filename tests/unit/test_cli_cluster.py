"""`resilient status` and `resilient chaos`: what people and programs are told, and what is refused."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from click.testing import CliRunner, Result

from resilient.chaos import NotNow, Victim
from resilient.cli import main
from resilient.cli_cluster import disturb
from resilient.cli_output import Answer
from resilient.core.control import Control
from resilient.core.detector import Detector, Vital
from resilient.core.events import NodeSeen, RankReady
from resilient.core.limits import Limits
from resilient.core.plan import Address
from resilient.core.view import view
from resilient.faults import Act, Seat, Seen
from resilient.status import controllers, describe, runs

RECOVERY = {
    "kind": "rank lost", "step": 41, "ranks": 2, "source": "memory", "restored_step": 40, "total_s": 1.25,
    "reason": "lost rank 1 (node bbbbbbbb)",
}  # fmt: skip
GPT: dict[str, Any] = {
    "run": "gpt", "attempt": 2, "step": 42, "steps": 100, "generation": 5, "formed": 5,
    "ranks": [
        {"rank": 0, "member": 3, "node": "aaaaaaaaaaaa", "state": "computing", "speed": 1.0},
        {"rank": 1, "member": 7, "node": "bbbbbbbbbbbb", "state": "stopped", "speed": None},
    ],
    "others": [{"member": 8, "node": "cccccccccccc", "state": "starting"}],
    "nodes": {"aaaaaaaaaaaa": 1, "bbbbbbbbbbbb": 1, "cccccccccccc": 1},
    "leaving": {}, "recoveries": [RECOVERY], "recovering": None, "snapshots": {"protected": 41.0},
    "checkpoints": {"durable": 40, "committed": 4, "failures": 1, "last_failure": "no room"},
    "messages": ["10:00:00 the checkpoint of step 40 is durable"], "outcome": None, "memory": "/dev/shm",
    "observe": {"url": "http://10.0.0.1:9400/", "events": None, "events_left_out": 0},
}  # fmt: skip


def told(capsys: pytest.CaptureFixture[str], *found: dict[str, Any], as_json: bool = False) -> tuple[str, bool]:
    answer = Answer(as_json)
    describe(answer, list(found))
    answer.finish()
    return capsys.readouterr().out, answer.good


def test_a_run_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    text, good = told(capsys, GPT)
    assert good
    assert text == (
        "gpt, attempt 2: step 42 of 100, generation 5, 2 ranks on 2 of 3 nodes\n"
        "live page: http://10.0.0.1:9400/\n"
        "snapshots: step 41 is protected everywhere\n"
        "checkpoints: step 40 is durable, 4 were written, 1 failed, the last: no room\n"
        "\n"
        "rank  member  node      state      speed\n"
        "   0       3  aaaaaaaa  computing   1.00\n"
        "   1       7  bbbbbbbb  stopped        -\n"
        "   -       8  cccccccc  starting       -\n"
        "\n"
        "step  recovery   ranks  from             seconds  why\n"
        "  41  rank lost      2  memory, step 40     1.25  lost rank 1 (node bbbbbbbb)\n"
        "\n"
        "10:00:00 the checkpoint of step 40 is durable\n"
    )


def test_a_run_that_has_ended_and_is_only_still_shown_is_not_going_on(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["gpt/1/controller", "other/1/controller", "gone/1/controller"]
    views = {"gpt": {**GPT, "lingers": True}, "other": {**GPT, "run": "other", "lingers": False}, "gone": {"error": ""}}
    monkeypatch.setattr("resilient.status.launch.names", lambda prefix: names)
    monkeypatch.setattr("resilient.status._asked", lambda run, attempt: views[run])
    assert runs() == [views["gone"], views["other"]]


def test_programs_get_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    text, good = told(capsys, GPT, as_json=True)
    assert good and json.loads(text) == {"runs": [GPT]}


def test_nothing_running_and_a_silent_controller_are_not_good(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys) == ("nothing is running\n", False)
    silent = {"run": "gpt", "attempt": 1, "error": "its controller has just ended"}
    assert told(capsys, silent) == ("gpt, attempt 1: its controller has just ended\n", False)


def test_controllers_are_known_by_their_names() -> None:
    names = ["b/10/controller", "b/9/controller", "b/9/rank/3", "a/1/keeper/x/5", "a/1/controller"]
    assert controllers(names) == [("a", 1), ("b", 9), ("b", 10)]


def test_a_view_has_ranks_and_others_and_what_their_keepers_saw() -> None:
    control = Control(limits=Limits(min_workers=1, max_workers=2))
    detector = Detector(detection_s=2.0)
    for node in ("aa", "bb"):
        control.handle(NodeSeen(node=node, capacity=1), 0.0)
    (first, second) = (member.number for member in control.membership.alive())
    address = Address(host="h", port=1)
    control.handle(
        RankReady(member=first, node="aa", address=address, micro_batches=4, steps=9, probe="x", probe_fields=""), 1.0
    )
    vital = Vital(member=second, alive=True, stopped=True, activity="starting", work=0, longest_s=0.0)
    detector.beat("bb", (vital,), 1.0)
    found = view(control, detector)
    assert found["ranks"] == [] and found["nodes"] == {"aa": 1, "bb": 1} and found["recovering"] is None
    assert [(other["node"], other["state"]) for other in found["others"]] == [("aa", "ready"), ("bb", "stopped")]
    assert json.dumps(found)


def ran(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["chaos", "gpt", *arguments])


def test_chaos_is_refused_without_the_flag_and_says_what_it_would_do() -> None:
    refused = ran("--kind", "node,kill", "--every", "2s", "--for", "1min", "--seed", "4")
    assert refused.exit_code == 2 and not refused.stdout
    assert refused.stderr == (
        "Nothing was done. With --yes-break-it this does to the run 'gpt', on this machine's nodes, every 2 s for 60 s "
        "(seed 4), one of\n"
        "    kill: SIGKILL to one rank\n"
        "    node: SIGKILL to a raylet with all its processes, and the node's memory removed\n"
    )


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--kind", "burn"), "kind 'burn': is one of kill, stop"),
        (("--every", "5"), "'5': is a time, such as"),
        (("--for", "0s"), "'0s': is a time, such as"),
    ],
)
def test_wrong_use_is_explained(arguments: tuple[str, ...], why: str) -> None:
    wrong = ran(*arguments, "--yes-break-it")
    assert wrong.exit_code == 2 and why in wrong.stderr


class Shown(Victim):
    """A run that is only looked at: it has gone every third time."""

    def __init__(self) -> None:
        super().__init__("gpt")
        self.looks = 0

    def look(self) -> Seen:
        self.looks += 1
        if self.looks % 3 == 0:
            raise NotNow("no run 'gpt' is going on")
        return Seen(seats=(Seat(rank=0, member=3, node="aaaaaaaaaaaa"),), keepers=("bbbbbbbbbbbb",))

    def do(self, act: Act) -> str:
        return "process 12"


def disturbed(capsys: pytest.CaptureFixture[str], seed: int) -> list[str]:
    """What is printed, without the times."""
    assert disturb(Shown(), ("kill", "keeper", "node"), 0.01, 0.055, random.Random(seed)) == 4
    return [line.partition(" s  ")[2] for line in capsys.readouterr().out.splitlines()]


def test_every_act_is_printed_with_its_target_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    lines = disturbed(capsys, 1)
    assert disturbed(capsys, 1) == lines
    nothing = "nothing was done: no run 'gpt' is going on"
    assert [line == nothing for line in lines] == [False, False, True, False, False, True]
    why = "drawn from kill, keeper (nothing to do now for node)"
    assert set(lines) - {nothing} <= {
        f"kill: rank 0 (member 3, node aaaaaaaa): process 12 ({why}; the only rank)",
        f"keeper: the keeper of node bbbbbbbb: process 12 ({why}; the only keeper)",
    }
