"""The vault of a keeper: what a node's ranks have committed is sealed, protected by other nodes' keepers, and served.

    ranks      --slots in the folder, a datagram to keeper.socket-->  vault  --keeper.standing-->  ranks
    controller --rings, peers' addresses, wake, inventory, decode, assemble-->  vault
    vault      <--parity, questions whether it is settled, reads (TCP)-->  other vaults, ranks that restore

The folder is all that a keeper that takes over needs: slots, rings, parity blocks and decoded images describe
themselves. What was only half written is found out by its missing commit word, and done again.

Threads: one listens for wake-ups, one protects (and starts one per peer while it does), one watches the links to
peers, and one serves each connection. All end with `close`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from actors.holdings import Holdings
from actors.links import Address, Fields, Links
from actors.protecting import LOOK_S, Protecting
from actors.reading import Serving, fetch_slot
from actors.rebuilding import NotAsElected, Rebuilding
from actors.ring import Ring
from actors.standing import StandingFile
from actors.transfer import Server, Stream
from snapshot import codec
from snapshot.core.election import Elected
from snapshot.core.inventory import Inventory, SnapshotKey
from snapshot.core.lifecycle import Ordinal

if TYPE_CHECKING:
    from actors.saver import Saver
    from actors.saving import SaveSpec

__all__ = ["NotAsElected", "Ring", "Tally", "Vault", "fetch_slot", "wake_vault"]

NONE = -1
"""In place of a packed Ordinal: there is none yet."""
CLOSE_LIMIT_S = 1.0
_WORD = struct.Struct("<q")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What a vault has done so far, for metrics.

    protected: the newest snapshot that is, from this node's point of view; everywhere: on all nodes, as was told.
    *_bytes: what is held in memory now; sent and received: so far, for parity and for decoding.
    failures: by reason, snapshots whose protection was given up. dropped: by reason, parity blocks of others that
        came to nothing. oddities: by kind, what was found damaged, and strangers.
    last_s: from seeing that the newest protected snapshot was complete here until it was protected.
    codec: "isal" or "numpy".
    """

    protected: SnapshotKey | None
    everywhere: Ordinal | None
    data_bytes: int
    parity_bytes: int
    decoded_bytes: int
    sent_bytes: int
    received_bytes: int
    snapshots_protected: int
    failures: Mapping[str, int]
    dropped: Mapping[str, int]
    oddities: Mapping[str, int]
    last_failure: str
    last_s: float
    codec: str


