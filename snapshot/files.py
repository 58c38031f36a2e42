"""Where durable checkpoints are kept: a folder of a file system, or a prefix of an object store.

Names are relative to the URL, with "/" between folder and file. A file has a name only when it is whole:

    file system     write a temporary file, fsync it, rename it, fsync its folder and the one above
    object store    one request that makes the object, or parts that become one when the upload is completed

so whoever reads never sees a part of one, and what one machine has written every machine reads.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import unquote

from snapshot.core.names import MANIFEST, temporary
from snapshot.disk import Disk

Part = bytes | memoryview
Item = TypeVar("Item")
Result = TypeVar("Result")


class StorageError(Exception):
    """Storage has refused a request, or failed; the message names the file, the cause is the error as it came.

    Nothing of what was asked has happened, or all of it, if the failure came after the last word was written.
    Whether it helps to try again depends on the cause: a full disk, a lost network, missing rights.
    """


class Files(Protocol):
    """Every method may raise StorageError."""

    url: str
    lanes: int
    """How many requests at once are of use."""

    def names(self, folder: str = "") -> list[str]:
        """What lies in it, ascending; temporary files too. Empty if there is no such folder."""

    def size(self, name: str) -> int:
        """In bytes. FileNotFoundError if there is no such file."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Exactly these bytes; up to the end if stop is None. FileNotFoundError if there is no such file."""

    def read_into(self, name: str, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes from start on. FileNotFoundError if there is no such file."""

    def write(self, name: str, parts: Iterable[Part], *, at_most_bytes: int = 0) -> int:
        """Make the file of these parts, instead of one of that name. How many bytes it has.

        It is whole and durable when this returns. If making the parts raises, no trace of it is left.
        at_most_bytes: what it can't exceed, if that is known.
        """

    def forget(self, name: str) -> None:
        """What is read of it next comes from storage, not from this machine's memory, as far as that can be had."""

    def settle(self, name: str) -> None:
        """Make durable that there is a file of this name, whoever wrote it: it may have died just before that."""

    def remove(self, name: str) -> None:
        """Durably; nothing if there is no such file."""

    def remove_folder(self, folder: str) -> None:
        """The manifest first, durably, then the rest: what is left if this fails is no checkpoint."""

    def path(self, name: str) -> Path | None:
        """Where a local file lies, to be mapped."""


class LocalFiles:
    """A folder of a file system that every node mounts."""

    lanes = 1

    def __init__(self, root: Path, disk: Disk | None = None) -> None:
        self.url = str(root)
        self._root = root
        self._disk = disk or Disk()
        self._rooted = False

    def names(self, folder: str = "") -> list[str]:
        path = self.path(folder)
        with _failures(f"{path} can't be listed"):
            try:
                return sorted(self._disk.names(path))
            except FileNotFoundError:
                return []

    def size(self, name: str) -> int:
        path = self.path(name)
        with _failures(f"{path} can't be looked at"):
            return self._disk.size(path)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        stop = self.size(name) if stop is None else stop
        data = bytearray(max(0, stop - start))
        self.read_into(name, start, memoryview(data))
        return bytes(data)

    def read_into(self, name: str, start: int, into: memoryview) -> None:
        path = self.path(name)
        with _failures(f"{path} can't be read"):
            file = self._disk.open(path)
            try:
                at = 0
                while at < len(into):
                    count = self._disk.read_into(file, start + at, into[at:])
                    if count == 0:
                        raise StorageError(f"{path} ends at {start + at}, {start + len(into)} bytes were expected")
                    at += count
            finally:
                self._disk.close(file)

    def write(self, name: str, parts: Iterable[Part], *, at_most_bytes: int = 0) -> int:
        path = self.path(name)
        with _failures(f"{path} can't be written", missing=True):
            self._make_folder(path.parent)
            unfinished = path.parent / temporary(path.name, secrets.token_hex(4))
            file = self._disk.create(unfinished)
            try:
                try:
                    size = sum(self._write_all(file, part) for part in parts)
                    self._disk.sync(file)
                finally:
                    self._disk.close(file)
                self._disk.rename(unfinished, path)
            except BaseException:  # Whatever it was, half a file is of no use to anybody.
                with contextlib.suppress(OSError):
                    self._disk.unlink(unfinished)
                raise
        self.settle(name)
        return size

    def forget(self, name: str) -> None:
        path = self.path(name)
        with _failures(f"{path} can't be read", missing=True):
            file = self._disk.open(path)
            try:
                self._disk.forget(file)
            finally:
                self._disk.close(file)

    def settle(self, name: str) -> None:
        folder = self.path(name).parent
        with _failures(f"{folder} can't be made durable", missing=True):
            self._disk.sync_folder(folder)
            if folder != self._root:  # its own name may be as new
                self._disk.sync_folder(self._root)

    def remove(self, name: str) -> None:
        path = self.path(name)
        with _failures(f"{path} can't be removed"), contextlib.suppress(FileNotFoundError):
            self._disk.unlink(path)
            self._disk.sync_folder(path.parent)

    def remove_folder(self, folder: str) -> None:
        path = self.path(folder)
        assert path != self._root
        names = self.names(folder)
        with _failures(f"{path} can't be removed"):
            if MANIFEST in names:
                self.remove(f"{folder}/{MANIFEST}")
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    self._disk.unlink(path / name)
            with contextlib.suppress(FileNotFoundError):
                self._disk.remove_folder(path)
                self._disk.sync_folder(self._root)

    def path(self, name: str) -> Path:
        return self._root / name

    def _write_all(self, file: int, part: Part) -> int:
        rest = memoryview(part)
        while rest:
            rest = rest[self._disk.write(file, rest) :]
        return len(part)

    def _make_folder(self, path: Path) -> None:
        """With those above it. Their names are durable when the first file in it has been written."""
        if not self._rooted:
            # Also if it is there: who has made it may have died before it was durable.
            self._make(self._root)
            self._disk.sync_folder(self._root.parent)
            self._rooted = True
        if path != self._root:
            self._make(path)

    def _make(self, path: Path) -> None:
        try:
            self._disk.make_folder(path)
        except FileExistsError:
            return
        except FileNotFoundError:
            self._make(path.parent)
            self._disk.make_folder(path)
            self._disk.sync_folder(path.parent.parent)


def open_files(url: str, *, allow_memory: bool = False) -> Files:
    """Nothing is read or written yet.

    url: an absolute path or file://, s3:// or gs://. allow_memory: also memory://, which other processes can't see.
    Raises ValueError, with a remedy, for any other.
    """
    protocol, separator, rest = url.partition("://")
    if not separator or protocol in ("file", "local"):
        path = unquote(rest) if separator else url
        if not path.startswith("/") or "\0" in path or ".." in path.split("/") or path.strip("/") == "":
            raise bad_url(url, "is not an absolute path below the root; give one that all nodes mount, as /data/gpt")
        return LocalFiles(Path(os.path.normpath(path)))
    if "::" in url or not re.fullmatch("[a-z0-9]+", protocol):
        raise bad_url(url, "is no URL of a storage; give a folder's absolute path, s3://bucket/prefix or gs://...")
    if protocol == "memory" and not allow_memory:
        raise bad_url(url, "lies in one process's memory, which other processes can't see and which dies with it")
    from snapshot.objects import open_objects  # fsspec takes a while to load, and most runs don't need it

    return open_objects(url, protocol)


def in_lanes(files: Files, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """function of each, in order, with as many requests at once as are of use."""
    if files.lanes == 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(files.lanes) as pool:
        return list(pool.map(function, items))


def bad_url(url: str, why: str) -> ValueError:
    return ValueError(f"checkpoint url: {url!r} {why}")


@contextlib.contextmanager
def _failures(what: str, *, missing: bool = False) -> Iterator[None]:
    """What the operating system refuses is a StorageError.

    missing: also that there is no such file; else this remains a FileNotFoundError.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not missing:
            raise
        raise StorageError(f"{what}: {error.strerror or error}") from error
