"""A rank's snapshots: its share of the state goes into shared memory while the next step computes.

At a step's boundary, on the training thread: what may change during forward (buffers, plain values) is
copied at once; parameters and optimizer state, which only the optimizer changes, are left to a copying
thread. The gate stands where a step is committed: training waits there until the copy is whole, and
nowhere else. What was changed in spite of it, by the user's own hand, is noticed by torch's version
counters, and that snapshot is given up rather than kept torn.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from actors.standing import Standing, read_settled, read_standing
from actors.vault import wake_vault
from snapshot.arena import Slot, SlotHead, required_bytes
from snapshot.core.chunks import are_chunks, ends_within, share_of
from snapshot.core.lifecycle import Ordinal
from snapshot.core.ranges import Ranges, merged
from snapshot.front import FrontShare, Targets
from snapshot.recapture import Recapture
from snapshot.skeleton import TensorSpec
from snapshot.table import StateTable

from .copying import Copy
from .core.cadence import Cadence
from .core.lane import Agreed, Wish
from .core.saves import Saves
from .slots import Slots
from .verification import Digests

FINAL_WAIT_S, LOOK_S = 480.0, 0.05
"""How long the last step waits for the checkpoint before to be written or given up: longer than all tries take."""


@dataclass(slots=True, kw_only=True)
class Tally:
    """What snapshots did and cost on this rank so far."""

    captured: int = 0
    skipped: int = 0
    """Not taken although due, because no slot was free on some rank."""
    saves_postponed: int = 0
    """Steps at which a checkpoint was due while the one before was still being written."""
    torn: int = 0
    """Given up because the state was written while it was copied."""
    blocked_s: float = 0.0
    """Time for which training has waited: at boundaries and at the gate."""
    interval: int = 0
    protected: int = -1
    """Step of the newest snapshot protected everywhere."""
    verified: int = -1
    """Newest step at whose start all ranks were seen to hold the same state."""
    protected_generation: int = 0
    """The generation whose members captured it."""
    newest: int = -1
    """Step of the newest one that is captured."""
    state_bytes: int = 0
    """Of the whole state, all ranks' shares together."""
    mutable_s: float = 0.0
    """From the step's boundary until the state might be written again, the last time."""
    protected_s: float = 0.0
    """From the step's boundary until all ranks knew it protected everywhere, the last time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seating:
    """Under which membership a share is cut."""

    generation: int
    rank: int
    world: int


class Snapshots:
    """One rank's. Its methods may be called by several threads; each says by which."""

    def __init__(
        self,
        *,
        run: str,
        attempt: int,
        folder: Path,
        member: int,
        device: torch.device,
        cadence: Cadence,
        say: Callable[[str], None],
        saves: Saves | None = None,
        verify: bool = True,
    ) -> None:
        """say: tells the user what was decided, or went wrong. saves: what is made durable, if anything is. verify:
        whether to compare the state with the other ranks' at each capture."""
        self.tally = Tally(interval=cadence.interval)
        self._run, self._attempt, self._folder, self._member = run, attempt, folder, member
        self._cadence = cadence
        self._say = say
        self._saves = saves
        self._targets: dict[Slot, Targets] = {}
        self._slots = Slots(
            folder=folder,
            member=member,
            device=device,
            durable=saves is not None,
            say=say,
            replaced=self._forget_slot,
            without_room=self._without_room,
        )
        self._no_room: Exception | None = None
        self._seating: Seating | None = None
        self._recapture = Recapture()
        self._digests = Digests() if verify else None
        self._compared: Callable[[TensorSpec], bool] = lambda spec: True
        self._verified: Ordinal | None = None
        self._copy: Copy | None = None
        self._last: Ordinal | None = None
        self._boundaries: dict[Ordinal, float] = {}
        """Of the last snapshots, when their steps began."""
        self._captured_in = 0
        """The generation whose members captured it."""
        self._full_in = 0
        """The generation in which there was no room for the first snapshot."""
        self._protected_here: Ordinal | None = None
        """The newest that this node's keeper has protected, as far as is known."""
        self._everywhere = -1
        """Packed ordinal of the newest snapshot protected everywhere, for the keeper."""
        self._agreed_interval = cadence.interval
        self._began_at: float | None = None
        self._waited_s = 0.0
        self._jobs: queue.SimpleQueue[Copy | None] = queue.SimpleQueue()
        threading.Thread(target=self._copying, name="copying", daemon=True).start()

    # The lane: by the generation's thread, while the training thread waits for it

    def wish(self, ordinal: Ordinal, generation: int, last_step: int | None = None, *, renewed: bool = False) -> Wish:
        """For the state at the start of this step, to the members of this generation; the run ends at `last_step`.

        renewed: these are not the members of the run's beginning. Then their first snapshot is due at once: the former
        ones hang on keepers that have gone, or wait to go.
        """
        if self._saves is not None and ordinal.step == last_step:
            self._await_settled()
        last = self._last.step if self._last is not None and self._last.branch == ordinal.branch else None
        due = self._cadence.is_due(ordinal.step, last, self._agreed_interval)
        here = read_standing(self._folder, generation)
        slots, lifecycle = self._slots, self._slots.lifecycle
        with slots.lock:
            kept_here = self._kept_here(here, generation)
            hopeless = _hopeless(lifecycle.slots, ordinal.branch, here)
            lifecycle.never_protected(each for each in hopeless if each not in kept_here)
            if here.settled is not None:
                lifecycle.settled(here.settled)
            room = slots.has_room()
            if not lifecycle.free_for_any and generation != self._captured_in:
                # One that is free and too small is being replaced. If there is none: keepers protect what this
                # generation captures, and that is nothing yet, so what waits, waits in vain. Not at once: what they
                # are about to protect they may have protected in a moment.
                if self._full_in == generation:
                    slots.make_way(*kept_here)
                    room = slots.has_room()
                self._full_in = generation
            save_room = self._saves is not None and lifecycle.kept is None and slots.free() is not None
            started = slots.made > 0
        if started and not room:
            slots.make_room()  # what has become free may be too small for the share of a new seat
        if due and not room and started:
            self.tally.skipped += 1
            self._cadence.skipped()
        save_due = self._save_due(ordinal.step, last_step)
        if save_due and not save_room and started:
            self.tally.saves_postponed += 1
        return Wish(
            due=due or (renewed and self._captured_in != generation),
            room=room,
            save_due=save_due,
            save_room=save_room,
            interval=self._cadence.interval,
            protected=-1 if here.protected < 0 else Ordinal(ordinal.branch, here.protected).packed(),
            digest=self._digest_of(Ordinal(ordinal.branch, ordinal.step - 1)),
        )

    def _await_settled(self) -> None:
        """The run's final state is to be made durable: the slot for that may still hold the checkpoint before, which
        storage is slow to take."""
        until = time.monotonic() + FINAL_WAIT_S
        while time.monotonic() < until:
            settled = read_settled(self._folder)
            with self._slots.lock:
                if settled is not None:
                    self._slots.lifecycle.settled(settled)
                if self._slots.lifecycle.kept is None:
                    return
            time.sleep(LOOK_S)

    def _kept_here(self, here: Standing, generation: int) -> tuple[Ordinal | None, Ordinal | None]:
        """The newest that this node's keeper has protected, in a former generation too, and what it is protecting now:
        whether all nodes' have, no exchange may have told."""
        if self._last is None:
            return None, None
        before = here if self._captured_in == generation else read_standing(self._folder, self._captured_in)
        if before.protected >= 0:
            found = Ordinal(self._last.branch, before.protected)
            self._protected_here = max(found, self._protected_here or found)
        goes_on = before.taken_up >= 0 and before.taken_up != before.given_up
        return self._protected_here, Ordinal(self._last.branch, before.taken_up) if goes_on else None

    def _digest_of(self, ordinal: Ordinal) -> int | None:
        """Of the state that the ranks are about to leave behind, if it was captured here."""
        copy = self._copy
        if copy is None or copy.ordinal != ordinal:
            return None
        self.gate()
        return copy.digest

    def verified(self, branch: int) -> int:
        """Newest step of this line at whose start all held the same state; -1 if that was never seen here."""
        return self._verified.step if self._verified is not None and self._verified.branch == branch else -1

    def trust(self, ordinal: Ordinal) -> None:
        """All ranks have begun from this state."""
        self._verified = ordinal

    def _save_due(self, step: int, last_step: int | None) -> bool:
        if self._saves is None:
            return False
        self._saves.last_step = last_step
        return self._saves.is_due(step, time.monotonic())

    def agreed(self, ordinal: Ordinal, agreed: Agreed, generation: int = 0) -> None:
        """What came out of this generation's lane, about the state at the start of this step."""
        if agreed.differs:
            return
        if agreed.verified:
            self._verified = Ordinal(ordinal.branch, ordinal.step - 1)
            self.tally.verified = self._verified.step
        self._agreed_interval = self.tally.interval = agreed.interval
        if agreed.save and self._saves is not None:
            self._saves.saved(ordinal.step, time.monotonic())
        self._everywhere = max(self._everywhere, agreed.protected)
        everywhere = Ordinal.unpacked(agreed.protected)
        if everywhere is not None:
            if (began := self._boundaries.pop(everywhere, None)) is not None:
                self.tally.protected_s = time.monotonic() - began
            self.tally.protected, self.tally.protected_generation = everywhere.step, generation
            with self._slots.lock:
                self._slots.lifecycle.protected(everywhere)

    def account(self) -> dict[str, float]:
        return asdict(self.tally)

    # The boundary and the gate: by the training thread

    def boundary(
        self,
        ordinal: Ordinal,
        objects: Mapping[str, object],
        seating: Seating,
        *,
        wanted: bool,
        durable: bool = False,
        ranges: Callable[[StateTable], Ranges] | None = None,
        compared: Callable[[TensorSpec], bool] = lambda spec: True,
    ) -> None:
        """The state at the start of step `ordinal.step` stands. `wanted`: all ranks capture it; `durable`: for
        their keepers to write it to storage. `ranges`: which bytes of it this rank captures, whole chunks that it
        holds, so that those of all ranks are everything once; None: one stretch, as even as chunks allow.
        `compared`: of the tensors that are here, those that the ranks it is compared with hold too."""
        began = time.monotonic()
        if self._no_room is not None:
            raise self._no_room
        self._measure(began, seating)
        if wanted or seating != self._seating:
            table, share_in = self._recapture.capture(objects), ranges or _even_share(seating)
            self._compared = compared
            self._capture(ordinal, table, seating, share_in(table), wanted=wanted, durable=durable)
        self._seating = seating
        self._waited_s = time.monotonic() - began
        self.tally.blocked_s += self._waited_s

    def gate(self) -> None:
        """Returns when the state may be written: the copy of it is whole."""
        if self._copy is not None:
            began = time.monotonic()
            self._copy.done.wait()
            waited_s = time.monotonic() - began
            self._waited_s += waited_s
            self.tally.blocked_s += waited_s

    def _measure(self, now: float, seating: Seating) -> None:
        if self._began_at is not None and seating == self._seating:
            self._cadence.measured(now - self._began_at, captured=self._copy is not None, waited_s=self._waited_s)
            if said := self._cadence.decide():
                self._say(said)
        self._began_at, self._copy = now, None

    def _capture(
        self, ordinal: Ordinal, table: StateTable, seating: Seating, ranges: Ranges, *, wanted: bool, durable: bool
    ) -> None:
        ends = table.chunk_ends()
        assert are_chunks(ends, ranges), f"rank {seating.rank}: {ranges} are not whole chunks"
        head = SlotHead(
            run=self._run,
            attempt=self._attempt,
            branch=ordinal.branch,
            generation=seating.generation,
            step=ordinal.step,
            member=self._member,
            rank=seating.rank,
            world=seating.world,
            ranges=ranges,
            state_bytes=table.nbytes,
            skeleton=xxhash.xxh3_128_hexdigest(table.skeleton),
            skeleton_bytes=len(table.skeleton),
            chunks=tuple(len(table.skeleton) + end for end in (0, *ends_within(ends, ranges))),
            durable=durable,
        )
        with self._slots.lock:
            self._slots.needed_bytes = required_bytes(head)
            free = self._slots.free() if wanted else None
            if free is not None:
                self._slots.lifecycle.begin(free[0], ordinal, durable=durable)
        if free is not None:
            while len(self._boundaries) >= len(self._slots):
                del self._boundaries[min(self._boundaries)]
            self._boundaries[ordinal] = time.monotonic()
            self._begin(ordinal, free[1], head, table)
            self._last, self._captured_in = ordinal, seating.generation
            self.tally.state_bytes = head.state_bytes
        elif wanted:
            self.tally.skipped += 1  # the state has grown; no other rank can complete this snapshot either
        self._slots.make_room()

    def _begin(self, ordinal: Ordinal, slot: Slot, head: SlotHead, table: StateTable) -> None:
        buffer = slot.begin(head)
        buffer[: head.skeleton_bytes] = table.skeleton
        room = torch.frombuffer(buffer, dtype=torch.uint8)[head.skeleton_bytes :]
        front, behind = table.front_share(head.ranges)
        known = self._targets.get(slot)
        if known is None or not known.fit(room, front):
            self._forget_targets(front)
            known = self._targets[slot] = Targets.within(room, front)
        if known.moving:
            torch._foreach_copy_(known.moving, front.moving_views(table))
        later: list[tuple[Tensor, Tensor]] = []
        watched, at = list(front.watched), front.nbytes
        for place, piece in (each for start, stop in behind for each in table.numbered_pieces(start, stop)):
            target = room[at : at + piece.numel()]
            at += piece.numel()
            if place in table.calm:
                later.append((target, piece))
                watched.append(table.watched(place, piece))
            else:
                target.copy_(piece)
        ready = None
        if known.from_device or any(source.is_cuda for _, source in later):
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        targets = [*known.calm, *(target for target, _ in later)]
        sources = [*known.sources, *(source for _, source in later)]
        digesting = None if self._digests is None else self._digests.begin(table, self._compared)
        self._copy = Copy(
            ordinal=ordinal,
            slot=slot,
            targets=targets,
            sources=sources,
            watched=watched,
            ready=ready,
            digesting=digesting,
        )
        self._jobs.put(self._copy)

    def _forget_slot(self, slot: Slot) -> None:
        """The targets in it keep its memory."""
        self._targets.pop(slot, None)

    def _forget_targets(self, front: FrontShare) -> None:
        """Those of other fronts, which keep memory that the state may have left."""
        for slot, known in list(self._targets.items()):
            if known.front is not front:
                self._targets.pop(slot, None)

    # The copying thread

    def _copying(self) -> None:
        """Whatever happens to a copy, the gate opens, its slot is free or committed, and the next one is tried."""
        torch.set_num_threads(1)
        while (copy := self._jobs.get()) is not None:
            why = copy.finish()
            with self._slots.lock:
                self._slots.lifecycle.give_up() if why else self._slots.lifecycle.commit()
            unsaid = f"a snapshot was given up, because {why}" if why else self._tell_and_digest(copy)
            copy.done.set()
            if why:
                self.tally.torn += 1
            else:
                self.tally.captured += 1
                self.tally.newest = copy.ordinal.step
                began = self._boundaries.get(copy.ordinal)
                self.tally.mutable_s = 0.0 if began is None else time.monotonic() - began
            if unsaid:
                self._say(unsaid)

    def _tell_and_digest(self, copy: Copy) -> str:
        """What went wrong with it; empty if nothing did. The snapshot is whole all the same."""
        try:
            wake_vault(self._folder, self._everywhere)
            copy.finish_digest()
        except Exception as error:  # noqa: BLE001  the thread's edge; ranks compare what others have, keepers look too
            return f"the digest of step {copy.ordinal.step} could not be made: {error}"
        return ""

    def _without_room(self, error: Exception) -> None:
        """At the start that ends the run, which asked for snapshots; a run on its way goes on without some."""
        if self.tally.captured == 0:
            self._no_room = error
        self._say(f"no memory for snapshots could be had: {error}")


def _even_share(seating: Seating) -> Callable[[StateTable], Ranges]:
    return lambda table: merged([share_of(table.chunk_ends(), seating.rank, seating.world)])


def _hopeless(slots: Iterable[Ordinal | None], branch: int, here: Standing) -> list[Ordinal]:
    """Snapshots of the present branch in these slots that will never be protected everywhere, as their keeper
    has gone on to a later one, or has given them up."""
    held = [ordinal for ordinal in slots if ordinal is not None and ordinal.branch == branch]
    return [
        ordinal
        for ordinal in held
        if ordinal.step != here.protected and (ordinal.step < here.taken_up or ordinal.step == here.given_up)
    ]
