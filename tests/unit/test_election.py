"""Which snapshot is elected, where its bytes come from, and what is said where there is none."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from snapshot.core.branches import Branch, Lineage
from snapshot.core.decoding import Decode, Read
from snapshot.core.election import Elected, NotRecoverable, elect
from snapshot.core.inventory import ImageFound, Inventory, NodeImage, ParityFound, ShardFound
from snapshot.core.stripes import PAGE_BYTES, Group
from tests.keepers import images_of, key_of, left, protected

LINE = Lineage(branches=(Branch(number=0),))
FOUR = Group(nodes=("a", "b", "c", "d"), parity=1)
LENGTHS = dict.fromkeys("abcd", 3 * PAGE_BYTES)


def elected(inventories: list[Inventory], line: Lineage = LINE) -> Elected:
    outcome = elect(inventories, line)
    assert isinstance(outcome, Elected), outcome
    assert elect(inventories[::-1], line) == outcome
    return outcome


def not_recoverable(inventories: list[Inventory], line: Lineage = LINE) -> NotRecoverable:
    outcome = elect(inventories, line)
    assert isinstance(outcome, NotRecoverable), outcome
    assert elect(inventories[::-1], line) == outcome
    return outcome


def step(number: int, *, branch: int = 0, generation: int = 1, ring: int = 1) -> list[Inventory]:
    return protected(key_of(number, branch=branch, generation=generation), [FOUR], LENGTHS, ring)


def without_images(snapshot: list[Inventory]) -> list[Inventory]:
    return [replace(inventory, images=()) for inventory in snapshot]


def changed(snapshot: list[Inventory], keeper: str, image: NodeImage) -> list[Inventory]:
    """Where one keeper says something else of its image."""
    return [
        replace(found, images=(replace(found.images[0], image=image),)) if found.keeper == keeper else found
        for found in snapshot
    ]


# Which


def test_the_newest_step() -> None:
    outcome = elected(left(step(41), step(43), step(42)))
    assert outcome.key == key_of(43)
    assert outcome.images == tuple(Read(image=image, held_by=node) for node, image in images_of(LENGTHS).items())
    assert outcome.reason == "step 43 of branch 0 (generation 1, attempt 1): all 4 nodes' images are whole"
    assert (outcome.passed_over, outcome.ignored) == ((), ())


def test_the_later_branch_though_its_step_is_lower() -> None:
    line = Lineage(branches=(Branch(number=0), Branch(number=1, parent=0, at_step=40, skipped=(40,))))
    assert elected(left(step(40), step(41, branch=1)), line).key == key_of(41, branch=1)
    outcome = elected(left(step(39), step(40), step(47)), line)
    assert outcome.key == key_of(40)
    assert outcome.ignored == ("step 47 of branch 0 (generation 1, attempt 1): not on the line of branch 1",)


def test_generations_and_rings_are_never_mixed() -> None:
    """Two halves of a step, cut differently, are no whole."""
    first, second = without_images(step(5)), without_images(step(5, generation=2))
    halves = left(step(5)[:2], step(5, generation=2)[2:], step(4))
    assert elected(halves).key == key_of(4)
    assert elected(left(step(5), step(5, generation=2))).key == key_of(5, generation=2)
    assert elected(left(step(5), second, step(4))).key == key_of(5)
    assert elected(left(step(5, generation=2), first)).key == key_of(5, generation=2)
    assert elected(left(step(5, ring=1), step(5, ring=2))).ring == 2
    assert elected(left(step(5, ring=1), step(5, ring=2)[:2])).ring == 1


def test_nothing_at_all() -> None:
    assert not_recoverable([]).reason == "no keeper holds a snapshot on the newest branch's line"


# From where


def test_a_lost_image_is_decoded_by_the_survivors_in_equal_parts() -> None:
    outcome = elected(left(step(41), lost="b"))
    assert [type(image) for image in outcome.images] == [Read, Decode, Read, Read]
    decode = outcome.images[1]
    assert isinstance(decode, Decode)
    assert (decode.held_by, decode.image.node, decode.group) == (None, "b", FOUR)
    assert [(piece.start, piece.stop) for piece in decode.pieces] == [
        (start * PAGE_BYTES, (start + 1) * PAGE_BYTES) for start in range(3)
    ]
    assert Counter(piece.decoder for piece in decode.pieces) == Counter("acd")
    for piece in decode.pieces:
        assert [source.held_by for source in piece.sources if source.node] == [
            node for node in FOUR.data_nodes(piece.class_index) if node != "b"
        ]
        assert [(source.held_by, source.index) for source in piece.sources if source.node is None] == [
            (FOUR.parity_nodes(piece.class_index)[0], 3)
        ]
    assert "3 of 4 nodes' images are whole, that of node b decoded with parity of a, c, d" in outcome.reason


def test_two_lost_pieces_of_a_class_are_decoded_by_one_keeper() -> None:
    group = Group(nodes=tuple("abcdef"), parity=2)
    inventories = protected(key_of(1), [group], dict.fromkeys("abcdef", 8 * PAGE_BYTES))
    outcome = elected(left(inventories, lost="be"))
    by_class: dict[int, set[object]] = {}
    work: Counter[str] = Counter()
    for image in outcome.images:
        if isinstance(image, Decode):
            for piece in image.pieces:
                by_class.setdefault(piece.class_index, set()).add((piece.decoder, piece.sources))
                work[piece.decoder] += 1
                assert piece.decoder in {source.held_by for source in piece.sources}
    assert all(len(how) == 1 for how in by_class.values())
    assert set(work) == set("acdf")
    assert max(work.values()) - min(work.values()) <= 1


def test_rotten_pieces_alone_are_decoded() -> None:
    outcome = elected(left(step(41), rotten={"c": (1,)}))
    decode = outcome.images[2]
    assert isinstance(decode, Decode)
    assert decode.held_by == "c"
    assert [piece.piece for piece in decode.pieces] == [1]
    assert [piece.class_index for piece in decode.pieces] == [FOUR.classes_of("c")[1]]
    assert "1 of 3 pieces of that of node c decoded with parity of b" in outcome.reason


def test_a_lost_image_and_a_rotten_piece_of_its_class_are_too_much() -> None:
    assert isinstance(elect(left(step(41), lost="b", rotten={"c": (0, 1, 2)}), LINE), NotRecoverable)
    # The class of this piece has its parity on b.
    outcome = not_recoverable(left(step(41), lost="b", rotten={"c": (1,)}))
    assert "of class 1 of group (a, b, c, d), of which 2 good blocks are left and 3 are needed" in outcome.reason


def test_an_image_that_was_decoded_before_is_read_there() -> None:
    image = ImageFound(key=key_of(41), ring=1, image=images_of(LENGTHS)["b"])
    found = left(step(41), [Inventory(keeper="d", images=(image,))], lost="b")
    assert elected(found).images[1] == Read(image=image.image, held_by="d")
    # Its own keeper is preferred.
    whole = elected(left(step(41), [Inventory(keeper="d", images=(image,))])).images[1]
    assert whole == Read(image=image.image, held_by="b")


def test_what_is_all_zeros_need_not_be_read() -> None:
    """A node without ranks, and pieces beyond the end of a short image, count as blocks that are there."""
    short = {"a": 3 * PAGE_BYTES, "b": 10, "c": 0, "d": 3 * PAGE_BYTES}
    inventories = protected(key_of(2), [FOUR], short)
    outcome = elected(left(inventories, lost=("a",)))
    decode = outcome.images[0]
    assert isinstance(decode, Decode)
    for piece in decode.pieces:
        assert len(piece.sources) + len(piece.zeros) == FOUR.data
        assert "c" not in {source.node for source in piece.sources}
    assert [image.image.node for image in outcome.images] == ["a", "b", "d"]


def test_a_node_alone_needs_no_parity() -> None:
    alone = protected(key_of(2), [Group(nodes=("a",), parity=0)], {"a": 100})
    assert elected(alone).images[0].held_by == "a"
    outcome = not_recoverable(left(alone, rotten={"a": (0,)}))
    assert "the image of node a is damaged, and no parity block of its group is left" in outcome.reason


# What is missing


def test_the_newest_few_are_explained() -> None:
    outcome = not_recoverable(left(*(step(number) for number in range(5)), lost="ab"))
    assert [passed.key for passed in outcome.passed_over] == [key_of(number) for number in (4, 3, 2, 1, 0)]
    assert outcome.reason.startswith(
        "no snapshot in memory can be read: step 4 of branch 0 (generation 1, attempt 1): node a, b lost data of "
        "class 2 of group (a, b, c, d), of which 2 good blocks are left and 3 are needed; step 3 of"
    )
    assert outcome.reason.endswith("; and 2 more")


def test_an_older_one_is_taken_and_the_newer_explained() -> None:
    outcome = elected(left(step(41), step(42)[:2]))
    assert outcome.key == key_of(41)
    assert [passed.key for passed in outcome.passed_over] == [key_of(42)]


def test_shards_of_which_nothing_is_known() -> None:
    lonely = [replace(found, parities=()) for found in step(42)]
    outcome = not_recoverable(left(lonely, lost="bc"))
    assert "of 4 shards nothing is left that tells where that of rank 1, 2 was" in outcome.reason


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"ranges": ((400, 1000),)}, "leave out or repeat bytes between 500 and 400"),
        ({"ranges": ((600, 1000),)}, "leave out or repeat bytes between 500 and 600"),
        ({"ranges": ((500, 900),)}, "end at byte 900 of 1000"),
        ({"ranges": ()}, "end at byte 500 of 1000"),
        ({"ranges": ((200, 300), (500, 1000))}, "leave out or repeat bytes between 500 and 200"),
        ({"ranges": ((500, 600), (700, 1000))}, "leave out or repeat bytes between 600 and 700"),
        ({"skeleton": "other"}, "are of different states"),
        ({"rank": 0}, "nodes a and b have different shards of rank 0"),
    ],
)
def test_shards_that_do_not_make_a_state(second: dict[str, object], message: str) -> None:
    shard = ShardFound(rank=1, world=2, ranges=((500, 1000),), state_bytes=1000, skeleton="s")
    found = []
    for node, made in (("a", replace(shard, rank=0, ranges=((0, 500),))), ("b", replace(shard, **second))):  # type: ignore[arg-type]
        image = NodeImage(node=node, image_bytes=10, shards=(made,))
        found.append(Inventory(keeper=node, images=(ImageFound(key=key_of(1), ring=1, image=image),)))
    assert message in not_recoverable(found).reason


# Whom not to believe


def test_images_of_different_lengths_are_both_ignored() -> None:
    snapshot = step(42)
    other = replace(images_of(LENGTHS)["b"], image_bytes=7)
    stray = Inventory(keeper="d", images=(ImageFound(key=key_of(42), ring=1, image=other),))
    outcome = elected(left(snapshot, [stray]))
    assert isinstance(outcome.images[1], Decode)
    assert any("the image of node b on keeper d differs from another one" in reason for reason in outcome.ignored)
    assert any("the image of node b on keeper b differs from another one" in reason for reason in outcome.ignored)


def test_parity_of_another_image_is_not_used() -> None:
    """The image of b is not the one that parity was made of: parity can't give back c."""
    snapshot = changed(step(42), "b", replace(images_of(LENGTHS)["b"], image_bytes=7))
    assert elected(left(snapshot)).key == key_of(42)
    outcome = not_recoverable(left(snapshot, lost="c"))
    assert any("covers another image of node b than was found" in reason for reason in outcome.ignored)


