"""Exports: read again by others, bit-identical, all or nothing."""

import json
import resource
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from resilient.loading import opened, selected
from snapshot.export import SAFETENSORS_DTYPES, export
from snapshot.files import StorageError
from snapshot.stored import RottenCheckpoint, Stored
from snapshot.table import DTYPES
from tests.checkpoints import Parts, bits, build, files_in, leaves, save, state_dicts, train
from tests.shards import flip


@pytest.fixture(scope="module")
def parts() -> Parts:
    built = build()
    train(built)
    return built


@pytest.fixture(scope="module", params=[(1, None), (3, None), (3, 1)], ids=["one", "three", "compressed"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, parts: Parts) -> Stored:
    world, compression = request.param
    url = tmp_path_factory.mktemp("checkpoints")
    save(files_in(url), parts, 3, world, compression)
    return opened(str(url))


def exported(stored: Stored, path: Path, form: Any, *names: str, force: bool = False) -> int:
    return export(stored, selected(stored, names or None), path, form, force=force)


def portable(value: Any) -> Any:
    """As exports have it."""
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    return value.item() if isinstance(value, np.generic) else value


def test_safetensors(tmp_path: Path, parts: Parts, stored: Stored) -> None:
    path = tmp_path / "model.safetensors"
    assert exported(stored, path, "safetensors") == path.stat().st_size
    found = load_file(path)
    with safe_open(path, "pt") as file:
        words = file.metadata()
    aliases, values = json.loads(words["aliases"]), json.loads(words["values"])
    assert aliases == {"model.head.weight": "model.embed.weight"}
    assert "model.blocks.0.mask" not in found
    expected = state_dicts(parts)
    model = {f"model.{name}": tensor for name, tensor in expected["model"].items() if name != "_extra_state"}
    for name, tensor in model.items():
        assert bits(found[aliases.get(name, name)]) == bits(tensor), name
    for number, state in expected["optimizer"]["state"].items():
        for key, tensor in state.items():
            assert bits(found[f"optimizer.state.{number}.{key}"]) == bits(tensor)
    assert found["run.state.history"].tolist() == [0, 1, 2, 3]
    assert values["optimizer.param_groups.0.lr"] == expected["optimizer"]["param_groups"][0]["lr"]
    assert values["optimizer.param_groups.1.betas"] == {"tuple": [0.9, 0.999]}
    assert values["run.state.best"] == {"float": "inf"}
    assert (values["run.state.scale"], values["model._extra_state.calls"]) == (0.5, 3)
    assert (words["format"], words["step"], words["run"]) == ("pt", "3", "gpt")
    tensors = {name for name in found if name not in model}
    assert all(name.startswith(("optimizer.state.", "run.state.")) for name in tensors)


def test_torch(tmp_path: Path, parts: Parts, stored: Stored) -> None:
    path = tmp_path / "state.pt"
    exported(stored, path, "torch")
    found = torch.load(path, weights_only=True)
    assert list(leaves(found)) == list(leaves(portable(state_dicts(parts))))
    model = found["model"]
    assert model["embed.weight"].data_ptr() == model["head.weight"].data_ptr()
    build(1)["model"].load_state_dict(model)


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")  # there is no process group, which dcp.load says
def test_dcp(tmp_path: Path, parts: Parts, stored: Stored) -> None:
    path = tmp_path / "state"
    exported(stored, path, "dcp")
    expected = portable(state_dicts(parts))
    found = emptied(expected)
    dcp.load(found, checkpoint_id=path, no_dist=True)
    assert list(leaves(found)) == list(leaves(expected))


def emptied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: emptied(item) for key, item in value.items()}
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [emptied(item) for item in value]
    return torch.zeros_like(value) if isinstance(value, Tensor) else None


def test_subsets(tmp_path: Path, stored: Stored) -> None:
    exported(stored, tmp_path / "a", "safetensors", "model.blocks.0.*")
    assert set(load_file(tmp_path / "a")) == {
        f"model.blocks.0.{name}"
        for names in (
            "norm.weight norm.bias norm.running_mean norm.running_var norm.num_batches_tracked",
            "up.weight up.bias down.weight down.bias",
        )
        for name in names.split()
    }
    exported(stored, tmp_path / "b", "torch", "model", "run.state.name")
    found = torch.load(tmp_path / "b", weights_only=True)
    assert found["run.state"] == {"name": "tiny"}
    assert sorted(found) == ["model", "run.state"]


