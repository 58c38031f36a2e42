"""Dealings of controller and driver with storage: which checkpoints there are, and what becomes of new ones."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from actors.saving import SaveNews, SaveSpec
from snapshot import store
from snapshot.core.inventory import CheckpointFound, SnapshotKey
from snapshot.core.lifecycle import Ordinal
from snapshot.files import open_files

from .core.events import StorageSeen
from .core.story import Happening
from .job import Checkpoint


def first_attempt(checkpoint: Checkpoint) -> int:
    """The lowest number that no submission has used which has left something on this storage.

    Raises ValueError for a URL that can't be used, StorageError if it can't be listed.
    """
    return store.newest_attempt(open_files(checkpoint.url)) + 1


def save_spec(checkpoint: Checkpoint, run: str, node: str, secret: str) -> SaveSpec:
    """token: different for each submission, also of different clusters, and the same for all of its keepers."""
    token = hashlib.sha256(f"checkpoints of {secret}".encode()).hexdigest()[:8]
    return SaveSpec(run=run, node=node, url=checkpoint.url, keep=checkpoint.keep, level=checkpoint.level, token=token)


def look(checkpoint: Checkpoint, asked: int, answer: Callable[[StorageSeen], object]) -> None:
    """List what there is, in a thread of its own."""

    def work() -> None:
        try:
            found = tuple(map(_found, filter(lambda one: one.complete, store.checkpoints(open_files(checkpoint.url)))))
            answer(StorageSeen(asked=asked, checkpoints=found))
        except Exception as error:  # noqa: BLE001  the thread's edge: the controller must learn of anything
            answer(StorageSeen(asked=asked, error=f"{type(error).__name__}: {error}"))

    threading.Thread(target=work, name="looking at storage", daemon=True).start()


def _found(one: store.Found) -> CheckpointFound:
    assert one.manifest is not None
    key = one.key
    return CheckpointFound(
        key=SnapshotKey(attempt=key.attempt, branch=key.branch, step=key.step, generation=key.generation),
        lineage=one.manifest.lineage,
        folder=one.folder,
    )


@dataclass(slots=True)
class Saved:
    """What keepers say of the checkpoints that they write."""

    news: dict[str, SaveNews] = field(default_factory=dict)
    """By keeper, as node/incarnation: what one that died alone has counted stays counted. After a restart of the
    controller it begins with what is on record as said."""

    def heard(self, keeper: str, news: SaveNews) -> list[Happening]:
        """What has happened, with sentences for the user; it is then to be put on record."""
        node = keeper.partition("/")[0]
        former, self.news[keeper] = self.news.get(keeper, SaveNews()), news
        found = []
        if news.committed > former.committed and news.durable is not None:
            reason = (
                f"the checkpoint of step {news.durable.step} is durable: {news.stored_bytes / 2**20:.1f} MiB, "
                f"{news.took_s:.1f} s after its capture"
            )
            more = {"step": news.durable.step, "stored_bytes": news.stored_bytes, "took_s": news.took_s}
            found.append(Happening(kind="checkpoint durable", reason=reason, more={"node": node, **more}))
        if news.failures > former.failures:
            reason = f"node {node[:8]}: checkpoint not written: {news.last_failure}"
            found.append(Happening(kind="checkpoint failed", reason=reason, more={"node": node}))
        return found

    def summary(self) -> dict[str, Any]:
        """For `Result.checkpoints`."""
        durable = [news for news in self.news.values() if news.durable is not None]
        newest = max(durable, key=lambda news: _ordinal(news.durable), default=None)
        failed = [news.last_failure for news in self.news.values() if news.last_failure]
        return {
            "durable": newest.durable.step if newest is not None and newest.durable is not None else -1,
            "committed": sum(news.committed for news in self.news.values()),
            "failures": sum(news.failures for news in self.news.values()),
            "last_failure": failed[-1] if failed else "",
            "stored_bytes": newest.stored_bytes if newest is not None else 0,
        }


def _ordinal(key: SnapshotKey | None) -> Ordinal:
    assert key is not None
    return Ordinal(key.branch, key.step)