def test_parity_blocks_that_contradict_each_other_are_not_used() -> None:
    snapshot = [replace(found, images=()) if found.keeper == "b" else found for found in step(42)]
    assert elected(left(snapshot)).key == key_of(42)
    found = snapshot[0].parities[0]
    images = tuple(replace(image, image_bytes=7) if image.node == "b" else image for image in found.images)
    snapshot[0] = replace(snapshot[0], parities=(replace(found, images=images),))
    outcome = not_recoverable(left(snapshot))
    assert any("disagrees with another one on what it covers" in reason for reason in outcome.ignored)


def test_groups_that_overlap_are_not_used() -> None:
    other = Group(nodes=("b", "x"), parity=1)
    stray = ParityFound(key=key_of(42), ring=1, group=other, class_index=1, row=0, images=(images_of(LENGTHS)["b"],))
    found = left(step(42), [Inventory(keeper="x", parities=(stray,))], lost="b")
    assert "disagrees with another one" in " ".join(not_recoverable(found).ignored)


def test_an_unreadable_image_counts_as_lost() -> None:
    snapshot = step(42)
    broken = replace(snapshot[1].images[0], readable=False, image=NodeImage(node="b", image_bytes=1))
    snapshot[1] = replace(snapshot[1], images=(broken,))
    outcome = elected(left(snapshot))
    assert isinstance(outcome.images[1], Decode)
    assert outcome.ignored == (f"{key_of(42)}: the image of node b on keeper b is unreadable",)


