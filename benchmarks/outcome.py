"""What every benchmark writes: machine, commit, targets met or missed, and the raw samples."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    name: str
    value: float
    unit: str
    goal: float
    """The value must not exceed it; or, with `at_least`, not fall below it."""
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    @property
    def wanted(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.goal:g}"


def write(path: Path, targets: list[Target], samples: dict[str, Any]) -> None:
    """One JSON file, and the same as a table. A missed target is written as missed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**asdict(target), "met": target.met} for target in targets]
    text = {"machine": machine(), "commit": commit(), "targets": rows, "samples": samples}
    path.write_text(json.dumps(text, indent=1) + "\n")
    table = Table(title=str(path))
    for column in ("target", "value", "goal", "met"):
        table.add_column(column, justify="left" if column == "target" else "right")
    for target in targets:
        table.add_row(
            target.name, f"{target.value:.3f} {target.unit}", target.wanted, "yes" if target.met else "MISSED"
        )
    Console().print(table)


def machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ray": ray.__version__,
        "kernel": platform.release(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def commit() -> str:
    here = Path(__file__).parent
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or "unknown"
