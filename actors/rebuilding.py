"""How keepers make what was lost out of what is left, as an election has planned it.

First every keeper decodes the pieces that are its to decode, in its memory. Then one keeper per lost image fetches
the image's pieces and puts them together, in a file that is found by the next inventory and read like any other.
"""

from __future__ import annotations

import mmap
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from actors.holdings import Holdings
from actors.links import Address, Links
from actors.transfer import PeerLost
from snapshot.arena import SlotError
from snapshot.codec import Codec, multiply_add
from snapshot.core.decoding import Decode, Piece, Source
from snapshot.core.election import Elected
from snapshot.core.inventory import SnapshotKey
from snapshot.core.stripes import Group
from snapshot.fields import Fields, key_fields
from snapshot.image import read_image
from snapshot.room import reserve

MOST_SOURCES = 4
"""Read from at once."""


class NotAsElected(Exception):
    """What was put together is not the image that was elected: something was damaged, or changed, since the inventory.

    Take the inventories again, and elect again.
    """


@dataclass(eq=False)
class _Target:
    """A piece that is being decoded."""

    piece: Piece
    bytes: memoryview
    coefficients: dict[int, int]
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, source: Source, at: int, frame: memoryview) -> None:
        """Bytes of a source, `at` from its start."""
        coefficient = self.coefficients.get(source.index, 0)
        count = min(len(frame), len(self.bytes) - at)
        if coefficient and count > 0:
            with self.lock:
                multiply_add(coefficient, frame[:count], self.bytes[at : at + count])


