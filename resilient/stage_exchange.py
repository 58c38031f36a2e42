"""The end of a pipeline's exchange: from each stage's own sums to what all ranks need to apply the step.

Sums of a shared parameter's uses go from the stages that have them to the others that hold the parameter. Then losses,
norms of gradients, and which of them there are, go to everybody, in an exchange that comes to an end only when every
rank has its own stage's sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from actors.group import Group
from actors.pending import LinkBroken, Move

from .core.outcome import Outcome
from .core.plan import Plan, Stage
from .payload import Payload, abandon
from .sums import LOSS, StepSums

SHARED_TAG = 1 << 23


def close_step(
    group: Group,
    plan: Plan,
    layers: Mapping[str, int],
    sums: StepSums,
    result: Payload,
    stage_done: Callable[[Payload], None],
) -> None:
    """Complete `result`, which has this rank's stage's sums. layers: of each use of a shared parameter, its layer.
    stage_done: called when it has all that others than this rank must give, but for what `Outcome` says.

    Raises LinkBroken.
    """
    _exchange_shared(group, plan, layers, sums, result)
    losses: tuple[float | None, ...] = (None,) * sums.micro_batches
    place = result.layout.index()[LOSS]
    if result.counts[place]:
        losses = tuple(result.views[place].tolist())
    norms = norms_of({name: mean for name, mean in sums.mean_gradients(result) if mean is not None})
    mine = Outcome(
        losses=losses,
        norms=tuple(norms.get(name) for name in sums.names),
        finite=not sums.check_finite or sums.finite(result, gradients=True),
    )
    stage_done(result)
    result.outcome = Outcome.of(group.minimum(mine.row()), sums.micro_batches)


def norms_of(gradients: Mapping[str, Tensor]) -> dict[str, float]:
    """By name. A device is waited for once."""
    norms = [torch.linalg.vector_norm(gradient, 2.0).double() for gradient in gradients.values()]
    return dict(zip(gradients, torch.stack(norms).tolist(), strict=True)) if norms else {}


def _exchange_shared(group: Group, plan: Plan, layers: Mapping[str, int], sums: StepSums, result: Payload) -> None:
    places = result.layout.index()
    sends: list[Move] = []
    receives: list[Move] = []
    coming: list[tuple[str, Tensor, Tensor]] = []
    for tag, (use, layer) in enumerate(layers.items()):
        source = next(stage for stage in plan.stages if stage.first <= layer < stage.stop)
        for stage in _others(plan, layers, sums, use, source):
            for place, rank in enumerate(stage.ranks):
                sender = source.ranks[place % len(source.ranks)]
                if rank == group.rank:
                    count, total = torch.zeros(1, dtype=torch.int64), torch.empty_like(sums.template(use), device="cpu")
                    coming.append((use, count, total))
                    receives += _moves(count, total, sender, tag)
                if sender == group.rank:
                    number = places[f"gradient:{use}"]
                    count = torch.tensor([result.counts[number]])
                    sends += _moves(count, result.views[number].cpu(), rank, tag)
    try:
        group.post_host(sends, receives).wait()
    except LinkBroken:
        abandon(move.data for move in receives)
        raise
    result.foreign = {use: total.to(sums.device) for use, count, total in coming if int(count)}


def _moves(count: Tensor, total: Tensor, peer: int, tag: int) -> list[Move]:
    parts = (count, total.reshape(-1))
    return [
        Move(data=part.view(torch.uint8), peer=peer, tag=SHARED_TAG + 2 * tag + which)
        for which, part in enumerate(parts)
    ]


def _others(plan: Plan, layers: Mapping[str, int], sums: StepSums, use: str, source: Stage) -> list[Stage]:
    """The other stages that have a use of the same parameter."""
    users = next(users for users in sums.users.values() if use in users)
    return [
        stage
        for stage in plan.stages
        if stage is not source and any(stage.first <= layers[other] < stage.stop for other in users)
    ]