class Vault:
    """One node's, for one attempt of a run. All methods may be called from several threads."""

    def __init__(
        self,
        *,
        run: str,
        attempt: int,
        node: str,
        folder: Path,
        secret: str,
        ip: str,
        older: Sequence[Path] = (),
        save: SaveSpec | None = None,
    ) -> None:
        """folder: created if it is not there; what a former keeper of this attempt has left in it is taken over.

        older: further folders of this run on this machine, that are only read. save: where to make snapshots durable.
        ip: where to listen; secret: the run's, which all its keepers know.
        Raises ValueError for a damaged ring, OSError if it can't listen.
        """
        self._run, self._attempt, self._folder = run, attempt, folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._addresses: dict[str, Address] = {}
        self._everywhere: Ordinal | None = None
        self._lock = threading.Lock()
        self._oddities: Counter[str] = Counter()
        self._closing = threading.Event()
        self._standing = StandingFile(folder)
        self._bell = _bell(folder)
        self._holdings = Holdings(run=run, attempt=attempt, node=node, folder=folder, older=older)
        self._links = Links(secret)
        self._rebuilding = Rebuilding(self._holdings, self._links, self._address_of, self._introduce)
        self._serving = Serving(self._holdings, self._rebuilding.piece)
        self._protecting = Protecting(
            holdings=self._holdings,
            links=self._links,
            address_of=self._address_of,
            introduce=self._introduce,
            protected=self._note_protected,
            taken_up=lambda key: self._standing.show("taken_up", key),
            given_up=lambda key: self._standing.show("given_up", key),
        )
        self.saving = self._new_saver(save) if save is not None else None
        self._server = Server(ip, secret, self._serve)
        self.address: Address = self._server.address
        self._listener = threading.Thread(target=self._listen, name="vault bell", daemon=True)
        self._listener.start()
        self._protecting.start()

    def _new_saver(self, spec: SaveSpec) -> Saver:
        from actors.saver import Saver  # file systems take a while to import

        return Saver(spec, self._folder)

    def ring(self, ring: Ring) -> None:
        """Snapshots of this generation are protected so. ValueError if this node is not in the group."""
        latest = self._holdings.latest_ring()
        self._holdings.add_ring(ring)
        if latest is None or ring.generation > latest.generation:
            # Ranks may have gone back to an older step: what was protected says nothing about what they do now.
            self._standing.clear()
        self._protecting.wake()

    def peers(self, addresses: Mapping[str, Address]) -> None:
        """Where the keepers of the nodes listen now. Whoever is not named is not known any more."""
        with self._lock:
            changed = addresses != self._addresses
            self._addresses = {node: (address[0], address[1]) for node, address in addresses.items()}
            current = dict(self._addresses)
        if changed:
            self._links.cancel(lambda link: current.get(link.node) != link.address)
            self._protecting.revive()

    def wake(self, everywhere: int = NONE) -> None:
        """Something was committed. everywhere: the newest snapshot that is protected on all nodes, packed."""
        if (newest := Ordinal.unpacked(everywhere)) is not None:
            with self._lock:
                newer = self._everywhere is None or newest > self._everywhere
                self._everywhere = newest if newer else self._everywhere
            if newer:
                self._holdings.protected(newest)
                self._rebuilding.forget()
        self._protecting.wake()

    def inventory(self) -> Inventory:
        """All that is here and good, verified now: takes as long as reading it all once."""
        return self._holdings.inventory()

    def decode(self, elected: Elected) -> None:
        """First step on all keepers. Raises TransferError or SlotError; KeyError if what was found is gone."""
        self._rebuilding.decode(elected)

    def assemble(self, elected: Elected) -> None:
        """Second step on all keepers. Raises beside that NoRoom, and NotAsElected."""
        self._rebuilding.assemble(elected)

    def tally(self) -> Tally:
        agenda, parities, sent = self._protecting.agenda, self._holdings.parities, self._links.counts
        # Copies at once: other threads count on.
        oddities = Counter(dict(self._oddities)) + Counter(dict(self._holdings.failures))
        oddities += Counter(dict(self._server.counts))
        with self._lock:
            everywhere = self._everywhere
        return Tally(
            protected=agenda.protected,
            everywhere=everywhere,
            data_bytes=self._holdings.data_bytes(),
            parity_bytes=parities.held_bytes() + self._holdings.older_parity_bytes(),
            decoded_bytes=self._holdings.decoded_bytes() + self._rebuilding.held_bytes(),
            sent_bytes=sent["sent"],
            received_bytes=sent["received"] + parities.received_bytes,
            snapshots_protected=agenda.protected_count,
            failures=dict(agenda.failures),
            dropped=dict(parities.dropped),
            oddities=dict(oddities),
            last_failure=self._protecting.last_failure,
            last_s=self._protecting.last_s,
            codec=codec.backend(),
        )

    def forget_older(self, attempt: int) -> None:
        """Removes the older folders of attempts before this one."""
        self._holdings.forget_older(attempt)

    def close(self) -> None:
        """Ends server and threads, within about a second. The folder stays as it is."""
        self._closing.set()
        wake_vault(self._folder)  # If the folder has gone, it takes LOOK_S.
        self._holdings.parities.close()
        self._links.close(CLOSE_LIMIT_S)
        self._protecting.close(CLOSE_LIMIT_S)
        if self.saving is not None:
            self.saving.close(CLOSE_LIMIT_S)
        self._server.close(CLOSE_LIMIT_S)
        self._listener.join(CLOSE_LIMIT_S)
        self._bell.close()
        self._standing.close()
        self._holdings.close()

    def _address_of(self, node: str) -> Address | None:
        with self._lock:
            return self._addresses.get(node)

    def _introduce(self) -> Fields:
        with self._lock:
            everywhere = NONE if self._everywhere is None else self._everywhere.packed()
        return {"run": self._run, "attempt": self._attempt, "everywhere": everywhere}

    def _serve(self, request: Fields, stream: Stream) -> Fields:
        op = request.get("op")
        if op not in ("put", "settled"):
            return self._serving.serve(str(op), request, stream)
        if (request.get("run"), request.get("attempt")) != (self._run, self._attempt):
            raise ValueError(
                f"run {request.get('run')!r:.80}, attempt {request.get('attempt')!r:.20}: this is the keeper of run "
                f"{self._run!r}, attempt {self._attempt}"
            )
        everywhere = request.get("everywhere", NONE)
        if type(everywhere) is int and everywhere != NONE:
            self.wake(everywhere)
        return (self._holdings.parities.put if op == "put" else self._put_settled)(request, stream)

    def _put_settled(self, request: Fields, stream: Stream) -> Fields:
        stream.finish()
        return self._holdings.parities.settled(request)

    def _note_protected(self, key: SnapshotKey) -> None:
        latest = self._holdings.latest_ring()
        if latest is None or key.generation >= latest.generation:
            self._standing.show("protected", key)

    def _listen(self) -> None:
        while not self._closing.is_set():
            try:
                data = self._bell.recv(_WORD.size + 1)
            except TimeoutError:
                continue
            if self._closing.is_set():
                return
            if len(data) == _WORD.size:
                self.wake(*_WORD.unpack(data))
            else:
                with self._lock:
                    self._oddities["no wake-up"] += 1


def wake_vault(folder: Path, everywhere: int = NONE) -> bool:
    """From a rank: something was committed. Whether a keeper was there; if not, it will look by itself."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
        try:
            with _short(folder) as short:
                sender.sendto(_WORD.pack(everywhere), f"{short}/keeper.socket")
        except OSError:  # no keeper, or one that has many wake-ups to read already
            return False
    return True


def _bell(folder: Path) -> socket.socket:
    bell = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    (folder / "keeper.socket").unlink(missing_ok=True)  # a former keeper's
    with _short(folder) as short:
        bell.bind(f"{short}/keeper.socket")
    bell.settimeout(LOOK_S)
    return bell


@contextlib.contextmanager
def _short(folder: Path) -> Iterator[str]:
    """A name for the folder that leaves room for a socket's: the kernel takes 107 bytes for both."""
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
