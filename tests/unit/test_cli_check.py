"""`resilient check`: what people and programs are told, and the exit status."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner, Result

from resilient.cli import main

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys

import torch

import parts
import resilient


class Net(torch.nn.Linear):
    pass


@resilient.train(workers=1)
def main(run, lr=0.1, by_ranks=False, steps=9):
    assert sys.argv[1:] == ["--epochs", "3"], sys.argv
    model = Net(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    run.protect(model=model, optimizer=optimizer)
    for x, y in run.batches(parts.data(), global_batch=8, micro_batch=2, steps=steps):
        print("a line of the script's")
        loss = torch.nn.functional.mse_loss(model(x), y)
        (loss * run.world_size if by_ranks else loss).backward()
        optimizer.step()
        optimizer.zero_grad()


print("imported")
if __name__ == "__main__":
    raise SystemExit("the main block was run")
"""
PARTS = """
import torch


def data():
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
"""
OTHER = """
import resilient


@resilient.train()
def other(run):
    pass
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "parts.py").write_text(PARTS)
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gives back what the command changes for itself and for the script; its process would end here."""
    handlers = {sign: signal.getsignal(sign) for sign in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "parts", raising=False)
    yield
    for sign, handler in handlers.items():
        signal.signal(sign, handler)


def ran(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(main, ["check", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    assert result.exit_code == status, result.output
    return result


def test_a_script_in_order(script: Path) -> None:
    done = ran(script, "--", "--epochs", "3")
    assert done.stdout.splitlines()[-1] == "passed: the same bits in 8 layouts"
    assert "a line of the script's" not in done.stdout + done.stderr
    assert done.stderr.splitlines()[:3] == ["imported", "one process ...", "one process again ..."]


def test_an_example_of_the_project() -> None:
    assert "passed: the same bits in 8 layouts" in ran(ROOT / "examples" / "train_digits.py").stdout


def test_a_finding_as_json(script: Path) -> None:
    done = ran(script, "--args", '{"by_ranks": true}', "--json", "--steps", 5, "--", "--epochs", "3", status=1)
    document: dict[str, Any] = json.loads(done.stdout)
    assert not document["passed"]
    finding = document["findings"][0]
    assert (finding["kind"], finding["layout"], finding["step"]) == ("bits", "2 ranks", 0)
    assert "run.world_size" in finding["cause"] and finding["path"] == "model.bias"
    assert document["layouts"][0]["steps"] == 5


def test_wrong_use(script: Path) -> None:
    assert "--args" in ran(script, "--args", "lr=0.1", status=2).stderr
    assert "JSON object" in ran(script, "--args", "3", status=2).stderr
    assert "main" in ran(script, "--function", "train", status=2).stderr
    assert "steps=1" in ran(script, "--steps", 1, status=2).stderr
    assert "does not exist" in ran(script.parent / "none.py", status=2).stderr


def test_one_of_several_functions_is_to_be_chosen(script: Path) -> None:
    script.write_text(SCRIPT + OTHER.replace("import resilient", ""))
    assert "main, other; choose one with --function NAME" in ran(script, status=2).stderr
    done = ran(script, "--function", "other", status=1)
    assert "returned without calling run.protect" in done.stdout


def test_a_script_without_a_training_function(tmp_path: Path) -> None:
    path = tmp_path / "plain.py"
    path.write_text("x = 1\n")
    assert "no function under @resilient.train" in ran(path, status=2).stderr


def test_a_script_that_raises_while_it_is_imported(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import resilient\n1 / 0\n")
    assert "broken.py raises when it is imported: ZeroDivisionError: division by zero" in ran(path, status=2).stderr


def test_nothing_is_left_of_a_check_that_is_interrupted(script: Path, tmp_path: Path) -> None:
    command = "from resilient.cli import main; main()"
    running = subprocess.Popen(
        [
            sys.executable,
            "-c",
            command,
            "check",
            script,
            "--steps",
            "100000",
            "--args",
            '{"steps": 100000}',
            "--",
            "--epochs",
            "3",
        ],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with running:
        while not any(tmp_path.glob("resilient-check-*/*.txt")):
            assert running.poll() is None
        children = psutil.Process(running.pid).children(recursive=True)
        assert children
        running.terminate()
        assert running.wait(60) == 1
    assert not psutil.wait_procs(children, timeout=60)[1]
    assert not any(tmp_path.glob("resilient-check-*"))
