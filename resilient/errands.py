"""What only the cluster's head can do, done in order by a thread of its own: nothing else waits for it.

Without its head (`gcs_server`) Ray answers no such call: each of them waits until there is one again. Training,
heartbeats and verdicts need none of them, so whoever rules goes on, and hears of an errand when it is done.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RpcError

TRY_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    work: Callable[[], Any]
    then: Callable[[Any], None]
    failed: Callable[[Exception], None] | None


@dataclass(frozen=True, slots=True)
class Done:
    """An errand's result, or what it raised; to be finished by whoever ordered it."""

    order: _Order
    result: Any
    error: BaseException | None = None

    def finish(self) -> None:
        """Raises what the errand has raised, unless somebody is to be told of errors."""
        if self.error is None:
            self.order.then(self.result)
        elif self.order.failed is not None and isinstance(self.error, Exception):
            self.order.failed(self.error)
        else:
            raise self.error


class Errands:
    def __init__(self, done: Callable[[Done], object]) -> None:
        """done: called in the thread of the errands with each that has been run."""
        self._done = done
        self._orders: queue.SimpleQueue[_Order] = queue.SimpleQueue()
        self._since: float | None = None
        """When the one that is under way was begun."""
        self._said = False
        """That the head is away."""
        threading.Thread(target=self._loop, name="errands", daemon=True).start()

    def run(
        self,
        work: Callable[[], Any],
        then: Callable[[Any], None] = lambda _: None,
        failed: Callable[[Exception], None] | None = None,
    ) -> None:
        """After all that was ordered before. An error of the connection repeats it: it must be one that can be
        repeated. failed: is told of any other error; without it that is raised where the errand is finished."""
        self._orders.put(_Order(work=work, then=then, failed=failed))

    def remark(self, limit_s: float) -> str | None:
        """A sentence for the user when one has begun to take longer than this, and when that is over."""
        since = self._since
        waiting_s = 0.0 if since is None else time.monotonic() - since
        if self._said == (waiting_s > limit_s):
            return None
        self._said = not self._said
        if not self._said:
            return "the cluster's head answers again"
        return f"the cluster's head has not answered for {waiting_s:.1f} s: until it does, nobody can be replaced"

    def _loop(self) -> None:
        while True:
            order = self._orders.get()
            self._since = time.monotonic()
            self._done(_run(order))
            self._since = None


def _run(order: _Order) -> Done:
    while True:
        try:
            return Done(order, order.work())
        except RpcError:  # the head has gone in the middle of it
            time.sleep(TRY_AGAIN_S)
        except BaseException as error:  # noqa: BLE001  the thread's edge: raised where it was ordered
            return Done(order, None, error)
