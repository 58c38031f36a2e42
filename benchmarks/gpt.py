"""A GPT of any size for benchmarks, and a training step on one thread that is long enough to be measured."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

BYTES_PER_PARAMETER = 12
"""float32: the parameter and AdamW's two moments."""
LAYERS = {64: 4, 256: 8, 1024: 12}
"""By MiB of state."""
VOCABULARY, CONTEXT, HEADS = 256, 64, 8
LARGEST_BATCH = 256


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.project(self.attend(self.norm(x)))
        out: Tensor = x + self.mlp(x)
        return out

    def attend(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.query_key_value(x).view(batch, length, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return out.transpose(1, 2).reshape(batch, length, width)


class GPT(nn.Module):
    """Tokens in, logits of the next token out."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.places = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        out: Tensor = self.head(self.norm(self.blocks(x)))
        return out


class Training:
    """One rank's model, optimizer and step; the gradients of several ranks are averaged by DDP.

    state_bytes: of parameters and optimizer state, within a few percent of what was asked for.
    """

    def __init__(self, state_mib: int) -> None:
        torch.manual_seed(0)
        layers = LAYERS[state_mib]
        parameters = (state_mib << 20) / BYTES_PER_PARAMETER
        width = round((parameters / (12 * layers)) ** 0.5 / HEADS) * HEADS
        self.model = GPT(layers, width)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self._parallel: nn.Module = self.model
        if dist.get_world_size() > 1:
            self._parallel = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        self.batch = 1
        self.step()
        self.state_bytes = sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        """All that the optimizer changes."""
        moments = (value for state in self.optimizer.state.values() for value in state.values())
        return [*(parameter.data for parameter in self.model.parameters()), *moments]

    def state_dict(self) -> dict[str, object]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def step(self, gate: Callable[[], object] = lambda: None) -> None:
        """gate: returns when the optimizer may write."""
        tokens = torch.randint(VOCABULARY, (self.batch, CONTEXT + 1))
        logits = self._parallel(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        gate()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def calibrate(self, step_s: float) -> float:
        """Choose a batch with which a step takes about so long, or longer if one sample already does; what it takes."""
        first_s = self._timed(1)
        more_s = max((self._timed(5) - first_s) / 4, 1e-4)
        self.batch = max(1, min(LARGEST_BATCH, round(1 + (step_s - first_s) / more_s)))
        dist.all_reduce(batch := torch.tensor(self.batch), op=dist.ReduceOp.MIN)
        return self._timed(int(batch))

    def _timed(self, batch: int) -> float:
        self.batch = batch
        times = []
        for _ in range(3):
            began = time.monotonic()
            self.step()
            times.append(time.monotonic() - began)
        return min(times)
