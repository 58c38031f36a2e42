"""Which bytes go where when a tensor takes the elements of another, and either may be here only in part."""

from collections.abc import Iterator

from torch import Tensor

from snapshot.absent import Part, is_absent, parts_of
from snapshot.memory import memory_order
from snapshot.sharded import local_of


def fillings(path: str, target: Tensor, source: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(target, source) of the copies that give the target, of equal shape and dtype, all that it holds.

    An absent target holds nothing; one in parts holds them. Raises ValueError, naming the path, if some of the bytes
    that the target holds are not with the source.
    """
    local = local_of(target)
    if not is_absent(local) and not is_absent(source):
        yield target, source
        return
    wanted = _parts(path, local)
    if wanted and memory_order(local) != memory_order(source):
        raise ValueError(f"{path}: expected its axes in memory as {memory_order(local)}, found {memory_order(source)}")
    there = _parts(path, source) if wanted else ()
    for first, part in wanted:
        yield from _filling(path, first, part, there)


def not_here(path: str) -> ValueError:
    return ValueError(f"{path}: expected all of its bytes, the table lacks some of them: they are on other ranks")


def _filling(path: str, first: int, part: Tensor, there: tuple[Part, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    reached, stop = first, first + part.numel()
    for begin, data in there:
        end = min(stop, begin + data.numel())
        if begin <= reached < end:
            yield part[reached - first : end - first], data[reached - begin : end - begin]
            reached = end
    if reached != stop:
        raise not_here(path)


def _parts(path: str, tensor: Tensor) -> tuple[Part, ...]:
    """What is here of it, as 1-D views in the order in memory."""
    if is_absent(tensor):
        return parts_of(tensor)
    if memory_order(tensor) is None:
        raise not_here(path)
    return ((0, tensor.detach().as_strided((tensor.numel(),), (1,))),)
