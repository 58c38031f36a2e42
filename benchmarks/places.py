"""Nodes' places that are taken, so that no rank is started there. Nothing large is imported: the processes are small
and start in a second, beside what is measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import ray


@ray.remote(num_cpus=0, resources={"place": 1})
class Blocker:
    def there(self) -> None:
        pass


@contextlib.contextmanager
def places_taken(count: int) -> Iterator[None]:
    blockers = [Blocker.remote() for _ in range(count)]  # type: ignore[attr-defined]
    try:
        ray.get([blocker.there.remote() for blocker in blockers])
        yield
    finally:
        for blocker in blockers:
            ray.kill(blocker)
