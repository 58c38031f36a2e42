"""Capturing and loading the objects of a training script: bits, aliasing, identity, refusals."""

import copy
import json
import warnings
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from snapshot.capture import capture
from snapshot.load import load
from snapshot.skeleton import Skeleton
from snapshot.table import StateTable

Parts = dict[str, Any]


def received(table: StateTable, *, chunk: int = 1000) -> StateTable:
    """The table as another process gets it: from its skeleton and bytes alone."""
    data = b"".join(piece.cpu().numpy().tobytes() for piece in table.pieces(0, table.nbytes))
    copied = StateTable.empty(table.skeleton)
    for start in range(0, copied.nbytes, chunk):
        position = start
        for piece in copied.pieces(start, min(start + chunk, copied.nbytes)):
            piece.numpy()[:] = np.frombuffer(data, np.uint8, count=piece.numel(), offset=position)
            position += piece.numel()
    return copied


class Network(nn.Module):
    """Tied weights, a buffer that state_dict leaves out, statistics, extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.out = nn.Linear(4, 6, bias=False)
        self.tied = nn.Linear(4, 6)
        self.tied.weight = self.out.weight
        self.register_buffer("scale", torch.rand(3), persistent=False)
        self.register_buffer("later", None)
        self.calls = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.norm(self.embed(x)).relu()
        return self.out(hidden) * self.scale.sum() + self.tied(hidden)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd-plain": lambda p: torch.optim.SGD(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, foreach=False),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "tensor-lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), foreach=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=50),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=7),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [2, 2, 5]),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[3],
    ),
}


def build(seed: int, optimizer: str = "adamw", scheduler: str = "cosine") -> Parts:
    torch.manual_seed(seed)
    model = Network()
    built = OPTIMIZERS[optimizer]([{"params": model.embed.parameters()}, {"params": rest_of(model)}])
    return {
        "model": model,
        "optimizer": built,
        "scheduler": SCHEDULERS[scheduler](built),
        "scaler": torch.amp.GradScaler("cpu", init_scale=128.0),
        "state": {"seen": seed, "ema": torch.rand(5), "name": f"run {seed}"},
    }


def rest_of(model: Network) -> list[nn.Parameter]:
    first = {id(parameter) for parameter in model.embed.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in first]


def train(parts: Parts, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.rand(8, 6, generator=generator)
        loss = (parts["model"](x) - x).square().mean()
        parts["optimizer"].zero_grad()
        parts["scaler"].scale(loss).backward()
        parts["scaler"].step(parts["optimizer"])
        parts["scaler"].update()
        plateau = isinstance(parts["scheduler"], lr_scheduler.ReduceLROnPlateau)
        parts["scheduler"].step(*([loss.item()] if plateau else []))
        parts["state"]["seen"] += 1
        parts["state"]["ema"].mul_(0.5).add_(loss.detach())
        losses.append(loss.item())
    return losses


@pytest.fixture(autouse=True)
def _quiet_sequential() -> Any:
    with warnings.catch_warnings():
        # SequentialLR itself calls its parts with an argument that torch deprecates.
        warnings.filterwarnings("ignore", message="The epoch parameter in `scheduler.step")
        yield


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_continues_with_the_same_bits_for_each_optimizer(optimizer: str) -> None:
    check_continues(optimizer, "multistep")


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_training_continues_with_the_same_bits_for_each_scheduler(scheduler: str) -> None:
    check_continues("sgd", scheduler)


def check_continues(optimizer: str, scheduler: str) -> None:
    original, other = build(1, optimizer, scheduler), build(2, optimizer, scheduler)
    train(original, range(5))
    table = received(capture(original))
    assert table.digest() == capture(original).digest()
    train(other, range(3))  # a state that is in the way
    load(other, table)
    assert capture(other).digest() == table.digest()
    assert train(other, range(5, 10)) == train(original, range(5, 10))
    assert capture(other).digest() == capture(original).digest()
    untouched = build(3, optimizer, scheduler)
    load(untouched, table)
    assert capture(untouched).digest() == table.digest()


def test_loading_keeps_identity() -> None:
    original, other = build(1), build(2)
    train(original, range(2))
    train(other, range(1))
    model, optimizer = other["model"], other["optimizer"]
    before = [*model.parameters(), *model.buffers(), other["state"]["ema"]]
    moments = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    dicts = [other["state"], *optimizer.param_groups, *(optimizer.state[p] for p in model.parameters())]
    load(other, received(capture(original)))
    after = [*model.parameters(), *model.buffers(), other["state"]["ema"]]
    assert all(a is b for a, b in zip(before, after, strict=True))
    now = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    assert all(a is b for a, b in zip(moments, now, strict=True))
    dicts_now = [other["state"], *optimizer.param_groups, *(optimizer.state[p] for p in model.parameters())]
    assert all(a is b for a, b in zip(dicts, dicts_now, strict=True))
    assert model.out.weight is model.tied.weight
    assert model.calls == original["model"].calls == 2


def test_fp32_state_of_bf16_parameters_stays_fp32() -> None:
    def parts(seed: int) -> Parts:
        torch.manual_seed(seed)
        weight = nn.Parameter(torch.rand(5).bfloat16())
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        optimizer.state[weight]["momentum_buffer"] = torch.rand(5, dtype=torch.float32)
        model = nn.ParameterList([weight])
        return {"model": model, "optimizer": optimizer}

    original, other = parts(1), parts(2)
    expected = original["optimizer"].state[original["model"][0]]["momentum_buffer"]
    other["optimizer"].state.clear()
    load(other, received(capture(original)))
    found = other["optimizer"].state[other["model"][0]]["momentum_buffer"]
    assert found.dtype is torch.float32 and torch.equal(found, expected)


def test_state_that_the_table_lacks_is_removed() -> None:
    fresh, trained = build(1), build(2)
    table = received(capture(fresh))
    train(trained, range(2))
    trained["optimizer"].state["shared"] = {"count": 1}
    load(trained, table)
    assert not trained["optimizer"].state
    assert capture(trained).digest() == table.digest()


def test_state_shared_by_all_parameters() -> None:
    original, other = build(1), build(2)
    original["optimizer"].state["shared"] = {"count": 3, "sum": torch.rand(2)}
    load(other, received(capture(original)))
    assert other["optimizer"].state["shared"]["count"] == 3


def test_state_of_a_parameter_in_no_group_is_refused() -> None:
    parts = build(1)
    parts["optimizer"].state[torch.rand(3)] = {"step": 1}
    with pytest.raises(ValueError, match=r"optimizer: state for a tensor of shape \(3,\)"):
        capture(parts)


def test_tied_weights_are_stored_once() -> None:
    table = capture({"model": Network()})
    names = [spec.name for spec in table.layout.tensors]
    assert "model.out.weight" in names and "model.tied.weight" not in names


def test_it_is_known_which_buffers_state_dict_has_and_loading_minds_only_the_others_bits() -> None:
    original, other = build(1), build(2)
    original["model"].register_buffer("kept", torch.rand(2))
    other["model"].register_buffer("kept", torch.rand(2), persistent=False)
    table = capture(original)
    module: Any = table.layout.objects["model"]
    known = {path: persistent for path, _, persistent in module["module"]["buffers"]}
    assert known == {
        "kept": True,
        "later": True,
        "norm.num_batches_tracked": True,
        "norm.running_mean": True,
        "norm.running_var": True,
        "scale": False,
    }
    load(other, received(table))
    assert torch.equal(other["model"].kept, original["model"].kept)
    assert "kept" not in other["model"].state_dict()


def test_a_buffer_that_was_none_or_grew_is_replaced() -> None:
    original, other = Network(), Network()
    original.later = torch.arange(4)
    original.scale = torch.rand(7)
    load({"model": other}, received(capture({"model": original})))
    assert torch.equal(other.later, original.later) and torch.equal(other.scale, original.scale)
    load({"model": other}, received(capture({"model": Network()})))
    assert other.later is None


def test_the_table_refers_to_live_tensors() -> None:
    model = nn.Linear(3, 2)
    table = capture({"model": model})
    before = table.digest()
    with torch.no_grad():
        model.weight[1, 2] += 1
    assert table.digest() != before
    assert table.digest() == capture({"model": model}).digest()


def test_the_digest_sees_every_bit() -> None:
    table = received(capture({"state": {"x": torch.rand(3), "flag": torch.tensor(True), "half": torch.ones(2).half()}}))
    seen = {table.digest()}
    (flat,) = [list(table.pieces(0, table.nbytes))]
    for piece in flat:
        for position in range(piece.numel()):
            for bit in range(8):
                piece[position] ^= 1 << bit
                seen.add(table.digest())
                piece[position] ^= 1 << bit
    assert len(seen) == 1 + 8 * table.nbytes


def test_the_digest_sees_structure() -> None:
    x = torch.ones(4)
    states: list[dict[str, Any]] = [
        {"x": x}, {"y": x}, {"x": x.view(2, 2)}, {"x": x.int()}, {"x": [x]}, {"x": (x,)}, {"x": x, "y": x},
        {"x": x, "y": x.clone()}, {"x": x, "n": 1}, {"x": x, "n": True}, {"x": x, "n": 1.0},
    ]  # fmt: skip
    assert len({capture({"state": state}).digest() for state in states}) == len(states)


def test_order_of_objects_does_not_matter() -> None:
    parts = build(1)
    assert capture(parts).digest() == capture(dict(reversed(parts.items()))).digest()


def test_channels_last_needs_no_copy_and_keeps_its_layout() -> None:
    image = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    table = capture({"state": {"image": image}})
    assert table.tensors[0].data_ptr() == image.data_ptr()
    state: dict[str, Any] = {}
    load({"state": state}, received(table))
    assert state["image"].stride() == image.stride() and torch.equal(state["image"], image)


def test_axes_of_size_one_do_not_change_the_digest() -> None:
    for odd in (torch.rand(2, 1, 1, 2).permute(1, 2, 3, 0), torch.rand(1, 3)[:, 1:2]):
        assert capture({"x": {"x": odd}}).digest() == capture({"x": {"x": odd.clone()}}).digest()


def test_slices_and_expanded_tensors() -> None:
    base = torch.arange(24.0).view(4, 6)
    values = {"column": base[:, 2], "expanded": torch.ones(1).expand(5), "reversed": np.arange(5)[::-1]}
    state: dict[str, Any] = {"expanded": torch.zeros(1).expand(5), "column": base.clone()[:, 2]}
    load({"state": state}, received(capture({"state": values})))
    assert state["column"].tolist() == [2, 8, 14, 20] and state["expanded"].tolist() == [1] * 5
    assert state["reversed"].tolist() == [4, 3, 2, 1, 0]


def test_aliasing_in_plain_values_survives() -> None:
    shared, array = torch.rand(3), np.arange(3)
    values = {"a": shared, "b": [shared], "c": torch.rand(3), "d": array, "e": torch.from_numpy(array)}
    common = torch.zeros(3)
    state: dict[str, Any] = {"a": torch.zeros(3), "b": [torch.zeros(3)], "c": common, "x": common}
    load({"state": state}, received(capture({"state": values})))
    assert state["a"] is state["b"][0]
    state["d"][0] = 7
    assert state["e"][0] == 7
    swapped: dict[str, Any] = {"a": common, "b": [common], "c": common}  # shared where the table does not
    load({"state": swapped}, received(capture({"state": values})))
    assert torch.equal(swapped["a"], shared) and torch.equal(swapped["c"], values["c"])


def test_plain_values_come_back_with_their_types() -> None:
    values: dict[Any, Any] = {
        "counter": Counter("abca"), "ordered": OrderedDict(b=1, a=2), (1, "x"): {None: 2, 1.5: 3, False: 4},
        "set": {3, 1, (2, "y")}, "frozen": frozenset([1]), "bytes": b"\x00\xff", "huge": -(10**5000),
        "complex": complex(-0.0, float("inf")), "dtype": torch.bfloat16, "size": torch.Size([2, 3]),
        "device": torch.device("cpu"), "scalar": np.float32(1.1), "longest": np.uint64(2**64 - 1),
        "odd": "\ud800\n",
    }  # fmt: skip
    state: dict[Any, Any] = {}
    load({"state": state}, received(capture({"state": values})))
    assert state == values
    assert [type(value) for value in state.values()] == [type(value) for value in values.values()]
    assert list(state["ordered"]) == ["b", "a"] and type(state["scalar"]) is np.float32


def recursive() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            object(),
            r"state\['x'\]\[0\]: a value of type builtins.object can't be stored without pickle; keep",
        ),
        (print, "builtin_function_or_method"),
        (defaultdict(int), "defaultdict"),
        (np.array(["text"]), "ndarray"),
        (np.longdouble(1), "longdouble"),
        ({torch.rand(1): 1}, "Tensor"),
        (recursive(), "contains itself"),
        (torch.eye(3).to_sparse(), "to_dense"),
        (torch.empty(3, device="meta"), "to_empty"),
        (nn.LazyLinear(3).weight, "forward first"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_stored_is_refused_with_a_remedy(value: object, message: str) -> None:
    with pytest.raises(TypeError, match=message) as raised:
        capture({"state": {"x": [value]}})
    assert str(raised.value).startswith("state['x'][0]")


def test_an_object_without_state_is_refused() -> None:
    with pytest.raises(TypeError, match=r"thing: int has no state .* state_dict"):
        capture({"thing": 3})


class Wider(Network):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 7, bias=False)


class Untied(Network):
    def __init__(self) -> None:
        super().__init__()
        self.tied.weight = nn.Parameter(self.out.weight.detach().clone())


def with_model(model: Network) -> Parts:
    parts = build(2)
    optimizer = torch.optim.AdamW([{"params": model.embed.parameters()}, {"params": rest_of(model)}], lr=0.01)
    return parts | {"model": model, "optimizer": optimizer, "scheduler": SCHEDULERS["cosine"](optimizer)}


def without(parts: Parts, name: str) -> Parts:
    return {key: value for key, value in parts.items() if key != name}


def with_retyped_buffer() -> Parts:
    parts = build(2)
    parts["model"].scale = parts["model"].scale.double()
    return parts


@pytest.mark.parametrize(
    ("receiver", "message"),
    [
        (lambda: without(build(2), "scaler"), r"objects: .*has, not expected, \['scaler'\]"),
        (lambda: build(2) | {"extra": {}}, r"objects: the table lacks \['extra'\]"),
        (lambda: build(2) | {"state": nn.Linear(1, 1)}, "state: kind"),
        (lambda: with_model(Wider()), r"model.out.weight: expected .*\(7, 4\).*found .*\(6, 4\)"),
        (lambda: with_model(Untied()), r"model.tied.weight: expected .* its own, found it tied to model.out"),
        (lambda: build(2) | {"model": nn.Sequential(nn.Linear(2, 2))}, "model: parameters: the table lacks"),
        (with_retyped_buffer, r"model.scale: expected Tensor\(torch.float64.*found Tensor\(torch.float32"),
        (lambda: build(2, optimizer="sgd"), r"optimizer group 0: .*the table lacks \['dampening'"),
        (lambda: build(2) | {"optimizer": OPTIMIZERS["sgd"](Network().parameters())}, r"place 0, .* no module here"),
        (lambda: build(2, scheduler="onecycle"), "scheduler: fields: the table lacks"),
        (lambda: build(2) | {"scaler": torch.amp.GradScaler("cpu", enabled=False)}, "scaler: fields"),
    ],
)  # fmt: skip
def test_a_mismatch_changes_nothing(receiver: Callable[[], Parts], message: str) -> None:
    original, other = build(1), receiver()
    train(original, range(2))
    table = received(capture(original))
    before = capture(other).digest()
    with pytest.raises(ValueError, match=message):
        load(other, table)
    assert capture(other).digest() == before


def test_a_table_that_is_less_tied_than_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.tied.weight: expected it tied to model.out.weight, found"):
        load({"model": Network()}, capture({"model": Untied()}))


class Picky:
    """Refuses what it is given."""

    def state_dict(self) -> dict[str, Any]:
        return {"weight": torch.ones(2)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise RuntimeError("no")


def test_an_object_that_refuses_leaves_torch_objects_alone() -> None:
    original, other = build(1) | {"picky": Picky()}, build(2) | {"picky": Picky()}
    before = capture(without(other, "scheduler")).digest()
    with pytest.raises(RuntimeError, match="no"):
        load(other, received(capture(original)))
    assert capture(without(other, "scheduler")).digest() == before


def test_what_an_object_keeps_is_not_the_table() -> None:
    class Keeping(Picky):
        kept: Tensor

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.kept = state["weight"]

    keeping, table = Keeping(), received(capture({"x": Keeping()}))
    load({"x": keeping}, table)
    keeping.kept.zero_()
    assert table.tensors[0].tolist() == [1, 1]


def test_pieces_refuse_a_range_outside() -> None:
    table = capture({"state": {"x": torch.ones(3), "none": torch.empty(0, 4)}})
    assert table.nbytes == 12 and list(table.pieces(12, 12)) == []
    for start, stop in [(-1, 3), (3, 2), (0, 13)]:
        with pytest.raises(ValueError, match=r"not within 0\.\.12"):
            list(table.pieces(start, stop))


def change(skeleton: bytes, **changes: Any) -> bytes:
    node = json.loads(skeleton)
    node["tensors"][0].update(changes)
    return json.dumps(node, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [-1]}, {"shape": [2.0]}, {"shape": "ab"}, {"shape": [2**62, 2**62]}, {"itemsize": 0},
        {"itemsize": 8},
        {"dtype": "os.system"}, {"dtype": "qint8"}, {"order": [1]}, {"order": [0, 0]}, {"surprise": 1},
    ],
)  # fmt: skip
def test_a_damaged_skeleton_is_refused(changes: Any) -> None:
    skeleton = capture({"state": {"x": torch.ones(3)}}).skeleton
    with pytest.raises(ValueError, match="skeleton"):
        StateTable.empty(change(skeleton, **changes))


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[1]", b"\xff", b'{"format":2}', b"[" * 100_000, b'{"objects":{},"format":1,"tensors":[]}'],
)
def test_what_is_no_skeleton_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="skeleton"):
        Skeleton.from_bytes(data)


def test_capturing_changes_nothing() -> None:
    parts = build(1)
    train(parts, range(2))
    model = parts["model"]
    expected = copy.deepcopy(model.state_dict())
    versions = [parameter._version for parameter in model.parameters()]
    capture(parts).digest()
    assert [parameter._version for parameter in model.parameters()] == versions
    assert all(
        torch.equal(a, b)
        for a, b in zip(expected.values(), model.state_dict().values(), strict=False)
        if isinstance(a, Tensor)
    )
