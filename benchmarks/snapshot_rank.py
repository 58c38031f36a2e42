"""A rank that trains and saves, once with each contestant, turn by turn. Started by `benchmarks.snapshot`.

    python -m benchmarks.snapshot_rank FOLDER RANK PLAN

PLAN is a `Plan` as JSON. Writes FOLDER/rank-RANK.json.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from actors.priority import raise_priority
from benchmarks.gpt import Training
from benchmarks.snapshot_contestants import Contestant, Dcp, DlRover, Memcpy, Ours, TorchSave, fork_dlrover

SETTLE_BLOCK = 1
"""Steps at the start of each block that are not counted: the rhythm is not yet that of the contestant."""
STEP_PER_COPY, SHORTEST_STEP_S = 8.0, 0.15
FEWEST_ROUNDS, FEWEST_BLOCKS = 2, 1
IDLE = ("memcpy", "ours", "dcp process", "dcp process, copy at once", "dcp thread", "dlrover", "torch.save")
OVERLAPPED = ("ours", "dcp process")
"""Those that copy while training goes on."""
TRAINING = ("plain", "ours", "dcp process", "dlrover")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """rounds: of single snapshots, each with every contestant; blocks: of consecutive training steps."""

    state_mib: int
    nodes: tuple[str, ...]
    world: int
    rounds: int
    blocks: int
    block_steps: int
    budget_s: float
    dlrover: bool


class Rank:
    def __init__(self, base: Path, plan: Plan) -> None:
        self._base, self._plan = base, plan
        self._began = time.monotonic()
        self.excuses: dict[str, str] = {}
        self._field: dict[str, Contestant] = {}
        folder = base / f"rank-{dist.get_rank()}"
        folder.mkdir()
        self.training = Training(plan.state_mib)
        if plan.dlrover:
            self._enter("dlrover", lambda: DlRover(self.training, folder / "dlrover"))
        self._enter("memcpy", lambda: Memcpy(self.training, folder / "memcpy"))
        self._enter("ours", lambda: Ours(self.training, base, plan.nodes))
        self._enter("torch.save", lambda: TorchSave(self.training, folder / "torch.save"))
        # All ranks write one checkpoint together.
        for name, mode in (("process", "process"), ("process, copy at once", "sync"), ("thread", "thread")):
            self._enter(f"dcp {name}", lambda mode=mode: Dcp(self.training, base / "dcp", mode=mode))  # type: ignore[misc]

    def _enter(self, name: str, make: Callable[[], Contestant]) -> None:
        """On all ranks or on none."""
        made = torch.tensor(True)
        try:
            self._field[name] = make()
        except Exception as error:
            if name in ("ours", "memcpy"):
                raise
            self.excuses[name] = f"{type(error).__name__}: {error}"
            made = torch.tensor(False)
        dist.all_reduce(made, op=dist.ReduceOp.MIN)
        if not made:
            self.excuses.setdefault(name, "it failed on another rank")
            self._field.pop(name, None)

    def _in_time(self, enough: bool, limit_s: float) -> bool:
        late = torch.tensor(enough and time.monotonic() - self._began > limit_s)
        dist.all_reduce(late, op=dist.ReduceOp.MAX)
        return not bool(late)

    def one_by_one(self) -> dict[str, list[dict[str, float]]]:
        """Single snapshots, while nothing else goes on; the first round is not counted: it allocates.

        Those of OVERLAPPED are taken twice: with an idle training thread, and with a training step before the wait.
        """
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in IDLE if name in self._field}
        for number in range(self._plan.rounds + 1):
            if not self._in_time(number > FEWEST_ROUNDS, self._plan.budget_s / 2):
                break
            for name, found in samples.items():
                sample = _snapshot(self._field[name])
                if name in OVERLAPPED:
                    dist.barrier()
                    within = self._step(self._field[name])
                    sample |= {"blocked_s": within["blocked_s"], "taken": min(sample["taken"], within["taken"])}
                    self._field[name].settle()
                if number:
                    found.append(sample)
        return samples

    def steps(self) -> dict[str, list[dict[str, float]]]:
        """Training with a snapshot at every step, block by block."""
        samples: dict[str, list[dict[str, float]]] = {n: [] for n in TRAINING if n == "plain" or n in self._field}
        for number in range(self._plan.blocks):
            if not self._in_time(number >= FEWEST_BLOCKS, self._plan.budget_s):
                break
            for name, found in samples.items():
                contestant = self._field.get(name)
                dist.barrier()
                block = [self._step(contestant) for _ in range(SETTLE_BLOCK + self._plan.block_steps)]
                if contestant is not None:
                    contestant.settle()
                found.extend(block[SETTLE_BLOCK:])
        return samples

    def _step(self, contestant: Contestant | None) -> dict[str, float]:
        began = time.monotonic()
        if contestant is None:
            self.training.step()
            return {"step_s": time.monotonic() - began}
        contestant.agree()
        called = time.monotonic()
        taken = contestant.take()
        blocked_s = time.monotonic() - called

        def gate() -> None:
            nonlocal blocked_s
            reached = time.monotonic()
            contestant.mutable()
            blocked_s += time.monotonic() - reached

        self.training.step(gate)
        return {"step_s": time.monotonic() - began, "blocked_s": blocked_s, "taken": float(taken)}

    def report(self) -> dict[str, Any]:
        copy_s = min(_snapshot(self._field["memcpy"])["mutable_s"] for _ in range(3))
        dist.all_reduce(goal := torch.tensor(max(STEP_PER_COPY * copy_s, SHORTEST_STEP_S)), op=dist.ReduceOp.MAX)
        step_s = self.training.calibrate(float(goal))
        return {
            "plan": asdict(self._plan),
            "state_bytes": self.training.state_bytes,
            "tensors": len(self.training.tensors()),
            "batch": self.training.batch,
            "calibrated_step_s": step_s,
            "size_bytes": {name: contestant.size_bytes for name, contestant in self._field.items()},
            "one_by_one": self.one_by_one(),
            "steps": self.steps(),
            "excuses": self.excuses,
        }

    def close(self) -> None:
        dist.barrier()
        for contestant in self._field.values():
            contestant.close()


def _snapshot(contestant: Contestant) -> dict[str, float]:
    contestant.agree()
    dist.barrier()
    began = time.monotonic()
    taken = contestant.take()
    called = time.monotonic()
    contestant.mutable()
    mutable = time.monotonic()
    contestant.settle()
    return {
        "call_s": called - began,
        "mutable_s": mutable - began,
        "settled_s": time.monotonic() - began,
        "taken": float(taken),
    }


def main() -> None:
    base, rank = Path(sys.argv[1]), int(sys.argv[2])
    plan = Plan(**json.loads(sys.argv[3]))
    raise_priority()
    Path("/proc/self/oom_score_adj").write_text("900")  # if memory runs out, no one else's process is to blame
    torch.set_num_threads(1)
    # DCP's stagers keep a descriptor for every tensor.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if plan.dlrover:
        fork_dlrover(base / f"s{rank}", rank, plan.world)
    store = dist.FileStore(str(base / "meeting"), plan.world)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=plan.world)
    measured = Rank(base, plan)
    report = measured.report()
    measured.close()
    (base / f"rank-{rank}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # DLRover's and DCP's helpers are daemons, and some wait for long when they are joined


if __name__ == "__main__":
    main()
