"""Files in shared memory that others have made, mapped without a risk of SIGBUS."""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path


class NotMappable(Exception):
    """No regular file, or too short, or not all of its pages are reserved: it is still being created, or another's."""


def map_file(path: Path, least_bytes: int) -> mmap.mmap:
    """All of it, writable. Raises NotMappable, and FileNotFoundError."""
    try:
        # Not blocking: it might be a pipe.
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise NotMappable(f"{path} can't be opened: {error.strerror}") from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size < least_bytes:
            raise NotMappable(f"{path} is no file of at least {least_bytes} bytes")
        if found.st_blocks * 512 < found.st_size:
            raise NotMappable(f"{path} has holes: not all of its {found.st_size} bytes are reserved")
        return mmap.mmap(descriptor, found.st_size)
    finally:
        os.close(descriptor)
