"""An optimizer's step over some chunks: the same bits as over whole parameters, and state only of what is owned."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resilient.chunk_state import keep_runs
from resilient.chunked_step import in_chunks
from resilient.core.shards import Run
from snapshot.absent import is_absent, parts_of
from snapshot.capture import capture
from tests.lion import Lion

ROWS, WIDTH = 6, 4
OWNERS: list[list[tuple[Run, ...]]] = [
    [((0, 8), (16, 24)), ((8, 16),), ()],  # a parameter in three chunks
    [((0, 24),), (), ()],  # one that is whole with the first rank
    [(), ((0, 8),), ((8, 24),)],
]
"""By parameter, by rank."""

BUILD: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "AdamW": lambda given: torch.optim.AdamW(given, 1e-2, amsgrad=True),
    "momentum": lambda given: torch.optim.SGD(given, 0.1, momentum=0.9),
    "SGD": lambda given: torch.optim.SGD(given, 0.1),
    "Adagrad": lambda given: torch.optim.Adagrad(given, 1e-2),
    "Lion": lambda given: Lion(given, 1e-2),
}


def drawn(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(ROWS, WIDTH, generator=generator) for _ in OWNERS]


class Rank:
    def __init__(self, number: int | None, name: str) -> None:
        """number: None for one that owns all."""
        self.parameters = [nn.Parameter(each) for each in drawn(0)]
        self.optimizer = BUILD[name](self.parameters)
        self.runs = [((0, ROWS * WIDTH),) if number is None else owners[number] for owners in OWNERS]
        self.keep(self.runs)

    def keep(self, runs: Sequence[tuple[Run, ...]]) -> None:
        self.runs = list(runs)
        for parameter, own in zip(self.parameters, self.runs, strict=True):
            if parameter in self.optimizer.state:
                keep_runs(self.optimizer.state[parameter], parameter, own)

    def runs_of(self, parameter: Tensor) -> tuple[Run, ...]:
        (place,) = (place for place, each in enumerate(self.parameters) if each is parameter)
        return self.runs[place]

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        with in_chunks(self.optimizer, self.runs_of):
            self.optimizer.step()


def gather(ranks: Sequence[Rank]) -> None:
    for place, owners in enumerate(OWNERS):
        for owner, runs in enumerate(owners):
            for start, stop in runs:
                new = ranks[owner].parameters[place].detach().view(-1)[start:stop]
                for rank in ranks:
                    rank.parameters[place].detach().view(-1)[start:stop].copy_(new)


@pytest.mark.parametrize("name", BUILD)
def test_as_whole(name: str) -> None:
    whole = Rank(None, name)
    ranks = [Rank(number, name) for number in range(3)]
    for seed in range(1, 4):
        gradients: list[Tensor | None] = list(drawn(seed))
        if seed == 2:
            gradients[0] = None
        whole.step(gradients)
        for rank in ranks:
            rank.step(gradients)
        gather(ranks)
    for number, rank in enumerate(ranks):
        for place, parameter in enumerate(rank.parameters):
            assert torch.equal(parameter, whole.parameters[place])
            expected = whole.optimizer.state.get(whole.parameters[place], {})
            if OWNERS[place][number]:
                check(rank.optimizer.state.get(parameter, {}), expected, OWNERS[place][number])
        groups = rank.optimizer.param_groups
        assert [id(each) for group in groups for each in group["params"]] == list(map(id, rank.parameters))
        assert set(rank.optimizer.state) <= set(rank.parameters), "nothing of the pieces is left"
        capture({"optimizer": rank.optimizer})


def check(state: dict[str, Tensor], expected: dict[str, Tensor], runs: tuple[Run, ...]) -> None:
    assert list(state) == list(expected)
    for key, value in state.items():
        if value.dim() == 0:
            assert torch.equal(value, expected[key]), key
            continue
        assert value.shape == expected[key].shape and is_absent(value) == (runs != ((0, ROWS * WIDTH),))
        flat = expected[key].view(-1)
        parts = parts_of(value) if is_absent(value) else ((0, value.view(-1)),)
        assert [(first, first + part.numel()) for first, part in parts] == list(runs)
        assert all(torch.equal(part, flat[first : first + part.numel()]) for first, part in parts)


def test_an_error_in_the_step_leaves_the_groups_as_they_were() -> None:
    rank = Rank(0, "AdamW")
    rank.step(drawn(1))
    for parameter in rank.parameters:
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ZeroDivisionError), in_chunks(rank.optimizer, rank.runs_of):
        raise ZeroDivisionError
    assert rank.optimizer.param_groups[0]["params"] == rank.parameters
    rank.step(drawn(2))


def test_chunks_come_and_go() -> None:
    """What stays is the very same, what leaves gives its memory back."""
    rank = Rank(0, "momentum")
    rank.step(drawn(1))
    state = rank.optimizer.state[rank.parameters[0]]
    buffer, before = state["momentum_buffer"], dict(parts_of(state["momentum_buffer"]))
    rank.keep([((0, 24),), *rank.runs[1:]])
    assert not is_absent(buffer) and torch.equal(buffer.view(-1)[16:], before[16])
    rank.keep([((4, 8), (16, 24)), *rank.runs[1:]])
    assert is_absent(buffer) and torch.equal(dict(parts_of(buffer))[4], before[0][4:])
    kept = dict(parts_of(buffer))[16]
    rank.keep([((16, 24),), *rank.runs[1:]])
    assert [part is kept for _, part in parts_of(buffer)] == [True]
    rank.keep([(), *rank.runs[1:]])
    assert is_absent(buffer) and parts_of(buffer) == ()
    rank.keep([((0, 8),), *rank.runs[1:]])
    assert [part.numel() for _, part in parts_of(buffer)] == [8], "to be filled"


def test_a_counter_is_here_with_any_chunk() -> None:
    rank = Rank(0, "AdamW")
    rank.step(drawn(1))
    counter = rank.optimizer.state[rank.parameters[0]]["step"]
    rank.keep([((0, 8),), *rank.runs[1:]])
    assert counter.item() == 1
    rank.keep([(), *rank.runs[1:]])
    assert is_absent(counter)
