"""What the folders and files of durable checkpoints are called. No other name is ever opened."""

from __future__ import annotations

import re
from dataclasses import dataclass

MANIFEST = "manifest.json"
SKELETON = "skeleton.json"

_LIMIT = 1 << 63
_FOLDER = re.compile(r"step-([0-9]{9,19})-b([0-9]{1,19})-a([0-9]{1,19})-g([0-9]{1,19})-([0-9a-f]{8})")
_TOKEN = re.compile("[0-9a-f]{8}")
_SHARD = re.compile(r"shard-([0-9]{5,9})-of-([0-9]{5,9})\.(json|bin)")
_TEMPORARY = re.compile(r"\.[a-z0-9.-]{1,80}\.[0-9a-f]{8}\.tmp")


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class CheckpointKey:
    """Which checkpoint; the greater, the newer.

    token: eight hexadecimal digits, drawn anew by each submission of a job, so that two of them never write into
        the same folder, not even those of two clusters that both count attempts from 1.
    """

    attempt: int
    branch: int
    step: int
    generation: int
    token: str

    def __post_init__(self) -> None:
        for name in ("attempt", "branch", "step", "generation"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < _LIMIT:
                raise ValueError(f"{name}: {value!r:.80} is not an integer within 0..2**63-1")
        if type(self.token) is not str or not _TOKEN.fullmatch(self.token):
            raise ValueError(f"token: {self.token!r:.80} is not eight hexadecimal digits")

    @property
    def folder(self) -> str:
        return f"step-{self.step:09d}-b{self.branch}-a{self.attempt}-g{self.generation}-{self.token}"

    @classmethod
    def of_folder(cls, name: str) -> CheckpointKey | None:
        """None for anything that is not the folder of a checkpoint."""
        match = _FOLDER.fullmatch(name)
        if match is None:
            return None
        step, branch, attempt, generation = map(int, match.groups()[:4])
        if max(step, branch, attempt, generation) >= _LIMIT:
            return None
        key = cls(attempt=attempt, branch=branch, step=step, generation=generation, token=match[5])
        return key if key.folder == name else None


def shard_file(rank: int, world: int) -> str:
    """The bytes of a rank's share."""
    return f"shard-{rank:05d}-of-{world:05d}.bin"


def shard_manifest(rank: int, world: int) -> str:
    return f"shard-{rank:05d}-of-{world:05d}.json"


def world_of(name: str) -> int | None:
    """Of how many shards this is the manifest of one; None if it isn't one."""
    match = _SHARD.fullmatch(name)
    if match is None or match[3] != "json":
        return None
    rank, world = int(match[1]), int(match[2])
    return world if rank < world and shard_manifest(rank, world) == name else None


def is_temporary(name: str) -> bool:
    """Whether it is a file that was being written, and has no meaning yet."""
    return _TEMPORARY.fullmatch(name) is not None


def temporary(name: str, random: str) -> str:
    """random: eight hexadecimal digits."""
    return f".{name}.{random}.tmp"
