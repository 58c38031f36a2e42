"""DTensors: of each, the shard that this rank holds, and where in the whole it lies. Nothing is communicated.

What is captured is the local tensor; a ShardSpec beside it says which box of the whole that is. It goes back only
into a DTensor of the very same layout: whole shape, placements, mesh and coordinate. A shard is a box only under
Shard and Replicate, dealt out in the order of the mesh's axes; everything else is refused.
"""

import sys
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from snapshot.memory import Place, describe, place_of
from snapshot.skeleton import ShardSpec, TensorSpec

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement

identity_of: Callable[[Any], tuple[object, ...]] = attrgetter("_local_tensor", "_spec")
"""The very objects that a DTensor is made of. Operations in place keep them."""


def is_sharded(tensor: object) -> "TypeGuard[DTensor]":
    """Whether it is a DTensor: no subclass, which may hold more than its shard."""
    kind = type(tensor)
    if kind is Tensor or kind is nn.Parameter:
        return False
    # Where nobody has imported it there are none; importing it takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return kind is getattr(module, "DTensor", None)


def local_of(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor itself."""
    # Not to_local(), which makes a new tensor for autograd.
    return tensor._local_tensor if is_sharded(tensor) else tensor


def place_of_any(tensor: Tensor) -> Place:
    """As `place_of`; two DTensors have the same place if they have the same shard and the same layout."""
    if not is_sharded(tensor):
        return place_of(tensor)
    return (*place_of(local_of(tensor)), tensor._spec)


def shard_of(path: str, tensor: "DTensor") -> ShardSpec:
    """Where in the whole this rank's shard lies.

    Raises TypeError, naming path and remedy, if that is not one box, or none at all.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    placements = tuple(_word(placement) for placement in tensor.placements)
    if None in placements or not _is_dealt_in_order(tensor):
        raise TypeError(
            f"{path}: a DTensor placed as {list(tensor.placements)} can't be captured; only Shard and Replicate can, "
            "in the order of the mesh's axes. Capture what tensor.redistribute(placements=[...]) makes of it, with "
            "Replicate() or Shard(dim) for each axis"
        )
    mesh = tensor.device_mesh
    coordinate = tuple(mesh.get_coordinate() or ())
    if not coordinate:
        raise TypeError(
            f"{path}: this rank is not in the mesh {mesh} of a DTensor, and has no part of it; keep it out of the "
            "state here"
        )
    if int(mesh.mesh[coordinate]) != mesh.get_rank():
        # Operations take meshes from a cache, in which one equal but for the coordinate may have stayed.
        raise TypeError(
            f"{path}: the mesh {mesh} of a DTensor was made when this process was rank {int(mesh.mesh[coordinate])}, "
            f"now it is {mesh.get_rank()}; give the meshes of each process group names of their own (mesh_dim_names)"
        )
    shape, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
    found = tuple(local_of(tensor).shape)
    if found != shape:
        raise TypeError(
            f"{path}: a DTensor of shape {tuple(tensor.shape)}, placed as {list(placements)}, has {shape} at "
            f"{coordinate} of mesh {tuple(mesh.shape)}, but its local tensor is {found}; make it with "
            "distribute_tensor, or give from_local the whole's true shape and stride"
        )
    return ShardSpec(
        global_shape=tuple(tensor.shape),
        offsets=tuple(offsets),
        placements=tuple(word for word in placements if word is not None),
        mesh_shape=tuple(mesh.shape),
        coordinate=coordinate,
    )


def _word(placement: "Placement") -> str | None:
    from torch.distributed.tensor import Replicate, Shard

    if type(placement) is Shard:
        return f"Shard({placement.dim})"
    return "Replicate()" if type(placement) is Replicate else None


def _is_dealt_in_order(tensor: "DTensor") -> bool:
    """Whether a dim that several mesh axes shard was cut by the first of them first. Older torch knows no other way."""
    order = getattr(tensor._spec, "shard_order", None) or ()
    return all(tuple(entry.mesh_dims) == tuple(sorted(entry.mesh_dims)) for entry in order)


def has_layout(tensor: Tensor, shard: ShardSpec | None) -> bool:
    """Whether it is a DTensor of this layout; or, if that is None, no DTensor."""
    if not is_sharded(tensor):
        return shard is None
    try:
        return shard_of("", tensor) == shard
    except TypeError:
        return False


def distributed(local: Tensor, spec: TensorSpec, likes: tuple[object, ...]) -> Tensor:
    """The local tensor as a shard again: on the mesh of the first of `likes` that is a DTensor on such a mesh.

    Raises ValueError if none is.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    shard = spec.shard
    assert shard is not None
    for like in likes:
        if not is_sharded(like):
            continue
        mesh = like.device_mesh
        if (tuple(mesh.shape), tuple(mesh.get_coordinate() or ())) == (shard.mesh_shape, shard.coordinate):
            placements = [Replicate() if dim is None else Shard(dim) for dim in shard.dims]
            shape, stride = torch.Size(shard.global_shape), _stride(shard.global_shape, spec.order)
            return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
    raise ValueError(
        f"{spec.name}: found {describe_any(local, shard)} in the table, and nothing here says on which mesh it is to "
        "be; put a DTensor of that layout in its place first"
    )


def _stride(shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [0] * len(shape), 1
    for axis in reversed(order):
        stride[axis], step = step, step * max(shape[axis], 1)
    return tuple(stride)


def fill(target: Tensor, source: Tensor) -> None:
    """The target takes the source's elements; a DTensor takes them into its shard."""
    local_of(target).copy_(source)
    if is_sharded(target):
        # A write to the shard is not counted as one to the DTensor, and autograd asks the latter.
        torch.autograd.graph.increment_version(target)


def describe_any(tensor: Tensor, shard: ShardSpec | None = None) -> str:
    """A tensor in words. shard: it is the local tensor of one laid out so."""
    if is_sharded(tensor):
        try:
            shard = shard_of("", tensor)
        except TypeError:
            whole = f"shape {tuple(tensor.shape)}, {list(tensor.placements)} on mesh {tuple(tensor.device_mesh.shape)}"
            return f"DTensor({tensor.dtype}, {whole}, {tensor.device})"
    return describe(tensor) if shard is None else f"DTensor({tensor.dtype}, {shard}, {tensor.device})"
