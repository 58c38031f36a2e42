"""One rank's slots in shared memory: which of them are free and large enough, and new ones where they are too small."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from snapshot.arena import Slot
from snapshot.core.lifecycle import Lifecycle, Ordinal

from .pinning import pin, unpin

ROOM_TO_GROW, SKELETON_GROWTH_BYTES = 1.05, 1 << 16


class Slots:
    """`lock` is over all that is here. Whoever uses `lifecycle`, `free` or `make_way` holds it."""

    def __init__(
        self,
        *,
        folder: Path,
        member: int,
        device: torch.device,
        durable: bool,
        say: Callable[[str], None],
        replaced: Callable[[Slot], None],
        without_room: Callable[[Exception], None],
    ) -> None:
        """replaced, without_room: are called, in a thread of its own, before a slot's memory goes, and when none could
        be had."""
        self.lock = threading.Lock()
        self.lifecycle = Lifecycle(durable=durable)
        self.needed_bytes = 0
        self.made = 0
        self.preparing = False
        self._least = len(self.lifecycle.slots)
        self._held: list[Slot | None] = [None] * self._least
        self._folder, self._member, self._device = folder, member, device
        self._say, self._replaced, self._without_room = say, replaced, without_room

    def __len__(self) -> int:
        return len(self._held)

    def free(self, numbers: Sequence[int] | None = None) -> tuple[int, Slot] | None:
        """One of these, or of all, that is free and large enough."""
        for number in self.lifecycle.free if numbers is None else numbers:
            slot = self._held[number]
            if slot is not None and slot.capacity_bytes >= self.needed_bytes:
                return number, slot
        return None

    def has_room(self) -> bool:
        """Whether one is there for a snapshot that is not to be made durable."""
        return self.free(self.lifecycle.free_for_any) is not None

    def make_way(self, protected_here: Ordinal | None, begun: Ordinal | None) -> None:
        """A slot, for a snapshot by other members than those of all that is held. What is given up is not there any
        more: else a keeper might yet say that it has protected it. Arguments as of `Lifecycle.make_way`."""
        for ordinal in self.lifecycle.make_way(protected_here, begun):
            slot = self._held[self.lifecycle.slots.index(ordinal)]
            self.lifecycle.never_protected((ordinal,))
            if slot is not None and ordinal not in self.lifecycle.slots:
                slot.invalidate()
        self._held += [None] * (len(self.lifecycle.slots) - len(self._held))

    def make_room(self) -> None:
        """Replace free slots that are missing or too small, in the background: first touch is slow."""
        with self.lock:
            small = [
                number
                for number, held in enumerate(self.lifecycle.slots)
                if held is None and ((slot := self._held[number]) is None or slot.capacity_bytes < self.needed_bytes)
            ]
            if self.preparing or not small:
                return
            self.preparing = True
        threading.Thread(target=self._prepare, args=(small,), name="preparing slots", daemon=True).start()

    def _prepare(self, numbers: list[int]) -> None:
        number = numbers[0]
        try:
            for number in numbers:
                self._replace(number)
        except Exception as error:  # noqa: BLE001  the thread's edge: no memory, or what the driver says
            self._do_without(number)
            self._without_room(error)
        finally:
            with self.lock:
                self.preparing = False

    def _replace(self, number: int) -> None:
        with self.lock:
            if self.lifecycle.slots[number] is not None:
                return
            former, self._held[number] = self._held[number], None
            capacity = int(self.needed_bytes * ROOM_TO_GROW) + SKELETON_GROWTH_BYTES
            self.made += 1
            path = self._folder / f"rank-{self._member}.slot-{self.made}"
        if former is not None:
            self._remove(former)
        slot = Slot.create(path, capacity)
        if self._device.type == "cuda" and not pin(slot.memory):
            self._say("the CUDA driver does not pin the memory of snapshots: copying into it is slower")
        with self.lock:
            self._held[number] = slot

    def _do_without(self, number: int) -> None:
        """Another than those there have to be is not waited for: something is given up instead."""
        with self.lock:
            if number >= self._least and self.lifecycle.slots[number] is None:
                self.lifecycle.narrow()
                self._held.pop()

    def _remove(self, slot: Slot) -> None:
        self._replaced(slot)
        if self._device.type == "cuda":
            unpin(slot.memory)
        slot.unlink()
