"""`resilient checkpoints`: what people and programs are told, and the exit status."""

import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from click.testing import CliRunner, Result

from resilient.cli import main
from resilient.cli_checkpoints import split
from resilient.loading import load
from snapshot.compare import STEP_ELEMENTS, differences
from snapshot.table import DTYPES
from tests.checkpoints import Parts, build, files_in, save, snapshot_of, train
from tests.shards import flip

ROOT = Path(__file__).parents[2]


def ran(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["checkpoints", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


def answer(*arguments: object, status: int = 0) -> Any:
    """The JSON document, which is all that is on stdout."""
    result = ran(*arguments, "--json")
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)


@pytest.fixture
def url(tmp_path: Path) -> Path:
    """Steps 3 (compressed) and 5, of three ranks each."""
    parts, files = build(), files_in(tmp_path)
    train(parts)
    save(files, parts, 3, 3, 1)
    train(parts, 2)
    save(files, parts, 5, 3)
    return tmp_path


def begin(url: Path, step: int, **fields: Any) -> str:
    """One that is never completed."""
    state = snapshot_of({"run.state": {"x": 1}}, step, 2, **fields)
    state.write(files_in(url), 0)
    return state.folder


def test_urls_with_steps() -> None:
    assert split("/data/run") == ("/data/run", None)
    assert split("/data/run@12") == ("/data/run", 12)
    assert split("s3://user@12/run@7") == ("s3://user@12/run", 7)
    assert split("/data/a@b") == ("/data/a@b", None)
    assert split("/data/run@") == ("/data/run@", None)


def test_list(url: Path) -> None:
    begin(url, 7)
    found = answer("list", url)["checkpoints"]
    assert [(each["step"], each["shards"], each["state"]) for each in found] == [
        (3, 3, "complete"),
        (5, 3, "complete"),
        (7, None, "incomplete"),
    ]
    assert found[0]["stored_bytes"] < found[0]["state_bytes"] == found[1]["stored_bytes"]
    lines = ran("list", url).stdout.splitlines()
    assert lines[0].split() == ["step", "branch", "attempt", "saved", "size", "ratio", "shards", "state"]
    assert lines[2].split()[:4] == ["5", "0", "1", "2026-01-02T03:04:05Z"]
    assert lines[3].split() == ["7", "0", "1", "-", "-", "-", "-", "incomplete"]
    flip(next(url.glob("step-000000005*/manifest.json")), 100, 0)
    assert answer("list", url, status=1)["checkpoints"][1]["state"] == "bad"
    assert "bad: " in ran("list", url).stdout
    assert ran("list", url / "x").stdout == f"no checkpoints at {url}/x\n"


def test_inspect(url: Path) -> None:
    found = answer("inspect", f"{url}@3")
    assert (found["step"], found["world"]) == (3, 3)
    assert found["objects"] == {
        "model": "module",
        "optimizer": "optimizer",
        "run.state": "values",
        "scheduler": "object",
    }
    assert [branch["branch"] for branch in found["lineage"]] == [0, 1]
    by_name = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert by_name["model.embed.weight"] == {
        "name": "model.embed.weight",
        "aliases": ["model.head.weight"],
        "dtype": "float32",
        "shape": [50, 16],
        "bytes": 3200,
        "persistent": True,
    }
    assert by_name["optimizer.state.3.exp_avg"]["dtype"] == "bfloat16"
    assert not by_name["model.blocks.0.mask"]["persistent"]
    assert found["values"]["optimizer.param_groups.0.betas"] == {"tuple": [0.9, 0.999]}
    text = ran("inspect", url).stdout
    assert "step 5" in text
    assert "model.embed.weight = model.head.weight" in text
    assert "model.blocks.0.mask (not in state_dict)" in text
    assert "(0.9, 0.999)" in text


def test_digests_are_of_the_bytes_as_stored(url: Path) -> None:
    one, other = (answer("inspect", f"{url}@{step}", "--digests")["tensors"] for step in (3, 5))
    same = [a["name"] for a, b in zip(one, other, strict=True) if a["digest"] == b["digest"]]
    assert same == ["model.patches.weight", "model.patches.bias", "model.blocks.0.mask", "model.blocks.1.mask",
                    "run.state.ema", "run.state.history"]  # fmt: skip
    mask = torch.ones(3, 3).tril().numpy().tobytes()
    digest = xxhash.xxh3_128_hexdigest(mask)
    assert digest in [tensor["digest"] for tensor in one if tensor["name"] == "model.blocks.0.mask"]
    assert digest in ran("inspect", url, "--digests").stdout


def test_verify(url: Path) -> None:
    assert answer("verify", url)["checkpoints"][0]["step"] == 5
    assert [each["ok"] for each in answer("verify", url, "--all")["checkpoints"]] == [True, True]
    shard = next(url.glob("step-000000003*/shard-00000*.bin"))
    flip(shard, 5, 3)
    ((bad,),) = ([each["bad"] for each in answer("verify", f"{url}@3", status=1)["checkpoints"]],)
    assert bad == [
        {
            "file": f"{shard.parent.name}/{shard.name}",
            "chunk": 0,
            "tensors": ["model.embed.weight"],
            "why": "its checksum differs",
        }
    ]
    result = ran("verify", url, "--all")
    assert result.exit_code == 1
    assert "1 bad" in result.stdout and "model.embed.weight" in result.stdout and "whole" in result.stdout
    next(url.glob("step-000000005*/shard-00002*.bin")).unlink()
    flip(next(url.glob("step-000000003*/manifest.json")), 100, 0)
    found = answer("verify", url, "--all", status=1)["checkpoints"]
    assert [len(each["bad"]) for each in found] == [1, 1]
    assert "a file is missing" in found[1]["bad"][0]["why"]


@pytest.mark.parametrize("form", ["safetensors", "torch", "dcp"])
def test_export(url: Path, tmp_path: Path, form: str) -> None:
    path = tmp_path / "out"
    found = answer("export", f"{url}@3", path, "--to", form, "--names", "model", "--names", "run.state.ema")
    assert (found["step"], found["tensors"]) == (3, 22)
    assert path.exists()
    assert answer("export", url, path, "--to", form, status=2)["error"].endswith("--force replaces it")
    assert f"written to {path}" in ran("export", url, path, "--to", form, "--force").stdout
    if form == "torch":
        assert torch.load(path, weights_only=True)["scheduler"]["last_epoch"] == 5


def test_diff(url: Path) -> None:
    assert answer("diff", url, url)["identical"]
    assert "identical" in ran("diff", f"{url}@3", f"{url}@3").stdout
    found = answer("diff", f"{url}@3", f"{url}@5", status=1)
    assert found["compared"] == 64
    assert len(found["tensors"]) == 58
    by_name = {each["name"]: each for each in found["tensors"]}
    step = by_name["optimizer.state.0.step"]
    assert (step["differing_bits"], step["largest_absolute"], step["largest_relative"]) == (1, 2.0, 0.4)
    values = {each["name"]: (each["one"], each["other"]) for each in found["values"]}
    assert values["run.state.seen"] == (24, 40)
    assert values["scheduler.last_epoch"] == (3, 5)
    assert "optimizer.param_groups.0.lr" in values
    result = ran("diff", f"{url}@3", url)
    assert result.exit_code == 1
    assert "tensors that differ: 58, that don't: 6" in result.stdout


def changed(url: Path, before: Parts, after: Parts) -> Any:
    save(files_in(url), {"run.state": before}, 1)
    save(files_in(url), {"run.state": after}, 2, compression=1)
    return answer("diff", f"{url}@1", f"{url}@2", status=1), ran("diff", f"{url}@1", f"{url}@2").stdout


def test_diff_says_what_is_only_in_one_and_what_is_laid_out_differently(tmp_path: Path) -> None:
    one = {"gone": torch.ones(1), "a": torch.ones(2), "b": torch.ones(2), "c": 1, "d": [1], "same": 1.0}
    other = {"new": 5, "a": torch.ones(3), "b": torch.ones(2).half(), "c": torch.ones(1), "d": (1,), "same": 1.0}
    found, text = changed(tmp_path, one, other)
    assert (found["only_in_one"], found["only_in_other"]) == (["run.state.gone"], ["run.state.new"])
    assert found["layouts"] == [
        {"name": "run.state.a", "one": "float32 [2]", "other": "float32 [3]"},
        {"name": "run.state.b", "one": "float32 [2]", "other": "float16 [2]"},
        {"name": "run.state.c", "one": "a int", "other": "float32 [1]"},
    ]
    assert found["values"] == [{"name": "run.state.d", "one": [1], "other": {"tuple": [1]}}]
    assert "laid out differently" in text and "only in one" in text


def test_diff_names_what_was_switched_on_a_module(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))
    save(files_in(tmp_path), {"model": model}, 1)
    model[0].weight.requires_grad_(False)
    model[1].p = 0.25
    save(files_in(tmp_path), {"model": model.eval()}, 2)
    found = answer("diff", f"{tmp_path}@1", f"{tmp_path}@2", status=1)
    assert {each["name"]: (each["one"], each["other"]) for each in found["values"]} == {
        "model.0.weight.requires_grad": (True, False),
        "model.1.p": (0.5, 0.25),
        **{f"model{part}.training": (True, False) for part in ("", ".0", ".1")},
    }
    assert not found["tensors"] and not found["layouts"]
    assert "training" not in json.dumps(answer("inspect", tmp_path)["values"])


