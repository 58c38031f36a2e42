"""A model as a chain of layers, of which each rank holds those of its stage.

Every rank has all layers as modules, with names, shapes and hooks; the memory of those that it does not hold is empty
(`snapshot.absent`). So an optimizer is built over `pipeline.parameters()` as for any model, its groups are the same on
all ranks, and a layer that moves keeps its place in them.

A parameter that several layers use (an embedding and the head, say) is trained once. Each use has a gradient of its
own, summed along the tree over micro-batches; the parameter's is the sum of these in the order of the layers, wherever
the layers are. Only the first use is a parameter of the pipeline, the others are plain tensors over its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from snapshot.absent import absent_like, alias, bring, is_absent, release
from snapshot.memory import memory_order

from .core.order import derive_seed
from .core.schedule import KINDS, Kind
from .randomness import seed_everything

Layer = nn.Module | Callable[[], nn.Module]


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """A further use of a parameter: the tensor that this layer has in its place."""

    layer: int
    name: str
    """As the parameter would be called, e.g. "layers.5.weight"."""
    tensor: Tensor
    of: str
    """The parameter's own name."""


class Pipeline(nn.Module):
    """Made by `run.pipeline`. Layers are called with what the one before returns: a tensor, or a tuple of them."""

    attributes_beside_state: ClassVar[frozenset[str]] = frozenset(
        {"stages", "checkpoint", "schedule", "rank_bytes", "shard_optimizer", "_seed", "_train_step"}
    )
    """How layers are spread does not change the state."""

    def __init__(
        self,
        layers: Sequence[Layer],
        loss: Callable[..., Tensor],
        *,
        stages: int,
        tied: Mapping[str, str],
        checkpoint: bool,
        schedule: Kind,
        rank_bytes: int | None,
        shard_optimizer: bool,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__()
        if schedule not in KINDS:
            raise ValueError(f"pipeline(schedule={schedule!r}): is one of {', '.join(map(repr, KINDS))}")
        if not isinstance(stages, int) or not 1 <= stages <= len(layers):
            raise ValueError(f"pipeline(stages={stages!r}): is a number of stages from 1 to the {len(layers)} layers")
        self.loss, self.stages, self.checkpoint, self.schedule = loss, stages, checkpoint, schedule
        if rank_bytes is not None and (not isinstance(rank_bytes, int) or rank_bytes < 1):
            raise ValueError(f"pipeline(rank_bytes={rank_bytes!r}): is a number of bytes, or None for no limit")
        self.device, self.rank_bytes = device, rank_bytes
        self.shard_optimizer = shard_optimizer
        self._seed = seed
        self._factories = [None if isinstance(layer, nn.Module) else layer for layer in layers]
        self.layers = nn.ModuleList(self._built(number, layer) for number, layer in enumerate(layers))
        self.uses = (*_shared(self.layers), *(_tied(self, use, of) for use, of in tied.items()))
        self._train_step: Callable[[object], float] | None = None
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise ValueError("pipeline(layers=...): no parameter of any layer has requires_grad=True")
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if memory_order(tensor) is None:
                raise ValueError(
                    f"pipeline(layers=...): {name} has gaps or overlaps in memory (a slice, an expanded tensor), so "
                    "its layer could not move to another rank: give the layer a copy (.clone().contiguous())"
                )

    def forward(self, *_: Any) -> Any:
        raise TypeError(
            "a pipeline is not called as a whole, since its layers are on several ranks: "
            "loss = pipe.train_step(step) in a loop over run.steps(...)"
        )

    def train_step(self, step: object) -> float:
        """Forward and backward over all micro-batches of this step; the mean of their losses, equal on all ranks.

        Afterwards `.grad` of the parameters held here is the mean over the global batch. To be called once in each
        iteration of `run.steps`, which gives `step`.
        """
        if self._train_step is None:
            raise ValueError("pipe.train_step was called outside of run.steps: for step in run.steps(...)")
        return self._train_step(step)

    def bind(self, train_step: Callable[[object], float] | None) -> None:
        """What `train_step` does while a loop runs."""
        self._train_step = train_step

    def layer_bytes(self) -> tuple[int, ...]:
        """Of each layer, the bytes of its parameters and buffers. A shared parameter counts in its first layer; where
        there is a limit of memory, in each that uses it, since wherever one of them is it is held."""
        sizes = [0] * len(self.layers)
        for number, layer in enumerate(self.layers):
            sizes[number] += sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))
        if self.rank_bytes is not None:
            shared = {(use.layer, use.of) for use in self.uses if use.layer != layer_of(use.of)}
            parameters = dict(self.named_parameters())
            for number, name in sorted(shared):
                sizes[number] += parameters[name].nbytes
        return tuple(sizes)

    def needed(self, layers: range) -> dict[str, nn.Parameter]:
        """By name, the parameters that these layers use, in order."""
        owners = {use.of for use in self.uses if use.layer in layers}
        return {
            name: parameter for name, parameter in self.named_parameters() if layer_of(name) in layers or name in owners
        }

    def uses_in(self, layers: range) -> list[Use]:
        return [use for use in self.uses if use.layer in layers]

    # Which layers are here

    def bring(self, layers: range, *, initial: bool = False) -> list[nn.Parameter]:
        """Have memory for these layers too: uninitialised, or (initial) as they are when the run begins. The parameters
        that had none."""
        fresh = [tensor for tensor in self._tensors(layers) if is_absent(tensor)]
        for tensor in fresh:
            bring(tensor)
        for use in self._used_of(fresh):
            bring(use)
        if initial and fresh:
            for number in sorted({layer_of(name) for name in self.needed(layers)} | set(layers)):
                self._initialise(number)
        return [tensor for tensor in fresh if isinstance(tensor, nn.Parameter)]

    def keep_to(self, layers: range) -> list[nn.Parameter]:
        """Give back the memory of all other layers; the parameters that had some."""
        kept = {id(tensor) for tensor in self._tensors(layers)}
        everything = self._tensors(range(len(self.layers)))
        others = [tensor for tensor in everything if id(tensor) not in kept and not is_absent(tensor)]
        release(*others, *self._used_of(others))
        return [tensor for tensor in others if isinstance(tensor, nn.Parameter)]

    def _used_of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The further uses of these: they have the memory of their parameters, or none together with them."""
        wanted = set(map(id, tensors))
        parameters = dict(self.named_parameters())
        return [use.tensor for use in self.uses if id(parameters[use.of]) in wanted]

    def _tensors(self, layers: range) -> list[Tensor]:
        buffers = [buffer for number in layers for buffer in self.layers[number].buffers()]
        return [*self.needed(layers).values(), *buffers]

    # How layers are made

    def _built(self, number: int, layer: Layer) -> nn.Module:
        if isinstance(layer, nn.Module):
            return layer
        try:
            with torch.device("meta"):
                made = layer()
        except (RuntimeError, NotImplementedError):  # it computes with values: it is built for its shapes then
            made = self._made(number)
        if not isinstance(made, nn.Module):
            raise TypeError(
                f"pipeline(layers=...): layer {number} makes a {type(made).__name__}, not a torch.nn.Module"
            )
        return _emptied(made, self.device)

    def _made(self, number: int) -> nn.Module:
        factory = self._factories[number]
        assert factory is not None
        seed_everything(derive_seed("layer", self._seed, number))
        with torch.device(self.device):
            return factory()

    def _initialise(self, number: int) -> None:
        """Once more, with values: those of a layer depend on the run's seed and its number alone."""
        if self._factories[number] is None:
            return
        made = self._made(number)
        with torch.no_grad():
            for own, new in zip(self.layers[number].modules(), made.modules(), strict=True):
                _take_over(own, new)


