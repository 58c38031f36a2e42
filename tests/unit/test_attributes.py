"""What is switched on a module comes back with its state: requires_grad, training, plain attributes."""

import json
import math
import struct
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from snapshot.attributes import plain_attributes
from snapshot.capture import capture
from snapshot.load import load
from snapshot.recapture import Recapture
from snapshot.skeleton import Skeleton
from snapshot.table import StateTable


class Block(nn.Module):
    attributes_beside_state: ClassVar[frozenset[str]] = frozenset({"rank"})

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.again = self.body[2]
        self.scale, self.mode, self.limit, self.rank = 1.0, "wide", None, 0
        self.cache: Tensor | None = None
        self.sizes = [1, 2]


def digest(module: nn.Module) -> str:
    return capture({"model": module}).digest()


def set_scale(value: float) -> Callable[[Block], None]:
    def change(block: Block) -> None:
        block.scale = value

    return change


def count(block: Block) -> None:
    block.calls = 3  # type: ignore[assignment]


def freeze_bias(block: Block) -> None:
    block.body[0].bias.requires_grad_(False)


def drop_less(block: Block) -> None:
    block.body[2].p = 0.1


def move_faster(block: Block) -> None:
    block.body[1].momentum = None


def limit(block: Block) -> None:
    block.limit = "none"  # type: ignore[assignment]


