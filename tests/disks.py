"""Disks that fail: one that forgets what was not synced when the power goes, and a wire that trips at any call."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from snapshot.disk import Disk

CALLS = tuple(name for name, member in vars(Disk).items() if callable(member) and not name.startswith("_"))


class PowerCut(BaseException):
    """Not an Exception: nobody may handle it."""


class Tripwire(Disk):
    """A disk whose every call is announced. trip: called with the call's number, from 1, and its name."""

    def __init__(self, inner: Disk, trip: Callable[[int, str], None]) -> None:
        self.inner, self.trip, self.calls = inner, trip, 0


def _announced(name: str) -> Callable[..., object]:
    def call(self: Tripwire, *arguments: object) -> object:
        self.calls += 1
        self.trip(self.calls, name)
        return getattr(self.inner, name)(*arguments)

    return call


for _name in CALLS:
    setattr(Tripwire, _name, _announced(_name))


@dataclass
class _File:
    now: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    synced: bool = True


@dataclass
class _Folder:
    now: dict[str, int] = field(default_factory=dict)
    durable: dict[str, int] = field(default_factory=dict)
    pending: list[dict[str, int | None]] = field(default_factory=list)
    """What was changed since it was synced; an entry of one of these is kept as a whole, or lost."""

    def change(self, changes: dict[str, int | None]) -> None:
        _apply(self.now, changes)
        self.pending.append(changes)


class ModelDisk(Disk):
    """In memory, in two copies: what processes see, and what is there after a power cut.

    Then each change of a folder that was not synced is kept or lost, whatever happened to those before it; and each
    file that was not synced is as before, or as written, or a mixture.
    """

    def __init__(self) -> None:
        self.inodes: dict[int, _File | _Folder] = {0: _Folder()}
        self.open_files: dict[int, int] = {}
        self.dead = False

    def after_power_cut(self, seed: int) -> ModelDisk:
        """What is there when the machine is up again."""
        self.dead = True
        chance, after = random.Random(seed), ModelDisk()
        for number, inode in sorted(self.inodes.items()):
            if isinstance(inode, _Folder):
                entries = dict(inode.durable)
                for changes in inode.pending:
                    if chance.random() < 0.5:
                        _apply(entries, changes)
                after.inodes[number] = _Folder(now=dict(entries), durable=entries)
            else:
                data = inode.durable if inode.synced else _torn(inode, chance)
                after.inodes[number] = _File(now=bytearray(data), durable=data)
        return after

    def create(self, path: Path) -> int:
        folder = self._folder(path.parent)
        if path.name in folder.now:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        number = self._new(_File())
        folder.change({path.name: number})
        return self._handle(number)

    def open(self, path: Path) -> int:
        return self._handle(self._find(path))

    def write(self, file: int, data: bytes | memoryview) -> int:
        inode = self._file(file)
        taken = data[: max(1, len(data) * 2 // 3)]  # callers must not rely on all being taken
        inode.now += taken
        inode.synced = False
        return len(taken)

    def read_into(self, file: int, at: int, into: memoryview) -> int:
        data = self._file(file).now[at : at + min(len(into), 4096)]
        into[: len(data)] = data
        return len(data)

    def size(self, path: Path) -> int:
        inode = self.inodes[self._find(path)]
        assert isinstance(inode, _File)
        return len(inode.now)

    def sync(self, file: int) -> None:
        inode = self._file(file)
        inode.durable, inode.synced = bytes(inode.now), True

    def forget(self, file: int) -> None:
        self._file(file)

    def close(self, file: int) -> None:
        self._living()
        del self.open_files[file]

    def rename(self, source: Path, target: Path) -> None:
        assert source.parent == target.parent
        self._folder(source.parent).change({source.name: None, target.name: self._find(source)})

    def sync_folder(self, path: Path) -> None:
        folder = self._folder(path)
        folder.durable, folder.pending = dict(folder.now), []

    def unlink(self, path: Path) -> None:
        self._find(path)
        self._folder(path.parent).change({path.name: None})

    def make_folder(self, path: Path) -> None:
        folder = self._folder(path.parent)
        if path.name in folder.now:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        folder.change({path.name: self._new(_Folder())})

    def remove_folder(self, path: Path) -> None:
        if self._folder(path).now:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        self._folder(path.parent).change({path.name: None})

    def names(self, path: Path) -> list[str]:
        return list(self._folder(path).now)

    def _living(self) -> None:
        if self.dead:
            raise PowerCut

    def _new(self, inode: _File | _Folder) -> int:
        number = len(self.inodes)
        self.inodes[number] = inode
        return number

    def _handle(self, number: int) -> int:
        file = max(self.open_files, default=2) + 1
        self.open_files[file] = number
        return file

    def _file(self, file: int) -> _File:
        self._living()
        inode = self.inodes[self.open_files[file]]
        assert isinstance(inode, _File)
        return inode

    def _find(self, path: Path) -> int:
        self._living()
        number = 0
        for name in path.parts[1:]:
            inode = self.inodes[number]
            if not isinstance(inode, _Folder) or name not in inode.now:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            number = inode.now[name]
        return number

    def _folder(self, path: Path) -> _Folder:
        inode = self.inodes[self._find(path)]
        if not isinstance(inode, _Folder):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        return inode


def _apply(entries: dict[str, int], changes: dict[str, int | None]) -> None:
    for name, number in changes.items():
        if number is None:
            entries.pop(name, None)
        else:
            entries[name] = number


def _torn(file: _File, chance: random.Random) -> bytes:
    kind = chance.randrange(3)
    if kind < 2:
        return file.durable if kind == 0 else bytes(file.now)
    length = chance.randint(0, len(file.now))
    pieces = (bytes(file.now[at : min(at + 64, length)]) for at in range(0, length, 64))
    return b"".join(piece if chance.random() < 0.6 else bytes(len(piece)) for piece in pieces)
