"""What a process has decided or noticed, and the user should read: sent to the controller, shown by the driver."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Remark:
    text: str
