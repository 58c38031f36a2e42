"""Partial sums and the exchange: same bits for any dealing, nothing written into what is kept."""

from __future__ import annotations

import ctypes
import itertools
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from actors.device_link import NcclLink
from actors.group import Gloo, Group, _gloo_options
from actors.group_store import GroupStoreServer
from actors.pending import Waits
from resilient.core import planner
from resilient.core.plan import Address, Place, Plan
from resilient.core.tree import Node, fold_order, leaf, owned, roots, split
from resilient.exact import PartialSums
from resilient.exchange import Scratch, _fold, exchange, exchange_fast
from resilient.payload import Layout, Means, Payload, Pool
from tests.nccl import Nccl

CPU = torch.device("cpu")


def plan_of(leaves: list[list[int]], micro_batches: int, address: Address | None = None) -> Plan:
    places = tuple(
        Place(member=n + 1, node=f"n{n}", address=address or Address(host="127.0.0.1", port=1))
        for n in range(len(leaves))
    )
    return Plan(
        generation=1,
        base=0,
        kind="initial",
        places=places,
        leaves=tuple(tuple(sorted(own)) for own in leaves),
        micro_batches=micro_batches,
        joiners=(),
        reason="test",
    )


def example(index: int, absent: float) -> list[torch.Tensor | None]:
    rng = torch.Generator().manual_seed(index)
    draw = random.Random(index)
    values: list[torch.Tensor | None] = [
        torch.randn(37, 5, generator=rng) * 10 ** draw.uniform(-6, 6),
        torch.randn(1000, generator=rng).bfloat16(),
        torch.tensor(-0.0),
        torch.randn(700_000, generator=rng),
        torch.tensor([index + 7]),
        torch.full((3, 11), 60000.0).half() + index,
        torch.randn(20, generator=rng).to(torch.float8_e4m3fn),
        torch.randn(20, generator=rng).to(torch.float8_e5m2),
        torch.complex(torch.randn(9, generator=rng), torch.randn(9, generator=rng)).to(torch.complex128),
    ]
    return [None if number != 2 and draw.random() < absent else value for number, value in enumerate(values)]


RULES = ("sum", "sum", "sum", "sum", "first", "sum", "sum", "first", "sum")
SUM_TYPES = {1: torch.float32, 5: torch.float32, 6: torch.float32}
"""Of those that are not added in their own type."""
LAYOUT = Layout.of([(f"t{n}", t, RULES[n]) for n, t in enumerate(example(0, 0.0))])  # type: ignore[arg-type, misc]


def tree_sum(node: Node, leaves: list[list[torch.Tensor | None]], number: int) -> torch.Tensor | None:
    """The obvious twin."""
    if node.size == 1:
        leaf = leaves[node.start][number]
        return None if leaf is None else leaf.to(SUM_TYPES.get(number, leaf.dtype))
    left, right = (tree_sum(side, leaves, number) for side in split(node))
    if left is None or right is None:
        return right if left is None else left
    return left if RULES[number] == "first" else left + right


def check(result: Payload, leaves: list[list[torch.Tensor | None]], micro_batches: int) -> None:
    for number, entry in enumerate(LAYOUT.entries):
        name = int(entry.name[1:])
        expected = tree_sum(Node(0, micro_batches), leaves, name)
        assert result.counts[number] == sum(values[name] is not None for values in leaves)
        if expected is not None:
            assert torch.equal(
                result.views[number].view(torch.uint8).flatten()
                if entry.shape
                else result.views[number].reshape(1).view(torch.uint8),
                expected.reshape(-1).view(torch.uint8),
            ), entry.name


def check_means(means: dict[int, torch.Tensor], leaves: list[list[torch.Tensor | None]]) -> None:
    count = len(leaves)
    for number, mean in means.items():
        name = int(LAYOUT.entries[number].name[1:])
        total, own = tree_sum(Node(0, count), leaves, name), example(0, 0.0)[name]
        assert total is not None and own is not None and mean.is_contiguous()
        assert bits(mean) == bits((total / count).to(own.dtype)), name


