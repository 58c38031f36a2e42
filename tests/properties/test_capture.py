"""Any tree of any tensors comes back with the same bits, types and aliasing."""

import struct
from collections import Counter, OrderedDict
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from snapshot.attributes import plain_attributes
from snapshot.capture import capture
from snapshot.load import load
from snapshot.table import DTYPES, StateTable

# Creating a ComplexHalf tensor warns that it is experimental.
DTYPE_NAMES = sorted(set(DTYPES) - {"complex32"})

floats = st.floats() | st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack("<d", struct.pack("<Q", bits))[0])
keys = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=4,
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Random bits of any dtype: 0-d, empty, transposed, sliced."""
    dtype = DTYPES[draw(st.sampled_from(DTYPE_NAMES))]
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    count = int(np.prod(shape, dtype=int)) * dtype.itemsize
    data = draw(st.binary(min_size=count, max_size=count))
    if dtype is torch.bool:
        data = bytes(byte & 1 for byte in data)
    tensor = torch.tensor(list(data), dtype=torch.uint8).view(dtype).view(shape)
    tensor = tensor.permute(draw(st.permutations(range(tensor.dim()))))
    if tensor.dim() and dtype is not torch.float4_e2m1fn_x2 and draw(st.booleans()):
        tensor = tensor[draw(st.integers(0, 2)) :]
    return tensor


arrays = st.sampled_from(["b", "B", "h", "H", "i", "I", "q", "Q", "e", "f", "d", "F", "D", "?"]).flatmap(
    lambda char: st.integers(0, 3).map(lambda size: np.ones((size, 2), dtype=char))
)
leaves = keys | st.complex_numbers() | tensors() | arrays | st.sampled_from([torch.float8_e5m2, torch.Size([1])])
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4).map(OrderedDict),
        st.dictionaries(keys, st.integers(), max_size=4).map(Counter),
        st.sets(keys, max_size=4),
        st.frozensets(keys, max_size=4),
        st.tuples(inner).map(lambda one: [one[0], one[0]]),
    ),
    max_leaves=12,
)


def bits(value: Any) -> Any:
    """What must be equal, in a form whose == sees every bit."""
    if isinstance(value, Tensor):
        flat = torch.empty(value.numel(), dtype=value.dtype).copy_(value.reshape(-1))
        data = flat.view(torch.uint8).tolist()
        return ("tensor", value.dtype, tuple(value.shape), data)
    if isinstance(value, np.ndarray):
        return ("array", value.dtype, value.shape, value.tobytes())
    if isinstance(value, dict):
        return (type(value), [(bits(key), bits(item)) for key, item in value.items()])
    if isinstance(value, list | tuple):
        return (type(value), [bits(item) for item in value])
    if isinstance(value, set | frozenset):
        return (type(value), sorted((bits(item) for item in value), key=repr))
    if isinstance(value, float):
        return (float, struct.pack("<d", value))
    if isinstance(value, complex):
        return (complex, struct.pack("<dd", value.real, value.imag))
    return (type(value), value)


def received(table: StateTable, cuts: list[int]) -> StateTable:
    copied = StateTable.empty(table.skeleton)
    edges = sorted({0, table.nbytes, *(cut % (table.nbytes + 1) for cut in cuts)})
    for start, stop in pairwise(edges):
        ours, theirs = list(copied.pieces(start, stop)), list(table.pieces(start, stop))
        for target, source in zip(ours, theirs, strict=True):
            target.copy_(source)
        assert sum(piece.numel() for piece in ours) == stop - start
    return copied


@given(tree=trees, cuts=st.lists(st.integers(0, 10**6), max_size=5))
def test_any_tree_comes_back(tree: Any, cuts: list[int]) -> None:
    table = capture({"state": {"tree": tree}})
    copied = received(table, cuts)
    assert copied.digest() == table.digest()
    state: dict[str, Any] = {}
    load({"state": state}, copied)
    assert bits(state["tree"]) == bits(tree)
    assert capture({"state": state}).digest() == table.digest()


@given(old=trees, new=trees)
def test_whatever_was_there_before(old: Any, new: Any) -> None:
    state = {"tree": old, "more": 1}
    table = capture({"state": {"tree": new}})
    expected, digest = bits(new), table.digest()
    load({"state": state}, received(table, []))
    assert bits(state["tree"]) == expected
    assert capture({"state": state}).digest() == digest


@given(tree=trees)
def test_offsets_agree_with_the_bytes(tree: Any) -> None:
    table = capture({"state": {"tree": tree}})
    assert sum(piece.numel() for piece in table.pieces(0, table.nbytes)) == table.nbytes
    assert table.layout.offsets[-1] == table.nbytes
    assert table.layout.to_bytes() == table.skeleton


scalars = st.none() | st.booleans() | st.integers() | floats | st.text()
built = st.dictionaries(st.sampled_from(["p", "eps", "training"]), scalars)
added = st.dictionaries(st.text().map("own {}".format), scalars | st.lists(st.integers()), max_size=4)


@st.composite
def modules(draw: st.DrawFn) -> nn.Module:
    """Equally built ones, differently switched."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2))
    for part in module.modules():
        part.train(draw(st.booleans()))
        vars(part).update(draw(built) | draw(added))
    for parameter in module.parameters():
        parameter.requires_grad_(draw(st.booleans()))
    return module


def switches(module: nn.Module) -> Any:
    wanted = [parameter.requires_grad for parameter in module.parameters()]
    return wanted, [bits(plain_attributes(part)) for part in module.modules()]


@given(one=modules(), two=modules())
def test_what_is_switched_comes_back(one: nn.Module, two: nn.Module) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2))
    first = received(capture({"module": module}), [])
    for source in (one, two, one):
        load({"module": module}, received(capture({"module": source}), []))
        assert switches(module) == switches(source)
        assert capture({"module": module}).digest() == capture({"module": source}).digest()
    load({"module": module}, first)
    assert capture({"module": module}).digest() == first.digest()
