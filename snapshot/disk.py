"""The few calls by which durable checkpoints touch a local disk. Tests put one in its place that fails at each."""

from __future__ import annotations

import os
from pathlib import Path


class Disk:
    """Each method is one call of the operating system, and raises OSError as it does."""

    def create(self, path: Path) -> int:
        """A new file, to write. FileExistsError if there is one."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def open(self, path: Path) -> int:
        """To read."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def write(self, file: int, data: bytes | memoryview) -> int:
        """How many of the bytes were taken; at least one."""
        return os.write(file, data)

    def read_into(self, file: int, at: int, into: memoryview) -> int:
        """How many bytes there were; 0 at the end of the file."""
        return os.preadv(file, [into], at)

    def size(self, path: Path) -> int:
        return os.stat(path).st_size

    def sync(self, file: int) -> None:
        """What was written is on the disk when this returns."""
        os.fsync(file)

    def forget(self, file: int) -> None:
        """What was synced of it leaves the page cache."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self, file: int) -> None:
        os.close(file)

    def rename(self, source: Path, target: Path) -> None:
        """Whoever looks sees the former file or the new one, never a part."""
        os.rename(source, target)

    def sync_folder(self, path: Path) -> None:
        """The names in it are on the disk when this returns."""
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def make_folder(self, path: Path) -> None:
        os.mkdir(path)

    def remove_folder(self, path: Path) -> None:
        """An empty one."""
        os.rmdir(path)

    def names(self, path: Path) -> list[str]:
        return os.listdir(path)
