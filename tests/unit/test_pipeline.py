"""Pipelines in one process: the same numbers as a plain loop, and clear errors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resilient
from resilient.pipeline import Pipeline
from snapshot.absent import is_absent
from snapshot.capture import capture
from snapshot.load import load
from tests.pipelines import Text, layers, loss_of

SIZE, BATCH = 6, 8


class Points:
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        drawn = torch.Generator().manual_seed(index)
        return torch.randn(SIZE, generator=drawn), torch.randn(SIZE, generator=drawn)


def chain() -> list[nn.Module]:
    """The first and the last layer share a weight."""
    torch.manual_seed(5)
    first, last = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE, bias=False)
    last.weight = first.weight
    return [first, nn.Sequential(nn.GELU(), nn.Linear(SIZE, SIZE)), last]


def mean_square(out: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(out, target)


def in_a_run(body: Callable[[resilient.Run], Any], **settings: Any) -> resilient.Result:
    return resilient.train(**{"workers": 1, "name": "unit", **settings})(body).local()


def loop(run: resilient.Run, pipe: Pipeline, steps: int = 3, **around: Callable[..., Any]) -> None:
    """One step after the other, and what else the test wants."""
    optimizer = torch.optim.SGD(pipe.parameters(), 0.1, momentum=0.9)
    run.protect(model=pipe, optimizer=optimizer)
    for step in run.steps(
        around.get("data", Points)(), global_batch=BATCH, micro_batch=BATCH, steps=steps, shuffle=False
    ):
        pipe.train_step(step)
        around.get("after", lambda: None)()
        optimizer.step()
        optimizer.zero_grad()


def pipeline(run: resilient.Run, parts: Any = None, loss: Any = mean_square, **options: Any) -> Pipeline:
    return run.pipeline(chain() if parts is None else parts, loss, **{"stages": 2, **options})


def test_it_trains_as_a_plain_loop_does() -> None:
    """One micro-batch per step: then the tree over micro-batches changes nothing."""

    def main(run: resilient.Run) -> dict[str, Tensor]:
        pipe = pipeline(run)
        loop(run, pipe)
        return {name.removeprefix("layers."): parameter.detach() for name, parameter in pipe.named_parameters()}

    trained = in_a_run(main).value
    plain = nn.Sequential(*chain())
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    points = Points()
    for step in range(3):
        pairs = [points[index] for index in range(step * BATCH, (step + 1) * BATCH)]
        x, y = (torch.stack(each) for each in zip(*pairs, strict=True))
        mean_square(plain(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    assert trained.keys() == dict(plain.named_parameters()).keys()
    for name, parameter in plain.named_parameters():
        assert torch.equal(trained[name], parameter), name


def test_it_clips_as_torch_does() -> None:
    def main(run: resilient.Run) -> None:
        pipe = pipeline(run)

        def clip() -> None:
            before = [parameter.grad.clone() for parameter in pipe.parameters() if parameter.grad is not None]
            twins = [nn.Parameter(torch.zeros_like(each)) for each in before]
            for twin, gradient in zip(twins, before, strict=True):
                twin.grad = gradient
            assert torch.equal(run.clip_grad_norm_(0.1), nn.utils.clip_grad_norm_(twins, 0.1))
            for parameter, twin in zip(pipe.parameters(), twins, strict=True):
                assert parameter.grad is not None and twin.grad is not None and torch.equal(parameter.grad, twin.grad)

        loop(run, pipe, after=clip)

    in_a_run(main)


def test_layers_made_by_callables_take_no_memory_until_they_are_held() -> None:
    def main(run: resilient.Run) -> None:
        pipe = run.pipeline(layers(), loss_of, stages=3)
        assert all(is_absent(tensor) for tensor in (*pipe.parameters(), *pipe.buffers()))
        assert pipe.layer_bytes()[0] == 11 * 8 * 4
        loop(run, pipe, data=Text)
        assert not any(is_absent(parameter) for parameter in pipe.parameters())

    in_a_run(main)


def test_flags_and_groups_are_captured_alike_wherever_the_layers_are() -> None:
    kept = []
    for held, stages in ((range(2), 2), (range(2, 5), 3)):
        pipe = Pipeline(
            layers(), loss_of, stages=stages, tied={}, checkpoint=False, schedule="1f1b", rank_bytes=None,
            shard_optimizer=False, seed=1, device=torch.device("cpu"),
        )  # fmt: skip
        optimizer = torch.optim.SGD(pipe.layers[0].parameters(), 0.1)
        pipe.bring(held, initial=True)
        pipe.keep_to(held)
        before = capture({"model": pipe, "optimizer": optimizer})
        pipe.layers[0].eval().requires_grad_(False)
        pipe.layers[-1].tag = "last"
        optimizer.add_param_group({"params": list(pipe.layers[-1].parameters())})
        kept.append((pipe, optimizer, before, capture({"model": pipe, "optimizer": optimizer})))
    assert kept[0][3].skeleton == kept[1][3].skeleton != kept[1][2].skeleton
    pipe, optimizer, before, after = kept[0]
    for table in (before, after):
        load({"model": pipe, "optimizer": optimizer}, table)
        assert capture({"model": pipe, "optimizer": optimizer}).skeleton == table.skeleton
        assert [is_absent(next(pipe.layers[number].parameters())) for number in (0, -1)] == [False, True]


@pytest.mark.parametrize(("rank_bytes", "last"), [(None, 0), (10_000, 11 * 8 * 4)])
def test_under_a_limit_of_memory_a_shared_parameter_counts_wherever_it_is_held(
    rank_bytes: int | None, last: int
) -> None:
    def main(run: resilient.Run) -> None:
        tied = {"layers.4.weight": "layers.0.weight"}
        pipe = run.pipeline(layers(), loss_of, stages=3, tied=tied, rank_bytes=rank_bytes)
        sizes = pipe.layer_bytes()
        assert (sizes[0], sizes[4]) == (11 * 8 * 4, last)
        loop(run, pipe, data=Text)

    in_a_run(main)


def test_what_a_layer_begins_with_depends_on_its_place_alone() -> None:
    """Not on the layers before it, nor on what else was drawn."""

    def main(run: resilient.Run, before: Callable[[], nn.Module]) -> Tensor:
        pipe = pipeline(run, [before, functools.partial(nn.Linear, SIZE, SIZE)])
        begun_with: list[Tensor] = []
        loop(
            run, pipe, after=lambda: begun_with.append(pipe.get_parameter("layers.1.weight").detach().clone()), steps=2
        )
        return begun_with[0]

    kinds = (functools.partial(nn.Linear, SIZE, SIZE), nn.Identity)
    assert torch.equal(*(in_a_run(functools.partial(main, before=before)).value for before in kinds))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stages": 4}, "stages=4.*from 1 to the 3 layers"),
        ({"stages": 0}, "stages=0"),
        ({"rank_bytes": 0}, "rank_bytes=0.*a number of bytes"),
        ({"schedule": "zigzag"}, "schedule='zigzag'"),
        ({"tied": {"layers.2.weight": "layers.7.weight"}}, "there is no parameter 'layers.2.weight'"),
        ({"tied": {"layers.1.1.weight": "layers.0.bias"}}, "they differ"),
        ({"tied": {"layers.0.bias": "layers.1.1.bias"}}, "the key is the later use"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        in_a_run(lambda run: pipeline(run, **options))


def test_a_layer_that_is_none_is_named() -> None:
    with pytest.raises(TypeError, match="layer 1 makes a int"):
        in_a_run(lambda run: pipeline(run, [nn.Identity(), lambda: 3]))


def test_a_parameter_with_gaps_in_memory_is_named() -> None:
    sliced = nn.Linear(SIZE, SIZE)
    sliced.weight = nn.Parameter(torch.zeros(SIZE, 2 * SIZE)[:, :SIZE])
    with pytest.raises(ValueError, match=r"layers\.1\.weight has gaps or overlaps.*\.clone\(\)"):
        in_a_run(lambda run: pipeline(run, [nn.Linear(SIZE, SIZE), sliced]))


def test_nothing_to_train_is_said() -> None:
    with pytest.raises(ValueError, match="no parameter of any layer"):
        in_a_run(lambda run: pipeline(run, [nn.Identity(), nn.Identity()]))


def test_other_loops_and_reductions_are_refused() -> None:
    def batches(run: resilient.Run) -> None:
        pipe = pipeline(run)
        run.protect(model=pipe, optimizer=torch.optim.SGD(pipe.parameters(), 0.1))
        run.batches(Points(), global_batch=BATCH, micro_batch=BATCH, steps=2)

    with pytest.raises(ValueError, match=r"for step in run\.steps"):
        in_a_run(batches)

    def unprotected(run: resilient.Run) -> None:
        pipeline(run)
        model = nn.Linear(SIZE, SIZE)
        run.protect(model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1))
        run.steps(Points(), global_batch=BATCH, micro_batch=BATCH, steps=2)

    with pytest.raises(ValueError, match="the pipeline is not protected"):
        in_a_run(unprotected)


def test_torchs_own_clipping_is_refused() -> None:
    def main(run: resilient.Run) -> None:
        pipe = pipeline(run)
        loop(run, pipe, after=lambda: nn.utils.clip_grad_norm_(pipe.parameters(), 1.0))

    with pytest.raises(resilient.LoopError, match=r"use run\.clip_grad_norm_"):
        in_a_run(main)
    model = nn.Linear(SIZE, SIZE)
    model(torch.ones(SIZE)).sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # afterwards it is torch's own again


@pytest.mark.parametrize(
    ("parts", "loss", "says"),
    [
        ([nn.Linear(SIZE, SIZE), nn.LSTM(SIZE, SIZE)], mean_square, "layer 1 of the pipeline returned a tuple"),
        ([nn.Linear(SIZE, SIZE), nn.Identity()], lambda out, y: out, "the pipeline's loss gave Tensor"),
    ],
)
def test_what_layers_and_loss_return_is_checked(parts: Any, loss: Any, says: str) -> None:
    with pytest.raises(resilient.LoopError, match=says):
        in_a_run(lambda run: loop(run, pipeline(run, parts, loss)))


def test_a_dataset_without_targets_is_said() -> None:
    class Lonely(Points):
        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(index)[0]

    with pytest.raises(resilient.LoopError, match=r"a pair \(inputs, target\), the dataset gave a Tensor"):
        in_a_run(lambda run: loop(run, pipeline(run), data=Lonely))


def test_the_loop_body_is_checked() -> None:
    def none(run: resilient.Run) -> None:
        pipe = pipeline(run)
        run.protect(model=pipe, optimizer=torch.optim.SGD(pipe.parameters(), 0.1))
        for _ in run.steps(Points(), global_batch=BATCH, micro_batch=BATCH, steps=2):
            pass

    with pytest.raises(resilient.LoopError, match=r"ended without pipe\.train_step"):
        in_a_run(none)

    def twice(run: resilient.Run) -> None:
        pipe = pipeline(run)
        run.protect(model=pipe, optimizer=torch.optim.SGD(pipe.parameters(), 0.1))
        for step in run.steps(Points(), global_batch=BATCH, micro_batch=BATCH, steps=2):
            pipe.train_step(step)
            pipe.train_step(step)

    with pytest.raises(resilient.LoopError, match="called once in each iteration"):
        in_a_run(twice)
    with pytest.raises(ValueError, match=r"outside of run\.steps"):
        in_a_run(lambda run: pipeline(run).train_step(None))
    with pytest.raises(TypeError, match="not called as a whole"):
        in_a_run(lambda run: pipeline(run)(torch.ones(SIZE)))
