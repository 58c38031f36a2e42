"""The likely cause of a difference, in words: from which layouts differ, and from experiments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .check_rank import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    cause: str
    remedy: str


REFUSED = Cause(
    cause="the loop fails in one process already, before other ranks and failures come into it",
    remedy="as the error says",
)
FAILED = {
    "hangs": Cause(
        cause="a process waits for what never comes: something of the script's own, or ranks that do not do the same",
        remedy="let every rank do the same in each step; below is where each process stands",
    ),
    "died": Cause(
        cause="the script or a library has ended the process, or the system has, for want of memory",
        remedy="see what it has printed; a signal leaves nothing there",
    ),
}
RANDOM = Cause(
    cause="the same layout, run twice, has different bits: an operation that is not deterministic by itself, a random "
    "number that no seed decides (numpy.random.default_rng(), os.urandom), the time of day, or a process id",
    remedy="seed every generator from a constant, keep time and process ids out of training, and call "
    "torch.use_deterministic_algorithms(True)",
)
CARRIED = Cause(
    cause="a value is carried from one micro-batch to the next, in the order in which this process happens to have "
    "them: a Python variable, a hidden state, a batch fetched ahead, or a random generator of the script's own",
    remedy="let each micro-batch depend on the state at the start of the step alone; draw random numbers from torch's, "
    "numpy's or Python's global generators, which are seeded for each micro-batch",
)
ONE_RANK = Cause(
    cause="the script does something on one rank alone (run.is_main, run.rank) that changes training: it draws random "
    "numbers there, such as for a validation, or changes the model",
    remedy="do it in `with run.evaluating():`, which training does not notice, or on all ranks alike",
)
WORLD_SIZE = Cause(
    cause="the script computes something from the number of ranks (run.world_size)",
    remedy="leave run.world_size out: gradients and losses are means over the global batch already",
)
PER_MICRO_BATCH = Cause(
    cause="something changes once per micro-batch instead of once per step, so it depends on how many micro-batches a "
    "rank has: a counter, an average of weights, a learning rate set by hand",
    remedy="do it once per step: behind the inner loop of `for step in run.steps(...)`, or `if run.committing:` in a "
    "loop over run.batches; keep counters in run.state, or use run.step",
)
REPLACEMENT = Cause(
    cause="a replacement does not have all that training depends on: a Python variable (a learning rate, a counter, "
    "enumerate's number, a best loss) that was changed in the loop, an epoch's number read before run.steps, or a "
    "random generator",
    remedy="keep it in run.state, or in an object given to run.protect; derive the rest from run.step",
)
RESUMED = Cause(
    cause="a resumed run does not have all that training depends on: a Python variable (a learning rate, a counter, "
    "enumerate's number, a best loss) that was changed in the loop, an epoch's number read before run.steps, or a "
    "random generator",
    remedy="keep it in run.state, or in an object given to run.protect; derive the rest from run.step",
)


def cause_of(layout: Layout, failed: Mapping[str, Layout], differs: Callable[[Layout], bool]) -> Cause:
    """failed: all layouts that differ, by name. differs: tries another layout."""
    if layout.resumes_at is not None:
        return RESUMED
    if layout.dies_in is not None and not any(each.ranks > 1 and each.dies_in is None for each in failed.values()):
        return REPLACEMENT
    if layout.ranks == 1 and not layout.backwards:
        return RANDOM
    if any(each.backwards for each in failed.values()):
        return CARRIED
    if differs(Layout(name="one process that is not rank 0", as_rank=1, as_size=2)):
        alone = differs(Layout(name="one process of two", as_size=2))
        return WORLD_SIZE if alone else ONE_RANK
    return PER_MICRO_BATCH
