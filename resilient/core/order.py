"""The order of samples and of micro-batches, and the seeds of everything drawn by chance. Pure.

Rules:
- The order depends on (seed, epoch) alone: not on how many ranks there are, nor on who loads what.
- Seeking is free: any place of any epoch is computed directly, in O(1) time and memory per sample.
- One epoch uses every sample at most once, and all of them but a remainder smaller than a global
  batch; which samples are left over changes from epoch to epoch.
- A seed is a hash of what it is for. Two purposes never share one.

The permutation is a generalised Feistel network over pairs (left, right) in [0, side)^2, with addition
modulo `side` in place of XOR, and cycle walking for the few values that land outside [0, length):
J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, sections 4 and 5. Since
side^2 < length + 2 sqrt(length) + 1, nearly every value arrives at its first try. The round function is
the 64-bit finaliser "Mix13" of D. Stafford, as used by SplitMix64 (G. Steele, D. Lea and C. Flood, "Fast
Splittable Pseudorandom Number Generators", OOPSLA 2014, section 4), fed with the sum of its input and a round key.
"""

import functools
import hashlib
import math
import operator
from collections import deque
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Ticket: TypeAlias = tuple[int, int]  # (step, leaf)
Indices: TypeAlias = npt.NDArray[np.int64]
_Words: TypeAlias = npt.NDArray[np.uint64]

# Four rounds make a pseudo-random permutation of a large domain (M. Luby and C. Rackoff, 1988); small ones
# need more, and from 8 on nothing improves. (Of 5 to 8 samples some orders stay likelier than others, up to
# twice: Feistel rounds on 9 values make permutations of one parity only. Nobody trains on 8 samples.)
_ROUNDS = 8
LONGEST = 2**62  # samples; beyond it side^2 leaves 64 bits


def derive_seed(*parts: int | str | bytes) -> int:
    """A seed in [0, 2**64) for the purpose that `parts` spell out, e.g. (seed, "sample", epoch, index).

    The same on every machine and in every version of Python: the first 64 bits of BLAKE2b (RFC 7693) over
    parts tagged by type and prefixed by length, so that ("a", "b") and ("ab",) differ, and 1 and "1".
    Integers may be negative and of any size; numpy integers count as integers. Raises TypeError for
    anything else, bool and float included: True and 1, or 1.0 and 1, would be told apart by nobody.
    """
    return int.from_bytes(hashlib.blake2b(_encoded(parts), digest_size=8).digest(), "little")


def _encoded(parts: tuple[int | str | bytes, ...]) -> bytes:
    pieces: list[bytes] = []
    for part in parts:
        if isinstance(part, str):
            tag, body = b"s", part.encode()
        elif isinstance(part, bytes):
            tag, body = b"b", part
        elif isinstance(part, bool):
            raise TypeError(f"a seed is derived from integers, strings and bytes, not from {part!r}")
        else:
            tag, body = b"i", b"%d" % operator.index(part)
        pieces += [tag, len(body).to_bytes(8, "little"), body]
    return b"".join(pieces)


def whole(name: str, value: object, least: int | None = 1) -> int:
    """`value` as an int of at least `least` (None: any). Raises TypeError or ValueError naming the field."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    number = operator.index(value)
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, not {number}")
    return number


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """How a step's samples are cut: `global_batch` of them per step, `micro_batch` per leaf."""

    global_batch: int
    micro_batch: int

    def __post_init__(self) -> None:
        whole("global_batch", self.global_batch)
        whole("micro_batch", self.micro_batch)
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"global_batch must be a multiple of micro_batch, but {self.global_batch} is not one of "
                f"{self.micro_batch}: every step has the same number of equal micro-batches"
            )

    @property
    def micro_batches(self) -> int:
        """M, the number of leaves of every step."""
        return self.global_batch // self.micro_batch

    def steps_per_epoch(self, length: int) -> int:
        """Whole steps in `length` samples; a remainder smaller than a global batch is dropped.

        Raises ValueError if there is not even one.
        """
        if not self.global_batch <= length <= LONGEST:
            raise ValueError(
                f"the dataset has {length} samples: with global_batch={self.global_batch} it needs at least "
                f"{self.global_batch} (and at most 2**62)"
            )
        return length // self.global_batch

    def loop_steps(self, length: int | None, *, steps: int | None, epochs: int | None) -> int | None:
        """How many steps a loop has over a dataset of `length` samples (None: a stream, of unknown length).

        Exactly one of `steps` and `epochs` says so; for a stream `steps` or, until it ends, neither. Raises
        TypeError or ValueError naming the field.
        """
        steps = None if steps is None else whole("steps", steps)
        epochs = None if epochs is None else whole("epochs", epochs)
        if steps is not None and epochs is not None:
            raise ValueError(f"steps={steps} and epochs={epochs} both say how long the loop is; give only one")
        if length is None:
            if epochs is not None:
                raise ValueError(f"epochs={epochs}: the dataset has no length, hence no epochs; give steps")
            return steps
        if steps is None and epochs is None:
            raise ValueError("steps or epochs must say how long the loop is")
        per_epoch = self.steps_per_epoch(length)
        return steps if epochs is None else epochs * per_epoch

    def epoch(self, step: int, length: int) -> int:
        """The epoch that `step` belongs to; both count from 0."""
        return step // self.steps_per_epoch(length)


