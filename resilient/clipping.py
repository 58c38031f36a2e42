"""Clipping by the norm of the whole model's gradient, wherever its layers are.

The norm is torch's: of the norms of all parameters' gradients, in the order of the parameters. In a pipeline of several
stages those of other ranks have come with the step's result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .errors import LoopError
from .stage_exchange import norms_of

Named = Sequence[tuple[str, nn.Parameter]]


def clip(named: Named, known: dict[str, float] | None, max_norm: float) -> Tensor:
    """Scale `.grad` of those parameters that have one here; the norm before that.

    known: by name, the norms of all parameters' mean gradients; None if all are here.
    """
    gradients = [(name, parameter.grad) for name, parameter in named if parameter.grad is not None]
    if known is None:
        known = norms_of(dict(gradients))
    norms = [torch.tensor(known[name], dtype=parameter.dtype) for name, parameter in named if name in known]
    if not norms:
        return torch.tensor(0.0)
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms), 2.0)
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for _, gradient in gradients:
        gradient.mul_(factor.to(gradient.device))
    return total


class Untouched:
    """Whether gradients are still those whose norms are known."""

    def __init__(self, named: Named) -> None:
        self._seen = [(name, parameter, parameter.grad, _version(parameter.grad)) for name, parameter in named]

    def check(self) -> None:
        for name, parameter, gradient, version in self._seen:
            if parameter.grad is not gradient or _version(gradient) != version:
                raise LoopError(
                    f"the gradient of {name} was changed between pipe.train_step and run.clip_grad_norm_, which "
                    "clips by the norm that the step's mean gradient had: clip first"
                )


def _version(gradient: Tensor | None) -> int:
    return -1 if gradient is None else gradient._version