def layer_of(name: str) -> int:
    """Of a parameter or buffer, by its name in the pipeline."""
    return int(name.split(".", 2)[1])


def _take_over(own: nn.Module, new: nn.Module) -> None:
    for kept, values in ((own._parameters, new._parameters), (own._buffers, new._buffers)):
        for key, value in values.items():
            target = kept.get(key)
            if target is not None and value is not None and not is_absent(target):
                target.copy_(value)
    for key, value in new.__dict__.items():
        if isinstance(value, Tensor) and isinstance(own.__dict__.get(key), Tensor) and own.__dict__[key].is_meta:
            own.__dict__[key] = value  # neither parameter nor buffer: a constant


def _emptied(made: nn.Module, device: torch.device) -> nn.Module:
    """The same module with absent tensors; what was one tensor stays one."""
    known: dict[int, Tensor] = {}
    for part in made.modules():
        for kept in (part._parameters, part._buffers):
            for key, tensor in kept.items():
                if tensor is not None:
                    if id(tensor) not in known:
                        known[id(tensor)] = _absent(tensor, device)
                    kept[key] = known[id(tensor)]  # type: ignore[assignment]
    return made


def _absent(tensor: Tensor, device: torch.device) -> Tensor:
    if not isinstance(tensor, nn.Parameter):
        return absent_like(tensor, device=device)
    memory = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    parameter = nn.Parameter(memory, requires_grad=tensor.requires_grad)
    release(parameter)
    return parameter


def _shared(layers: nn.ModuleList) -> tuple[Use, ...]:
    """Parameters that are the same object in several layers: from the second layer on they become uses."""
    first: dict[int, str] = {}
    found: list[Use] = []
    for number, layer in enumerate(layers):
        mine = {id(parameter) for _, parameter in layer.named_parameters() if id(parameter) not in first}
        for path, part in layer.named_modules():
            for key, parameter in list(part._parameters.items()):
                if parameter is None:
                    continue
                name = ".".join(filter(None, ("layers", str(number), path, key)))
                if id(parameter) in mine:
                    first.setdefault(id(parameter), name)
                else:
                    found.append(_use_instead(part, key, number, name, parameter, first[id(parameter)]))
    return tuple(found)


def _tied(pipe: Pipeline, use: str, of: str) -> Use:
    """Raises ValueError."""
    parameters = dict(pipe.named_parameters())
    for name in (use, of):
        if name not in parameters:
            raise ValueError(
                f"pipeline(tied={{{use!r}: {of!r}}}): there is no parameter {name!r}; they are called "
                f"{', '.join(list(parameters)[:4])}, ..."
            )
    one, other = parameters[use], parameters[of]
    if layer_of(use) <= layer_of(of):
        raise ValueError(f"pipeline(tied={{{use!r}: {of!r}}}): the key is the later use, in a layer after the value's")
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        raise ValueError(
            f"pipeline(tied={{{use!r}: {of!r}}}): they differ: {tuple(one.shape)} {one.dtype} and "
            f"{tuple(other.shape)} {other.dtype}"
        )
    path, _, key = use.rpartition(".")
    return _use_instead(pipe.get_submodule(path), key, layer_of(use), use, other, of)


def _use_instead(part: nn.Module, key: str, layer: int, name: str, parameter: nn.Parameter, of: str) -> Use:
    del part._parameters[key]
    tensor = alias(parameter).requires_grad_(parameter.requires_grad)
    object.__setattr__(part, key, tensor)
    return Use(layer=layer, name=name, tensor=tensor, of=of)
