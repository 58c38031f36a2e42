"""What keepers give each other and the ranks to read: slots, ranges of images and parity blocks, decoded pieces.

Requests (op):
    slot    key, node, rank, start, stop -> that range of a slot's image; without stop: only how long the image is
    block   key, node, start, stop -> that range of a node image
            key, class, row, start, stop -> that range of a parity block
    piece   key, node, piece -> a piece that this keeper has decoded
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from actors.holdings import Holdings
from actors.links import Address, Fields, Links
from actors.transfer import Stream, TransferCorrupt
from snapshot.arena import SlotChanged, SlotError, SlotView
from snapshot.core.inventory import SnapshotKey
from snapshot.fields import key_fields, key_from, text, whole
from snapshot.image import key_of

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
    links = Links(secret)
    try:
        with links.open(node, address) as link:
            fields = {"op": "slot", "key": key_fields(key), "node": node, "rank": rank}
            buffer = bytearray(link.request(fields)["image_bytes"])
            view = memoryview(buffer)
            for start in range(0, len(buffer), _RANGE_BYTES):
                stop = min(start + _RANGE_BYTES, len(buffer))
                link.request({**fields, "start": start, "stop": stop}, receive_into=view[start:stop])
    finally:
        links.close()
    return _verified(buffer, f"the slot of rank {rank} of {key} from {address[0]}:{address[1]}", key, rank)


def _verified(buffer: bytearray, name: str, key: SnapshotKey, rank: int) -> SlotView:
    try:
        slot = SlotView(buffer, name)
        head, bad = slot.head(), slot.verify()
    except SlotError as error:
        raise TransferCorrupt(str(error)) from error
    if bad:
        raise TransferCorrupt(f"{name}: chunks {', '.join(map(str, bad[:8]))} are damaged")
    if (key_of(head), head.rank) != (key, rank):
        raise TransferCorrupt(f"{name} is that of rank {head.rank} of {key_of(head)}")
    return slot


def _range(request: Mapping[str, object], length: int) -> tuple[int, int]:
    start, stop = whole(request.get("start"), "start"), whole(request.get("stop"), "stop")
    if not start <= stop <= length:
        raise ValueError(f"start, stop: got {start}..{stop}, must be within 0..{length}")
    return start, stop


def _node(request: Mapping[str, object]) -> str:
    return text(request.get("node"), "node")
