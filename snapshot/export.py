"""A stored checkpoint as files that others read: safetensors, torch.save, torch.distributed.checkpoint.

Bits are kept. The file or folder has its name only when it is whole. Arrays become tensors, and numpy's scalars
Python's, so that nothing needs a pickle of more than torch allows.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Callable
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, Literal

import torch

from snapshot.files import StorageError
from snapshot.skeleton import TensorSpec
from snapshot.state_dict import Progress, read_state
from snapshot.state_tree import Tree, json_of, places
from snapshot.stored import Stored
from snapshot.table import DTYPES

Form = Literal["safetensors", "torch", "dcp"]

SAFETENSORS_DTYPES = frozenset(DTYPES) - {"complex32", "complex128"}


def export(
    stored: Stored, tree: Tree, path: Path, form: Form, *, force: bool = False, progress: Progress | None = None
) -> int:
    """How many bytes were written. tree: what is to be in it.

    force: also instead of what is there, if that looks like an earlier export.
    Raises ValueError for what can't be expressed and for a path that can't be taken, StorageError, and as `read_state`.
    """
    _check_path(path, form, force)
    if form == "safetensors":
        _check_dtypes(stored, tree)
    else:
        _check_values(tree)
    write = {"safetensors": _write_safetensors, "torch": _write_torch, "dcp": _write_dcp}[form]
    unfinished = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        # Maps: what is exported need not fit into memory.
        write(stored, tree, unfinished, lambda: read_state(stored, tree, mapped=True, portable=True, progress=progress))
        size = _settle(unfinished)
        _put_in_place(unfinished, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: of others' writers, when the disk is full
        raise StorageError(f"{path} can't be written: {error}") from error
    finally:
        _remove(unfinished)
    return size


def _check_path(path: Path, form: Form, force: bool) -> None:
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    if not os.path.lexists(path):
        return
    if not force:
        raise ValueError(f"{path}: is there already; --force replaces it")
    if form == "dcp":
        fits = path.is_dir() and ((path / ".metadata").exists() or not any(path.iterdir()))
    else:
        fits = path.is_file()
    if not fits:
        kind = "a folder of torch.distributed.checkpoint" if form == "dcp" else "a file"
        raise ValueError(f"{path}: is there already, and not {kind}; it is not replaced. Give another path")


def _check_dtypes(stored: Stored, tree: Tree) -> None:
    for place in places(tree):
        if place.tensor is not None:
            spec: TensorSpec = stored.skeleton.tensors[place.tensor]
            if spec.dtype not in SAFETENSORS_DTYPES:
                raise ValueError(
                    f"{place.name}: safetensors has no {spec.dtype}; export to torch, or leave it out with --names"
                )


def _check_values(tree: Tree) -> None:
    """Of all types that a skeleton knows, torch.load(weights_only=True) refuses one."""
    for place in places(tree):
        if any(map(_has_frozenset, (place.value, *place.path))):
            raise ValueError(
                f"{place.name}: torch.load(weights_only=True) doesn't load a frozenset; leave it out with --names"
            )


def _has_frozenset(value: Any) -> bool:
    return type(value) is frozenset or (type(value) in (tuple, list, set) and any(map(_has_frozenset, value)))


def _write_safetensors(stored: Stored, tree: Tree, path: Path, read: Callable[[], Tree]) -> None:
    """Flat names; tied tensors once, the other names under "aliases"; plain values under "values"."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError as error:
        raise ValueError("safetensors is not installed: pip install 'resilient-runtime[export]'") from error
    tensors: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}
    aliases: dict[str, str] = {}
    values: dict[str, Any] = {}
    state: Any = read()
    for place in places(tree):
        value: Any = reduce(getitem, place.path, state)
        if place.tensor is None:
            values[place.name] = json_of(value if type(value) in _NUMBERS else place.value)
        elif place.tensor in names:
            aliases[place.name] = names[place.tensor]
        else:
            names[place.tensor] = place.name
            tensors[place.name] = value.contiguous()
    words = {
        "run": stored.manifest.run,
        "step": str(stored.manifest.step),
        "aliases": json.dumps(aliases),
        "values": json.dumps(values, allow_nan=False),
    }
    try:
        save_file(tensors, path, metadata={"format": "pt", **words})
    except SafetensorError as error:
        raise RuntimeError(str(error)) from error


_NUMBERS = (bool, int, float)


def _write_torch(stored: Stored, tree: Tree, path: Path, read: Callable[[], Tree]) -> None:
    with path.open("xb") as file:
        torch.save(read(), file)


def _write_dcp(stored: Stored, tree: Tree, path: Path, read: Callable[[], Tree]) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    with warnings.catch_warnings():
        # It says that there is no process group; there shall be none.
        warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
        try:
            save(read(), checkpoint_id=path, no_dist=True)
        except CheckpointException as error:  # a BaseException, which nobody expects
            cause = next(iter(error.failures.values()))[0]
            raise RuntimeError(f"{type(cause).__name__}: {cause}") from error


def _settle(path: Path) -> int:
    """Make it durable; its size in bytes."""
    size = 0
    for each in sorted(path.iterdir()) if path.is_dir() else [path]:
        with each.open("rb") as file:
            os.fsync(file.fileno())
            size += os.fstat(file.fileno()).st_size
    return size


def _put_in_place(unfinished: Path, path: Path) -> None:
    if not path.is_dir():
        os.replace(unfinished, path)
        return
    # A folder can't be replaced at once.
    former = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    os.rename(path, former)
    try:
        os.rename(unfinished, path)
    except OSError:
        os.rename(former, path)
        raise
    _remove(former)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