def bits(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


SUMMED = [section for section in LAYOUT.sections if section.rule == "sum"]


def ordered(values: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [values[int(entry.name[1:])] for entry in LAYOUT.entries]


@pytest.mark.parametrize("micro_batches", range(1, 18))
def test_roots_cover_and_fold_order_ends_at_the_whole(micro_batches: int) -> None:
    draw = random.Random(micro_batches)
    for _ in range(30):
        own = [n for n in range(micro_batches) if draw.random() < 0.5]
        rest = [n for n in range(micro_batches) if n not in own]
        for leaves in (own, rest):
            assert sorted(n for node in roots(micro_batches, leaves) for n in range(*node)) == leaves
        order = fold_order(micro_batches, {*roots(micro_batches, own), *roots(micro_batches, rest)})
        if order:
            assert order[-1].target == Node(0, micro_batches)


@pytest.mark.parametrize("micro_batches", range(1, 18))
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_all_roots_in_one_pass_are_those_of_rank_after_rank(micro_batches: int, ranks: int) -> None:
    draw = random.Random(micro_batches)
    for reach in (1, 3, 30):
        owners = [draw.randrange(ranks) if n % reach == 0 else -1 for n in range(micro_batches)]
        for n, owner in enumerate(owners):
            owners[n] = owners[n - 1] if owner < 0 else owner
        each = [[n for n, owner in enumerate(owners) if owner == rank] for rank in range(ranks)]
        expected = {root: rank for rank, leaves in enumerate(each) for root in roots(micro_batches, leaves)}
        found, order = owned(owners)
        assert found == expected and list(found) == sorted(expected)
        assert order == fold_order(micro_batches, expected)


@pytest.mark.parametrize("frozen_after", [None, 2, 5])
@pytest.mark.parametrize("absent", [0.0, 0.4])
def test_any_order_of_leaves_gives_the_same_bits(absent: float, frozen_after: int | None) -> None:
    leaves = [example(n, absent) for n in range(11)]
    for seed in range(4):
        sums = PartialSums(11, Pool(LAYOUT, CPU))
        order = list(range(11))
        random.Random(seed).shuffle(order)
        for turn, index in enumerate(order):
            if turn == frozen_after:
                sums.freeze()
                before = {node: (payload, payload.flat.clone()) for node, payload in sums.nodes.items()}
            sums.add_leaf(index, ordered(leaves[index]))
        if frozen_after is not None:
            assert all(torch.equal(payload.flat, copy) for payload, copy in before.values())
        check(sums.nodes[Node(0, 11)], leaves, 11)


def run_ranks(
    leaves: list[list[int]], micro_batches: int, absent: float, fast: bool = False, device_name: str = ""
) -> list[Payload]:
    """device_name: of each rank's device, where {} is its rank."""
    values = [example(n, absent) for n in range(micro_batches)]
    store = GroupStoreServer("127.0.0.1", "secret")
    plan = plan_of(leaves, micro_batches, Address(host="127.0.0.1", port=store.port))
    results: dict[int, Payload] = {}

    def one(rank: int) -> None:
        group = Group(
            store=("127.0.0.1", store.port),
            secret="secret",
            host="127.0.0.1",
            prefix="t",
            rank=rank,
            size=plan.size,
            device=CPU,
            device_name=device_name.format(rank),
        )
        sums = PartialSums(micro_batches, Pool(LAYOUT, CPU))
        for index in plan.leaves[rank]:
            sums.add_leaf(index, ordered(values[index]))
        kept = {node: payload.flat.clone() for node, payload in sums.nodes.items()}
        result, scratch = Payload(LAYOUT, CPU), Scratch()
        for _ in range(2):
            if fast:
                result.counts = [0] * len(result.counts)
                exchange_fast(group, sums.nodes, result)
            else:
                everyone = None
                if absent:
                    everyone = counts_of(plan, values)
                exchange(group, plan, sums.nodes, result, scratch, everyone)
        assert all(torch.equal(sums.nodes[node].flat, copy) for node, copy in kept.items())
        results[rank] = result
        group.minimum([0])

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(plan.size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    store.close()
    assert len(results) == plan.size
    if not fast:
        for result in results.values():
            check(result, values, micro_batches)
    return [results[rank] for rank in range(plan.size)]


def counts_of(plan: Plan, values: list[list[torch.Tensor | None]]) -> dict[Node, list[int]]:
    found = {}
    for own in plan.leaves:
        for root in roots(plan.micro_batches, own):
            rows = [ordered(values[n]) for n in range(*root)]
            found[root] = [sum(row[e] is not None for row in rows) for e in range(len(LAYOUT.entries))]
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("absent", [0.0, 0.4])
def test_exchange_gives_every_rank_the_tree_sum(ranks: int, absent: float) -> None:
    run_ranks([list(run) for run in planner.even_runs(8, ranks)], 8, absent)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("device_name", ["one for all", "of rank {}"])
def test_by_a_devices_link_the_exchange_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, device_name: str, fast: bool
) -> None:
    """Through host memory, or in batches that only a stream waits for."""

    def connect(store: Any, rank: int, size: int, device: torch.device, waits: Waits) -> NcclLink:
        return NcclLink(Nccl(Gloo(store, rank, size, _gloo_options("127.0.0.1"))), device, waits)

    monkeypatch.setattr(NcclLink, "connect", connect)
    leaves = [list(run) for run in planner.even_runs(8, 3)]
    plain, by_link = run_ranks(leaves, 8, 0.4, fast), run_ranks(leaves, 8, 0.4, fast, device_name)
    assert [one.counts for one in plain] == [one.counts for one in by_link]
    for one, other in zip(plain, by_link, strict=True):
        for number, count in enumerate(one.counts):
            if count and not fast:
                (bits, same) = (each.views[number].reshape(-1).view(torch.uint8) for each in (one, other))
                assert bits.equal(same)


def whole(leaves: list[list[torch.Tensor | None]]) -> Payload:
    sums = PartialSums(len(leaves), Pool(LAYOUT, CPU))
    for index, values in enumerate(leaves):
        sums.add_leaf(index, ordered(values))
    return sums.nodes[Node(0, len(leaves))]


def test_the_memory_of_sums_is_used_again() -> None:
    pool = Pool(LAYOUT, CPU)
    sums, seen = PartialSums(8, pool), []
    for _ in range(3):
        for index in (0, 2, 4, 6, 7, 5, 3, 1):
            sums.add_leaf(index, ordered(example(index, 0.0)))
        sums.clear()
        taken = [pool.take() for _ in range(6)]
        seen.append({payload.flat.data_ptr() for payload in taken})
        for payload in taken:
            pool.give_back(payload)
    assert seen[0] == seen[1] == seen[2]


def test_means_are_rounded_once_to_the_tensors_own_type() -> None:
    leaves = [example(n, 0.0) for n in range(7)]
    check_means(Means(LAYOUT, SUMMED, CPU).of(whole(leaves).flat, 7), leaves)


def test_the_memory_of_means_is_used_again() -> None:
    means = Means(LAYOUT, SUMMED, CPU)
    total = whole([example(n, 0.0) for n in range(3)]).flat
    assert len({means.of(total, 3)[0].data_ptr() for _ in range(4)}) == 1


@pytest.mark.parametrize(
    "hold",
    [
        lambda mean: mean,
        lambda mean: mean.detach(),
        lambda mean: mean[1:],
        lambda mean: mean.numpy(),
        lambda mean: mean.untyped_storage(),
        lambda mean: {"kept": [mean.view(-1)]},
    ],
)
def test_the_memory_of_means_that_somebody_holds_is_not(hold: Callable[[torch.Tensor], object]) -> None:
    means = Means(LAYOUT, SUMMED, CPU)
    leaves = [[example(n + shift, 0.0) for n in range(3)] for shift in (0, 5)]
    first = means.of(whole(leaves[0]).flat, 3)
    (number,) = (n for n, entry in enumerate(LAYOUT.entries) if entry.name == "t0")
    address, held = first[number].data_ptr(), hold(first[number])
    kept = ctypes.string_at(address, first[number].nbytes)
    del first
    second = means.of(whole(leaves[1]).flat, 3)
    check_means(second, leaves[1])
    assert ctypes.string_at(address, len(kept)) == kept
    address = second[number].data_ptr()
    del second, held
    assert means.of(whole(leaves[0]).flat, 3)[number].data_ptr() == address


def test_exchange_of_scattered_leaves() -> None:
    run_ranks([[0, 3, 7], [1, 2, 9, 10], [4, 5, 6, 8]], 11, 0.3)


@pytest.mark.parametrize("own", [own for count in range(5) for own in itertools.combinations(range(4), count)])
@pytest.mark.parametrize("absent", [0.0, 0.4])
def test_folding_writes_into_what_was_received_and_never_into_a_partial_sum(
    own: tuple[int, ...], absent: float
) -> None:
    """A partial sum that has been written into would be sent again, as if it were one, after another rank's death."""
    leaves = [example(n, absent) for n in range(4)]
    payloads = {leaf(n): Payload(LAYOUT, CPU) for n in range(4)}
    for (node, payload), values in zip(payloads.items(), leaves, strict=True):
        for view, value in zip(payload.views, ordered(values), strict=True):
            view.fill_(1) if value is None else view.copy_(value)
        payload.counts = [int(value is not None) for value in ordered(values)]
        assert node.size == 1
    sums = {leaf(n): payloads[leaf(n)] for n in own}
    received = {node: payload.flat.clone() for node, payload in payloads.items() if node not in sums}
    kept = {node: payload.flat.clone() for node, payload in sums.items()}
    result = Payload(LAYOUT, CPU)
    counts = {node: payload.counts for node, payload in payloads.items()} if absent else None
    _fold(LAYOUT, sums, received, fold_order(4, payloads), result.flat, 0, LAYOUT.nbytes, counts)
    assert all(torch.equal(sums[node].flat, copy) for node, copy in kept.items())
    result.counts = [sum(payload.counts[entry] for payload in payloads.values()) for entry in range(len(result.counts))]
    check(result, leaves, 4)


def test_a_route_is_made_once_per_plan() -> None:
    scratch, plans = Scratch(), [plan_of([[0], [1]], 2), plan_of([[1], [0]], 2)]
    routes = [scratch.route(plan, 0) for plan in (*plans, plans[1])]
    assert routes[1] is routes[2] and [route.plan for route in routes[:2]] == plans


def test_fast_reduction_agrees_on_all_ranks() -> None:
    results = run_ranks([[0, 1, 2], [3, 4], [5, 6, 7]], 8, 0.0, fast=True)
    for other in results[1:]:
        assert torch.equal(results[0].flat, other.flat) and results[0].counts == other.counts
    (big,) = (view for entry, view in zip(LAYOUT.entries, results[0].views, strict=True) if entry.name == "t5")
    assert big.tolist() == [[8 * 60000.0] * 11] * 3
    assert leaf(0) == Node(0, 1)
