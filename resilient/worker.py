"""What runs inside a rank's process: the user's function, as a member of its team."""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import cloudpickle

from actors.rank import Host
from actors.remark import Remark

from .core.events import RankFailed
from .function_store import opened
from .job import Job, Settings
from .last_output import LastOutput
from .packing import packed_value
from .records import ReturnValue


class RankBody:
    """Implements `actors.rank.Body`."""

    def __init__(self, job: Job, host: Host) -> None:
        import torch

        from actors.device import survive_peers

        from .member import Member

        self._job = job
        self._host = host
        settings = job.settings
        survive_peers()
        torch.set_num_threads(settings.threads)
        self._member = Member(
            host,
            workers=settings.workers,
            reduction=settings.reduction,
            threads=settings.threads,
            device=device_for(settings.resources),
            snapshots=self._snapshots(),
            storage=settings.checkpoint.url if settings.checkpoint else "",
            detection_s=settings.detection_s,
        )

    def _snapshots(self) -> Any:
        from .core.cadence import Cadence
        from .core.saves import Saves
        from .snapshots import Snapshots

        wanted, checkpoint = self._job.settings.snapshot, self._job.settings.checkpoint
        if wanted is None:
            return None
        saves = None
        if checkpoint is not None:
            saves = Saves(every_steps=checkpoint.every_steps, every_s=checkpoint.every_s)
        return Snapshots(
            run=self._job.settings.name,
            attempt=self._job.attempt,
            folder=self._host.folder,
            member=self._host.member,
            device=device_for(self._job.settings.resources),
            cadence=Cadence(every=wanted.every, budget=wanted.budget),
            saves=saves,
            verify=wanted.verify and not self._job.settings.allow_different_bits,
            say=lambda text: self._host.tell(Remark(text=f"member {self._host.member}: {text}")),
        )

    def train(self) -> None:
        output = LastOutput()
        try:
            with output.kept():
                value, digest = self._train()
            self._host.tell(ReturnValue(member=self._host.member, value=value))
            self._member.telling.returned(digest)
        except BaseException as error:  # noqa: BLE001  the thread's edge: whatever the user's code raises ends the run
            self._give_up(error, user_traceback(error) + output.of_exit(error))

    def _give_up(self, error: BaseException, text: str) -> None:
        from actors.device import is_device_error, is_out_of_memory

        try:
            if is_device_error(error) or (is_out_of_memory(error) and was_raised_here(error)):
                traceback.print_exc()
                self._member.telling.crashed_here(text)
                os._exit(1)
            self._member.telling.failed(self._member.step, text)
        except BaseException as second:  # noqa: BLE001  the last resort: nothing may keep the first error from being told
            text = f"{text}\nand this could not be told as usual:\n{user_traceback(second)}"
            self._host.tell_at_last(RankFailed(member=self._host.member, step=-1, traceback=text))

    def _train(self) -> tuple[bytes, Any]:
        import torch

        torch.set_num_threads(self._job.settings.threads)
        if self._member.device.type == "cuda":
            torch.cuda.set_device(self._member.device)
        # While a process waits for a place, Ray has all others collect garbage every 10 s. With torch's objects among
        # what is looked through that takes 0.1 to 0.5 s, in which the rank stands still; so they are left out.
        gc.freeze()
        value, digest = call(self._function, self._member, self._job.settings, self._member.device)
        return packed_value(value), digest

    def _function(self) -> Any:
        with opened(self._job.key, self._job.function, self._host.folder) as (argv, file):
            sys.argv = argv
            return cloudpickle.load(file)

    def deliver(self, message: object) -> None:
        self._member.deliver(message)

    def report(self) -> None:
        self._member.telling.report()

    def acknowledged(self, through: int) -> None:
        self._member.telling.recorded_through(through)

    def repeat_records(self) -> None:
        self._member.telling.repeat_records()


def call(load: Callable[[], Any], team: Any, settings: Settings, device: Any) -> tuple[Any, Any]:
    """Run the user's function on this team; its value, and the digest of the state it ended with.

    load: gives the function and its arguments, as `packed_call` has packed them.
    """
    from .run import Run

    same_bits = not settings.allow_different_bits
    run = Run(team, seed=settings.seed, device=device, on_nonfinite=settings.on_nonfinite, same_bits=same_bits)
    user, args, kwargs = load()
    value = user(run, *args, **kwargs)
    run.check_left_in_order()
    return value, run.digest()


def device_for(resources: Any) -> Any:
    """The device that a rank with these resources trains on. ValueError where CUDA is asked for in vain."""
    import torch

    if not resources.get("GPU"):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            f"resources={dict(resources)!r} asks for a GPU, but torch finds no CUDA device here; "
            "use nodes with GPUs and a CUDA build of torch, or leave GPU out of resources"
        )
    return torch.device("cuda", 0)


def was_raised_here(error: BaseException) -> bool:
    """Whether the runtime's own code was at work: more micro-batches after a loss take more sums, say, and that is no
    mistake of the function's."""
    frames = traceback.extract_tb(error.__traceback__)
    packages = [Path(__file__).parents[1] / name for name in ("resilient", "actors", "snapshot")]
    return bool(frames) and any(Path(frames[-1].filename).is_relative_to(package) for package in packages)


def user_traceback(error: BaseException) -> str:
    """The traceback from the user's function on, without the frames of the runtime that called it."""
    frames = error.__traceback__
    here = sys.modules[__name__].__file__
    while frames is not None and frames.tb_next is not None and frames.tb_frame.f_code.co_filename == here:
        frames = frames.tb_next
    try:
        return "".join(traceback.format_exception(type(error), error, frames))
    except Exception as second:  # noqa: BLE001  what an exception's class does when it is shown is anybody's
        shown = "".join(traceback.format_tb(frames))
        return f"{shown}{type(error).__qualname__} (which could not be shown: {type(second).__qualname__})\n"
