"""A GPT over bytes, its layers spread over ranks as a pipeline: `python train_gpt_pipeline.py [steps]`.

It learns Python's own library. A rank has memory only for the layers that it holds; when ranks die or come, layers
move, and the weights stay the same to the last bit.
"""

import math
import sys
import sysconfig
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import resilient

CONTEXT, WIDTH, HEADS, BLOCKS = 64, 128, 4, 4


class Text:
    """Windows of the standard library's source: bytes, and the byte after each."""

    def __init__(self):
        folder = Path(sysconfig.get_paths()["stdlib"])
        self.bytes = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))

    def __len__(self):
        return (len(self.bytes) - 1) // CONTEXT

    def __getitem__(self, index):
        window = self.bytes[index * CONTEXT : (index + 1) * CONTEXT + 1]
        window = torch.tensor(list(window))
        return window[:-1], window[1:]


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(256, WIDTH)
        self.places = nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        nn.init.normal_(self.words.weight, std=0.02)

    def forward(self, x):
        return functional.dropout(self.words(x) + self.places, 0.1, self.training)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query_key_value, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        x = x + functional.dropout(self.project(self.attend(self.before(x))), 0.1, self.training)
        hidden = functional.gelu(self.wide(self.between(x)))
        return x + functional.dropout(self.narrow(hidden), 0.1, self.training)

    def attend(self, x):
        batch, time, _ = x.shape
        heads = self.query_key_value(x).view(batch, time, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(*heads.unbind(0), is_causal=True)
        return out.transpose(1, 2).reshape(batch, time, WIDTH)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.words = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, x):
        return self.words(self.norm(x))


def loss_of(logits, y):
    return functional.cross_entropy(logits.flatten(0, 1), y.flatten())


def warm_up_then_cosine(step, steps):
    return min((step + 1) / 10, 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))


@resilient.train(workers=(2, 4), snapshot=resilient.Snapshot(every=1))
def main(run, steps=200, stages=3, after_step=lambda step, loss: None):
    pipe = run.pipeline(
        layers=[Embedding, *[Block] * BLOCKS, Head],
        loss=loss_of,
        stages=stages,
        tied={f"layers.{BLOCKS + 1}.words.weight": "layers.0.words.weight"},
    )
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=3e-3, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(warm_up_then_cosine, steps=steps))
    run.protect(model=pipe, optimizer=optimizer, scheduler=scheduler)
    for step in run.steps(Text(), global_batch=16, micro_batch=2, steps=steps):
        loss = pipe.train_step(step)
        run.clip_grad_norm_(1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        after_step(run.step, loss)


if __name__ == "__main__":
    result = main(*map(int, sys.argv[1:]))
    print(f"loss {result.metrics[-1]['loss']:.3f}, digest of the state: {result.digest}")
