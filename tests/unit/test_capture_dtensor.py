"""DTensors: each rank's shard is captured, says where in the whole it lies, and goes back in place."""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from snapshot.absent import release
from snapshot.capture import capture
from snapshot.load import load
from snapshot.recapture import Recapture
from snapshot.skeleton import ShardSpec, Skeleton
from snapshot.table import StateTable

Parts = dict[str, Any]


@contextmanager
def fake_rank(rank: int, *mesh_shape: int, named_after: int | None = None) -> Iterator[DeviceMesh]:
    """The mesh as that rank sees it. Its communication does nothing, so only what needs none is true here."""
    size = torch.Size(mesh_shape).numel()
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        # A rank's own names: torch keeps the meshes of former operations for equal ones, with their coordinate.
        names = tuple(
            f"axis {axis} of rank {rank if named_after is None else named_after}" for axis in range(len(mesh_shape))
        )
        yield init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    finally:
        dist.destroy_process_group()


def shared_out(whole: Tensor, mesh: DeviceMesh, *placements: Placement) -> DTensor:
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def received(table: StateTable) -> StateTable:
    """The table as another process gets it: from its skeleton and bytes alone."""
    copied = StateTable.empty(table.skeleton)
    for target, source in zip(copied.pieces(0, copied.nbytes), table.pieces(0, table.nbytes), strict=True):
        target.copy_(source)
    return copied


def assembled(tables: list[StateTable], name: str) -> Tensor:
    """The whole tensor, from the boxes of all ranks; each element is in one at least."""
    whole: Tensor | None = None
    covered: Tensor | None = None
    for table in tables:
        number = [spec.name for spec in table.layout.tensors].index(name)
        shard, box = table.layout.tensors[number].shard, table.tensors[number]
        assert shard is not None
        if whole is None or covered is None:
            whole = torch.empty(shard.global_shape, dtype=box.dtype)
            covered = torch.zeros(shard.global_shape, dtype=torch.bool)
        at = tuple(slice(offset, offset + size) for offset, size in zip(shard.offsets, box.shape, strict=True))
        whole[at], covered[at] = box, True
    assert whole is not None and covered is not None and covered.all()
    return whole


LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[Placement, ...], tuple[int, ...]]] = {
    "rows": ((2,), (Shard(0),), (4, 6)),
    "columns": ((2,), (Shard(1),), (4, 6)),
    "uneven": ((2,), (Shard(0),), (5, 3)),
    "an empty shard": ((2,), (Shard(0),), (1, 3)),
    "three of four": ((4,), (Shard(1),), (2, 5)),
    "nothing at all": ((2,), (Shard(0),), (0, 3)),
    "replicas": ((2,), (Replicate(),), (3, 2)),
    "one number": ((2,), (Replicate(),), ()),
    "tiles": ((2, 2), (Shard(0), Shard(1)), (5, 3)),
    "twice": ((2, 2), (Shard(0), Shard(0)), (7, 2)),
    "twice, empty": ((2, 2), (Shard(0), Shard(0)), (1, 2)),
    "rows, replicated": ((2, 2), (Replicate(), Shard(0)), (5, 3)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_rank_has_its_box_of_the_whole(layout: str, dtype: torch.dtype) -> None:
    mesh_shape, placements, shape = LAYOUTS[layout]
    whole = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
    tables = []
    for rank in range(torch.Size(mesh_shape).numel()):
        with fake_rank(rank, *mesh_shape) as mesh:
            state = {"deep": [{"x": shared_out(whole, mesh, *placements)}]}
            table = received(capture({"state": state}))
            other = {"deep": [{"x": shared_out(torch.zeros_like(whole), mesh, *placements)}]}
            there = other["deep"][0]["x"]
            load({"state": other}, table)
            assert other["deep"][0]["x"] is there
            assert torch.equal(there.to_local(), state["deep"][0]["x"].to_local())
            assert capture({"state": other}).digest() == table.digest()
        tables.append(table)
    assert torch.equal(assembled(tables, "state['deep'][0]['x']"), whole)


def test_where_a_shard_lies_in_words() -> None:
    with fake_rank(3, 2, 2) as mesh:
        (spec,) = capture({"s": {"x": shared_out(torch.rand(5, 3), mesh, Shard(0), Shard(1))}}).layout.tensors
    assert spec.shape == (2, 1)
    assert spec.shard == ShardSpec(
        global_shape=(5, 3),
        offsets=(3, 2),
        placements=("Shard(0)", "Shard(1)"),
        mesh_shape=(2, 2),
        coordinate=(1, 1),
    )
    assert str(spec.shard) == "shape (5, 3), [Shard(0), Shard(1)] at (1, 1) of mesh (2, 2)"


def test_a_shard_that_is_absent_is_described_as_if_it_were_there() -> None:
    with fake_rank(1, 2) as mesh:
        model = nn.Module()
        model.sharded = nn.Parameter(shared_out(torch.rand(5, 3), mesh, Shard(0)))
        expected = capture({"model": model}).skeleton
        release(model.sharded._local_tensor)
        table, recapture = capture({"model": model}), Recapture()
        assert table.skeleton == expected and table.held_ranges() == ()
        assert [recapture.capture({"model": model}).skeleton for _ in range(2)] == [expected] * 2
        load({"model": model}, StateTable.empty(expected, ()))
        load({"model": model}, StateTable.empty(expected))


def build(mesh: DeviceMesh, seed: int) -> Parts:
    """Tied parameters, a sharded and a plain buffer, one parameter that wants no gradient."""
    torch.manual_seed(seed)
    model = nn.Module()
    model.first = nn.Parameter(shared_out(torch.rand(5, 3), mesh, Shard(0)))
    model.tied = model.first
    model.second = nn.Parameter(shared_out(torch.rand(3, 4).bfloat16(), mesh, Shard(1)))
    model.frozen = nn.Parameter(shared_out(torch.rand(1, 2), mesh, Shard(0)), requires_grad=False)
    model.plain = nn.Parameter(torch.rand(2))
    model.register_buffer("mean", shared_out(torch.rand(6), mesh, Replicate()))
    model.register_buffer("count", torch.tensor(seed))
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    ema = {"first": shared_out(torch.rand(5, 3), mesh, Shard(0)), "seed": seed}
    return {"model": model, "optimizer": optimizer, "state": {"ema": ema}}


def train(parts: Parts, steps: int) -> None:
    """Without communication."""
    for step in range(steps):
        for parameter in parts["model"].parameters():
            if parameter.requires_grad:
                parameter.grad = parameter.detach() * (step + 1)
        parts["optimizer"].step()
        parts["model"].mean.mul_(0.5)
        parts["state"]["ema"]["first"].mul_(0.5).add_(parts["model"].first.detach())


def locals_of(parts: Parts) -> list[Tensor]:
    model, optimizer = parts["model"], parts["optimizer"]
    states = [value for state in optimizer.state.values() for value in state.values()]
    every = [*model.parameters(), *model.buffers(), *states, parts["state"]["ema"]["first"]]
    return [tensor._local_tensor if isinstance(tensor, DTensor) else tensor for tensor in every]


@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize("trained", [0, 2])
def test_a_training_state_goes_into_another_instance(rank: int, trained: int) -> None:
    with fake_rank(rank, 2) as mesh:
        original, other = build(mesh, 1), build(mesh, 2)
        train(original, 3)
        train(other, trained)
        table = received(capture(original))
        assert [spec.name for spec in table.layout.tensors if "tied" in spec.name] == []
        model = other["model"]
        before = [*model.parameters(), *model.buffers(), other["state"]["ema"]["first"]]
        load(other, table)
        after = [*model.parameters(), *model.buffers(), other["state"]["ema"]["first"]]
        assert all(a is b for a, b in zip(before, after, strict=True))
        assert model.tied is model.first and model.first.requires_grad and not model.frozen.requires_grad
        moment = other["optimizer"].state[model.second]["exp_avg"]
        assert isinstance(moment, DTensor) and moment.placements == (Shard(1),) and moment.dtype is torch.bfloat16
        assert moment.device_mesh == mesh and moment.stride() == model.second.stride()
        assert capture(other).digest() == table.digest()
        train(original, 2)
        train(other, 2)
        assert all(torch.equal(a, b) for a, b in zip(locals_of(original), locals_of(other), strict=True))


def test_ties_that_the_target_lacks_are_refused() -> None:
    with fake_rank(0, 2) as mesh:
        original, other = build(mesh, 1), build(mesh, 2)
        other["model"].tied = nn.Parameter(shared_out(torch.rand(5, 3), mesh, Shard(0)))
        with pytest.raises(ValueError, match=r"model.tied: expected .* its own, found it tied to model.first"):
            load(other, capture(original))


def test_ties_among_values_survive() -> None:
    with fake_rank(1, 2) as mesh:
        shared = shared_out(torch.rand(4, 2), mesh, Shard(0))
        values = {"a": shared, "b": shared.detach(), "local": shared._local_tensor}
        table = received(capture({"s": values}))
        assert len(table.tensors) == 2  # the plain tensor is another, though it lies in the same memory
        other: Parts = {
            "a": shared_out(torch.rand(4, 2), mesh, Shard(0)),
            "b": shared_out(torch.rand(4, 2), mesh, Shard(0)),
        }
        load({"s": other}, table)
        assert other["a"] is other["b"] and type(other["local"]) is Tensor
        assert torch.equal(other["a"]._local_tensor, other["local"])


def test_shards_that_are_not_contiguous() -> None:
    with fake_rank(1, 2) as mesh:
        turned = shared_out(torch.arange(16.0).view(4, 4), mesh, Shard(0)).t()
        gaps = DTensor.from_local(torch.arange(24.0).view(4, 6)[:, ::2], mesh, [Shard(0)])
        assert not gaps._local_tensor.is_contiguous()
        table = capture({"s": {"turned": turned, "gaps": gaps}})
        assert table.tensors[0].data_ptr() == turned._local_tensor.data_ptr()
        assert table.layout.tensors[0].order == (1, 0)
        other: Parts = {
            "turned": shared_out(torch.zeros(4, 4), mesh, Shard(0)).t(),
            "gaps": DTensor.from_local(torch.zeros(4, 6)[:, ::2], mesh, [Shard(0)]),
        }
        load({"s": other}, received(table))
        for key, value in (("turned", turned), ("gaps", gaps)):
            assert torch.equal(other[key]._local_tensor, value._local_tensor)
            assert other[key]._local_tensor.stride() == value._local_tensor.stride()


class Averages:
    """Keeps what it is given."""

    def __init__(self, *shards: Tensor) -> None:
        self.shards = list(shards)

    def state_dict(self) -> Parts:
        return {"shards": self.shards}

    def load_state_dict(self, state: Parts) -> None:
        self.shards = state["shards"]


def test_objects_get_new_dtensors() -> None:
    with fake_rank(0, 2) as mesh:
        original, other = (Averages(shared_out(torch.rand(5, 2), mesh, Shard(0))) for _ in range(2))
        (before,) = other.shards
        table = received(capture({"x": original}))
        load({"x": other}, table)
        (after,) = other.shards
        assert isinstance(after, DTensor) and after is not before
        assert (after.shape, after.placements) == ((5, 2), (Shard(0),))
        assert torch.equal(after._local_tensor, original.shards[0]._local_tensor)
        with pytest.raises(ValueError, match=r"x\['shards'\]\[0\]: found DTensor.* on which mesh"):
            load({"x": Averages()}, table)
        with pytest.raises(ValueError, match=r"x\['shards'\]\[0\]: expected Tensor.*, found DTensor"):
            load({"x": Averages(torch.rand(5, 2))}, table)


def misplaced(mesh: DeviceMesh) -> dict[str, tuple[DTensor, str]]:
    local, shape = torch.rand(4, 2), torch.Size([8, 2])
    strided = DTensor.from_local(local, mesh, [_StridedShard(0, split_factor=2)], shape=shape, stride=(2, 1))
    return {
        "partial": (DTensor.from_local(local, mesh, [Partial()]), r"placed as \[Partial.*redistribute"),
        "strided": (strided, r"placed as \[_StridedShard.*redistribute"),
        "ragged": (
            DTensor.from_local(local, mesh, [Shard(0)], shape=torch.Size([6, 2]), stride=(2, 1)),
            r"has \(3, 2\) at \(0,\) of mesh \(2,\), but its local tensor is \(4, 2\); make it",
        ),
        "meta": (DTensor.from_local(local.to("meta"), mesh, [Shard(0)]), "to_empty"),
    }


@pytest.mark.parametrize("kind", ["partial", "strided", "ragged", "meta"])
def test_what_is_no_box_is_refused_with_a_remedy(kind: str) -> None:
    with fake_rank(0, 2) as mesh:
        tensor, message = misplaced(mesh)[kind]
        with pytest.raises(TypeError, match=r"s\['x'\]: .*" + message):
            capture({"s": {"x": tensor}})
        if kind != "meta":
            whole = {"x": shared_out(torch.rand(6, 2), mesh, Shard(0))}
            with pytest.raises(ValueError, match=r"s\['x'\]: expected DTensor.*, found DTensor.*\[Shard\(0\)\]"):
                load({"s": {"x": tensor}}, capture({"s": whole}))


def test_an_unusual_order_of_cuts_is_refused() -> None:
    with fake_rank(1, 2, 2) as mesh:
        tensor = shared_out(torch.rand(8), mesh, Shard(0), Shard(0))
        (entry,) = tensor._spec.shard_order
        tensor._spec.shard_order = (entry._replace(mesh_dims=(1, 0)),)
        with pytest.raises(TypeError, match="in the order of the mesh's axes"):
            capture({"s": {"x": tensor}})


def test_a_rank_outside_of_the_mesh_is_refused() -> None:
    with fake_rank(1, 2):
        mesh = DeviceMesh("cpu", [0])
        tensor = distribute_tensor(torch.rand(4), mesh, [Shard(0)], src_data_rank=None)
        with pytest.raises(TypeError, match=r"s\['x'\]: this rank is not in the mesh"):
            capture({"s": {"x": tensor}})


def test_a_mesh_of_an_earlier_rank_is_refused() -> None:
    """What an operation makes lies on the first mesh that was equal, whatever rank this process had then."""
    for rank in range(2):
        with fake_rank(rank, 2, named_after=7) as mesh:
            tensor = shared_out(torch.rand(4), mesh, Shard(0)).neg()
            if rank == 1:
                assert tensor.device_mesh.get_coordinate() != mesh.get_coordinate()  # else: torch has mended it
                with pytest.raises(TypeError, match=r"s\['x'\]: the mesh .* was rank 0, now it is 1; .*mesh_dim_names"):
                    capture({"s": {"x": tensor}})


OTHERS: dict[str, Callable[[DeviceMesh], Tensor]] = {
    r"shape \(6, 4\), \[Shard\(1\)\]": lambda mesh: shared_out(torch.ones(6, 4), mesh, Shard(1)),
    r"shape \(6, 4\), \[Replicate\(\)\]": lambda mesh: shared_out(torch.ones(6, 4), mesh, Replicate()),
    r"shape \(5, 4\), \[Shard\(0\)\]": lambda mesh: shared_out(torch.ones(5, 4), mesh, Shard(0)),
    r"Parameter\(torch.float32, shape \(6, 4\)|Tensor\(torch.float32, shape \(6, 4\)": lambda _: torch.ones(6, 4),
    r"Parameter\(torch.float32, shape \(3, 4\)|Tensor\(torch.float32, shape \(3, 4\)": lambda _: torch.ones(3, 4),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("holder", ["parameter", "buffer", "value"])
def test_another_layout_is_refused_and_nothing_changed(name: str, holder: str) -> None:
    def held(tensor: Tensor) -> Parts:
        module = nn.Module()
        if holder == "value":
            return {"s": {"x": tensor}}
        if holder == "buffer":
            module.register_buffer("x", tensor)
        else:
            module.x = nn.Parameter(tensor)
        return {"s": module}

    with fake_rank(0, 2) as mesh:
        mine, others = shared_out(torch.rand(6, 4), mesh, Shard(0)), OTHERS[name](mesh)
        words = r"DTensor\(torch.float32, shape \(6, 4\), \[Shard\(0\)\] at \(0,\) of mesh \(2,\), cpu\)"
        target = held(others)
        with pytest.raises(ValueError, match=rf"x.*: expected .*({name}).*, found {words} in the table"):
            load(target, capture(held(mine)))
        local = others._local_tensor if isinstance(others, DTensor) else others
        assert bool((local == 1).all())
        with pytest.raises(ValueError, match=rf"x.*: expected {words}, found .*({name}).* in the table"):
            load(held(mine), capture(target))


def test_another_rank_is_another_layout() -> None:
    with fake_rank(0, 2) as mesh:
        table = received(capture({"s": {"x": shared_out(torch.rand(4), mesh, Shard(0))}}))
    with fake_rank(1, 2) as mesh, pytest.raises(ValueError, match=r"expected .* at \(1,\) .* found .* at \(0,\) of"):
        load({"s": {"x": shared_out(torch.rand(4), mesh, Shard(0))}}, table)


def test_a_new_dtype_takes_the_mesh_that_is_there() -> None:
    with fake_rank(0, 2) as mesh:
        values = {"x": shared_out(torch.rand(3, 5).double(), mesh, Shard(0)).t()}
        other = {"x": shared_out(torch.rand(3, 5), mesh, Shard(0)).t()}
        load({"s": other}, received(capture({"s": values})))
        assert other["x"].dtype is torch.float64 and other["x"].stride() == (1, 5)
        assert torch.equal(other["x"]._local_tensor, values["x"]._local_tensor)


def test_autograd_sees_that_a_dtensor_was_loaded() -> None:
    with fake_rank(0, 2) as mesh:
        parts = build(mesh, 1)
        version = parts["model"].first._version
        load(parts, received(capture(parts)))
        assert parts["model"].first._version > version


def test_dtensors_are_never_calm() -> None:
    """torch does not count the writes to their shards."""
    with fake_rank(0, 2) as mesh:
        parts = build(mesh, 1)
        first = parts["model"].first
        version = first._local_tensor._version
        train(parts, 1)
        assert first._local_tensor._version == version
        table = capture(parts)
        calm = {table.layout.tensors[number].name for number in table.calm}
        assert "model.plain" in calm and "model.first" not in calm
        assert all(table.layout.tensors[number].shard is None for number in table.calm)


@pytest.mark.parametrize("rank", range(2))
def test_capturing_at_every_step(rank: int) -> None:
    with fake_rank(rank, 2) as mesh:
        parts, recapture = build(mesh, 1), Recapture()
        train(parts, 1)
        for _ in range(5):
            found, expected = recapture.capture(parts), capture(parts)
            assert (found.skeleton, found.digest(), found.calm) == (expected.skeleton, expected.digest(), expected.calm)
            front = found.front_share(((0, found.nbytes),))[0]
            assert sum(view.numel() for view in front.moving_views(found)) > 0
            train(parts, 1)
        assert recapture.full == 1


CHANGES: dict[str, Callable[[Parts, DeviceMesh], object]] = {
    "local": lambda parts, _: setattr(parts["model"].first, "_local_tensor", torch.rand(3, 3)),
    "local's memory": lambda parts, _: parts["model"].first._local_tensor.set_(torch.rand(3, 3)),
    "buffer": lambda parts, mesh: setattr(parts["model"], "mean", shared_out(torch.rand(6), mesh, Replicate())),
    "placement": lambda parts, mesh: setattr(parts["model"], "mean", shared_out(torch.rand(6), mesh, Shard(0))),
    "swap": lambda parts, mesh: torch.utils.swap_tensors(
        parts["model"].mean, shared_out(torch.rand(6), mesh, Shard(0))
    ),
    "moment": lambda parts, mesh: (
        parts["optimizer"].state[parts["model"].first].update(exp_avg=shared_out(torch.rand(5, 3), mesh, Shard(0)))
    ),
    "alias": lambda parts, _: parts["state"].update(alias=parts["model"].first, other=parts["model"].mean.detach()),
    "value": lambda parts, mesh: parts["state"]["ema"].update(first=shared_out(torch.rand(5, 3), mesh, Shard(1))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_is_noticed(change: str) -> None:
    with fake_rank(0, 2) as mesh:
        parts, recapture = build(mesh, 1), Recapture()
        train(parts, 1)
        recapture.capture(parts)
        for _ in range(2):
            CHANGES[change](parts, mesh)
            for _ in range(2):
                found, expected = recapture.capture(parts), capture(parts)
                assert (found.skeleton, found.digest()) == (expected.skeleton, expected.digest())


def test_plain_tensors_are_spelled_as_ever() -> None:
    table = capture({"s": {"x": torch.ones(2, 3)}})
    assert table.skeleton == (
        b'{"format":1,"objects":{"s":{"values":{"dict":[["x",{"tensor":0}]]}}},"tensors":['
        b'{"device":"cpu","dtype":"float32","itemsize":4,"name":"s[\'x\']","order":[0,1],"shape":[2,3]}]}'
    )
    assert Skeleton.from_bytes(table.skeleton).tensors[0].shard is None


def sharded_skeleton() -> bytes:
    with fake_rank(1, 2) as mesh:
        return capture({"s": {"x": shared_out(torch.ones(5, 3), mesh, Shard(0))}}).skeleton


@pytest.mark.parametrize(
    "changes",
    [
        {"global_shape": [4, 3]}, {"global_shape": [5]}, {"global_shape": [5, 4]}, {"global_shape": [-5, 3]},
        {"global_shape": [True, 3]}, {"offsets": [4, 0]}, {"offsets": [-1, 0]}, {"offsets": [3.0, 0]},
        {"offsets": [3, 1]}, {"offsets": [3]}, {"offsets": 3}, {"placements": ["Shard(1)"]}, {"placements": []},
        {"placements": ["Shard(2)"]}, {"placements": ["Partial(sum)"]}, {"placements": [0]}, {"placements": "ab"},
        {"placements": ["Replicate()"]}, {"placements": ["Shard(00)"]}, {"mesh_shape": [1]}, {"mesh_shape": [0]},
        {"mesh_shape": [2, 1]}, {"coordinate": [2]}, {"coordinate": [-1]}, {"coordinate": []}, {"surprise": [1]},
    ],
)  # fmt: skip
def test_a_damaged_shard_is_refused(changes: Any) -> None:
    node = json.loads(sharded_skeleton())
    node["tensors"][0]["shard"].update(changes)
    with pytest.raises(ValueError, match="skeleton"):
        StateTable.empty(json.dumps(node, sort_keys=True, separators=(",", ":")).encode())


@pytest.mark.parametrize("shard", [None, 1, [], {}, "x", {"offsets": [3, 0]}])
def test_what_is_no_shard_is_refused(shard: Any) -> None:
    node = json.loads(sharded_skeleton())
    node["tensors"][0]["shard"] = shard
    with pytest.raises(ValueError, match="skeleton"):
        Skeleton.from_bytes(json.dumps(node, sort_keys=True, separators=(",", ":")).encode())


# Two real processes.


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def network(mesh: DeviceMesh, seed: int) -> Parts:
    torch.manual_seed(seed)
    wholes = {"up": torch.rand(7, 4), "down": torch.rand(4, 7), "one": torch.rand(1, 4)}
    model = nn.ParameterDict(
        {name: nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)])) for name, whole in wholes.items()}
    )
    return {"model": model, "optimizer": torch.optim.Adam(model.parameters(), lr=0.01)}


def learn(parts: Parts, mesh: DeviceMesh, steps: range) -> list[float]:
    model, losses = parts["model"], []
    for step in steps:
        torch.manual_seed(step)
        x = distribute_tensor(torch.rand(6, 4), mesh, [Replicate()])
        loss = ((x * model["one"]) @ model["up"].t() @ model["down"].t() - x).square().mean()
        parts["optimizer"].zero_grad()
        loss.backward()
        for value in model.values():
            value.grad = value.grad.redistribute(placements=value.placements)
        parts["optimizer"].step()
        losses.append(loss.full_tensor().item())  # type: ignore[operator]
    return losses


def one_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        original, other = network(mesh, 1), network(mesh, 2)
        learn(original, mesh, range(3))
        table = received(capture(original))
        load(other, table)
        assert capture(other).digest() == table.digest()
        path = Path(folder)
        (path / f"skeleton-{rank}").write_bytes(table.skeleton)
        (path / f"bytes-{rank}").write_bytes(b"".join(p.numpy().tobytes() for p in table.pieces(0, table.nbytes)))
        wholes = {f"model.{name}": value.detach().full_tensor() for name, value in original["model"].items()}
        for number, value in enumerate(original["model"].values()):
            state = original["optimizer"].state[value]
            wholes[f"optimizer group 0 parameter {number}['exp_avg']"] = state["exp_avg"].full_tensor()
        if rank == 0:
            torch.save(wholes, path / "wholes")
        assert learn(other, mesh, range(3, 6)) == learn(original, mesh, range(3, 6))
        assert capture(other).digest() == capture(original).digest()
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_two_processes_hold_the_whole_between_them(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_rank, args=(free_port(), str(tmp_path)), nprocs=2)
    tables = []
    for rank in range(2):
        table = StateTable.empty((tmp_path / f"skeleton-{rank}").read_bytes())
        stored = torch.frombuffer(bytearray((tmp_path / f"bytes-{rank}").read_bytes()), dtype=torch.uint8)
        at = 0
        for piece in table.pieces(0, table.nbytes):
            piece.copy_(stored[at : at + piece.numel()])
            at += piece.numel()
        tables.append(table)
    wholes = torch.load(tmp_path / "wholes")
    assert len(wholes) == 6
    for name, whole in wholes.items():
        assert torch.equal(assembled(tables, name), whole)
