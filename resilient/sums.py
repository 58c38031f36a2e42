"""One rank's numbers of a step: collects what each micro-batch produced, applies the step's result.

Three kinds of buffers, never mixed: the partial sums, which nothing writes but the fold; the result,
written by the exchange and kept until that of the next step is complete, for ranks that missed it;
and `.grad`, the mean made from the result, which the user may clip and change as they like.

Memory, for a payload of S bytes (gradients and changed buffers) and L micro-batches on the rank:
partial sums at most (log2 L + 1) S, results 2 S, `.grad` S, receiving buffers (foreign roots / ranks) S.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .buffers import Buffers
from .core.tree import Node
from .errors import LoopError
from .exact import PartialSums
from .payload import Layout, Payload, Pool, Rule

LOSS = "loss"


class StepSums:
    """Gradients, changed buffers and losses of one rank."""

    def __init__(self, parameters: Sequence[tuple[str, nn.Parameter]], buffers: Buffers, micro_batches: int) -> None:
        self.parameters = parameters
        self.buffers = buffers
        self.micro_batches = micro_batches
        self.device = parameters[0][1].device
        self.known_buffers: tuple[str, ...] = ()
        """Buffers seen to change; only these take part in the exchange."""
        self.layout = self._lay_out()
        self.pool = Pool(self.layout, self.device)
        self.partial = PartialSums(micro_batches, self.pool)
        self.kept: Payload | None = None
        """Complete result of the newest step that has one here."""
        self._mean = Payload(self.layout, self.device)

    # A micro-batch

    def fold_leaf(self, leaf: int, loss: Tensor | None) -> None:
        """Take over `.grad` of every parameter and all changed buffers; both are clean afterwards."""
        gradients = [self._gradient(name, parameter) for name, parameter in self.parameters]
        changed = self.buffers.take_changes()
        if not set(changed) <= set(self.known_buffers):
            self.widen([*self.known_buffers, *changed])
        losses = torch.zeros(self.micro_batches, dtype=torch.float64)
        losses[leaf] = float("nan") if loss is None else loss.detach().double().cpu()
        named: dict[str, Tensor | None] = {LOSS: losses.to(self.device), **changed}
        for (name, _), gradient in zip(self.parameters, gradients, strict=True):
            named[f"gradient:{name}"] = gradient
        self.partial.add_leaf(leaf, [named.get(entry.name) for entry in self.layout.entries])

    def _gradient(self, name: str, parameter: nn.Parameter) -> Tensor | None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None and gradient.layout != torch.strided:
            raise LoopError(
                f"parameter {name} has a sparse gradient, which the exact reduction does not take: "
                "build the embedding with sparse=False"
            )
        return gradient

    # The exchange

    def widen(self, buffers: Sequence[str]) -> None:
        """Let these buffers take part too. The sums so far keep their bits."""
        self.known_buffers = tuple(sorted(set(buffers)))
        self.layout = self._lay_out()
        self.partial.widen(self.layout)
        self._mean = Payload(self.layout, self.device)

    def fingerprint(self) -> int:
        """Of the layout, 62 bits, to compare between ranks."""
        return _hash(repr([(entry.name, tuple(entry.shape), str(entry.dtype)) for entry in self.layout.entries]))

    def mask(self) -> int | None:
        """Which tensors are present, if in all micro-batches alike; None if it depends on them."""
        masks = set()
        for node, payload in self.partial.nodes.items():
            if any(count not in (0, node.size) for count in payload.counts):
                return None
            masks.add(tuple(bool(count) for count in payload.counts))
        return _hash(repr(masks)) if len(masks) == 1 else None

    def counts(self) -> dict[Node, list[int]]:
        return {node: payload.counts for node, payload in self.partial.nodes.items()}

    def accept(self, result: Payload) -> None:
        """The step's result is complete: keep it, and let the former one and the sums go."""
        if self.kept is not None:
            self.pool.give_back(self.kept)
        self.kept = result
        self.partial.clear()

    def forget(self) -> None:
        """Another state takes this one's place: nothing of the step counts."""
        self.partial.clear()
        if self.kept is not None:
            self.pool.give_back(self.kept)
            self.kept = None

    # The commit

    def losses(self) -> list[float]:
        """The loss of each micro-batch, by the complete result."""
        assert self.kept is not None
        return [float(loss) for loss in self.kept.views[self.kept.layout.index()[LOSS]].tolist()]

    def is_finite(self, *, gradients: bool) -> bool:
        """Whether all losses of the complete result are, and all gradients if asked for."""
        result = self.kept
        assert result is not None
        present = [
            view
            for entry, view, count in zip(result.layout.entries, result.views, result.counts, strict=True)
            if count and (entry.name == LOSS or (gradients and entry.name.startswith("gradient:")))
        ]
        return all(bool(torch.isfinite(view).all()) for view in present)

    def apply(self) -> list[float]:
        """Set `.grad` to the mean over the global batch and the buffers to the step's new values.

        Returns the loss of each micro-batch.
        """
        result = self.kept
        assert result is not None
        places = result.layout.index()
        mean = self._mean if result.layout is self.layout else Payload(result.layout, self.device)
        for section in result.layout.sections:
            is_gradient = result.layout.entries[section.entries[0]].name.startswith("gradient:")
            if is_gradient and section.stop > section.start:
                sums, means = (side.flat[section.start : section.stop].view(section.dtype) for side in (result, mean))
                torch.div(sums, self.micro_batches, out=means)
        for name, parameter in self.parameters:
            number = places[f"gradient:{name}"]
            parameter.grad = mean.views[number] if result.counts[number] else None
        for name in self.known_buffers:
            if name in places and result.counts[places[name]]:
                self.buffers.put(name, _mean_of(result, places[name]))
        return self.losses()

    def _lay_out(self) -> Layout:
        tensors: list[tuple[str, Tensor, Rule]] = [
            (f"gradient:{name}", parameter.detach(), "sum") for name, parameter in self.parameters
        ]
        sums = Layout.of(tensors)
        others: list[tuple[str, Tensor, Rule]] = [(LOSS, torch.empty(self.micro_batches, dtype=torch.float64), "sum")]
        for name in self.known_buffers:
            value = self.buffers.template(name)
            rule: Rule = "sum" if value.is_floating_point() or value.is_complex() else "first"
            others.append((name, value, rule))
        return sums.followed_by(Layout.of(others))


def _mean_of(result: Payload, number: int) -> Tensor:
    view = result.views[number]
    return view / result.counts[number] if result.layout.entries[number].rule == "sum" else view


def _hash(text: str) -> int:
    return zlib.crc32(text.encode()) | zlib.adler32(text.encode()) << 30 & (1 << 62) - 1
