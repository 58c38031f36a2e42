"""Dealings of controller and driver with storage: which checkpoints there are, and what becomes of new ones."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from actors.saving import SaveNews, SaveSpec
from snapshot import store
from snapshot.core.inventory import CheckpointFound, SnapshotKey
from snapshot.core.lifecycle import Ordinal
from snapshot.files import Files, open_files

from .core.events import StorageSeen
from .core.story import Happening
from .job import Checkpoint


def first_attempt(checkpoint: Checkpoint, run: str, files: Files | None = None) -> int:
    """The lowest number that no submission of the run has used which has left something on this storage.

    Raises ValueError for a URL that can't be used or is another run's, StorageError if it can't be listed.
    """
    files = files or open_files(checkpoint.url)
    other = store.other_run(files, run)
    if other is not None:
        raise ValueError(
            f"Checkpoint(url={checkpoint.url!r}): the run {other.run!r} keeps its checkpoints there (the newest: step "
            f"{other.key.step}), and this run is {run!r}. To begin from its newest state write "
            f"Checkpoint(<a folder of its own>, resume_from={checkpoint.url!r}); to go on with that run, "
            f"name={other.run!r}; otherwise give this run another URL"
        )
    if checkpoint.resume_from is not None and store.newest(files, run=run) is None:
        there = open_files(checkpoint.resume_from, allow_memory=True)
        if store.newest(there, run=source_run(there, run)) is None:
            raise ValueError(f"Checkpoint(resume_from={checkpoint.resume_from!r}): there is no complete checkpoint")
    return store.newest_attempt(files, run) + 1


def to_resume(
    checkpoint: Checkpoint, run: str, files: Files, step: int | None = None
) -> tuple[str, store.Found] | None:
    """The run's newest complete checkpoint (of a step), or where it has none, that of `resume_from`; with the URL.

    Raises ValueError if there are several runs' to choose from, and StorageError.
    """
    found = store.newest(files, step=step, run=run)
    if found is not None:
        return checkpoint.url, found
    if not checkpoint.resume_from or (step is not None and store.newest(files, run=run) is not None):
        return None
    there = open_files(checkpoint.resume_from, allow_memory=True)
    found = store.newest(there, step=step, run=source_run(there, run))
    return None if found is None else (checkpoint.resume_from, found)


def source_run(files: Files, run: str) -> str | None:
    """Whose checkpoints to begin from: this run's own, or the only other one's."""
    found = {each.run for each in store.checkpoints(files) if each.complete}
    if run in found or len(found) < 2:
        return run if run in found else None
    names = ", ".join(map(repr, sorted(found)))
    raise ValueError(
        f"Checkpoint(resume_from={files.url!r}): there are checkpoints of several runs ({names}): copy the folders "
        "of the one to begin from to a place of their own, and name that"
    )


def save_spec(checkpoint: Checkpoint, run: str, node: str, secret: str) -> SaveSpec:
    """token: different for each submission, also of different clusters, and the same for all of its keepers."""
    token = hashlib.sha256(f"checkpoints of {secret}".encode()).hexdigest()[:8]
    return SaveSpec(run=run, node=node, url=checkpoint.url, keep=checkpoint.keep, level=checkpoint.level, token=token)


def look(checkpoint: Checkpoint, run: str, asked: int, answer: Callable[[StorageSeen], object]) -> None:
    """List what there is of this run, or to begin it from, in a thread of its own."""

    def work() -> None:
        try:
            answer(StorageSeen(asked=asked, checkpoints=tuple(_to_go_on_from(checkpoint, run))))
        except Exception as error:  # noqa: BLE001  the thread's edge: the controller must learn of anything
            answer(StorageSeen(asked=asked, error=f"{type(error).__name__}: {error}"))

    threading.Thread(target=work, name="looking at storage", daemon=True).start()


def _to_go_on_from(checkpoint: Checkpoint, run: str) -> Iterator[CheckpointFound]:
    own = [one for one in store.checkpoints(open_files(checkpoint.url), run) if one.complete]
    yield from (_found(one, one.key.attempt, one.folder) for one in own)
    if not own and checkpoint.resume_from is not None:
        there = open_files(checkpoint.resume_from)
        for one in store.checkpoints(there, source_run(there, run)):
            if one.complete:  # older than whatever this run makes itself
                yield _found(one, 0, f"{checkpoint.resume_from}/{one.folder}")


def _found(one: store.Found, attempt: int, folder: str) -> CheckpointFound:
    assert one.manifest is not None
    key = SnapshotKey(attempt=attempt, branch=one.key.branch, step=one.key.step, generation=one.key.generation)
    return CheckpointFound(key=key, lineage=one.manifest.lineage, folder=folder)


@dataclass(slots=True)
class Saved:
    """What keepers say of the checkpoints that they write."""

    news: dict[str, SaveNews] = field(default_factory=dict)
    """By keeper, as node/incarnation: what one that died alone has counted stays counted. After a restart of the
    controller it begins with what is on record as said."""
    _missed: str = ""

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
            reason = f"node {node[:8]}: checkpoints: {news.last_failure}"
            found.append(Happening(kind="checkpoint failed", reason=reason, more={"node": node}))
        return found

    def missed(self, step: int) -> str:
        """That the run's final state is on no storage, and why; empty if it is."""
        told = self.summary()
        if told["durable"] >= step:
            return ""
        newest = (
            "there is no checkpoint" if told["durable"] < 0 else f"the newest checkpoint is of step {told['durable']}"
        )
        why = told["last_failure"] or "no slot was free for it"
        self._missed = f"the final state, of step {step}, is not on storage; {newest}: {why}"
        return self._missed

    def summary(self) -> dict[str, Any]:
        """For `Result.checkpoints`."""
        durable = [news for news in self.news.values() if news.durable is not None]
        newest = max(durable, key=lambda news: _ordinal(news.durable), default=None)
        failed = [news.last_failure for news in self.news.values() if news.last_failure]
        return {
            "durable": newest.durable.step if newest is not None and newest.durable is not None else -1,
            "committed": sum(news.committed for news in self.news.values()),
            "failures": sum(news.failures for news in self.news.values()),
            "unverified": sum(news.unverified for news in self.news.values()),
            "last_failure": failed[-1] if failed else "",
            "missed": self._missed,
            "stored_bytes": newest.stored_bytes if newest is not None else 0,
        }


def _ordinal(key: SnapshotKey | None) -> Ordinal:
    assert key is not None
    return Ordinal(key.branch, key.step)