def test_diff_tells_bits_from_values(tmp_path: Path) -> None:
    zeros, nan = torch.zeros(4), torch.full((3,), float("nan"))
    other_nan = torch.frombuffer(bytearray(struct.pack("<3I", *[0x7FC00123] * 3)), dtype=torch.float32)
    large = torch.zeros(2 * STEP_ELEMENTS + 7)
    last = large.clone()
    last[-1] = 0.5
    before = {"zero": zeros, "nan": nan, "large": large, "turned": torch.arange(6.0).view(2, 3), "inf": torch.ones(2)}
    after = {
        "zero": -zeros,
        "nan": other_nan,
        "large": last,
        "turned": torch.arange(6.0).view(2, 3).t().contiguous().t(),
        "inf": torch.tensor([1.0, float("inf")]),
    }
    found, text = changed(tmp_path, before, after)
    by_name = {each.pop("name").removeprefix("run.state."): each for each in found["tensors"]}
    assert sorted(by_name) == ["inf", "large", "nan", "zero"]  # the other one has the same elements
    for name, count in (("zero", 4), ("nan", 3)):
        assert by_name[name]["only_bits"]
        assert (by_name[name]["differing_bits"], by_name[name]["differing_values"]) == (count, 0)
    assert by_name["large"] == {
        "elements": large.numel(),
        "differing_bits": 1,
        "differing_values": 1,
        "only_bits": False,
        "largest_absolute": 0.5,
        "largest_relative": 1.0,
        "not_finite": 0,
    }
    assert (by_name["inf"]["not_finite"], by_name["inf"]["largest_absolute"]) == (1, None)
    assert "only bits: a NaN's payload, or the sign of zero" in text and "1 are not finite" in text


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_can_be_compared(name: str) -> None:
    data = torch.arange(64, dtype=torch.uint8) % (2 if name == "bool" else 64)
    changed = data.clone()
    changed[-1] ^= 1
    one, same, other = (each.view(DTYPES[name]) for each in (data, data.clone(), changed))
    assert differences(one, same).bits == 0
    found = differences(one, other)
    assert (found.elements, found.bits, found.values) == (one.numel(), 1, 1)
    assert found.absolute is not None or name == "float4_e2m1fn_x2"