def test_what_no_keeper_can_read_is_passed_over() -> None:
    broken = replace(step(42)[1].images[0], readable=False, image=NodeImage(node="b", image_bytes=0))
    outcome = not_recoverable([Inventory(keeper="b", images=(broken,))])
    assert [(each.key, each.reason) for each in outcome.passed_over] == [(key_of(42), "no shard of it is known")]


def test_bad_pieces_that_an_image_cannot_have() -> None:
    outcome = elected(left(step(42), rotten={"b": (3,)}))
    assert isinstance(outcome.images[1], Decode)
    assert outcome.images[1].held_by is None
    assert "has bad pieces (3,), where there are only 3" in outcome.ignored[0]


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (ShardFound, {"rank": 2}, "rank: got 2, must be 0..1"),
        (ShardFound, {"ranges": ((0, 11),)}, r"rank 0: ranges: 0..11 is empty, or not within 0..10"),
        (NodeImage, {"image_bytes": -1}, "node b: image_bytes: got -1"),
        (ParityFound, {"class_index": 4}, "class_index: got 4, must be 0..3"),
        (ParityFound, {"row": 1}, r"row: got 1, must be 0..0 in group \(a, b, c, d\)"),
        (ParityFound, {"class_index": 1}, r"images: got those of \['b'\], must be of different nodes of"),
    ],
)
def test_impossible_facts(kind: type, fields: dict[str, object], message: str) -> None:
    shard = {"rank": 0, "world": 2, "ranges": ((0, 5),), "state_bytes": 10, "skeleton": "s"}
    image = {"node": "b", "image_bytes": 1}
    images = (NodeImage(node="b", image_bytes=1),)
    parity = {"key": key_of(1), "ring": 1, "group": FOUR, "class_index": 0, "row": 0, "images": images}
    usual = {ShardFound: shard, NodeImage: image, ParityFound: parity}[kind]
    kind(**usual)
    with pytest.raises(ValueError, match=message):
        kind(**usual | fields)


def test_a_keeper_reports_once() -> None:
    with pytest.raises(ValueError, match=r"got keepers \['a', 'a'\], must be one of each"):
        elect([Inventory(keeper="a"), Inventory(keeper="a")], LINE)
