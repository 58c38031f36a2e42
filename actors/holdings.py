"""What is in the folders on one keeper's node: images over slots, decoded images, parity blocks, and their rings.

    own folder       the ranks of this node write slots, the keeper parity blocks and decoded images
    older folders    left by former attempts, or by this machine's former node: read, and sealed, nothing else

Whose node image a folder's slots are is written down beside its rings, so that it is known also when the machine
goes by another name now.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, unquote

from actors.agenda import ordinal
from actors.parities import Parities
from actors.ring import Ring, read_rings, write_ring
from snapshot.arena import NotASlot, SlotError, SlotView
from snapshot.core.inventory import ImageFound, Inventory, NodeImage, ParityFound, SnapshotKey
from snapshot.core.lifecycle import Ordinal
from snapshot.core.stripes import Group
from snapshot.image import ImageView, SlotFolder, read_image
from snapshot.mapped import NotMappable, map_file
from snapshot.parity import NotParity, ParityFile, ParityHead, RottenParity
from snapshot.slot import PAGE_BYTES


class Folder:
    """One folder of slots, and the rings that they were captured in."""

    def __init__(self, path: Path, run: str, node: str) -> None:
        """node: whose slots these are, unless it is written down. Raises ValueError for a damaged ring."""
        written = [found for found in read_rings(path) if found.run == run]
        self.path = path
        self._run = run
        self.node = written[0].node if written else node
        self.attempt = max((found.attempt for found in written), default=-1)
        self.rings = {found.ring.generation: found.ring for found in written}
        self.slots = SlotFolder(path, run)

    def learn_rings(self) -> None:
        """What has been written down since, by the keeper whose folder it is."""
        self.rings |= {found.ring.generation: found.ring for found in read_rings(self.path) if found.run == self._run}

    def complete(self) -> dict[SnapshotKey, tuple[Ring, dict[int, SlotView]]]:
        """Snapshots of which all ranks on the node have committed their slots, and whose ring is known."""
        rings = dict(self.rings)
        found = {}
        for key, slots in self.slots.look().items():
            ring = rings.get(key.generation)
            if ring is not None and set(ring.ranks_on(self.node)) <= set(slots):
                found[key] = ring, {rank: slots[rank] for rank in ring.ranks_on(self.node)}
        return found


class Holdings:
    """All folders of one keeper. Any thread may call."""

    def __init__(self, *, run: str, attempt: int, node: str, folder: Path, older: Sequence[Path]) -> None:
        self._run = run
        self._attempt = attempt
        self.node = node
        self.own = Folder(folder, run, node)
        self.failures: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._older = [Folder(path, run, node) for path in older if path.is_dir()]
        self._older_parity = {folder.path: list(self._committed_parity(folder)) for folder in self._older}
        for path in folder.glob("decoding-*"):  # half done by a former keeper
            path.unlink()
        self.parities = Parities(run=run, node=node, folder=folder, ring_of=self.own.rings.get)

    def add_ring(self, ring: Ring) -> None:
        """Written down before it is acted on. ValueError if the node has no place in it."""
        if self.node not in ring.group.nodes:
            raise ValueError(f"ring {ring.generation}: node {self.node} is not in its group {ring.group}")
        write_ring(self.own.path, ring, run=self._run, attempt=self._attempt, node=self.node)
        self.own.rings[ring.generation] = ring
        self.parities.ring_known()

    def latest_ring(self) -> Ring | None:
        rings = dict(self.own.rings)
        return rings[max(rings)] if rings else None

    def image(self, key: SnapshotKey, node: str) -> ImageView:
        """The node's image, sealed; of copies in several files the one that is decoded. KeyError if there is none.

        Raises SlotError if it is damaged in front, or being written anew.
        """
        path = self.decoded_path(key, node)
        if path.exists():
            with contextlib.suppress(FileNotFoundError):  # removed just now
                return _read_decoded(path)
        for folder in self._folders():
            if folder.node == node and (found := folder.complete().get(key)):
                return sealed_image(node, found[1])
        raise KeyError(f"the image of node {node} of {key} is not on node {self.node}")

    def slot(self, key: SnapshotKey, node: str, rank: int) -> SlotView:
        """As `image`, but the node's other slots may be damaged."""
        if not self.decoded_path(key, node).exists():
            for folder in self._folders():
                found = folder.complete().get(key) if folder.node == node else None
                if found and rank in found[1]:
                    found[1][rank].seal()
                    return found[1][rank]
        return self.image(key, node).slot(rank)

    @contextlib.contextmanager
    def reading_parity(self, key: SnapshotKey, class_index: int, row: int) -> Iterator[memoryview]:
        """The bytes of a parity block. KeyError if there is none."""
        with self._lock:
            older = [parity for held in self._older_parity.values() for parity in held]
        for file, head in older:
            if (head.found.key, head.found.class_index, head.found.row) == (key, class_index, row):
                yield file.payload.toreadonly()
                return
        with self.parities.reading(key, class_index, row) as payload:
            yield payload

    def inventory(self) -> Inventory:
        """Everything is looked at and verified now; what is committed is sealed first."""
        images = [found for folder in self._folders() for found in self._images_in(folder)]
        return Inventory(
            keeper=self.node,
            images=(*_best(images), *self._decoded()),
            parities=tuple(self._good_parities()),
        )

    def protected(self, everywhere: Ordinal) -> None:
        """This snapshot is protected on all nodes: older parity and decoded images may go."""
        self.parities.protected(everywhere)
        for path, key, _ in self.decoded_keys():
            if ordinal(key) < everywhere:
                path.unlink(missing_ok=True)

    def decoded_path(self, key: SnapshotKey, node: str) -> Path:
        numbers = f"{key.attempt}-{key.branch}-{key.step}-{key.generation}"
        return self.own.path / f"decoded-{numbers}-{quote(node, safe='')}"

    def decoded_keys(self) -> list[tuple[Path, SnapshotKey, str]]:
        found = []
        for path in sorted(self.own.path.glob("decoded-*")):
            _, attempt, branch, step, generation, node = path.name.split("-", 5)
            key = SnapshotKey(attempt=int(attempt), branch=int(branch), step=int(step), generation=int(generation))
            found.append((path, key, unquote(node)))
        return found

    def data_bytes(self) -> int:
        return sum(folder.slots.held_bytes() for folder in self._folders())

    def decoded_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.own.path.glob("decoded-*"))

    def older_parity_bytes(self) -> int:
        with self._lock:
            return sum(file.held_bytes for held in self._older_parity.values() for file, _ in held)

    def forget_older(self, attempt: int) -> None:
        with self._lock:
            gone = [folder for folder in self._older if folder.attempt < attempt]
            self._older = [folder for folder in self._older if folder not in gone]
            for folder in gone:
                del self._older_parity[folder.path]
        for folder in gone:
            folder.slots.forget()
            with contextlib.suppress(FileNotFoundError):  # somebody else sweeps, too
                shutil.rmtree(folder.path)

    def close(self) -> None:
        self.parities.close()
        for folder in self._folders():
            folder.slots.forget()

    def count(self, reason: str) -> None:
        with self._lock:
            self.failures[reason] += 1

    def _folders(self) -> list[Folder]:
        with self._lock:
            return [self.own, *self._older]

    def _images_in(self, folder: Folder) -> Iterator[ImageFound]:
        complete = folder.complete()
        for key, (ring, slots) in sorted(complete.items(), key=lambda item: item[0].newness):
            if slots and (found := self._verified(key, ring.group, folder.node, slots)):
                yield found
        # Which snapshot a slot is of can't be read when it is rotten; but whose neighbours lack it is told.
        for _ in folder.slots.skipped:
            self.count("unusable slot file")
        if folder.slots.skipped:
            for key in sorted(set(folder.slots.look()) - set(complete), key=lambda key: key.newness):
                if key.generation in folder.rings:
                    yield _unreadable(key, folder.node)

    def _verified(self, key: SnapshotKey, group: Group, node: str, slots: Mapping[int, SlotView]) -> ImageFound | None:
        try:
            image = sealed_image(node, slots)
            bad = image.bad_pieces(group)
            image.check_unchanged()
        except SlotError as error:
            self.count(type(error).__name__)
            return None
        if bad:
            self.count("rotten pieces")
        return ImageFound(key=key, ring=key.generation, image=image.described, bad_pieces=bad)

    def _decoded(self) -> Iterator[ImageFound]:
        for path, key, node in self.decoded_keys():
            try:
                image = _read_decoded(path)
                # Cut as one piece: it is all good, or of no use.
                whole = not image.bad_pieces(Group(nodes=(node,), parity=0))
            except FileNotFoundError:  # removed just now
                continue
            except SlotError:
                whole = False
            if whole:
                yield ImageFound(key=key, ring=key.generation, image=image.described)
            else:
                self.count("rotten decoded image")
                path.unlink(missing_ok=True)

    def _good_parities(self) -> Iterator[ParityFound]:
        for block in self.parities.complete():
            try:
                with self.parities.reading(block.key, block.class_index, block.row):
                    good = block.file is not None and not block.file.verify()
            except KeyError:  # dropped just now
                continue
            except RottenParity:
                good = False
            if good:
                yield block.found
            else:
                self.parities.drop_rotten(block)
        with self._lock:
            older = [parity for held in self._older_parity.values() for parity in held]
        for file, head in older:
            try:
                if file.verify():
                    raise RottenParity(f"{file.path}: the block is damaged")
            except RottenParity as error:
                self.count(type(error).__name__)
            else:
                yield head.found

    def _committed_parity(self, folder: Folder) -> Iterator[tuple[ParityFile, ParityHead]]:
        for path in sorted(folder.path.glob("parity-*")):
            try:
                file = ParityFile.open(path)
                head = file.read()
            except (NotParity, RottenParity) as error:  # as if it were lost, in a folder that is only read
                self.count(type(error).__name__)
                continue
            if head is not None and head.run == self._run:
                yield file, head


def sealed_image(node: str, slots: Mapping[int, SlotView]) -> ImageView:
    """Seals what is not. Raises SlotError if one is damaged in front, or being written anew."""
    for view in slots.values():
        view.seal()
    return ImageView(node, list(slots.values()))


def _read_decoded(path: Path) -> ImageView:
    """Raises SlotError, FileNotFoundError."""
    try:
        mapped = map_file(path, PAGE_BYTES)
    except NotMappable as error:
        raise NotASlot(str(error)) from error
    return read_image(unquote(path.name.split("-", 5)[5]), memoryview(mapped), str(path))


def _unreadable(key: SnapshotKey, node: str) -> ImageFound:
    return ImageFound(key=key, ring=key.generation, image=NodeImage(node=node, image_bytes=0), readable=False)


def _best(images: Sequence[ImageFound]) -> list[ImageFound]:
    """One of each image: an older folder may hold a copy of what is in another."""
    best: dict[tuple[SnapshotKey, str], ImageFound] = {}
    for found in images:
        known = best.get((found.key, found.image.node))
        if known is None or (found.readable, -len(found.bad_pieces)) > (known.readable, -len(known.bad_pieces)):
            best[found.key, found.image.node] = found
    return list(best.values())