def test_differences_of_integers_are_exact_to_the_ends_of_their_range() -> None:
    low, high = -(1 << 63), (1 << 63) - 1
    assert differences(torch.tensor([low]), torch.tensor([high])).absolute == float((1 << 64) - 1)
    found = differences(torch.tensor([high, 0]), torch.tensor([high - 1, 0]))
    assert (found.absolute, found.bits) == (1.0, 1)
    found = differences(torch.tensor([0, 255], dtype=torch.uint8), torch.tensor([255, 255], dtype=torch.uint8))
    assert (found.absolute, found.relative) == (255.0, 1.0)


def test_prune(url: Path) -> None:
    abandoned = begin(url, 4)
    later = begin(url, 9, attempt=2)
    before = sorted(each.name for each in url.iterdir())
    dry, text = answer("prune", url, "--keep", 1, "--dry-run"), ran("prune", url, "--keep", 1, "--dry-run").stdout
    assert sorted(each.name for each in url.iterdir()) == before
    fates = {each["folder"]: (each["removed"], each["why"]) for each in dry["checkpoints"]}
    assert [removed for removed, _ in fates.values()] == [True, True, False, False]
    assert fates[abandoned] == (True, "never completed, and nobody completes it any more")
    assert fates[later] == (False, "may still be being written")
    assert "2 would go, 2 would stay" in text
    assert answer("prune", url, "--keep", 1)["checkpoints"] == dry["checkpoints"]
    assert [each.name for each in sorted(url.iterdir())] == [name for name in before if not fates[name][0]]
    assert "0 removed, 2 stay" in ran("prune", url, "--keep", 1).stdout


