"""Durable checkpoints in object stores, through fsspec."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.spec import AbstractBufferedFile

from snapshot.core.names import MANIFEST
from snapshot.files import Part, StorageError, bad_url

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "memory": ""}
"""Protocols whose writes are whole or nothing, and the extra that brings them."""

BLOCK_BYTES = 16 << 20
MOST_BLOCKS = 9_000
"""S3 takes 10,000 parts."""


class ObjectFiles:
    """A prefix of an object store. Objects have no folders: one is there as long as something lies in it."""

    lanes = 16

    def __init__(self, url: str, system: Any, root: str) -> None:
        """system: of fsspec, without caches of listings."""
        self.url = url
        self._system = system
        self._root = root.rstrip("/")

    def names(self, folder: str = "") -> list[str]:
        place = self._place(folder)
        with _failures(f"{self.url}/{folder} can't be listed"):
            self._system.invalidate_cache()
            try:
                found = self._system.ls(place, detail=False)
            except FileNotFoundError:
                return []
        front = place.strip("/") + "/"
        inside = (each.strip("/") for each in found)
        return sorted(each.removeprefix(front) for each in inside if each.startswith(front))

    def size(self, name: str) -> int:
        with _failures(f"{self.url}/{name} can't be looked at"):
            self._system.invalidate_cache()
            found = self._system.info(self._place(name))
        if found["type"] != "file":
            raise FileNotFoundError(f"{self.url}/{name} is no object")
        return int(found["size"])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        if stop is not None and stop <= start:
            return b""
        with _failures(f"{self.url}/{name} can't be read"):
            data: bytes = self._system.cat_file(self._place(name), start=start or None, end=stop)
        if stop is not None and len(data) != stop - start:
            raise StorageError(f"{self.url}/{name}: {len(data)} bytes from {start} on, {stop - start} were expected")
        return data

    def read_into(self, name: str, start: int, into: memoryview) -> None:
        into[:] = self.read(name, start, start + len(into))

    def write(self, name: str, parts: Iterable[Part], *, at_most_bytes: int = 0) -> int:
        """If the last request fails there may be the whole object nevertheless."""
        block_bytes = max(BLOCK_BYTES, -(-at_most_bytes // MOST_BLOCKS))
        source = iter(parts)
        front, front_bytes = [], 0
        for part in source:
            front.append(bytes(part))
            front_bytes += len(part)
            if front_bytes >= block_bytes and not self._whole_only:
                return self._write_blocks(name, front, source, block_bytes)
        with _failures(f"{self.url}/{name} can't be written", missing=True):
            self._system.pipe_file(self._place(name), b"".join(front))
        return front_bytes

    @property
    def _whole_only(self) -> bool:
        # fsspec's own store in memory shows a file from the moment that it is opened.
        return bool(self._system.protocol == "memory")

    def _write_blocks(self, name: str, front: list[bytes], rest: Iterator[Part], block_bytes: int) -> int:
        with _failures(f"{self.url}/{name} can't be written", missing=True):
            # Not as a context: when an exception leaves it, fsspec completes the upload with what is there.
            file = self._system.open(self._place(name), "wb", block_size=block_bytes, autocommit=False)
        assert isinstance(file, AbstractBufferedFile)
        try:
            with _failures(f"{self.url}/{name} can't be written", missing=True):
                while front:
                    file.write(front.pop(0))
            for part in rest:
                with _failures(f"{self.url}/{name} can't be written", missing=True):
                    file.write(part)
            with _failures(f"{self.url}/{name} can't be written", missing=True):
                file.close()
                file.commit()
        except BaseException:  # Whatever it was, half an object must not be completed.
            _give_up(file)
            raise
        return int(file.loc)

    def forget(self, name: str) -> None:
        """Nothing of it is kept here."""

    def settle(self, name: str) -> None:
        """What is there is durable."""

    def remove(self, name: str) -> None:
        with _failures(f"{self.url}/{name} can't be removed"), contextlib.suppress(FileNotFoundError):
            self._system.rm_file(self._place(name))

    def remove_folder(self, folder: str) -> None:
        assert folder
        names = self.names(folder)
        if MANIFEST in names:
            self.remove(f"{folder}/{MANIFEST}")
        rest = [self._place(f"{folder}/{name}") for name in names if name != MANIFEST]
        with _failures(f"{self.url}/{folder} can't be removed"), contextlib.suppress(FileNotFoundError):
            if rest:
                self._system.rm(rest)

    def path(self, name: str) -> Path | None:
        return None

    def _place(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root


def open_objects(url: str, protocol: str) -> ObjectFiles:
    """See `open_files`."""
    if protocol not in EXTRAS:
        raise bad_url(
            url,
            f"begins with {protocol}://, which may show half-written files as whole; "
            "give an absolute path, s3://bucket/prefix or gs://bucket/prefix",
        )
    if protocol != "memory" and not url.partition("://")[2].strip("/"):
        raise bad_url(url, f"names no bucket; give {protocol}://bucket/prefix")
    try:
        system, root = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        remedy = f'pip install "resilient-runtime[{EXTRAS[protocol]}]" on all nodes'
        raise bad_url(url, f"needs a package that is not installed ({error}); {remedy}") from error
    return ObjectFiles(url.rstrip("/"), system, root)


def _give_up(file: AbstractBufferedFile) -> None:
    # Before anything else: a file that is not closed completes its upload when it is collected.
    file.closed = True
    with contextlib.suppress(Exception):  # The reason is on its way; storage forgets unfinished uploads by itself.
        file.discard()


@contextlib.contextmanager
def _failures(what: str, *, missing: bool = False) -> Iterator[None]:
    """Whatever the backend raises is a StorageError.

    missing: also that there is no such object, or bucket; else this remains a FileNotFoundError.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:  # each backend of fsspec has its own, of no common class
        if isinstance(error, FileNotFoundError) and not missing:
            raise
        raise StorageError(f"{what}: {error!r:.500}") from error
