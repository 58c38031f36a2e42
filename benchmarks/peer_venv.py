"""An environment for DLRover, which asks for other packages than we do: it sees ours beside its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

REQUIREMENTS = ("dlrover==0.6.1", "grpcio==1.85.1", "protobuf==7.36.2")
INSTALL_LIMIT_S = 300.0
CHECK = "import torch; from dlrover.trainer.torch.flash_checkpoint.ddp import DdpCheckpointer"


def prepare(folder: Path) -> tuple[Path, str]:
    """The interpreter to run ranks with, and why DLRover is not in it; that is empty if it is.

    Both interpreters load torch, and all else that we use, from the same files.
    """
    python = folder / "bin" / "python"
    try:
        if not (folder / "complete").exists():
            _run(sys.executable, "-m", "venv", str(folder))
            # Without what it asks for beside: it does not use it for this, and brings a torch of its own.
            _run(str(python), "-m", "pip", "install", "--quiet", "--no-deps", *REQUIREMENTS)
            (site,) = (folder / "lib").glob("python*/site-packages")
            (site / "ours.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
            (folder / "complete").touch()
        _run(str(python), "-c", CHECK)
    except subprocess.CalledProcessError as error:
        return Path(sys.executable), f"{' '.join(error.cmd)}: {error.stderr.strip()[-500:]}"
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return Path(sys.executable), str(error)
    return python, ""


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_LIMIT_S)