CHANGES: dict[str, Callable[[Block], object]] = {
    "frozen": lambda block: block.requires_grad_(False),
    "bias frozen": freeze_bias,
    "eval": lambda block: block.eval(),
    "part in eval": lambda block: block.body[1].eval(),
    "dropout": drop_less,
    "momentum": move_faster,
    "negative zero": set_scale(-0.0),
    "nan": set_scale(math.nan),
    "another nan": set_scale(struct.unpack("<d", struct.pack("<Q", 0x7FF8_0000_0000_0001))[0]),
    "int": set_scale(1),
    "bool": set_scale(True),
    "from None": limit,
    "new": count,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_switched_changes_the_digest_and_comes_back(change: Callable[[Block], object]) -> None:
    original, other, untouched = Block(), Block(), Block()
    before = digest(untouched)
    load({"model": original}, capture({"model": untouched}))
    load({"model": other}, capture({"model": untouched}))
    first = capture({"model": other}).skeleton
    change(original)
    assert digest(original) != before
    for _ in range(2):  # into one that lacks the change, and one that has it
        load({"model": other}, capture({"model": original}))
        assert digest(other) == digest(original)
    load({"model": other}, capture({"model": untouched}))
    assert digest(other) == before and capture({"model": other}).skeleton == first


def test_each_of_the_changes_is_another_state() -> None:
    digests = set()
    for change in CHANGES.values():
        torch.manual_seed(1)
        block = Block()
        change(block)
        digests.add(digest(block))
    assert len(digests) == len(CHANGES)


def test_what_is_plain() -> None:
    block = Block()
    assert plain_attributes(block) == {"cache": None, "limit": None, "mode": "wide", "scale": 1.0, "training": True}
    assert list(plain_attributes(block)) == sorted(plain_attributes(block))
    assert plain_attributes(nn.Dropout(0.25)) == {"inplace": False, "p": 0.25, "training": True}


def test_what_torch_compile_leaves_on_a_module_is_no_state() -> None:
    plain, compiled = nn.Dropout(0.25), nn.Dropout(0.25)
    torch.compile(compiled, backend="eager")
    assert plain_attributes(compiled) == plain_attributes(plain)
    one, other = (torch.compile(nn.Linear(2, 2), backend="eager") for _ in range(2))
    load({"model": other}, capture({"model": one}))
    assert digest(other) == digest(one)


def test_a_part_that_stands_twice_is_stored_once() -> None:
    structure: Any = capture({"model": Block()}).layout.objects["model"]
    paths = [path for path, _ in structure["module"]["attributes"]]
    assert paths == ["", "body", "body.0", "body.1", "body.2"]


def test_what_a_class_calls_no_state_is_neither_stored_nor_changed() -> None:
    one, other = Block(), Block()
    load({"model": other}, capture({"model": one}))
    one.rank = 1
    assert digest(one) == digest(other)
    load({"model": one}, capture({"model": other}))
    assert one.rank == 1


def test_what_is_not_plain_now_stays_unless_a_plain_value_was_captured() -> None:
    empty, full = Block(), Block()
    full.cache = torch.ones(2)
    load({"model": empty}, capture({"model": full}))
    assert empty.cache is None
    load({"model": full}, capture({"model": empty}))
    assert full.cache is None and full.sizes == [1, 2]


def test_an_attribute_that_the_loop_added_goes_with_a_rollback_and_one_that_was_built_stays() -> None:
    block = Block()
    table = capture({"model": block})
    block.added = 1  # type: ignore[assignment]
    load({"model": block}, table)
    assert not hasattr(block, "added")
    newer = Block()
    newer.added = 1  # type: ignore[assignment]
    load({"model": newer}, table)
    assert newer.added == 1


def test_a_parameter_is_never_hidden_by_an_attribute_of_its_name() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    one.scale = None  # type: ignore[assignment]
    other.register_parameter("scale", None)
    load({"model": other}, capture({"model": one}))
    assert "scale" not in vars(other) and other.scale is None


def test_other_parts_are_refused() -> None:
    table = capture({"model": nn.Sequential(nn.Linear(2, 2), nn.Dropout())})
    with pytest.raises(ValueError, match=r"model: modules: the table lacks \[\] and has, not expected, \['1'\]"):
        load({"model": nn.Sequential(nn.Linear(2, 2))}, table)


def test_a_mismatch_switches_nothing() -> None:
    one, other = Block(), Block()
    one.eval().requires_grad_(False)
    with pytest.raises(ValueError, match="state: kind"):
        load({"model": other, "state": nn.Linear(1, 1)}, capture({"model": one, "state": {}}))
    assert other.training and all(parameter.requires_grad for parameter in other.parameters())


def without_flags(table: StateTable) -> StateTable:
    """As earlier versions wrote it."""
    node = json.loads(table.skeleton)
    for structure in node["objects"].values():
        for field in ("attributes", "frozen"):
            structure.get("module", {}).pop(field, None)
        for group in structure.get("optimizer", {}).get("groups", ()):
            for member in group["parameters"]:
                del member["parameter"]
    spelled = json.dumps(node, sort_keys=True, separators=(",", ":")).encode()
    return StateTable(layout=Skeleton.from_bytes(spelled), tensors=table.tensors)


def test_a_state_of_an_earlier_version_leaves_flags_alone() -> None:
    def parts() -> dict[str, Any]:
        model = Block()
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1)}

    one, other = parts(), parts()
    one["model"].eval()
    other["model"].requires_grad_(False).scale = 2.0
    load(other, without_flags(capture(one)))
    model = other["model"]
    assert model.training and model.scale == 2.0 and not model.body[0].weight.requires_grad
    assert torch.equal(model.body[0].weight, one["model"].body[0].weight)


def test_changes_of_flags_take_no_full_capture() -> None:
    block, recapture = Block(), Recapture()
    objects = {"model": block}
    recapture.capture(objects)
    for number, change in enumerate([*CHANGES.values(), lambda _: None]):
        change(block)
        block.body.calls = number  # type: ignore[assignment]
        block.cache = torch.ones(number) if number % 3 else None
        found, expected = recapture.capture(objects), capture(objects)
        assert found.skeleton == expected.skeleton and found.layout == expected.layout
    del block.body.calls
    assert recapture.capture(objects).skeleton == capture(objects).skeleton
    assert recapture.full == 1


def test_earlier_tables_keep_their_attributes() -> None:
    block, recapture = Block(), Recapture()
    tables = []
    for number in range(4):
        block.scale = float(number)
        tables.append(recapture.capture({"model": block}))
    assert len({table.skeleton for table in tables}) == 4
    assert all(table.layout.to_bytes() == table.skeleton for table in tables)


def test_what_is_not_plain_is_not_kept_alive() -> None:
    import weakref

    block, recapture = Block(), Recapture()
    block.cache = torch.ones(3)
    seen = weakref.ref(block.cache)
    recapture.capture({"model": block})
    block.cache = None
    assert seen() is None
