"""A small CNN learns scikit-learn's handwritten digits, whatever fails: `python train_digits.py [epochs]`."""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import resilient


def datasets():
    """Images of 8 x 8 pixels, in a fixed random order: 1,437 to learn from and 360 held out."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] / 16
    labels = torch.tensor(labels)[order]
    return TensorDataset(images[:1437], labels[:1437]), TensorDataset(images[1437:], labels[1437:])


def network():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(512, 10),
    )  # fmt: skip


@torch.no_grad()
def accuracy(model, dataset):
    model.eval()
    images, labels = dataset.tensors
    return (model(images).argmax(1) == labels).float().mean().item()


@resilient.train(workers=(1, 4))
def main(run, epochs=8):
    train, held_out = datasets()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(train) // 64))
    run.protect(model=model, optimizer=optimizer, scheduler=scheduler)
    for step in run.steps(train, global_batch=64, micro_batch=8, epochs=epochs):
        for x, y in step:
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return accuracy(model, held_out)


if __name__ == "__main__":
    result = main(*map(int, sys.argv[1:]))
    print(f"{result.value:.1%} of the held-out digits are recognised; digest of the state: {result.digest}")