def test_another_submissions_checkpoints_stay(url: Path) -> None:
    state = snapshot_of({"run.state": {"x": 1}}, 1, token="00000000")
    state.save(files_in(url))
    fates = {each["folder"]: each["why"] for each in answer("prune", url, "--keep", 1)["checkpoints"]}
    assert fates[state.folder] == "of another submission of the same attempt"
    assert (url / state.folder).exists()


WRONG: dict[str, tuple[Callable[[Path], list[object]], int, str]] = {
    "no checkpoint": (lambda url: ["inspect", url / "x"], 2, "no checkpoint at"),
    "no step": (lambda url: ["verify", f"{url}@4"], 2, "no checkpoint of step 4 at .*; there are: 3, 5"),
    "no url": (lambda url: ["list", "a::b://x"], 2, "is no URL of a storage"),
    "no name": (lambda url: ["export", url, url / "o", "--to", "torch", "--names", "modle"], 2, "close to it: model"),
    "nothing to prune": (lambda url: ["prune", url / "x", "--keep", 1], 2, "no complete checkpoint at"),
    "all and a step": (lambda url: ["verify", f"{url}@3", "--all"], 2, "--all takes a URL without @STEP"),
    "rotten": (lambda url: ["export", f"{url}@3", url / "o", "--to", "torch"], 1, "its checksum differs"),
    "rotten diff": (lambda url: ["diff", f"{url}@3", url], 1, "its checksum differs"),
}


@pytest.mark.parametrize(("arguments", "status", "message"), WRONG.values(), ids=WRONG)
def test_errors_are_one_line(url: Path, arguments: Callable[[Path], list[object]], status: int, message: str) -> None:
    flip(next(url.glob("step-000000003*/shard-00000*.bin")), 5, 3)
    result = ran(*arguments(url))
    assert (result.exit_code, result.stdout) == (status, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    error = answer(*arguments(url), status=status)["error"]
    assert f"Error: {error}" == line
    assert re.search(message, error)


def test_wrong_arguments_are_click_s() -> None:
    assert ran("prune", "/x").exit_code == 2
    assert ran("export", "/x", "y", "--to", "zip").exit_code == 2


def test_looking_does_not_import_torch(url: Path) -> None:
    program = f"""
import sys
from resilient.cli import main
for words in (["list", {str(url)!r}], ["inspect", {str(url)!r}], ["verify", {str(url)!r}, "--all"]):
    try:
        main(["checkpoints", *words, "--json"])
    except SystemExit as end:
        assert not end.code
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, check=True, capture_output=True)


def test_several_runs_at_one_url(url: Path) -> None:
    """As earlier versions allowed it: each is shown, read and pruned by itself."""
    snapshot_of({"run.state": {"x": 1}}, 8, run="other", token="00000000").save(files_in(url))
    assert [each["run"] for each in answer("list", url)["checkpoints"]] == ["gpt", "gpt", "other"]
    assert "run" in ran("list", url).stdout
    assert re.search("of several runs.*'gpt', 'other'.*--run", ran("inspect", url).stderr)
    with pytest.raises(ValueError, match="several runs"):
        load(str(url))
    assert answer("inspect", url, "--run", "gpt")["step"] == 5
    assert load(str(url), run="other")["run.state"] == {"x": 1}
    fates = {each["folder"]: each["removed"] for each in answer("prune", url, "--keep", 1)["checkpoints"]}
    assert list(fates.values()) == [True, False, False]
