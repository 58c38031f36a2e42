"""Room in shared memory: is there enough, and taking it for good before it is needed.

A page of a file in memory that was merely promised kills its writer (SIGBUS) when there is none left, and costs
several times a copy when it is touched first. So all of a file is reserved, and its pages touched, beforehand.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from pathlib import Path

# Newer than Python's own list of advices (Linux 5.14).
_POPULATE_WRITE = 23
# The kernel holds the process's memory map meanwhile: others wait for it a few milliseconds, not seconds.
_PIECE_BYTES = 16 << 20
_PAGE_BYTES = 4096
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class NoRoom(Exception):
    """A file system has too little room left for what was asked. The message says what to change."""


def free_bytes(directory: Path) -> int:
    """What this process may still take on the directory's file system."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def check_room(directory: Path, needed_bytes: int, what: str) -> None:
    """Raises NoRoom, with remedies, if so many bytes for `what` are not free now. Reserves nothing."""
    if needed_bytes > free_bytes(directory):
        raise _no_room(directory, needed_bytes, what)


def reserve(path: Path, size_bytes: int) -> mmap.mmap:
    """Create a file of this size, for the owner's eyes only, and map it, every page of it present and zero.

    Raises NoRoom, and leaves no file behind, if there is not enough room; FileExistsError if there is a file.
    Other threads run meanwhile. The file must never be truncated: whoever maps it would die of SIGBUS.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        _allocate(descriptor, path, size_bytes)
        mapped = mmap.mmap(descriptor, size_bytes)
        prefault(mapped)
        return mapped
    except BaseException:  # Whatever it was, half a file is of no use to anybody.
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        raise
    finally:
        os.close(descriptor)


def prefault(mapped: mmap.mmap) -> None:
    """Make every page present and writable, without changing a byte; other threads run meanwhile."""
    first = ctypes.c_char.from_buffer(mapped)
    address, size_bytes = ctypes.addressof(first), len(mapped)
    for start in range(0, size_bytes, _PIECE_BYTES):
        length = min(_PIECE_BYTES, size_bytes - start)
        # Not `mmap.madvise`, which keeps the interpreter's lock; ctypes gives it back.
        while _LIBC.madvise(address + start, length, _POPULATE_WRITE) != 0:
            error = ctypes.get_errno()
            if error == errno.EINVAL:  # an older kernel
                _touch(mapped, start, start + length)
                break
            if error != errno.EINTR:
                raise OSError(error, f"pages could not be made present: {os.strerror(error)}")


def _touch(mapped: mmap.mmap, start: int, stop: int) -> None:
    for position in range(start, stop, _PAGE_BYTES):
        mapped[position] = mapped[position]


def _allocate(descriptor: int, path: Path, size_bytes: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.ENOMEM):
            raise _no_room(path.parent, size_bytes, path.name) from error
        raise


def _no_room(directory: Path, needed_bytes: int, what: str) -> NoRoom:
    return NoRoom(
        f"no room for {what}: {_mebibytes(needed_bytes)} needed, {_mebibytes(free_bytes(directory))} free on the "
        f"file system of {directory}. Make it larger (/dev/shm: `docker run --shm-size`; on Kubernetes mount an "
        "emptyDir with medium: Memory and a sizeLimit there, and raise the pod's memory limit), use another "
        "directory, or keep less in it: fewer parity blocks, or a smaller object store of Ray's, which shares "
        "/dev/shm."
    )


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
