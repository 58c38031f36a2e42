"""Many seeds over all cores, or one of them with its story."""

from __future__ import annotations

import functools
import multiprocessing
import os
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from .world import World

MOST_FAILURES = 40
CHUNK = 50


@dataclass(slots=True)
class Outcome:
    seeds: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    """How often each interesting interval was hit, over all seeds."""
    failures: list[tuple[int, str]] = field(default_factory=list)


def run_seed(
    seed: int, *, drained: bool = True, staged: bool = True, looped: bool = False, silenced: bool = False
) -> tuple[int, Counter[str], str]:
    """The seed, what was seen, and what went wrong (empty when nothing did)."""
    world = World(seed, drained=drained, staged=staged, looped=looped, silenced=silenced)
    try:
        world.run()
    except Exception as error:  # noqa: BLE001 - a failing seed is a finding, whatever it raises
        where = traceback.extract_tb(error.__traceback__)[-1]
        return seed, world.seen, f"{type(error).__name__} at {where.name}:{where.lineno}: {str(error)[:300]}"
    assert world.end is not None
    world.seen[f"run {world.end.outcome}"] += 1
    return seed, world.seen, ""


def swarm(
    seeds: Iterable[int],
    *,
    keep_going: bool,
    drained: bool = True,
    staged: bool = True,
    looped: bool = False,
    silenced: bool = False,
) -> Outcome:
    """drained: nodes and ranks may be asked to leave, or be slow. staged: a third trains a pipeline. looped: the others
    have two loops. silenced: links between living nodes may fall silent."""
    outcome = Outcome()
    run = functools.partial(run_seed, drained=drained, staged=staged, looped=looped, silenced=silenced)
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        for seed, seen, error in pool.imap(run, seeds, chunksize=CHUNK):
            outcome.seeds += 1
            outcome.seen.update(seen)
            if error:
                outcome.failures.append((seed, error))
                if not keep_going and len(outcome.failures) >= MOST_FAILURES:
                    break
    return outcome


def replay(seed: int, *, looped: bool = False, silenced: bool = False) -> int:
    world = World(seed, keep_story=True, looped=looped, silenced=silenced)
    try:
        world.run()
    except Exception:  # noqa: BLE001 - shown in full below its story
        print("\n".join(world.story))
        print(world.setting)
        for number, rank in sorted(world.ranks.items()):
            print(f"rank {number} {'alive' if rank.alive else 'dead'} {rank.seat}")
        traceback.print_exc()
        return 1
    print("\n".join(world.story))
    return 0
