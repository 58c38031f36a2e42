"""Checkpoints as state dicts, without the run that wrote them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from snapshot.core.spelling import ManifestError
from snapshot.files import Files, open_files
from snapshot.state_tree import Tree, chosen, places, pruned, tree_of
from snapshot.store import INCOMPLETE, Found, checkpoints, newest, other_runs
from snapshot.stored import Stored
from snapshot.tree import Json

from .job import at_home

_USERS = "user:"
"""Before the names of what was given to `run.protect`; see `Run`."""


def load(
    url: str,
    step: int | None = None,
    names: Iterable[str] | None = None,
    mapped: bool = False,
    run: str | None = None,
) -> dict[str, Any]:
    """A checkpoint's state on CPU, compared with its checksums, as nested plain state dicts.

        {"model": {...}, "optimizer": {...}, "run.state": {...}}

    Of a module what its `load_state_dict` takes; of an optimizer torch's own format; of a dict its values; of
    anything else what its `state_dict()` gave. Tied tensors are one tensor.

    url: as given to `Checkpoint`; also a relative path. step: of exactly this step; None: the newest that is complete.
    names: only these objects ("model"), tensors or values ("model.norm.weight", as `resilient checkpoints inspect`
        shows them), with unix wildcards ("model.*"); nothing else is read. A list of which only some elements are
        asked for is a dict by position.
    mapped: tensors that lie uncompressed, aligned and in one shard of a local file, of a page or more, are maps of that
        file, copied on write, instead of being read into memory. The files must not be truncated meanwhile.
    run: whose, should several keep theirs there.
    Raises ValueError if there is no such checkpoint or name, its subclass ManifestError for files that are damaged or
        of a newer version, RottenCheckpoint for bytes that are not those that were written, and StorageError.
    """
    from snapshot.state_dict import read_state  # torch

    stored = opened(url, step, run=run)
    return read_state(stored, selected(stored, names), mapped=mapped)


def files_at(url: str) -> Files:
    """As `snapshot.files.open_files`, and relative paths."""
    return open_files(url if "://" in url or not url else os.path.abspath(at_home(url)))


def opened(url: str, step: int | None = None, files: Files | None = None, run: str | None = None) -> Stored:
    """The newest complete checkpoint, or that of a step, ready to be read. Raises as `load`."""
    files = files or files_at(url)
    return Stored.open(files, found_at(files, url, step, run))


def found_at(files: Files, url: str, step: int | None, run: str | None) -> Found:
    """The newest complete checkpoint, of these. Raises as `load`."""
    found = newest(files, step=step, run=run)
    if found is None:
        raise _missing(files, url, step, run)
    if run is None and (others := other_runs(files, found.run)):
        names = ", ".join(map(repr, sorted({found.run, *others})))
        raise ValueError(f"{url} has checkpoints of several runs ({names}): say of which, by run= or --run")
    return found


def _missing(files: Files, url: str, step: int | None, run: str | None) -> ValueError:
    seen = checkpoints(files, run)
    wanted = [each for each in seen if step is None or each.key.step == step]
    damaged = [each for each in wanted if not each.complete and each.why != INCOMPLETE]
    if damaged:
        return ManifestError(damaged[-1].why)
    steps = sorted({each.key.step for each in seen if each.complete})
    if step is None or not steps:
        begun = "; what is there was begun, but never completed" if wanted else ""
        return ValueError(f"no checkpoint at {url}{begun}")
    begun = " that is complete" if wanted else ""
    return ValueError(f"no checkpoint of step {step}{begun} at {url}; there are: {', '.join(map(str, steps))}")


def shown_name(name: str) -> str:
    """Of an object, or of a tensor by its first place, as users know it."""
    return name.removeprefix(_USERS)


def whole_tree(stored: Stored, *, everything: bool = False) -> Tree:
    """See `snapshot.state_tree`; objects have the names that their user gave them."""
    return tree_of(shown_objects(stored), everything=everything)


def shown_objects(stored: Stored) -> dict[str, Json]:
    objects = stored.skeleton.objects
    shown = {name: shown_name(name) for name in objects}
    if len(set(shown.values())) < len(shown):
        shown = {name: name for name in objects}
    return {shown[name]: objects[name] for name in sorted(objects, key=shown.__getitem__)}


def selected(stored: Stored, names: Iterable[str] | None) -> Tree:
    """Raises ValueError for a name that stands for nothing."""
    tree = whole_tree(stored)
    if names is None:
        return tree
    return pruned(tree, chosen(places(tree), [names] if isinstance(names, str) else names))
