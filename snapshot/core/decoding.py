"""Where the bytes of an elected snapshot come from: images that are read, and pieces of images that are decoded.

The wanted pieces of one class are decoded by one keeper, from the same blocks, so that it reads those once. It
holds one of them itself. Work goes to whoever has least so far.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from snapshot.core.evidence import Evidence
from snapshot.core.inventory import NodeImage
from snapshot.core.stripes import Group


class Unreadable(Exception):
    """Less is left of a snapshot than it takes to read it. Says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A block to decode from: `index` of its class (k + row for parity), in the memory of `held_by`.

    Bytes start..stop of the image of `node`, or of the parity block if that is None. Wanted pieces that are longer
    see zeros after these.
    """

    index: int
    held_by: str
    node: str | None
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Bytes start..stop of an image, block `index` of a class, to be decoded by the keeper `decoder`.

    sources: by index.
    zeros: further blocks of the class, all zeros, not to be read; k blocks with the sources.
    """

    piece: int
    class_index: int
    index: int
    start: int
    stop: int
    decoder: str
    sources: tuple[Source, ...]
    zeros: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """The keeper `held_by` has the whole image."""

    image: NodeImage
    held_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """The pieces are decoded; whatever lies outside them is read from `held_by`, None if nothing does."""

    image: NodeImage
    group: Group
    held_by: str | None
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decoder:
    keeper: str
    sources: tuple[Source, ...]
    zeros: tuple[int, ...]


def plan_images(evidence: Evidence, nodes: Sequence[str]) -> tuple[Read | Decode, ...]:
    """How to get the images of `nodes`, in their order. Raises Unreadable if one can't be had."""
    wanted = {node: _wanted_classes(evidence, node) for node in nodes if evidence.whole(node) is None}
    decoders = _decoders(evidence, wanted)
    planned: list[Read | Decode] = []
    for node in nodes:
        held_by = evidence.whole(node)
        if held_by is not None:
            planned.append(Read(image=evidence.known[node], held_by=held_by))
        else:
            planned.append(_decode(evidence, node, wanted[node], decoders))
    return tuple(planned)


def _wanted_classes(evidence: Evidence, node: str) -> list[int]:
    """Of the pieces of the node's image that nobody holds and that are not empty."""
    group = evidence.groups.get(node)
    if group is None:
        state = "is damaged" if node in evidence.copies else "is lost"
        raise Unreadable(f"the image of node {node} {state}, and no parity block of its group is left")
    bad = evidence.copies[node][0].bad_pieces if node in evidence.copies else range(group.data)
    wanted = [index for piece, index in enumerate(group.classes_of(node)) if piece in bad]
    return [index for index in wanted if _length(_bounds(evidence, group, node, index))]


def _decoders(evidence: Evidence, wanted: Mapping[str, Sequence[int]]) -> dict[tuple[Group, int], _Decoder]:
    lengths: dict[tuple[Group, int], dict[str, int]] = defaultdict(dict)
    for node, classes in wanted.items():
        group = evidence.groups[node]
        for class_index in classes:
            lengths[group, class_index][node] = _length(_bounds(evidence, group, node, class_index))
    # The most work first, so that what comes last can even it out.
    ordered = sorted(lengths, key=lambda block: (-sum(lengths[block].values()), block[0].nodes, block[1]))
    work: dict[str, int] = defaultdict(int)
    decoders = {}
    for group, class_index in ordered:
        nodes = lengths[group, class_index]
        decoder = _decoder(evidence, group, class_index, nodes, work)
        work[decoder.keeper] += sum(nodes.values())
        decoders[group, class_index] = decoder
    return decoders


def _decoder(
    evidence: Evidence, group: Group, class_index: int, wanted: Mapping[str, int], work: Mapping[str, int]
) -> _Decoder:
    """From all readable data, and as much parity as it takes beside. wanted: by node, how many bytes are."""
    longest = max(wanted.values())
    zeros, data = _data_blocks(evidence, group, class_index)
    parities = evidence.parities.get((group, class_index), {})
    rows_needed = group.data - len(zeros) - len(data)
    if len(parities) < rows_needed:
        raise Unreadable(
            f"node {', '.join(wanted)} lost data of class {class_index} of group {group}, of which "
            f"{len(zeros) + len(data) + len(parities)} good blocks are left and {group.data} are needed"
        )
    holding = {keeper for holders in data.values() for keeper in holders}
    if rows_needed:
        holding |= {keeper for holders in parities.values() for keeper in holders}
    decoder = min(holding, key=lambda keeper: (work.get(keeper, 0), keeper))
    sources = []
    for index, holders in data.items():
        node = group.data_nodes(class_index)[index]
        start, stop = _bounds(evidence, group, node, class_index)
        stop = min(stop, start + longest)
        sources.append(Source(index=index, held_by=_near(decoder, holders), node=node, start=start, stop=stop))
    # What lies near first; then row 0, whose coefficients are ones.
    rows = sorted(parities, key=lambda row: (decoder not in parities[row], row))[:rows_needed]
    for row in sorted(rows):
        held_by = _near(decoder, parities[row])
        sources.append(Source(index=group.data + row, held_by=held_by, node=None, start=0, stop=longest))
    return _Decoder(keeper=decoder, sources=tuple(sources), zeros=zeros)


def _data_blocks(
    evidence: Evidence, group: Group, class_index: int
) -> tuple[tuple[int, ...], dict[int, Sequence[str]]]:
    """The class's data blocks that are all zeros, and the holders of the others that can be read."""
    zeros, data = [], {}
    for index, node in enumerate(group.data_nodes(class_index)):
        if node not in evidence.known:
            continue
        if not _length(_bounds(evidence, group, node, class_index)):
            zeros.append(index)
        elif holders := _holders(evidence, group, node, class_index):
            data[index] = holders
    return tuple(zeros), data


def _near(keeper: str, holders: Sequence[str]) -> str:
    return keeper if keeper in holders else holders[0]


def _decode(
    evidence: Evidence, node: str, classes: Sequence[int], decoders: Mapping[tuple[Group, int], _Decoder]
) -> Decode:
    group, pieces = evidence.groups[node], []
    for class_index in classes:
        decoder = decoders[group, class_index]
        start, stop = _bounds(evidence, group, node, class_index)
        pieces.append(
            Piece(
                piece=group.piece_of(node, class_index),
                class_index=class_index,
                index=group.data_nodes(class_index).index(node),
                start=start,
                stop=stop,
                decoder=decoder.keeper,
                sources=decoder.sources,
                zeros=decoder.zeros,
            )
        )
    held_by = evidence.copies[node][0].held_by if node in evidence.copies else None
    return Decode(image=evidence.known[node], group=group, held_by=held_by, pieces=tuple(pieces))


def _holders(evidence: Evidence, group: Group, node: str, class_index: int) -> Sequence[str]:
    """The keepers that hold the node's data block of the class, good."""
    piece = group.piece_of(node, class_index)
    return [copy.held_by for copy in evidence.copies.get(node, ()) if piece not in copy.bad_pieces]


def _bounds(evidence: Evidence, group: Group, node: str, class_index: int) -> tuple[int, int]:
    image = evidence.known[node]
    return group.piece_bounds(group.piece_of(node, class_index), image.image_bytes)


def _length(bounds: tuple[int, int]) -> int:
    return bounds[1] - bounds[0]
