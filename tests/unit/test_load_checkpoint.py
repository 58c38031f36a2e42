"""Checkpoints as state dicts: bits, ties, subsets, maps, and what is refused."""

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import resilient
from resilient.loading import opened, selected, whole_tree
from snapshot.core.manifest import Manifest
from snapshot.core.spelling import ManifestError, spelled
from snapshot.files import LocalFiles, open_files
from snapshot.skeleton import ShardSpec, Skeleton, TensorSpec
from snapshot.state_dict import read_state
from snapshot.state_tree import places
from snapshot.stored import RottenCheckpoint
from tests.checkpoints import Parts, build, files_in, leaves, save, state_dicts, train
from tests.shards import State, flip

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def parts() -> Parts:
    built = build()
    train(built)
    return built


class Counting(LocalFiles):
    """How many bytes of shards were read, and how often memory was mapped."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.shard_bytes = 0

    def read_into(self, name: str, start: int, into: memoryview) -> None:
        self.shard_bytes += len(into) if name.endswith(".bin") else 0
        super().read_into(name, start, into)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("compression", [None, 1])
@pytest.mark.parametrize("world", [1, 3])
def test_load_gives_what_state_dict_gave(
    tmp_path: Path, parts: Parts, world: int, compression: int | None, mapped: bool
) -> None:
    save(files_in(tmp_path), parts, 3, world, compression)
    found = resilient.load(str(tmp_path), mapped=mapped)
    assert list(leaves(found)) == list(leaves(state_dicts(parts)))
    assert type(found["run.state"]["history"]) is type(parts["run.state"]["history"])


def test_load_state_dict_takes_it_and_training_goes_on_alike(tmp_path: Path, parts: Parts) -> None:
    save(files_in(tmp_path), parts, 3, 3, 1)
    found, other = resilient.load(str(tmp_path), mapped=True), build(1)
    for name in ("model", "optimizer", "scheduler"):
        other[name].load_state_dict(found[name])
    assert list(leaves(state_dicts(other)["model"])) == list(leaves(state_dicts(parts)["model"]))
    assert other["scheduler"].last_epoch == 3
    train(other, 1)


def test_tied_tensors_are_one_and_others_share_nothing(tmp_path: Path, parts: Parts) -> None:
    save(files_in(tmp_path), parts, 3)
    for mapped in (False, True):
        model = resilient.load(str(tmp_path), mapped=mapped)["model"]
        assert model["embed.weight"] is model["head.weight"]
        assert model["patches.weight"].is_contiguous(memory_format=torch.channels_last)
        former = model["blocks.0.up.weight"].clone()
        for name, tensor in model.items():
            if name not in ("blocks.0.up.weight", "_extra_state"):
                tensor.zero_()
        assert torch.equal(model["blocks.0.up.weight"], former)


def test_the_step_asked_for_or_the_newest(tmp_path: Path, parts: Parts) -> None:
    files = files_in(tmp_path)
    for step in (3, 11, 7):
        save(files, {**parts, "run.state": {"step": step}}, step)
    assert resilient.load(str(tmp_path))["run.state"] == {"step": 11}
    assert resilient.load(str(tmp_path), step=3)["run.state"] == {"step": 3}
    assert resilient.load(f"file://{tmp_path}", 7)["run.state"] == {"step": 7}


def test_relative_paths(tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    save(files_in(tmp_path / "runs"), parts, 3)
    monkeypatch.chdir(tmp_path)
    assert resilient.load("runs", names=["run.state.seen"]) == {"run.state": {"seen": 24}}


NAMES: dict[str, tuple[list[str], list[str]]] = {
    "an object": (["scheduler"], ["scheduler"]),
    "a tensor": (["model.blocks.0.up.weight"], ["model.blocks.0.up.weight"]),
    "a value": (["optimizer.param_groups.0.lr"], ["optimizer.param_groups.0.lr"]),
    "what is within": (["optimizer.state.1"], ["optimizer.state.1."]),
    "wildcards": (["model.blocks.?.norm.*", "run*"], ["model.blocks.0.norm", "model.blocks.1.norm", "run.state"]),
}


@pytest.mark.parametrize(("names", "within"), NAMES.values(), ids=NAMES)
def test_subsets_have_what_was_asked_for(tmp_path: Path, parts: Parts, names: list[str], within: list[str]) -> None:
    save(files_in(tmp_path), parts, 3)
    stored = opened(str(tmp_path))
    wanted = [place.name for place in places(whole_tree(stored)) if place.name.startswith(tuple(within))]
    assert [place.name for place in places(selected(stored, names))] == wanted
    found, whole = resilient.load(str(tmp_path), names=names), resilient.load(str(tmp_path))
    every = dict(leaves(whole))
    assert all(every[path] == bits for path, bits in leaves(found))


def test_a_subset_of_a_list_is_a_dict_by_position(tmp_path: Path, parts: Parts) -> None:
    save(files_in(tmp_path), parts, 3)
    assert resilient.load(str(tmp_path), names=["optimizer.param_groups.1.betas"]) == {
        "optimizer": {"param_groups": {1: {"betas": (0.9, 0.999)}}}
    }
    assert resilient.load(str(tmp_path), names="run.state.shape") == {"run.state": {"shape": (1, 2)}}
    assert resilient.load(str(tmp_path), names=[]) == {}


def test_only_what_is_asked_for_is_read(tmp_path: Path, parts: Parts) -> None:
    save(files_in(tmp_path), parts, 3, 3)
    files = Counting(tmp_path)
    stored = opened("", files=files)
    read_state(stored, selected(stored, ["scheduler", "run.state.seen"]))
    assert files.shard_bytes == 0
    found = read_state(stored, selected(stored, ["model.embed.weight", "model.head.weight"]))
    assert files.shard_bytes == found["model"]["embed.weight"].nbytes
    # Rotten bytes elsewhere don't matter.
    shard = sorted((tmp_path / stored.folder).glob("*.bin"))[-1]
    flip(shard, shard.stat().st_size - 1, 0)
    assert resilient.load(str(tmp_path), names=["model.embed.weight"])
    with pytest.raises(RottenCheckpoint, match=r"shard-00002-of-00003.bin: chunk \d+ \(of run.state\["):
        resilient.load(str(tmp_path))
    with pytest.raises(RottenCheckpoint, match="its checksum differs"):
        resilient.load(str(tmp_path), mapped=True)


def test_names_that_can_be_confused_are_told_apart(tmp_path: Path) -> None:
    save(files_in(tmp_path), {"run.state": {"a": {"b": 1}, "a.b": 2, 0: 3, "0": 4, "empty": {}, "c": []}}, 1)
    names = [place.name for place in places(whole_tree(opened(str(tmp_path))))]
    assert names == [
        "run.state['a']['b']",
        "run.state['a.b']",
        "run.state[0]",
        "run.state['0']",
        "run.state.empty",
        "run.state.c",
    ]
    for name in names:
        assert len(resilient.load(str(tmp_path), names=[name])["run.state"]) == 1
    assert len(resilient.load(str(tmp_path), names=["run.state"])["run.state"]) == 6


class Large(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.rand(1 << 22))
        self.small = nn.Parameter(torch.rand(3))
        self.second = nn.Parameter(torch.rand(1 << 22))


def test_many_tensors_take_few_maps_and_open_files(tmp_path: Path) -> None:
    state = {f"x{number}": torch.full((1024,), float(number)) for number in range(1500)}
    save(files_in(tmp_path), {"run.state": state}, 1, 3)
    before = len(list(Path("/proc/self/fd").iterdir()))
    found = resilient.load(str(tmp_path), mapped=True)["run.state"]
    assert 0 < len(list(Path("/proc/self/fd").iterdir())) - before < 40
    assert list(leaves(found)) == list(leaves(state))


def test_one_ranks_shard_is_no_whole_tensor(tmp_path: Path) -> None:
    shard = ShardSpec(global_shape=(4, 2), offsets=(2, 0), placements=("Shard(0)",), mesh_shape=(2,), coordinate=(1,))
    spec = TensorSpec(
        name="run.state['x']", dtype="float32", itemsize=4, shape=(2, 2), order=(0, 1), device="cpu", shard=shard
    )
    skeleton = Skeleton(tensors=(spec,), objects={"run.state": {"values": {"dict": [["x", {"tensor": 0}], ["y", 1]]}}})
    State(skeleton=skeleton, data=bytes(16)).save(files_in(tmp_path))
    assert resilient.load(str(tmp_path), names=["run.state.y"]) == {"run.state": {"y": 1}}
    with pytest.raises(ValueError, match=r"run.state\['x'\]: is stored as one rank's shard of a DTensor"):
        resilient.load(str(tmp_path))


@pytest.mark.parametrize("compression", [None, 1])
def test_memory_is_that_of_the_result_and_a_map_takes_none(tmp_path: Path, compression: int | None) -> None:
    save(files_in(tmp_path), {"model": Large()}, 1, 1, compression)
    resilient.load(str(tmp_path))
    for mapped in (False, True):
        tracemalloc.start()  # sees what Python and numpy allocate; torch's own memory is the result's
        found = resilient.load(str(tmp_path), mapped=mapped)["model"]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 24 << 20
        maps = Path("/proc/self/maps").read_text().count(str(tmp_path))
        assert (maps > 0) == (mapped and compression is None)
        assert found["first"].numel() == found["second"].numel() == 1 << 22
        del found


def test_a_map_is_a_copy_on_write(tmp_path: Path) -> None:
    save(files_in(tmp_path), {"model": Large()}, 1)
    first = resilient.load(str(tmp_path), mapped=True)["model"]["first"]
    expected = first.clone()
    first.zero_()
    assert torch.equal(resilient.load(str(tmp_path), mapped=True)["model"]["first"], expected)


def test_what_lies_in_an_object_store_is_read_not_mapped(parts: Parts) -> None:
    files = open_files("memory://runs/tiny", allow_memory=True)
    save(files, parts, 3, 3)
    stored = opened("", files=files)
    found = read_state(stored, whole_tree(stored), mapped=True)
    assert list(leaves(found)) == list(leaves(state_dicts(parts)))


def test_progress_is_told(tmp_path: Path, parts: Parts) -> None:
    save(files_in(tmp_path), parts, 3)
    stored, seen = opened(str(tmp_path)), list[tuple[int, int]]()
    read_state(stored, whole_tree(stored, everything=True), progress=lambda *words: seen.append(words))
    assert seen == [(stored.state_bytes, stored.state_bytes)]


def load_step_4(path: Path) -> object:
    return resilient.load(str(path), step=4)


def newer_format(path: Path) -> object:
    manifest = next(path.glob("*/manifest.json"))
    assert Manifest.from_bytes(manifest.read_bytes(), file="")
    fields: dict[str, Any] = json.loads(manifest.read_bytes())
    for name in ("format", "checksum"):
        del fields[name]
    manifest.write_bytes(spelled("resilient-checkpoint", {**fields, "version": 2}))
    return resilient.load(str(path))


def missing_shard(path: Path) -> object:
    next(path.glob("*/*.bin")).unlink()
    return resilient.load(str(path))


REFUSED: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no such place": (lambda path: resilient.load(str(path / "x")), ValueError, r"^no checkpoint at .*/x$"),
    "no such step": (load_step_4, ValueError, r"^no checkpoint of step 4 at .*; there are: 3, 5$"),
    "no such name": (
        lambda path: resilient.load(str(path), names=["model.embed.weigth"]),
        ValueError,
        "^names: nothing is called 'model.embed.weigth'; close to it: model.embed.weight",
    ),
    "nothing like it": (
        lambda path: resilient.load(str(path), names=["§§§"]),
        ValueError,
        "^names: nothing is called '§§§'; there are: model, optimizer, run.state, scheduler$",
    ),
    "newer": (newer_format, ManifestError, "written by a newer version of this package; upgrade"),
    "missing": (missing_shard, RottenCheckpoint, "a file is missing"),
}


@pytest.mark.parametrize(("act", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(
    tmp_path: Path, parts: Parts, act: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    for step in (3, 5) if act is not newer_format else (3,):
        save(files_in(tmp_path), parts, step)
    if act is missing_shard:
        for shard in sorted(tmp_path.glob("*/*.bin"))[:1]:
            shard.unlink()
    with pytest.raises(error, match=message):
        act(tmp_path)


def test_what_was_never_completed_is_said(tmp_path: Path, parts: Parts) -> None:
    folder = save(files_in(tmp_path), parts, 3)
    (tmp_path / folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="was begun, but never completed"):
        resilient.load(str(tmp_path))
    save(files_in(tmp_path), parts, 5)
    with pytest.raises(ValueError, match=r"no checkpoint of step 3 that is complete at .*; there are: 5"):
        resilient.load(str(tmp_path), step=3)


def test_importing_resilient_does_not_import_torch() -> None:
    program = "import sys, resilient.loading, resilient; resilient.load; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, check=True)
