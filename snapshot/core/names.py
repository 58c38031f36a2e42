"""What the folders and files of durable checkpoints are called. No other name is ever opened."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, replace

MANIFEST = "manifest.json"
SKELETON = "skeleton.json"

_LIMIT = 1 << 63
_FOLDER = re.compile(r"step-([0-9]{9,19})-b([0-9]{1,19})-a([0-9]{1,19})-g([0-9]{1,19})-([0-9a-f]{8})(?:-(.+))?")
_PLAIN = re.compile(r"[A-Za-z0-9._-]{1,100}")
_CODED = re.compile(r"=[A-Za-z0-9_-]{1,140}")
_TOKEN = re.compile("[0-9a-f]{8}")
_SHARD = re.compile(r"shard-([0-9]{5,9})-of-([0-9]{5,9})\.(json|bin)")
_TEMPORARY = re.compile(r"\.[a-z0-9.-]{1,80}\.[0-9a-f]{8}\.tmp")


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class CheckpointKey:
    """Which checkpoint; the greater, the newer.

    token: eight hexadecimal digits, drawn anew by each submission of a job, so that two of them never write into
        the same folder, not even those of two clusters that both count attempts from 1.
    run: the run's name; "" for a folder that an earlier version has written, whose manifests alone say it.
    """

    attempt: int
    branch: int
    step: int
    generation: int
    token: str
    run: str = ""

    def __post_init__(self) -> None:
        for name in ("attempt", "branch", "step", "generation"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < _LIMIT:
                raise ValueError(f"{name}: {value!r:.80} is not an integer within 0..2**63-1")
        if type(self.token) is not str or not _TOKEN.fullmatch(self.token):
            raise ValueError(f"token: {self.token!r:.80} is not eight hexadecimal digits")

    @property
    def folder(self) -> str:
        front = f"step-{self.step:09d}-b{self.branch}-a{self.attempt}-g{self.generation}-{self.token}"
        return f"{front}-{_in_folders(self.run)}" if self.run else front

    @property
    def folders(self) -> tuple[str, str]:
        """Where it may lie: earlier versions left out the run."""
        return self.folder, replace(self, run="").folder

    @classmethod
    def of_folder(cls, name: str) -> CheckpointKey | None:
        """None for anything that is not the folder of a checkpoint."""
        match = _FOLDER.fullmatch(name)
        if match is None:
            return None
        step, branch, attempt, generation = map(int, match.groups()[:4])
        if max(step, branch, attempt, generation) >= _LIMIT:
            return None
        run = "" if match[6] is None else _from_folders(match[6])
        if run is None:
            return None
        key = cls(attempt=attempt, branch=branch, step=step, generation=generation, token=match[5], run=run)
        return key if key.folder == name else None


def _in_folders(run: str) -> str:
    """A run's name, in signs that every storage takes as they are: itself, or its UTF-8 in base64."""
    if _PLAIN.fullmatch(run):
        return run
    return "=" + base64.urlsafe_b64encode(run.encode(errors="surrogatepass")).decode().rstrip("=")


def _from_folders(name: str) -> str | None:
    """None if no run is spelled so."""
    if not _CODED.fullmatch(name):
        return name if _PLAIN.fullmatch(name) else None
    try:
        return base64.urlsafe_b64decode(name[1:] + "=" * (-len(name[1:]) % 4)).decode() or None
    except ValueError:
        return None


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
