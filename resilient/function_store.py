"""A run's training function, with all that it carries, where nothing that dies takes it along: in the cluster's keys.

Ray sends an actor's large arguments as objects that belong to the process that starts it. After that process's death
the actor can be neither started nor restarted. So controller and ranks are given no more than a digest. A node's first
rank copies what is large into the run's folder there; the others, and replacements, read that copy.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import pickle
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import xxhash
from ray.exceptions import RpcError

from actors import launch

from .job import StoredFunction

PIECE_BYTES = 1 << 20
TRY_AGAIN_S = 1.0
_FUNCTION = "/function/"


def store_function(key: str, argv: Sequence[str], function: bytes) -> StoredFunction:
    """key: of the run's attempt. argv: what the function finds as sys.argv, also while it is loaded."""
    digest, count = xxhash.xxh3_128(), 0
    try:
        for buffer in (pickle.dumps(list(argv)), function):
            for start in range(0, len(buffer), PIECE_BYTES):
                piece = buffer[start : start + PIECE_BYTES]
                launch.write_key(_key(key, count), piece)
                digest.update(piece)
                count += 1
    except BaseException:
        launch.delete_keys(f"{key}{_FUNCTION}")
        raise
    return StoredFunction(pieces=count, digest=digest.hexdigest())


def drop_stored(run: str) -> None:
    """What earlier attempts have left that ended before their controller could remove it."""
    for key in {key.partition(_FUNCTION)[0] for key in launch.list_keys(f"{run}/") if _FUNCTION in key}:
        launch.delete_keys(f"{key}{_FUNCTION}")


@contextlib.contextmanager
def opened(key: str, stored: StoredFunction, folder: Path) -> Iterator[tuple[list[str], Any]]:
    """The pickles of sys.argv and of the function, in this order. folder: the run's on this node."""
    if stored.pieces <= 2:
        file: IO[bytes] = io.BytesIO(b"".join(_pieces(key, stored)))
    else:
        file = _copy_on_node(key, stored, folder / f"function-{stored.digest}")
    with file:
        yield pickle.load(file), file


def _copy_on_node(key: str, stored: StoredFunction, path: Path) -> IO[bytes]:
    """The node's copy, made by the first that needs it. Without room for one there, this process's own."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            file = path.open("rb")
            if _digest_of(file) == stored.digest:
                return file
            file.close()
        fresh = path.with_suffix(".new")
        try:
            with fresh.open("wb") as written:
                for piece in _pieces(key, stored):
                    written.write(piece)
        except OSError:
            fresh.unlink(missing_ok=True)
            return io.BytesIO(b"".join(_pieces(key, stored)))
        fresh.replace(path)
        return path.open("rb")


def _pieces(key: str, stored: StoredFunction) -> Iterator[bytes]:
    digest = xxhash.xxh3_128()
    for number in range(stored.pieces):
        piece = _piece(_key(key, number))
        digest.update(piece)
        yield piece
    if digest.hexdigest() != stored.digest:
        raise RuntimeError(f"the training function of {key} is not in the cluster's keys as it was put there")


def _piece(key: str) -> bytes:
    while True:
        try:
            piece = launch.read_key(key)
        except RpcError:  # the cluster's head is away; without a controller this process's lease ends
            time.sleep(TRY_AGAIN_S)
            continue
        if piece is None:
            raise RuntimeError(
                f"{key} is no longer in the cluster's keys: the run has ended, or the cluster's head "
                "was restarted without what it had stored"
            )
        return piece


def _digest_of(file: IO[bytes]) -> str:
    digest = xxhash.xxh3_128()
    while data := file.read(PIECE_BYTES):
        digest.update(data)
    file.seek(0)
    return digest.hexdigest()


def _key(key: str, number: int) -> str:
    return f"{key}{_FUNCTION}{number:06d}"
