"""What keepers give each other and the ranks to read: slots, ranges of images and parity blocks, decoded pieces.

Requests (op):
    slot    key, node, rank, start, stop -> that range of a slot's image; without stop: only how long the image is
    block   key, node, start, stop -> that range of a node image
            key, class, row, start, stop -> that range of a parity block
    piece   key, node, piece -> a piece that this keeper has decoded
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import xxhash

from actors.holdings import Holdings
from actors.links import Address, Fields, Links
from actors.transfer import Stream, TransferCorrupt
from snapshot.arena import SlotChanged, SlotError, SlotView
from snapshot.core.inventory import SnapshotKey
from snapshot.fields import key_fields, key_from, text, whole
from snapshot.image import key_of
from snapshot.slot import PAGE_BYTES, SlotHead, read_head, read_preamble

_RANGE_BYTES = 16 << 20


class Serving:
    """Answers from what a keeper holds. ValueError and KeyError refuse."""

    def __init__(self, holdings: Holdings, piece: Callable[[SnapshotKey, str, int], memoryview]) -> None:
        """piece: a decoded one; KeyError if there is none."""
        self._holdings = holdings
        self._piece = piece

    def serve(self, op: str, request: Fields, stream: Stream) -> Fields:
        try:
            if op == "slot":
                return self._slot(request, stream)
            if op == "block" and "class" in request:
                return self._parity(request, stream)
            if op == "block":
                return self._image(request, stream)
            if op == "piece":
                return self._decoded(request, stream)
        except SlotError as error:  # damaged, or its rank writes it anew
            raise ValueError(str(error)) from error
        raise ValueError(f"op: got {op!r:.80}, which there is not")

    def _slot(self, request: Fields, stream: Stream) -> Fields:
        key, node, rank = key_from(request.get("key")), _node(request), whole(request.get("rank"), "rank")
        view = self._holdings.slot(key, node, rank)
        image = view.image
        if "stop" in request:
            start, stop = _range(request, len(image))
            stream.send([image[start:stop]])
        if not view.sealed or key_of(view.head()) != key:
            raise SlotChanged(f"{view.name} was written anew while it was read")
        return {"image_bytes": len(image)}

    def _image(self, request: Fields, stream: Stream) -> Fields:
        image = self._holdings.image(key_from(request.get("key")), _node(request))
        stream.send(image.parts(*_range(request, image.image_bytes)))
        image.check_unchanged()
        return {}

    def _parity(self, request: Fields, stream: Stream) -> Fields:
        class_index, row = whole(request.get("class"), "class"), whole(request.get("row"), "row")
        with self._holdings.reading_parity(key_from(request.get("key")), class_index, row) as payload:
            start, stop = _range(request, len(payload))
            stream.send([payload[start:stop]])
        return {}

    def _decoded(self, request: Fields, stream: Stream) -> Fields:
        piece = whole(request.get("piece"), "piece")
        stream.send([self._piece(key_from(request.get("key")), _node(request), piece)])
        return {}


def fetch_slot(address: Address, secret: str, *, key: SnapshotKey, node: str, rank: int) -> SlotView:
    """The slot of a rank, from the keeper at the address, verified: it is what was captured for this snapshot.

    node: whose image it is in; the keeper may be another node's, which has decoded it.
    Raises TransferError: PeerLost, TransferRefused if the keeper does not have it, TransferCorrupt if it is damaged.
    """
    with _slot_at(address, secret, key, node, rank) as (buffer, read):
        read(0, len(buffer))
    return _verified(buffer, _name(address, key, rank), key, rank)


def fetch_front(
    address: Address, secret: str, *, key: SnapshotKey, node: str, rank: int, skeleton: bool = False
) -> tuple[SlotHead, bytes]:
    """What a rank's slot holds, without the share; and the skeleton, if it is asked for. As `fetch_slot`."""
    name = _name(address, key, rank)
    with _slot_at(address, secret, key, node, rank) as (buffer, read), memoryview(buffer) as view:
        read(0, PAGE_BYTES)
        try:
            preamble = read_preamble(view, name)
            if preamble is None:
                raise SlotChanged(f"{name} is not committed")
            read(PAGE_BYTES, preamble.sums_at)
            head = read_head(view, preamble, name)
        except SlotError as error:
            raise TransferCorrupt(str(error)) from error
        _check_whose(head, name, key, rank)
        stop = preamble.payload_at + (head.skeleton_bytes if skeleton else 0)
        read(preamble.payload_at, stop)
        data = bytes(view[preamble.payload_at : stop])
    if skeleton and xxhash.xxh3_128_hexdigest(data) != head.skeleton:
        raise TransferCorrupt(f"{name}: the skeleton is damaged")
    return head, data


@contextmanager
def _slot_at(
    address: Address, secret: str, key: SnapshotKey, node: str, rank: int
) -> Iterator[tuple[bytearray, Callable[[int, int], None]]]:
    """A buffer as long as the slot's image, and what reads bytes start..stop of it into there."""
    links = Links(secret)
    try:
        with links.open(node, address) as link:
            fields = {"op": "slot", "key": key_fields(key), "node": node, "rank": rank}
            buffer = bytearray(link.request(fields)["image_bytes"])

            def read(start: int, stop: int) -> None:
                for begin in range(start, stop, _RANGE_BYTES):
                    end = min(begin + _RANGE_BYTES, stop)
                    into = memoryview(buffer)[begin:end]
                    link.request({**fields, "start": begin, "stop": end}, receive_into=into)

            yield buffer, read
    finally:
        links.close()


def _name(address: Address, key: SnapshotKey, rank: int) -> str:
    return f"the slot of rank {rank} of {key} from {address[0]}:{address[1]}"


def _verified(buffer: bytearray, name: str, key: SnapshotKey, rank: int) -> SlotView:
    try:
        slot = SlotView(buffer, name)
        head, bad = slot.head(), slot.verify()
    except SlotError as error:
        raise TransferCorrupt(str(error)) from error
    if bad:
        raise TransferCorrupt(f"{name}: chunks {', '.join(map(str, bad[:8]))} are damaged")
    _check_whose(head, name, key, rank)
    return slot


def _check_whose(head: SlotHead, name: str, key: SnapshotKey, rank: int) -> None:
    if (key_of(head), head.rank) != (key, rank):
        raise TransferCorrupt(f"{name} is that of rank {head.rank} of {key_of(head)}")


def _range(request: Mapping[str, object], length: int) -> tuple[int, int]:
    start, stop = whole(request.get("start"), "start"), whole(request.get("stop"), "stop")
    if not start <= stop <= length:
        raise ValueError(f"start, stop: got {start}..{stop}, must be within 0..{length}")
    return start, stop


def _node(request: Mapping[str, object]) -> str:
    return text(request.get("node"), "node")
