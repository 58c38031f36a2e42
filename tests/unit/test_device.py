"""What a device does behind the host's back, on machines that have none: fakes stand for NCCL and its errors."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from actors import launch
from actors.device import NCCL_SETTINGS, is_device_error, is_out_of_memory, survive_peers
from actors.pending import Move, link_errors
from resilient import generation, member, verification
from resilient.buffers import Buffers
from resilient.clipping import clip
from resilient.copying import Copy
from resilient.exchange import Scratch
from resilient.generation import GenerationThread, Holding
from resilient.local import _as_in_a_rank
from resilient.probe import probe
from resilient.sums import StepSums

CPU, META = torch.device("cpu"), torch.device("meta")
LIMIT_S = 30.0


# Errors

DEVICE_ERRORS = [
    "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported",
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
]
NO_MEMORY = ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"]
MISTAKES = [
    "CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling",
    "cuDNN error: CUDNN_STATUS_BAD_PARAM",
    "no CUDA error:",
]


def accelerator_error(text: str) -> RuntimeError:
    return getattr(torch, "AcceleratorError", RuntimeError)(text)  # type: ignore[no-any-return]


@pytest.mark.parametrize("text", DEVICE_ERRORS)
@pytest.mark.parametrize("kind", [RuntimeError, accelerator_error])
def test_a_device_that_has_failed_is_no_broken_link(text: str, kind: Callable[[str], RuntimeError]) -> None:
    """Every later call fails too: taken for a link's, it would break one generation after another."""
    error = kind(text)
    assert is_device_error(error) and not is_out_of_memory(error)
    with pytest.raises(type(error)) as found, link_errors():
        raise error
    assert found.value is error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), *map(RuntimeError, NO_MEMORY)])
def test_a_lack_of_memory_is_neither(error: RuntimeError) -> None:
    assert is_out_of_memory(error) and not is_device_error(error)
    with pytest.raises(RuntimeError) as found, link_errors():
        raise error
    assert found.value is error


@pytest.mark.parametrize(
    "error",
    [*map(RuntimeError, MISTAKES), dist.DistBackendError("CUDA error: seen by NCCL"), ValueError("CUDA error:")],
)
def test_other_errors_are_not_the_devices(error: Exception) -> None:
    assert not is_device_error(error) and not is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError(DEVICE_ERRORS[0]), torch.OutOfMemoryError("CUDA out of memory.")])