def sample_indices(
    batching: Batching, *, step: int, leaf: int, length: int, seed: int, shuffle: bool = True
) -> Indices:
    """The samples of one micro-batch: int64, shape (micro_batch,), each in [0, length).

    `step` counts from 0 over all epochs; `leaf` is in [0, M). Without `shuffle` every epoch runs through the
    dataset in its own order. Raises ValueError for a step or leaf out of range, or a dataset smaller than a
    global batch.
    """
    if step < 0 or not 0 <= leaf < batching.micro_batches:
        raise ValueError(f"there is no leaf {leaf} of step {step}: a step has {batching.micro_batches} leaves")
    epoch, step_in_epoch = divmod(step, batching.steps_per_epoch(length))
    start = step_in_epoch * batching.global_batch + leaf * batching.micro_batch
    places = np.arange(start, start + batching.micro_batch, dtype=np.int64)
    return permuted(places, length=length, seed=seed, epoch=epoch) if shuffle else places


def permuted(places: Indices, *, length: int, seed: int, epoch: int) -> Indices:
    """Which sample stands at each of `places`, in the order that belongs to (seed, epoch).

    `places` and the result are int64 of the same one-dimensional shape, values in [0, length). Over all
    places the result is a permutation.
    """
    assert 0 < length <= LONGEST, length
    side = math.isqrt(length - 1) + 1  # least whole number with side**2 >= length
    keys = _round_keys(seed, epoch)
    values = _enciphered(places.astype(np.uint64), side, keys)
    # Ends: a permutation of [0, side**2) leads back into [0, length), at the latest where it came in.
    while (outside := np.flatnonzero(values >= np.uint64(length))).size:
        values[outside] = _enciphered(values[outside], side, keys)
    return values.astype(np.int64)


@functools.lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    return tuple(np.uint64(derive_seed(seed, "order", epoch, number)) for number in range(_ROUNDS))


def _enciphered(values: _Words, side: int, keys: tuple[np.uint64, ...]) -> _Words:
    modulus = np.uint64(side)
    left, right = values // modulus, values % modulus
    for key in keys:
        left, right = right, (left + _mix(right + key) % modulus) % modulus
    return left * modulus + right


def _mix(words: _Words) -> _Words:
    """Stafford's Mix13: a bijection of 64-bit words in which every input bit flips every output bit about
    half the time. Overflow is meant."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


class Line:
    """Tickets in the order in which a rank will ask for them, redirectable at any time.

    The line is the iterator that reading ahead draws on. A drawn ticket is *under way* until the caller,
    to whom tickets come back in the order they were drawn, takes it off `under_way`; it then keeps in
    `arrived` what may still be asked for. No ticket is drawn while it is under way or arrived.
    """

    def __init__(self, steps: int) -> None:
        self.under_way: deque[Ticket] = deque()
        self.arrived: dict[Ticket, Any] = {}
        self.steps = steps
        self._leaves: tuple[int, ...] = ()
        self._step = 0  # the next ticket is for _leaves[_place] of _step
        self._place = 0

    def __iter__(self) -> "Line":
        return self

    def __next__(self) -> Ticket:
        if not self.has_more():
            raise StopIteration  # for now: after `redirect` there may be more
        self.under_way.append((self._step, self._leaves[self._place]))
        return self.under_way[-1]

    def has_more(self) -> bool:
        """Whether a ticket is left that is neither under way nor arrived; moves up to it."""
        while self._leaves and self._step < self.steps:
            ticket = (self._step, self._leaves[self._place])
            if ticket not in self.arrived and ticket not in self.under_way:
                return True
            self._place = (self._place + 1) % len(self._leaves)
            self._step += self._place == 0
        return False

    def reaches(self, ticket: Ticket, draws: int) -> bool:
        """Whether the ticket is under way, or would be after at most so many draws."""
        if ticket in self.under_way:
            return True
        if not self.has_more() or ticket in self.arrived or ticket[1] not in self._leaves:
            return False
        steps_between = ticket[0] - self._step
        distance = steps_between * len(self._leaves) + self._leaves.index(ticket[1]) - self._place
        return ticket[0] < self.steps and 0 <= distance < draws

    def redirect(self, step: int, leaves: tuple[int, ...]) -> None:
        """From here on draw `leaves`, ascending, of `step` and every step after it."""
        self._leaves, self._step, self._place = leaves, step, 0
        self.forget_before(step)

    def forget_before(self, step: int) -> None:
        """Drop what arrived and isn't wanted by the owner of these leaves from `step` on."""
        self.arrived = {
            ticket: batch for ticket, batch in self.arrived.items() if ticket[0] >= step and ticket[1] in self._leaves
        }
