"""Real small checkpoints of a little language model in training, as a run writes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from snapshot.capture import capture
from snapshot.disk import Disk
from snapshot.files import Files, LocalFiles
from tests.shards import State

Parts = dict[str, Any]

VOCABULARY, WIDTH = 50, 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, dtype=torch.bfloat16)
        self.down = nn.Linear(4 * WIDTH, WIDTH, dtype=torch.bfloat16)
        self.register_buffer("mask", torch.ones(3, 3).tril(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x).to(torch.bfloat16)).relu()).float()


class Language(nn.Module):
    """Tied weights, running statistics, bf16 parameters, a buffer that state_dict leaves out, extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.patches = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        self.calls = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        x = self.embed(tokens) + self.patches(torch.ones(1, 3, 2, 2)).mean()
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build(seed: int = 0) -> Parts:
    torch.manual_seed(seed)
    model = Language()
    optimizer = torch.optim.AdamW(
        [{"params": model.embed.parameters(), "lr": 0.01}, {"params": list(model.blocks.parameters())}], lr=0.02
    )
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100),
        "run.state": {
            "seen": 0,
            "best": float("inf"),
            "name": "tiny",
            "ema": torch.rand(5),
            "history": np.arange(4, dtype=np.float32),
            "scale": np.float32(0.5),
            "shape": (1, 2),
        },
    }


def train(parts: Parts, steps: int = 3) -> None:
    for _ in range(steps):
        tokens = torch.randint(VOCABULARY, (8,))
        nn.functional.cross_entropy(parts["model"](tokens), tokens).backward()
        parts["optimizer"].step()
        parts["optimizer"].zero_grad()
        parts["scheduler"].step()
        parts["run.state"]["seen"] += 8


def snapshot_of(parts: Parts, step: int, world: int = 1, **fields: Any) -> State:
    """The objects as `Run` names them."""
    table = capture({name if name == "run.state" else f"user:{name}": thing for name, thing in parts.items()})
    data = b"".join(piece.numpy().tobytes() for piece in table.pieces(0, table.nbytes))
    return State(skeleton=table.layout, data=data, step=step, world=world, **fields)


class Hasty(Disk):
    """What it writes need not outlive the machine."""

    def sync(self, file: int) -> None:
        pass

    def sync_folder(self, path: Path) -> None:
        pass


def files_in(path: Path) -> LocalFiles:
    return LocalFiles(path, Hasty())


def save(files: Files, parts: Parts, step: int, world: int = 1, compression: int | None = None) -> str:
    """The folder."""
    state = snapshot_of(parts, step, world)
    state.save(files, compression)
    return state.folder


def state_dicts(parts: Parts) -> Parts:
    """What there is to be loaded."""
    return {name: dict(thing) if isinstance(thing, dict) else thing.state_dict() for name, thing in parts.items()}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, type and bits) of everything in nested containers."""
    if isinstance(value, dict):
        for key in sorted(value, key=repr):
            yield from leaves(value[key], f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        yield path, (type(value), len(value))
        for position, item in enumerate(value):
            yield from leaves(item, f"{path}[{position}]")
    else:
        yield path, bits(value)


def bits(value: Any) -> Any:
    if isinstance(value, Tensor):
        plain = value.detach().contiguous().flatten()
        return value.dtype, tuple(value.shape), plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    if isinstance(value, np.ndarray | np.generic):
        return type(value), value.dtype, value.shape, value.tobytes()
    return type(value), repr(value)