def test_a_process_whose_device_fails_in_an_exchange_is_replaced(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    told: list[str] = []
    monkeypatch.setattr(member.os, "_exit", lambda code: told.append(f"exit {code}"))
    team: Any = SimpleNamespace(
        telling=SimpleNamespace(crashed_here=told.append, failed=lambda *_: None),
        _changed=threading.Condition(),
        _is_current=lambda plan: False,
    )
    member.Member.crashed(team, SimpleNamespace(generation=1), error)  # type: ignore[arg-type]
    assert str(error).splitlines()[0] in told[0] and told[1:] == ["exit 1"]


def test_a_peers_death_tears_nobody_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    for name in NCCL_SETTINGS:
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    survive_peers()
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == os.environ["TORCH_NCCL_ENABLE_MONITORING"] == "0"


# A rank


def sums_on(device: torch.device) -> StepSums:
    return StepSums(list(nn.Linear(64, 64, device=device).named_parameters()), Buffers([]), 4, device)


@pytest.mark.parametrize("rank", [0, 1])
def test_counts_never_go_by_the_devices_link(rank: int) -> None:
    """NCCL refuses tensors of the host."""
    posted: dict[str, set[str]] = {"device": set(), "host": set()}

    def posting(kind: str) -> Callable[[Iterable[Move], Iterable[Move]], Any]:
        def post(sends: Iterable[Move], receives: Iterable[Move]) -> Any:
            posted[kind] |= {each.data.device.type for each in (*sends, *receives)}
            return SimpleNamespace(wait=lambda: None)

        return post

    sums = sums_on(META)
    group: Any = SimpleNamespace(post=posting("device"), post_host=posting("host"))
    thread: Any = SimpleNamespace(
        rank=rank, _member=SimpleNamespace(sums=sums), _in_flight=None, _taken=lambda payload: payload
    )
    holding = Holding(has_state=True, complete=3, kept=sums.pool.take())
    GenerationThread._catch_up(thread, group, holding, [0], [1])
    assert posted == {"device": {"meta"}, "host": {"cpu"}}


def test_buffers_of_abandoned_exchanges_are_kept_for_gloo_alone() -> None:
    """Each would take the size of the gradient from the device, with every failure."""
    from resilient.exchange import _given_up

    for device, kept in ((META, 0), (CPU, 1)):
        sums, before = sums_on(device), len(_given_up)
        sums.pool.give_up(sums.pool.take())
        scratch = Scratch()
        scratch.rows(1, 1 << 10, device)
        scratch.give_up()
        assert (len(sums.pool._given_up), len(_given_up) - before) == (kept, kept)


def thread_of(**known: Any) -> GenerationThread:
    plan: Any = SimpleNamespace(generation=1, rank_of=lambda number: 0)
    team: Any = SimpleNamespace(number=1, threads=1, device=CPU, **known)
    return GenerationThread(team, plan, Holding(has_state=True, complete=0, kept=None))


def test_a_group_that_forms_too_late_is_given_up() -> None:
    """Nobody could when its generation was left behind."""
    given_up: list[object] = []
    late: Any = SimpleNamespace(abandon=lambda held=None: given_up.append(late))
    thread = thread_of(connect=lambda *_: late)
    thread.abandon()
    thread.start()
    thread.join(LIMIT_S)
    assert given_up == [late]


def test_a_retired_group_is_closed_once_the_next_has_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    team = member.Member(
        SimpleNamespace(member=1, tell=lambda *_: None, words=SimpleNamespace()),  # type: ignore[arg-type]
        workers=(1, 2),
        reduction="exact",
        threads=1,
        device=CPU,
        snapshots=None,
    )
    former: Any = SimpleNamespace(close=lambda: closed.append("former"))
    team._retired = former
    monkeypatch.setattr(team, "_is_current", lambda plan: True)
    monkeypatch.setattr(team, "_do", lambda instructions: None)
    team._seat = SimpleNamespace(handle=lambda event: ())  # type: ignore[assignment]
    team.formed(SimpleNamespace(generation=2, rank_of=lambda number: 1), 0, None)  # type: ignore[arg-type]
    assert closed == ["former"] and team._retired is None


def test_the_exchange_comes_after_what_the_training_thread_has_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their streams on the device may be different ones."""
    order: list[str] = []

    def mark(device: torch.device) -> Any:
        order.append(f"marked by {threading.current_thread().name}")
        return SimpleNamespace(precede=lambda: order.append(f"precedes in {threading.current_thread().name}"))

    monkeypatch.setattr(generation, "Mark", mark)
    group: Any = SimpleNamespace(close=lambda: None)
    thread = thread_of(connect=lambda *_: group, formed=lambda *_: None)
    monkeypatch.setattr(thread, "_level", lambda group: (0, None))
    monkeypatch.setattr(thread, "_exchange", lambda group, step: order.append(f"exchanges {step}"))
    thread.submit(1)
    thread.retire()
    thread.start()
    thread.join(LIMIT_S)
    assert order == ["marked by MainThread", "precedes in generation-1", "exchanges 1"]


def test_a_buffer_is_used_again_after_what_still_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(
        "resilient.payload.Mark", lambda device: SimpleNamespace(precede=lambda: order.append("precedes"))
    )
    pool = sums_on(CPU).pool
    payload = pool.take()
    order.clear()
    pool.give_back(payload)
    assert pool.take() is payload and order == ["precedes"]


def test_a_run_on_the_cpu_touches_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("CUDA was touched")

    for name in ("is_available", "get_device_name", "_lazy_init", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    assert "CUDA" not in probe(1, CPU)[1]
    with _as_in_a_rank(1, CPU):
        torch.rand(1)


# Waiting for the device


class Waited(TorchDispatchMode):
    """Counts how often a value is asked of the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name in ("aten::_local_scalar_dense", "aten::equal")
        return func(*args, **(kwargs or {}))


def waits_of(call: Callable[[], object]) -> int:
    with Waited() as seen:
        call()
    return seen.count


def test_the_device_is_waited_for_once_however_many_tensors_there_are() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(9)))
    named = list(model.named_parameters())
    sums = StepSums(named, Buffers([]), 2)
    for leaf in range(2):
        loss = model(torch.ones(2, 3)).square().mean()
        loss.backward()
        assert waits_of(lambda leaf=leaf, loss=loss: sums.fold_leaf(leaf, loss)) == 0  # type: ignore[misc]
    (whole,) = sums.partial.nodes.values()
    assert waits_of(lambda: sums.finite(whole, gradients=True)) == 1
    whole.views[0].view(-1)[0] = float("inf")
    assert not sums.finite(whole, gradients=True) and sums.finite(whole, gradients=False)
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
    assert waits_of(lambda: clip(named, None, 1.0)) == 0, "one tolist, which asks the host's copy"


def test_a_digest_asks_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    place: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    monkeypatch.setattr(verification, "weighted_sum", lambda data: torch.tensor(-2))
    taken: list[bytes] = []
    running, here = SimpleNamespace(update=taken.append), torch.ones(2, dtype=torch.uint8)
    monkeypatch.setattr(torch, "stack", once := Once(torch.stack))
    verification._update(running, [place, here, place])
    assert list(map(bytes, taken)) == [b"\xfe" + b"\xff" * 7, b"\1\1", b"\xfe" + b"\xff" * 7] and once.calls == 1


class Once:
    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.function(*args)


def test_a_digest_beside_the_copy_comes_after_what_still_writes_the_state() -> None:
    order: list[str] = []
    copy: Any = SimpleNamespace(
        ready=SimpleNamespace(synchronize=lambda: order.append("ready")),
        digesting=SimpleNamespace(finish=lambda: order.append("digested") or 5),  # type: ignore[func-returns-value]
        is_unchanged=True,
    )
    Copy.finish_digest(copy)
    assert order == ["ready", "digested"] and copy.digest == 5


# Parts of a GPU


@pytest.mark.parametrize(
    ("resources", "there", "ranks"),
    [
        ({"GPU": 0.5}, {"GPU": 2.0}, 4),
        ({"GPU": 0.6}, {"GPU": 2.0}, 2),
        ({"GPU": 0.1}, {"GPU": 1.0}, 10),
        ({"GPU": 0.3}, {"GPU": 1.7}, 5),
        ({"GPU": 1}, {"GPU": 2.0}, 2),
        ({"GPU": 0.5, "CPU": 1}, {"GPU": 1.0, "CPU": 8.0}, 2),
        ({"GPU": 0.5}, {"CPU": 8.0}, 0),
    ],
)
def test_a_part_of_a_gpu_comes_from_a_single_one(
    resources: dict[str, float], there: dict[str, float], ranks: int
) -> None:
    assert launch._fit(resources, there) == ranks
