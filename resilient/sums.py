"""One rank's numbers of a step: collects what each micro-batch produced, applies the step's result.

Three kinds of buffers, never mixed: the partial sums, which nothing writes but the fold; the result,
written by the exchange and kept until that of the next step is complete, for ranks that missed it;
and `.grad`, the mean made from the result, which the user may clip, change and keep as they like.

Memory, for a payload of S bytes (gradients and changed buffers, those of fewer than 32 bits in fp32) and L
micro-batches on the rank: partial sums at most (log2 L + 1) S, results 2 S, receiving buffers (foreign roots / ranks)
S, and `.grad` in its own type: S, or S / 2 for bf16. For each step whose `.grad` the user's code keeps, once more that.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from .buffers import Buffers
from .core.tree import Node
from .errors import LoopError
from .exact import PartialSums
from .payload import Layout, Means, Payload, Pool, Rule, rule_of, sum_type

LOSS = "loss"


class SharedUse(Protocol):
    """A further use of a parameter that several layers share."""

    @property
    def name(self) -> str: ...

    @property
    def tensor(self) -> Tensor: ...


class StepSums:
    """Gradients, changed buffers and losses of one rank."""

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        buffers: Buffers,
        micro_batches: int,
        device: torch.device | None = None,
    ) -> None:
        """device: that of the parameters; to be given if there are none yet."""
        self.parameters = parameters
        self.uses: Sequence[SharedUse] = ()
        """Further uses of shared parameters here, each summed by itself."""
        self.buffers = buffers
        self.micro_batches = micro_batches
        self.users: Mapping[str, Sequence[str]] = {}
        """Of each parameter that several layers use, all uses in the order of the layers, itself first; the same on all
        ranks."""
        self.names: Sequence[str] = tuple(name for name, _ in parameters)
        """Of all parameters of the model, in order, the same on all ranks."""
        self.check_finite = False
        """Whether it matters if gradients are finite."""
        self.elsewhere: frozenset[str] = frozenset()
        """Those of them that are in the layers of other stages."""
        self.device = parameters[0][1].device if device is None else device
        self.known_buffers: tuple[str, ...] = ()
        """Buffers seen to change; only these take part in the exchange."""
        self.layout = self._lay_out()
        self.pool = Pool(self.layout, self.device)
        self.partial = PartialSums(micro_batches, self.pool)
        self.kept: Payload | None = None
        """Complete result of the newest step that has one here."""
        self._means = self._means_of(self.layout)

    def reshape(
        self, parameters: Sequence[tuple[str, nn.Parameter]], uses: Sequence[SharedUse], buffers: Buffers
    ) -> None:
        """Others are here from now on, at a step's boundary: nothing of a step has begun. The kept result stays, for
        those that lack it."""
        assert not self.partial.nodes, "a step has begun"
        self.parameters, self.uses, self.buffers = parameters, uses, buffers
        self._lay_out_anew()

    # A micro-batch

    def fold_leaf(self, leaf: int, loss: Tensor | None) -> None:
        """Take over `.grad` of every parameter and all changed buffers; both are clean afterwards."""
        self.fold(leaf, self._losses(leaf, loss), self.buffers.take_changes())

    def fold_stage(self, leaf: int, loss: Tensor | None, changed: Mapping[str, Tensor]) -> None:
        """The same for one stage of a pipeline: only the last one has losses."""
        self.fold(leaf, None if loss is None else self._losses(leaf, loss), changed)

    def _losses(self, leaf: int, loss: Tensor | None) -> Tensor:
        """On the device, which is not waited for."""
        losses = torch.zeros(self.micro_batches, dtype=torch.float64, device=self.device)
        losses[leaf] = float("nan") if loss is None else loss.detach().double()
        return losses

    def fold(self, leaf: int, losses: Tensor | None, changed: Mapping[str, Tensor]) -> None:
        if self._laid_out_for != self.buffers.revision:
            assert not self.partial.nodes, "a step has begun"
            self._lay_out_anew()
        if not set(changed) <= set(self.known_buffers):
            self.widen([*self.known_buffers, *changed])
        named: dict[str, Tensor | None] = {LOSS: losses, **changed}
        for name, tensor in (*self.parameters, *((use.name, use.tensor) for use in self.uses)):
            named[f"gradient:{name}"] = self._gradient(name, tensor)
        self.partial.add_leaf(leaf, [named.get(entry.name) for entry in self.layout.entries])

    def _gradient(self, name: str, parameter: Tensor) -> Tensor | None:
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
        self.known_buffers = tuple(sorted({*self.known_buffers, *buffers}))
        self._lay_out_anew()

    def _lay_out_anew(self) -> None:
        self.layout = self._lay_out()
        self.partial.widen(self.layout)
        self._means = self._means_of(self.layout)

    def fingerprint(self) -> int:
        """Of the layout, 62 bits, to compare between ranks."""
        entries = [(entry.name, tuple(entry.shape), str(entry.dtype)) for entry in self.layout.entries]
        return _hash(repr((entries, [(str(section.own), section.entries) for section in self.layout.sections])))

    def buffers_digest(self) -> int:
        """Of which buffers take part, 62 bits."""
        return _hash(repr(self.known_buffers))

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
        if self.kept.outcome is not None:
            return [float("nan") if loss is None else loss for loss in self.kept.outcome.losses]
        return [float(loss) for loss in self.kept.views[self.kept.layout.index()[LOSS]].tolist()]

    def is_finite(self, *, gradients: bool) -> bool:
        """Whether all losses of the complete result are, and all gradients if asked for."""
        assert self.kept is not None
        outcome = self.kept.outcome
        return self.finite(self.kept, gradients=gradients) if outcome is None else outcome.finite

    def finite(self, result: Payload, *, gradients: bool) -> bool:
        """The same of what lies in this result."""
        finite = [
            torch.isfinite(view).all()
            for entry, view, count in zip(result.layout.entries, result.views, result.counts, strict=True)
            if count and (entry.name == LOSS or (gradients and entry.name.startswith("gradient:")))
        ]
        return not finite or bool(torch.stack(finite).all())  # a device is waited for once

    def apply(self) -> list[float]:
        """Set `.grad` to the mean over the global batch and the buffers to the step's new values.

        Returns the loss of each micro-batch.
        """
        result = self.kept
        assert result is not None
        places = result.layout.index()
        for _, parameter in self.parameters:
            parameter.grad = None
        means = self._means if result.layout is self.layout else self._means_of(result.layout)
        mean = means.of(result.flat, self.micro_batches)
        shared = self.shared_sums(result)
        for name, parameter in self.parameters:
            number = places[f"gradient:{name}"]
            if name in shared:
                parameter.grad = self._mean_like(parameter, shared[name])
            else:
                parameter.grad = mean[number] if result.counts[number] else None
        for name in self.known_buffers:
            if name in places and result.counts[places[name]]:
                self.buffers.put(name, _mean_of(result, places[name]))
        return self.losses()

    def shared_sums(self, result: Payload) -> dict[str, Tensor | None]:
        """Of each parameter here that several layers use, its gradients' sum over all of them, added in their order."""
        found: dict[str, Tensor | None] = {}
        here = {name for name, _ in self.parameters}
        for name, uses in self.users.items():
            if name not in here:
                continue
            parts = [self.sum_of(result, use) for use in uses]
            there = [part for part in parts if part is not None]
            found[name] = functools.reduce(torch.add, there) if there else None
        return found

    def sum_of(self, result: Payload, use: str) -> Tensor | None:
        """The sum of a parameter's, or a use's, gradients over all micro-batches; of one in another stage as it was
        received."""
        number = result.layout.index().get(f"gradient:{use}")
        if number is not None and use not in self.elsewhere:
            return result.views[number] if result.counts[number] else None
        return result.foreign.get(use)

    def template(self, use: str) -> Tensor:
        """Room for the sum of this use of a shared parameter that is here too."""
        name = next(name for name, users in self.users.items() if use in users)
        like = dict(self.parameters)[name]
        return torch.empty(like.shape, dtype=sum_type(like.dtype), device=like.device)

    def mean_gradients(self, result: Payload) -> Iterator[tuple[str, Tensor | None]]:
        """By name, of every parameter here: the mean of the complete result."""
        shared = self.shared_sums(result)
        for name, parameter in self.parameters:
            yield name, self._mean_like(parameter, shared[name] if name in shared else self.sum_of(result, name))

    def _mean_like(self, parameter: Tensor, total: Tensor | None) -> Tensor | None:
        return None if total is None else (total / self.micro_batches).to(parameter.dtype)

    def _means_of(self, layout: Layout) -> Means:
        gradients = (each for each in layout.sections if layout.entries[each.entries[0]].name.startswith("gradient:"))
        return Means(layout, list(gradients), self.device)

    def _lay_out(self) -> Layout:
        self._laid_out_for = self.buffers.revision
        tensors: list[tuple[str, Tensor, Rule]] = [
            (f"gradient:{name}", parameter, "sum")
            for name, parameter in (*self.parameters, *((use.name, use.tensor) for use in self.uses))
        ]
        sums = Layout.of(tensors)
        others: list[tuple[str, Tensor, Rule]] = [(LOSS, torch.empty(self.micro_batches, dtype=torch.float64), "sum")]
        for name in filter(self.buffers.has, self.known_buffers):
            value = self.buffers.template(name)
            others.append((name, value, rule_of(value.dtype)))
        return sums.followed_by(Layout.of(others))


def _mean_of(result: Payload, number: int) -> Tensor:
    view = result.views[number]
    return view / result.counts[number] if result.layout.entries[number].rule == "sum" else view


def _hash(text: str) -> int:
    return zlib.crc32(text.encode()) | zlib.adler32(text.encode()) << 30 & (1 << 62) - 1
