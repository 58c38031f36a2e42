"""The keeper's side of snapshots: its vault, and the controller's questions to it.

Questions may take long (everything is checked before it is counted on), so each is answered by a thread
of its own, with a message to the controller.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snapshot.arena import SlotHead, find_slots
from snapshot.core.election import Elected
from snapshot.core.lifecycle import Ordinal

from .folders import earlier_attempts
from .standing import read_settled
from .vault import Ring, Vault

if TYPE_CHECKING:
    from .saving import SaveNews, SaveSpec

END_LIMIT_S = 5.0


class Keeping:
    def __init__(
        self, *, key: str, node: str, folder: Path, secret: str, ip: str, save: SaveSpec | None = None
    ) -> None:
        run, _, attempt = key.rpartition("/")
        older = earlier_attempts(folder, run, int(attempt), node)
        self.folders = (folder, *older)
        self._node = node
        self._vault = Vault(
            run=run, attempt=int(attempt), node=node, folder=folder, secret=secret, ip=ip, older=older, save=save
        )

    @property
    def address(self) -> tuple[str, int]:
        found: tuple[str, int] = self._vault.address
        return found

    def protect(self, ring: Ring, peers: dict[str, tuple[str, int]]) -> None:
        self._vault.peers(peers)
        self._vault.ring(ring)

    def take_inventory(
        self, ended: Iterable[int], is_alive: Callable[[int], bool], answer: Callable[..., None]
    ) -> None:
        """What is held, checked; not before these ranks, whose end was ordered, have ended."""

        def look() -> None:
            deadline = time.monotonic() + END_LIMIT_S
            while any(is_alive(member) for member in ended) and time.monotonic() < deadline:
                time.sleep(0.005)
            alive = [member for member in ended if is_alive(member)]
            if alive:
                answer(error=f"ranks {alive} have not ended, so what they may still write can't be counted on")
            else:
                answer(inventory=self._vault.inventory())

        self._in_thread(look, answer)

    def rebuild(
        self, phase: str, elected: Elected, peers: dict[str, tuple[str, int]], answer: Callable[..., None]
    ) -> None:
        def work() -> None:
            self._vault.peers(peers)
            self._vault.decode(elected) if phase == "decode" else self._vault.assemble(elected)
            answer()

        self._in_thread(work, answer)

    def sweep(self, is_alive: Callable[[int], bool]) -> None:
        """Remove what nobody will need any more, once something newer is protected everywhere: slots of ranks
        that have ended, unless they are still to be made durable, and folders of earlier attempts."""
        everywhere = self._vault.tally().everywhere
        if everywhere is None:
            return
        settled = read_settled(self.folders[0])
        for slot in find_slots(self.folders[0], "rank-*.slot-*"):
            member = int(slot.path.name.removeprefix("rank-").partition(".")[0])
            if not is_alive(member) and not _is_needed(slot.head, everywhere, settled):
                slot.path.unlink(missing_ok=True)
        for older in self.folders[1:]:
            shutil.rmtree(older, ignore_errors=True)

    @property
    def save_news(self) -> SaveNews | None:
        return None if self._vault.saving is None else self._vault.saving.news

    def finish_saving(self, answer: Callable[..., None]) -> None:
        """All that is here to be made durable is, or has been given up."""

        def work() -> None:
            if self._vault.saving is not None:
                self._vault.saving.wait_until_done()
            answer()

        self._in_thread(work, answer)

    def tally(self) -> Any:
        return self._vault.tally()

    def close(self) -> None:
        self._vault.close()

    def _in_thread(self, work: Callable[[], None], answer: Callable[..., None]) -> None:
        def run() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001  the thread's edge: whatever it was, the controller must not wait
                answer(error=f"{type(error).__name__}: {error}")

        threading.Thread(target=run, name="answering", daemon=True).start()


def _is_needed(head: SlotHead | None, everywhere: Ordinal, settled: Ordinal | None) -> bool:
    """Whether somebody may still want this slot, when its rank has ended."""
    if head is None:
        return False
    ordinal = Ordinal(head.branch, head.step)
    return ordinal >= everywhere or (head.durable and (settled is None or ordinal > settled))
