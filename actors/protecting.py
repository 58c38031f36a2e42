"""How one keeper protects its node's snapshots: one at a time, the newest, one thread per peer.

    complete here -> sealed -> all PUTs to each peer -> each peer says: settled -> protected
                                  ^                        |
                                  +---- this one again ----+

All PUTs to a peer go before any waiting for it, so keepers never wait in a circle. What broke off is tried again a
few times, with the address that the peer has by then. `actors.agenda` decides; here are only the threads.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from actors.agenda import TRIES, Agenda, pause_s
from actors.holdings import Holdings, sealed_image
from actors.links import Address, Fields, Link, Links, Stalled
from actors.ring import Ring
from actors.transfer import PeerLost, TransferCancelled, TransferCorrupt, TransferRefused
from snapshot.arena import SlotError, SlotView
from snapshot.core.inventory import SnapshotKey
from snapshot.fields import image_fields, key_fields
from snapshot.image import ImageView

LOOK_S = 0.25
"""How often is looked for what nobody has announced."""

_REASONS: Mapping[type[Exception], str] = {
    Stalled: "peer stalled",
    PeerLost: "peer lost",
    TransferRefused: "peer refused",
    TransferCorrupt: "corrupt",
    TransferCancelled: "cancelled",
    SlotError: "slot changed",
}


@dataclass(eq=False)
class Attempt:
    """The protection of one snapshot, seen by all threads that work on it.

    why: it will not succeed. What was begun is sent to its end all the same, for half a piece costs the peers all
        that they have of the block; but nobody waits for anything.
    stopped: it is to end now.
    settled: the peers that have said so.
    """

    key: SnapshotKey
    ring: Ring
    image: ImageView
    stopped: threading.Event = field(default_factory=threading.Event)
    settled: set[str] = field(default_factory=set)
    why: str = ""
    last_error: str = ""

    def fail(self, reason: str, error: Exception | None = None) -> None:
        """The first reason counts."""
        if not self.why:
            self.why, self.last_error = reason, str(error or "")


class Protecting:
    """The thread that protects, and those that it starts."""

    def __init__(
        self,
        *,
        holdings: Holdings,
        links: Links,
        address_of: Callable[[str], Address | None],
        introduce: Callable[[], Fields],
        protected: Callable[[SnapshotKey], None],
        taken_up: Callable[[SnapshotKey], None],
        given_up: Callable[[SnapshotKey], None],
    ) -> None:
        """address_of: where a node's keeper listens, None if not known. introduce: what each request begins with.

        protected, taken_up, given_up: are called, in this thread, when a snapshot is.
        """
        self.agenda = Agenda()
        self.last_s = 0.0
        self.last_failure = ""
        self._holdings = holdings
        self._links = links
        self._address_of = address_of
        self._introduce = introduce
        self._protected = protected
        self._taken_up = taken_up
        self._given_up = given_up
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="protecting", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        self._wake.set()

    def revive(self) -> None:
        """A peer has a new address."""
        with self._lock:
            self.agenda.revive()
        self._wake.set()

    def close(self, limit_s: float) -> None:
        """The links are cancelled by whoever owns them."""
        self._closing.set()
        self._wake.set()
        self._thread.join(limit_s)

    def _run(self) -> None:
        while not self._closing.is_set():
            self._wake.wait(LOOK_S)
            self._wake.clear()
            while not self._closing.is_set() and self._turn():
                pass

    def _turn(self) -> bool:
        """Whether there was anything to do."""
        key = None
        try:
            complete = self._look()
            with self._lock:
                key = self.agenda.next(time.monotonic())
            if key is None or key not in complete:
                return False
            return self._protect(key, *complete[key])
        except Exception as error:  # noqa: BLE001  the thread's edge: what comes next is protected all the same
            self.last_failure = f"unforeseen: {error!r}"
            if key is not None:
                with contextlib.suppress(OSError):
                    self._failed(key, "other", repr(error))
            return False

    def _protect(self, key: SnapshotKey, ring: Ring, slots: dict[int, SlotView]) -> bool:
        self._taken_up(key)
        try:
            image = sealed_image(self._holdings.node, slots)
        except SlotError as error:
            self._failed(key, reason_of(error), str(error))
            return True
        attempt = Attempt(key, ring, image)
        self._deliver_to_all(attempt)
        if attempt.why or attempt.settled != set(ring.peers_of(self._holdings.node)):
            self._failed(key, attempt.why or "broken", attempt.last_error)
            return True
        try:
            image.check_unchanged()
        except SlotError as error:  # a rank has given the snapshot up meanwhile
            self._failed(key, reason_of(error), str(error))
            return True
        with self._lock:
            self.last_s = self.agenda.succeeded(key, time.monotonic())
        self._protected(key)
        return True

    def _look(self) -> dict[SnapshotKey, tuple[Ring, dict[int, SlotView]]]:
        complete = {key: found for key, found in self._holdings.own.complete().items() if found[1]}
        with self._lock:
            self.agenda.see(complete, time.monotonic())
        return complete

    def _failed(self, key: SnapshotKey, reason: str, error: str) -> None:
        with self._lock:
            self.last_failure = f"{key}: {reason}" + (f": {error}" if error else "")
            self.agenda.failed(key, reason, time.monotonic())
        self._given_up(key)

    def _deliver_to_all(self, attempt: Attempt) -> None:
        peers = attempt.ring.peers_of(self._holdings.node)
        threads = [
            threading.Thread(target=self._deliver, args=(attempt, peer, classes), name=f"protect {peer}", daemon=True)
            for peer, classes in peers.items()
        ]
        for thread in threads:
            thread.start()
        next_look = time.monotonic() + LOOK_S
        for thread in threads:
            while thread.is_alive():
                thread.join(max(0.0, next_look - time.monotonic()))
                if time.monotonic() >= next_look:
                    self._reconsider(attempt, peers)
                    next_look = time.monotonic() + LOOK_S

    def _reconsider(self, attempt: Attempt, peers: Mapping[str, object]) -> None:
        self._look()
        node, latest = self._holdings.node, self._holdings.latest_ring()
        with self._lock:
            reason = self.agenda.why_stop(attempt.key, attempt.ring, node, latest, time.monotonic())
        if self._closing.is_set():
            reason = "closing"
        if reason:
            attempt.fail(reason)
            attempt.stopped.set()
            self._links.cancel(lambda link: link.node in peers and link.purpose is attempt)

    def _deliver(self, attempt: Attempt, peer: str, classes: tuple[int, ...]) -> None:
        """Until the peer says that all is settled, or the attempt has failed."""
        tries = 0
        while not attempt.why:
            address = self._address_of(peer)
            if address is None:  # the controller will tell
                attempt.stopped.wait(LOOK_S)
                continue
            try:
                with self._links.open(peer, address, purpose=attempt) as link:
                    if _Delivery(attempt, link, self._introduce, classes).run():
                        attempt.settled.add(peer)
                        return
                error: Exception = TransferRefused(f"{peer} has lost again and again what was delivered")
            except Exception as failure:  # noqa: BLE001  the thread's edge: the attempt must hear of it
                error = failure
            tries += 1
            with self._lock:
                newer_waits = self.agenda.newer_waits(attempt.key)
            if tries >= TRIES or newer_waits or isinstance(error, SlotError):
                attempt.fail(reason_of(error), error)
                return
            attempt.stopped.wait(pause_s(tries))


class _Delivery:
    """All of one node's data for one peer, over one link."""

    def __init__(self, attempt: Attempt, link: Link, introduce: Callable[[], Fields], classes: tuple[int, ...]) -> None:
        self._attempt = attempt
        self._link = link
        self._introduce = introduce
        self._classes = classes

    def run(self) -> bool:
        """Whether it is settled, or the attempt has failed elsewhere; else the peer has lost too often what it had."""
        missing = self._classes
        for _ in range(TRIES):
            for class_index in missing:
                self._put(class_index)
            missing = self._unsettled()
            if not missing:
                return True
        return False

    def _put(self, class_index: int) -> None:
        image = self._attempt.image
        fields = {
            **self._introduce(),
            "op": "put",
            "key": key_fields(self._attempt.key),
            "class": class_index,
            "image": image_fields(image.described),
        }
        self._link.request(fields, send=self._piece(class_index))

    def _piece(self, class_index: int) -> Iterator[memoryview]:
        image, group = self._attempt.image, self._attempt.ring.group
        piece = group.piece_of(image.described.node, class_index)
        yield from image.parts(*group.piece_bounds(piece, image.image_bytes))
        # If it has changed under our hands, the PUT must not seem whole.
        image.check_unchanged()

    def _unsettled(self) -> tuple[int, ...]:
        """Which classes to deliver again; none if all is settled, or the attempt has failed."""
        fields = {
            **self._introduce(),
            "op": "settled",
            "key": key_fields(self._attempt.key),
            "node": self._attempt.image.described.node,
            "classes": list(self._classes),
        }
        while not self._attempt.why:
            reply = self._link.request(fields)
            if again := tuple(reply["again"]):
                return again
            if len(reply["complete"]) == len(self._classes):
                break
        return ()


def reason_of(error: Exception) -> str:
    return next((reason for kind, reason in _REASONS.items() if isinstance(error, kind)), "other")
