"""Loops that train differently on other ranks, after a death or a resume: found, with path, step and cause."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import resilient
from resilient.check_report import Finding
from resilient.core.order import derive_seed
from resilient.randomness import seed_everything

ROOT = Path(__file__).parents[2]
STEPS, GLOBAL, MICRO = 6, 24, 6


def data() -> torch.utils.data.TensorDataset:
    x = torch.randn(96, 8, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))


class Model:
    """What every loop here has."""

    def __init__(self, run: resilient.Run, model: nn.Module | None = None) -> None:
        torch.manual_seed(0)
        self.model = model if model is not None else nn.Linear(8, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        run.protect(model=self.model, optimizer=self.optimizer)


class Parts(Model):
    """The same for a flat loop."""

    def __init__(self, run: resilient.Run, model: nn.Module | None = None) -> None:
        super().__init__(run, model)
        self.batches = run.batches(data(), global_batch=GLOBAL, micro_batch=MICRO, steps=20)

    def learn(self, x: torch.Tensor, y: torch.Tensor) -> None:
        nn.functional.mse_loss(self.model(x), y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def clean(run: resilient.Run) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    run.protect(model=model, optimizer=optimizer, scheduler=scheduler)
    for x, y in run.batches(data(), global_batch=GLOBAL, micro_batch=4, steps=20, num_workers=1):
        nn.functional.mse_loss(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if run.committing:
            run.state["steps"] = run.state.get("steps", 0) + 1
    raise AssertionError("what follows the loop is not run")


def carries_hidden_state(run: resilient.Run) -> None:
    parts = Parts(run)
    hidden = torch.zeros(1)
    for x, y in parts.batches:
        parts.learn(x + 0.1 * hidden, y)
        hidden = x.mean().detach()


def carries_next_batch(run: resilient.Run) -> None:
    parts = Parts(run)
    ahead: Any = None
    for batch in parts.batches:
        parts.learn(*(ahead or batch))
        ahead = batch


def owns_generator(run: resilient.Run) -> None:
    parts, own = Parts(run), torch.Generator().manual_seed(3)
    for x, y in parts.batches:
        parts.learn(x + torch.randn(x.shape, generator=own), y)


def counts_iterations(run: resilient.Run) -> None:
    parts = Parts(run)
    for iterations, (x, y) in enumerate(parts.batches):
        parts.learn(x / (1 + iterations // 4), y)


def validates_on_rank_0(run: resilient.Run) -> None:
    torch.manual_seed(0)
    parts = Parts(run, nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Linear(16, 1)))
    for x, y in parts.batches:
        if run.is_main and run.step % 5 == 0:
            torch.randint(96, (8,))
        parts.learn(x, y)


def divides_by_ranks(run: resilient.Run) -> None:
    parts = Parts(run)
    for x, y in parts.batches:
        parts.learn(x / run.world_size, y)


def anneals_in_variable(run: resilient.Run) -> None:
    parts, lr = Parts(run), 0.1
    for x, y in parts.batches:
        parts.optimizer.param_groups[0]["lr"] = lr
        parts.learn(x, y)
        if run.committing and run.step == 4:
            lr /= 4


def halves_by_hand(run: resilient.Run) -> None:
    parts = Parts(run)
    for x, y in parts.batches:
        parts.learn(x, y)
        for group in parts.optimizer.param_groups:
            group["lr"] *= 0.9


def epochs(run: resilient.Run) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=100)
    run.protect(model=model, optimizer=optimizer, plateau=plateau)
    dataset = data()
    for _ in run.epochs(5):
        for step in run.steps(dataset, global_batch=GLOBAL, micro_batch=MICRO):
            for x, y in step:
                nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            run.state["steps"] = run.state.get("steps", 0) + 1
        with run.evaluating():
            loss = nn.functional.mse_loss(model(dataset.tensors[0]), dataset.tensors[1])
        plateau.step(float(loss))


class StepParts(Model):
    """The same for a loop in two levels."""

    def __init__(self, run: resilient.Run) -> None:
        super().__init__(run)
        self.steps = run.steps(data(), global_batch=GLOBAL, micro_batch=MICRO, steps=20)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def carries_within_steps(run: resilient.Run) -> None:
    parts = StepParts(run)
    for step in parts.steps:
        hidden = torch.zeros(1)
        for x, y in step:
            nn.functional.mse_loss(parts.model(x + hidden), y).backward()
            hidden = x.mean().detach()
        parts.update()


def counts_steps(run: resilient.Run) -> None:
    parts = StepParts(run)
    for steps, step in enumerate(parts.steps):
        for x, y in step:
            nn.functional.mse_loss(parts.model(x / (1 + steps)), y).backward()
        parts.update()


def draws_unseeded(run: resilient.Run) -> None:
    parts, own = Parts(run), random.SystemRandom()
    for x, y in parts.batches:
        parts.learn(x + own.random(), y)


def has_one_micro_batch(run: resilient.Run) -> None:
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.protect(model=model, optimizer=optimizer)
    for x, y in run.batches(data(), global_batch=8, micro_batch=8, steps=20):
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def forgets_to_step(run: resilient.Run) -> None:
    print("about to train")
    for x, _ in Parts(run).batches:
        x.sum().requires_grad_().backward()


def raises_as_a_replacement(run: resilient.Run) -> None:
    parts = Parts(run)
    for x, y in parts.batches:
        if run.generation > 2:
            raise RuntimeError(f"what is generation {run.generation}?")
        parts.learn(x, y)


def five_steps_in_all(run: resilient.Run, steps: int = 5) -> None:
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.protect(model=model, optimizer=optimizer)
    for x, y in run.batches(data(), global_batch=GLOBAL, micro_batch=MICRO, steps=steps):
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def two_steps_in_all(run: resilient.Run) -> None:
    five_steps_in_all(run, 2)


def ends_the_second_process(run: resilient.Run) -> None:
    parts = Parts(run)
    for x, y in parts.batches:
        if run.rank == 1 and run.step == 1:
            print("good-bye", flush=True)
            os._exit(3)
        parts.learn(x, y)


def waits_for_itself(run: resilient.Run) -> None:
    parts = Parts(run)
    for x, y in parts.batches:
        parts.learn(x, y)
        if run.world_size == 2 and run.rank == 0 and run.step == 2:
            threading.Event().wait()


def breaks_by_iterations(run: resilient.Run) -> None:
    parts = Parts(run)
    for iterations, (x, y) in enumerate(parts.batches, 1):
        parts.learn(x, y)
        if iterations >= 16 and run.committing:
            break


def learns_from_the_seed(run: resilient.Run) -> None:
    assert torch.initial_seed() == first_seed(3)
    parts = Parts(run)
    for x, y in parts.batches:
        parts.learn(x + torch.rand(1), y)


def first_seed(seed: int) -> int:
    seed_everything(derive_seed("function", seed))
    return torch.initial_seed()


def pipeline(run: resilient.Run, counts: bool = False) -> None:
    torch.manual_seed(0)
    pipe = run.pipeline([nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)], nn.functional.mse_loss, stages=2)
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=0.01)
    run.protect(model=pipe, optimizer=optimizer)
    for step in run.steps(data(), global_batch=GLOBAL, micro_batch=MICRO, steps=20):
        pipe.train_step(step)
        optimizer.step()
        optimizer.zero_grad()
        if counts:
            run.state["ranks"] = run.world_size


def pipeline_with_counter(run: resilient.Run) -> None:
    pipeline(run, counts=True)


def check(function: Any, **settings: Any) -> resilient.CheckReport:
    return resilient.train(**{"workers": 1, **settings})(function).check(steps=STEPS)


def first(report: resilient.CheckReport) -> Finding:
    assert not report.passed
    return report.findings[0]


def failed(report: resilient.CheckReport) -> list[str]:
    return [layout.name for layout in report.layouts if layout.ok is False]


def test_a_loop_in_order_passes_in_all_layouts() -> None:
    report = check(clean)
    assert report.passed, report
    assert [(layout.name, layout.ok, layout.steps) for layout in report.layouts] == [
        ("one process", True, 6),
        ("one process again", True, 6),
        ("micro-batches in the opposite order", True, 6),
        ("2 ranks", True, 6),
        ("3 ranks", True, 6),
        ("4 ranks (uneven)", True, 6),
        ("2 ranks, one killed and replaced", True, 6),
        ("stopped after 3 steps and resumed", True, 3),
        ("stopped after 5 steps and resumed", True, 1),
    ]
    assert not any(layout.note for layout in report.layouts), report
    assert str(report).endswith("passed: the same bits in 9 layouts")
    assert json.loads(json.dumps(report.to_json()))["passed"]


def test_the_example_of_the_readme_passes() -> None:
    readme = (ROOT / "README.md").read_text()
    example = readme.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(example, "README.md", "exec"), names)
    report = names["main"].check(lr=0.05)
    assert report.passed, report


@pytest.mark.parametrize(
    ("loop", "layout", "path", "cause"),
    [
        (carries_hidden_state, "micro-batches in the opposite order", "model.bias", "carried from one micro-batch"),
        (carries_next_batch, "micro-batches in the opposite order", "model.bias", "carried from one micro-batch"),
        (owns_generator, "micro-batches in the opposite order", "model.bias", "random generator of the script's"),
        (counts_iterations, "2 ranks", "model.bias", "once per micro-batch"),
        (validates_on_rank_0, "2 ranks", "model.2.bias", "on one rank alone"),
        (divides_by_ranks, "2 ranks", "model.bias", "from the number of ranks"),
        (draws_unseeded, "one process again", "model.bias", "not deterministic"),
    ],
)
def test_the_first_difference_is_named_with_its_likely_cause(loop: Any, layout: str, path: str, cause: str) -> None:
    report = check(loop)
    found = first(report)
    assert (found.kind, found.layout, found.path) == ("bits", layout, path), report
    assert cause in found.cause
    assert next(iter(found.values)) == "one process" and len(set(found.values.values())) == 2
    assert f"{path} differs after step {found.step}" in str(report)


def test_what_changes_in_every_iteration_is_found_or_refused() -> None:
    found = first(check(halves_by_hand))
    if found.kind == "exception":
        assert found.layout == "one process" and "LoopError" in found.values["error"]
    else:
        assert found.layout == "2 ranks" and "once per micro-batch" in found.cause


def test_loops_over_epochs_and_steps_pass_in_all_layouts() -> None:
    report = check(epochs)
    assert report.passed, report
    assert [layout.steps for layout in report.layouts] == [6, 6, 6, 6, 6, 6, 3, 1]


def test_a_value_carried_within_a_step_is_found_in_the_loop_over_steps() -> None:
    found = first(check(carries_within_steps))
    assert (found.kind, found.layout) == ("bits", "micro-batches in the opposite order")


def test_a_counter_of_steps_that_a_replacement_and_a_resume_do_not_have() -> None:
    report = check(counts_steps)
    names = [
        "2 ranks, one killed and replaced",
        "stopped after 3 steps and resumed",
        "stopped after 5 steps and resumed",
    ]
    assert failed(report) == names, report
    assert [finding.step for finding in report.findings] == [5, 3, 5]


def test_a_variable_that_a_replacement_and_a_resume_do_not_have() -> None:
    report = check(anneals_in_variable)
    assert failed(report) == ["2 ranks, one killed and replaced", "stopped after 5 steps and resumed"], report
    killed, resumed = report.findings
    assert killed.step == resumed.step == 5
    assert "0.1" in killed.values["error"] and "lr" in killed.values["error"]
    assert "Python variable" in killed.cause and "run.state" in killed.remedy
    assert resumed.path == "optimizer.param_groups.0.lr"
    assert resumed.values == {"one process": "0.025", "stopped after 5 steps and resumed": "0.1"}
    assert "Python variable" in resumed.cause and "run.state" in resumed.remedy


def test_what_the_loop_refuses_is_a_finding_with_what_the_script_printed() -> None:
    report = check(forgets_to_step)
    found = first(report)
    assert (found.kind, found.layout, found.step) == ("exception", "one process", 0)
    assert found.values["error"].startswith("resilient.errors.LoopError: ")
    assert "without optimizer.step()" in found.values["error"]
    assert "in forgets_to_step" in found.detail and "printed: about to train" in found.detail
    assert [layout.name for layout in report.layouts] == ["one process"]


def test_an_exception_in_one_layout_alone_names_the_layout() -> None:
    report = check(raises_as_a_replacement)
    assert failed(report) == ["2 ranks, one killed and replaced"], report
    assert first(report).values["error"] == "RuntimeError: what is generation 3?"


def test_layouts_that_cannot_be_are_listed() -> None:
    report = check(has_one_micro_batch)
    assert report.passed, report
    alone = "not possible: with 1 in a step, there are micro-batches for no more than 1"
    assert {layout.name: layout.note for layout in report.layouts if layout.ok is None} == {
        "micro-batches in the opposite order": "not possible: a step has 1 micro-batch",
        "2 ranks": alone,
        "3 ranks": alone,
        "2 ranks, one killed and replaced": alone,
    }


def test_a_loop_of_fewer_steps_is_checked_for_all_of_them() -> None:
    report = check(five_steps_in_all)
    assert report.passed, report
    assert report.layouts[-1].name == "stopped after 4 steps and resumed"
    assert {layout.steps for layout in report.layouts} == {5, 3, 1}


def test_a_loop_of_few_steps_is_compared_as_far_as_possible() -> None:
    report = check(two_steps_in_all)
    assert report.passed, report
    assert [layout.note for layout in report.layouts if layout.ok is None] == [
        "not possible: it takes 3 steps, and there are 2"
    ]


def test_too_few_steps_are_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match=r"check\(steps=1\): is a whole number of steps, 2 or more"):
        resilient.train()(clean).check(steps=1)


def test_a_process_that_ends_by_itself_is_found() -> None:
    report = check(ends_the_second_process)
    assert failed(report) == ["2 ranks", "3 ranks (uneven)", "2 ranks, one killed and replaced"], report
    assert first(report).kind == "died" and "printed: good-bye" in first(report).detail


def test_a_loop_that_is_left_at_another_step_by_some_ranks_is_found() -> None:
    report = check(breaks_by_iterations)
    assert "2 ranks" in failed(report), report
    assert first(report).values == {"error": "the last step of process 1 was 4, and it is 3 in one process"}


def test_a_layout_in_which_nothing_happens_any_more_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resilient.check.QUIET_LIMIT_S", 6.0)
    report = check(waits_for_itself)
    assert [layout.note for layout in report.layouts[4:6]] == ["not possible: 2 ranks hang already"] * 2, report
    found = first(report)
    assert (found.kind, found.layout, found.step) == ("hangs", "2 ranks", 2)
    assert found.values["error"].startswith("nothing has happened for")
    assert "in waits_for_itself" in found.detail and "threading.Event().wait()" in found.detail


def test_settings_are_those_of_the_run_but_its_storage_is_not_touched(tmp_path: Path) -> None:
    url = tmp_path / "checkpoints"
    settings = {"seed": 3, "checkpoint": resilient.Checkpoint(str(url), every=1), "on_nonfinite": "rollback"}
    report = check(learns_from_the_seed, **settings, reduction="fast")
    assert report.passed, report
    assert not url.exists()


def test_more_workers_than_micro_batches_are_a_finding() -> None:
    found = first(check(has_one_micro_batch, workers=(1, 2)))
    assert "workers allows 2 ranks, but a step has only 1 micro-batches" in found.values["error"]


def test_the_layers_of_a_pipeline_are_compared_wherever_they_are() -> None:
    report = check(pipeline)
    assert report.passed, report
    assert [layout.name for layout in report.layouts if layout.ok] == [
        "one process",
        "one process again",
        "2 ranks",
        "3 ranks",
        "3 ranks, one killed and replaced",
        "stopped after 3 steps and resumed",
        "stopped after 5 steps and resumed",
    ]
    assert not any(layout.note for layout in report.layouts if layout.ok), report


def test_a_difference_in_a_pipeline_is_found() -> None:
    report = check(pipeline_with_counter)
    assert failed(report) == ["2 ranks", "3 ranks", "3 ranks, one killed and replaced"], report
    assert first(report).path == "run.state.ranks"
    assert first(report).values == {"one process": "1", "2 ranks, rank 0": "2"}


def test_a_script_without_a_main_block_is_not_run_again_by_the_processes(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import torch, resilient\n"
        "@resilient.train()\n"
        "def main(run):\n"
        "    model = torch.nn.Linear(2, 1)\n"
        "    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "    run.protect(model=model, optimizer=optimizer)\n"
        "    for x in run.batches([torch.ones(2)] * 8, global_batch=4, micro_batch=2, steps=2):\n"
        "        model(x).mean().backward()\n"
        "        optimizer.step()\n"
        "        optimizer.zero_grad()\n"
        "print('begins')\n"
        "print(main.check(steps=2))\n"
    )
    command = [sys.executable, str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("begins\nok       one process"), done
    assert done.stdout.count("begins") == 1 and "passed" in done.stdout
    assert done.stderr == ""