class Rebuilding:
    """One keeper's part in it. `decode` and `assemble` are called one after the other, by one thread."""

    def __init__(
        self,
        holdings: Holdings,
        links: Links,
        address_of: Callable[[str], Address | None],
        introduce: Callable[[], Fields],
    ) -> None:
        """address_of: where a node's keeper listens, None if not known. introduce: what each request begins with."""
        self._holdings = holdings
        self._links = links
        self._address_of = address_of
        self._introduce = introduce
        self._pieces: dict[tuple[SnapshotKey, str, int], memoryview] = {}

    def piece(self, key: SnapshotKey, node: str, number: int) -> memoryview:
        """A piece that was decoded here. KeyError if it was not."""
        found = self._pieces.get((key, node, number))
        if found is None:
            raise KeyError(f"piece {number} of the image of node {node} of {key} is not decoded on this keeper")
        return found

    def forget(self) -> None:
        """The pieces are not needed any more."""
        self._pieces = {}

    def held_bytes(self) -> int:
        return sum(len(piece) for piece in self._pieces.values())

    def decode(self, elected: Elected) -> None:
        """Decodes what is this keeper's to decode. Raises TransferError or SlotError, and then has nothing."""
        self.forget()
        done: dict[tuple[SnapshotKey, str, int], memoryview] = {}
        for group, pieces in self._mine(elected):
            targets = [_target(group, piece) for _, piece in pieces]
            self._add_all(elected.key, group, targets)
            for (node, piece), target in zip(pieces, targets, strict=True):
                done[elected.key, node, piece.piece] = target.bytes
        self._pieces = done

    def assemble(self, elected: Elected) -> None:
        """Puts the images together that are this keeper's to put together, from pieces that all have decoded.

        Raises NoRoom, TransferError, SlotError, or NotAsElected; then nothing is left of the image at fault.
        """
        for image in elected.images:
            if isinstance(image, Decode) and assembler(image) == self._holdings.node:
                self._put_together(elected.key, image)

    def _mine(self, elected: Elected) -> Iterator[tuple[Group, list[tuple[str, Piece]]]]:
        """By class: its pieces with their nodes. They have the same sources, which are read once."""
        mine: dict[tuple[Group, int], list[tuple[str, Piece]]] = defaultdict(list)
        for image in elected.images:
            if isinstance(image, Decode):
                for piece in image.pieces:
                    if piece.decoder == self._holdings.node:
                        mine[image.group, piece.class_index].append((image.image.node, piece))
        for (group, _), pieces in mine.items():
            yield group, pieces

    def _add_all(self, key: SnapshotKey, group: Group, targets: Sequence[_Target]) -> None:
        sources = targets[0].piece.sources
        class_index = targets[0].piece.class_index
        with ThreadPoolExecutor(max_workers=MOST_SOURCES, thread_name_prefix="decode") as pool:
            # Each is waited for: an error of one does not leave the others behind.
            for added in [pool.submit(self._add, key, group, class_index, source, targets) for source in sources]:
                added.result()

    def _add(
        self, key: SnapshotKey, group: Group, class_index: int, source: Source, targets: Sequence[_Target]
    ) -> None:
        at = 0

        def add(frame: memoryview) -> None:
            nonlocal at
            for target in targets:
                target.add(source, at, frame)
            at += len(frame)

        if source.held_by == self._holdings.node:
            self._read_here(key, group, class_index, source, add)
            return
        fields = {"op": "block", "key": key_fields(key), "start": source.start, "stop": source.stop}
        if source.node is None:
            fields |= {"class": class_index, "row": source.index - group.data}
        else:
            fields |= {"node": source.node}
        self._request(source.held_by, fields, add)

    def _read_here(
        self, key: SnapshotKey, group: Group, class_index: int, source: Source, add: Callable[[memoryview], None]
    ) -> None:
        if source.node is None:
            with self._holdings.reading_parity(key, class_index, source.index - group.data) as payload:
                add(payload[source.start : source.stop])
            return
        image = self._holdings.image(key, source.node)
        for part in image.parts(source.start, source.stop):
            add(part)
        image.check_unchanged()

    def _put_together(self, key: SnapshotKey, wanted: Decode) -> None:
        node = wanted.image.node
        path = self._holdings.decoded_path(key, node)
        half = path.with_name(path.name.replace("decoded-", "decoding-", 1))
        half.unlink(missing_ok=True)
        buffer = memoryview(reserve(half, wanted.image.image_bytes))
        try:
            if wanted.held_by is not None:
                self._copy_good(key, wanted, buffer)
            for piece in wanted.pieces:
                self._fetch(key, node, piece, buffer[piece.start : piece.stop])
            _check(key, wanted, buffer, half.name)
        except BaseException:  # Whatever it was, half an image is of no use to anybody.
            half.unlink(missing_ok=True)
            raise
        half.replace(path)

    def _copy_good(self, key: SnapshotKey, wanted: Decode, buffer: memoryview) -> None:
        image, at = self._holdings.image(key, wanted.image.node), 0
        for part in image.parts(0, image.image_bytes):
            buffer[at : at + len(part)] = part
            at += len(part)
        image.check_unchanged()

    def _fetch(self, key: SnapshotKey, node: str, piece: Piece, target: memoryview) -> None:
        if piece.decoder == self._holdings.node:
            target[:] = self.piece(key, node, piece.piece)
            return
        fields = {"op": "piece", "key": key_fields(key), "node": node, "piece": piece.piece}
        at = 0

        def copy(frame: memoryview) -> None:
            nonlocal at
            target[at : at + len(frame)] = frame
            at += len(frame)

        self._request(piece.decoder, fields, copy)

    def _request(self, node: str, fields: Fields, consume: Callable[[memoryview], None]) -> None:
        address = self._address_of(node)
        if address is None:
            raise PeerLost(f"the keeper of node {node} has no known address")
        with self._links.open(node, address) as link:
            link.request({**self._introduce(), **fields}, receive_into=consume)


def assembler(image: Decode) -> str:
    """The keeper that puts the image together: the same for all who ask."""
    return image.held_by if image.held_by is not None else image.pieces[0].decoder


def _target(group: Group, piece: Piece) -> _Target:
    length = piece.stop - piece.start
    available = [*(source.index for source in piece.sources), *piece.zeros]
    coefficients = Codec(group.data, group.parity).recovery_coefficients(available, [piece.index])[piece.index]
    return _Target(piece, memoryview(mmap.mmap(-1, length)), coefficients)


def _check(key: SnapshotKey, wanted: Decode, buffer: memoryview, name: str) -> None:
    node = wanted.image.node
    try:
        image = read_image(node, buffer, name)
        bad = image.bad_pieces(wanted.group)
    except (SlotError, ValueError) as error:
        raise NotAsElected(f"the image of node {node} of {key} could not be decoded: {error}") from error
    if bad or image.key != key or image.described != wanted.image:
        raise NotAsElected(f"the image of node {node} of {key} was decoded, but pieces {bad} of it are wrong")
