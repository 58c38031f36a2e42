"""An environment for a peer that asks for other packages than we do: it sees ours beside its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

INSTALL_LIMIT_S = 300.0
DLROVER = (
    ("dlrover==0.6.1", "grpcio==1.85.1", "protobuf==7.36.2"),
    "import torch; from dlrover.trainer.torch.flash_checkpoint.ddp import DdpCheckpointer",
)
TORCHFT = (
    (
        "torchft-nightly==2026.10.26",
        "opentelemetry-exporter-otlp-common",
        "opentelemetry-exporter-otlp-proto-common",
        "opentelemetry-exporter-otlp-proto-http",
        "opentelemetry-exporter-http-transport",
    ),
    "import torchft",
)
RAY_TRAIN = (
    ("pyarrow", "pandas", "python-dateutil", "pytz", "tzdata", "six"),
    "from ray.train.torch import TorchTrainer",
)
"""What each is installed from, and what shows that it is there."""

Peer = tuple[tuple[str, ...], str]


def prepare(folder: Path, peer: Peer) -> tuple[Path, str]:
    """The interpreter to run it with, and why it is not in there; that is empty if it is.

    Both interpreters load torch, and all else that we use, from the same files.
    """
    requirements, check = peer
    python = folder / "bin" / "python"
    try:
        if not (folder / "complete").exists():
            _run(sys.executable, "-m", "venv", str(folder))
            # Without what they ask for beside: they do not use it for this, and bring a torch of their own.
            _run(str(python), "-m", "pip", "install", "--quiet", "--no-deps", *requirements)
            (site,) = (folder / "lib").glob("python*/site-packages")
            (site / "ours.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
            (folder / "complete").touch()
        _run(str(python), "-c", check)
    except subprocess.CalledProcessError as error:
        return Path(sys.executable), f"{' '.join(error.cmd)}: {error.stderr.strip()[-500:]}"
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return Path(sys.executable), str(error)
    return python, ""


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_LIMIT_S)
