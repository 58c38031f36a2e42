"""The loops of four well-known training scripts, in small: what each does around a step, in the loop of two levels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import lr_scheduler
from torch.utils.data import TensorDataset

SIZES: dict[str, Any] = {"global_batch": 24, "micro_batch": 4}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TOKENS = torch.randint(11, (48, 9), generator=torch.Generator().manual_seed(1))
IMAGES = TensorDataset(drawn(48, 1, 6, 6), drawn(48, seed=3).gt(0).long())


class Words(nn.Module):
    """Embedding and head share their weight, as in language models."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embedding, self.body, self.dropout = nn.Embedding(11, 16), body, nn.Dropout(0.1)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.body(self.dropout(self.embedding(tokens)))
        out: Tensor = self.head(x[0] if isinstance(x, tuple) else x)
        return out


def word_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def gpt(run: Any) -> Any:
    """A learning rate by hand from the step's number, clipping, decay for matrices only, and on rank 0 an estimate of
    the loss on random batches, whose best is told and not kept."""
    torch.manual_seed(1337)
    # In double precision: the bias of keys has no gradient but rounding, which AdamW would make a full step of.
    model = Words(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)).double()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    run.protect(model=model, optimizer=optimizer)
    best = math.inf
    for step in run.steps(TOKENS, **SIZES, steps=6):
        rate = 1e-2 * min((step.number + 1) / 2, 0.5 * (1 + math.cos(math.pi * step.number / 6)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        if run.is_main and step.number % 2 == 0:
            with run.evaluating():
                batches = [TOKENS[torch.randint(len(TOKENS), (8,))] for _ in range(2)]
                best = min(best, *(float(word_loss(model, batch)) for batch in batches))
        for tokens in step:
            word_loss(model, tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model


def mnist(run: Any) -> Any:
    """Epochs with a test on held-out data, and a schedule by epoch."""
    torch.manual_seed(1)
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.25), nn.Flatten()),
        *(nn.Linear(16, 2), nn.LogSoftmax(1)),
    )
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    scheduler = lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    run.protect(model=model, optimizer=optimizer, scheduler=scheduler)
    right = []
    for _ in run.epochs(3):
        for step in run.steps(IMAGES, **SIZES):
            for images, labels in step:
                functional.nll_loss(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        with run.evaluating():
            images, labels = IMAGES.tensors
            right.append(int((model(images).argmax(1) == labels).sum()))
        scheduler.step()
    return model


def word_language_model(run: Any) -> Any:
    """A recurrent model whose hidden state begins anew with each sequence; plain gradient descent by hand, and a
    learning rate that is divided where validation gets no better: both live in `run.state` and the optimizer."""
    torch.manual_seed(2)
    model = Words(nn.LSTM(16, 16, batch_first=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    run.protect(model=model, optimizer=optimizer)
    run.state["best"] = math.inf
    for _ in run.epochs(3):
        for step in run.steps(TOKENS, **SIZES):
            for tokens in step:
                word_loss(model, tokens).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            optimizer.step()
            optimizer.zero_grad()
        with run.evaluating():
            loss = float(word_loss(model, TOKENS))
        if loss < run.state["best"] - 0.05:
            run.state["best"] = loss
        else:
            optimizer.param_groups[0]["lr"] /= 4
    return model


def dcgan(run: Any) -> Any:
    """The judge's update before the maker's, on the same images; two losses before the judge's update."""
    torch.manual_seed(999)
    judge = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
    maker = nn.Sequential(
        nn.Linear(4, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 36), nn.Unflatten(1, (1, 6, 6))
    )
    judging, making = (torch.optim.Adam(each.parameters(), lr=2e-3, betas=(0.5, 0.999)) for each in (judge, maker))
    run.protect(judge=judge, maker=maker, judging=judging, making=making)
    for step in run.steps(IMAGES, **SIZES, epochs=2, updates=2):
        for real, _ in step:
            made = maker(torch.randn(len(real), 4))
            if step.update == 0:
                functional.binary_cross_entropy_with_logits(judge(real), torch.ones(len(real), 1)).backward()
                functional.binary_cross_entropy_with_logits(judge(made.detach()), torch.zeros(len(real), 1)).backward()
            else:
                functional.binary_cross_entropy_with_logits(judge(made), torch.ones(len(real), 1)).backward()
        (judging, making)[step.update].step()
        judging.zero_grad()
        making.zero_grad()
    return nn.ModuleList([judge, maker])


LOOPS = {"gpt": gpt, "mnist": mnist, "word_language_model": word_language_model, "dcgan": dcgan}


def parameters_of(run: Any, name: str) -> list[Tensor]:
    """As the function of a run: what the model has come to."""
    return [parameter.detach().clone() for parameter in LOOPS[name](run).parameters()]


def nothing_of(run: Any, name: str) -> None:
    """The same without a value, which would have to travel."""
    LOOPS[name](run)