def saved(path: Path, state: dict[str, Any]) -> Stored:
    save(files_in(path), {"run.state": state}, 1)
    return opened(str(path))


def test_every_dtype_that_safetensors_knows_and_a_clear_word_for_others(tmp_path: Path) -> None:
    for name in sorted(SAFETENSORS_DTYPES):
        data = torch.arange(64, dtype=torch.uint8)
        tensor = (data % 2).bool() if name == "bool" else data.view(DTYPES[name])
        exported(saved(tmp_path / name, {"x": tensor}), tmp_path / f"{name}.out", "safetensors")
        assert bits(load_file(tmp_path / f"{name}.out")["run.state.x"]) == bits(tensor)
    with pytest.raises(ValueError, match=r"^run.state.x: safetensors has no complex128; export to torch"):
        exported(saved(tmp_path / "no", {"x": torch.ones(1, dtype=torch.complex128)}), tmp_path / "x", "safetensors")
    assert not (tmp_path / "x").exists()
    with pytest.raises(KeyError):  # else the list is out of date
        save_file({"x": torch.ones(1, dtype=torch.complex128)}, tmp_path / "x")


def test_every_kind_of_value_comes_back_from_torch_load_or_is_refused(tmp_path: Path) -> None:
    nan: float = struct.unpack(">d", bytes.fromhex("7ff8000000000123"))[0]
    state = {
        "plain": [None, True, 1 << 100, 1.5, "x", b"\x00\xff", 1 + 2j, nan, float("-inf")],
        "sets": {1, 2},
        "counter": Counter("aab"),
        "torch": (torch.Size([2, 3]), torch.bfloat16, torch.device("cuda:1")),
        ("a", 1): {3: [], "": {}},
        "arrays": [np.arange(3, dtype=np.uint16), np.float64(nan), np.int8(-1), np.bool_(True)],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(7),
    }
    exported(saved(tmp_path / "a", state), tmp_path / "a.pt", "torch")
    found = torch.load(tmp_path / "a.pt", weights_only=True)["run.state"]
    arrays = [torch.arange(3).to(torch.uint16), nan, -1, True]
    assert list(leaves(found)) == list(leaves({**state, "arrays": arrays}))
    assert struct.pack(">d", found["plain"][7]) == struct.pack(">d", nan)
    with pytest.raises(ValueError, match=r"^run.state.x: .*doesn't load a frozenset; leave it out with --names"):
        exported(saved(tmp_path / "b", {"x": [frozenset({1})]}), tmp_path / "b.pt", "torch")


def test_nothing_is_replaced_without_being_told_to(tmp_path: Path, stored: Stored) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "precious").write_text("x")
    file.write_text("precious")
    for path, form in ((folder, "dcp"), (file, "torch"), (file, "safetensors")):
        with pytest.raises(ValueError, match=r"is there already; --force replaces it"):
            exported(stored, path, form)
    for path, form in ((folder, "dcp"), (folder, "torch"), (file, "dcp")):
        with pytest.raises(
            ValueError, match=r"is there already, and not a f(ile|older of torch.*); it is not replaced"
        ):
            exported(stored, path, form, force=True)
    assert ((folder / "precious").read_text(), file.read_text()) == ("x", "precious")
    exported(stored, file, "torch", force=True)
    assert torch.load(file, weights_only=True)["run.state"]["name"] == "tiny"
    for _ in range(2):
        exported(stored, tmp_path / "dcp", "dcp", force=True)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["dcp", "file", "folder"]


def test_a_failed_export_leaves_nothing_behind(tmp_path: Path, parts: Parts) -> None:
    url, out = tmp_path / "url", tmp_path / "out"
    out.mkdir()
    save(files_in(url), parts, 3)
    flip(next(url.glob("*/*.bin")), 0, 0)
    for form in ("safetensors", "torch", "dcp"):
        with pytest.raises(RottenCheckpoint):
            exported(opened(str(url)), out / "x", form)
    assert list(out.iterdir()) == []
    with pytest.raises(ValueError, match="there is no folder"):
        exported(opened(str(url)), out / "y" / "x", "torch")


@pytest.mark.parametrize("form", ["safetensors", "torch", "dcp"])
def test_storage_that_takes_no_more_is_said(tmp_path: Path, stored: Stored, form: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(StorageError, match="/x can't be written: "):
            exported(stored, tmp_path / "x", form)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
