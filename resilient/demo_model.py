"""What the demo trains: a small GPT over bytes, on text that every machine has, Python's own library.

Everything below `main` is an ordinary training script.
"""

from __future__ import annotations

import functools
import math
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

import resilient

BYTES = 256
CONTEXT = 64
WIDTH = 176
HEADS = 4
LAYERS = 3
DROPOUT = 0.1


class SourceText(Dataset[tuple[Tensor, Tensor]]):
    """The running interpreter's library, cut into windows: a window's bytes, and the byte after each."""

    def __init__(self, context: int = CONTEXT) -> None:
        self.text = source_text()
        self.context = context

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.context
        window = self.text[start : start + self.context + 1].long()
        return window[:-1], window[1:]


@functools.cache
def source_text() -> Tensor:
    """A few megabytes of Python, the same in every process of this interpreter."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.drop = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.project(self.attend(self.norm(x))))
        out: Tensor = x + self.drop(self.mlp(x))
        return out

    def attend(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        heads = self.query_key_value(x).view(batch, time, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        dropout = DROPOUT if self.training else 0.0
        out = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return out.transpose(1, 2).reshape(batch, time, WIDTH)


class GPT(nn.Module):
    """Bytes in, logits of the next byte out; the embedding is also the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, WIDTH)
        self.position = nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        self.drop = nn.Dropout(DROPOUT)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, BYTES, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.embedding(x) + self.position)
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def warm_up_then_cosine(step: int, *, steps: int, warm_up: int = 10) -> float:
    """The factor on the learning rate."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


# detection_s is above the default because all nodes share one machine, which may be slow for all at once.
@resilient.train(workers=(2, 4), resources={"CPU": 1}, name="demo", detection_s=6.0)
def main(run: resilient.Run, steps: int, after_step: Callable[[int, float], None], lr: float = 3e-3) -> int:
    """Train for this many steps; returns the number of parameters.

    after_step: called with step and loss in every step, on every rank; touches nothing that is trained.
    """
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
    schedule = functools.partial(warm_up_then_cosine, steps=steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    run.protect(model=model, optimizer=optimizer, scheduler=scheduler)
    for x, y in run.batches(SourceText(), global_batch=16, micro_batch=2, steps=steps):
        logits = model(x)
        loss = functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        run.log(loss=loss, accuracy=(logits.argmax(-1) == y).float().mean())
        if run.committing:
            after_step(run.step, float(run.reduced("loss")))
    return sum(parameter.numel() for parameter in model.parameters())
