"""Names of dtypes come from files and other processes: only those of dtypes mean something."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from snapshot.memory import dtype_named
from snapshot.writes import leaf_decoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.qint8], ids=str)
def test_a_dtype_is_found_by_its_name(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    assert dtype_named(name) is dtype
    assert leaf_decoder(lambda number, current: torch.empty(0))("dtype", name, None) is dtype


@pytest.mark.parametrize("name", ["load", "nn", "__builtins__", "float32.x", "", None, ["float32"]])
def test_another_attribute_of_torch_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="no dtype of the name"):
        leaf_decoder(lambda number, current: torch.empty(0))("dtype", name, None)
