"""What docs/checkpoint-format.md says, tried."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from snapshot.files import open_files
from tests.shards import LARGE, SMALL, Shape, scattered, state_of

PAGE = (Path(__file__).parents[2] / "docs" / "checkpoint-format.md").read_text(encoding="utf-8")


def example() -> Any:
    (source,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert "snapshot" not in source and len(source.splitlines()) <= 32
    names: dict[str, Any] = {}
    exec(source, names)
    return names["read_tensor"]


@pytest.mark.parametrize("shapes", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("compression", [None, 1])
@pytest.mark.parametrize("scatter", [False, True])
def test_the_example_reads_a_tensor(
    tmp_path: Path, shapes: tuple[Shape, ...], compression: int | None, scatter: bool
) -> None:
    state = state_of(shapes=shapes, world=3)
    state = scattered(state) if scatter else state
    state.save(open_files(str(tmp_path)), compression)
    read_tensor = example()
    for spec, offset in zip(state.skeleton.tensors, state.skeleton.offsets, strict=False):
        found = read_tensor(tmp_path / state.folder, spec.name)
        assert found == (spec.dtype, list(spec.shape), state.data[offset : offset + spec.nbytes])


@pytest.mark.parametrize("scatter", [False, True])
def test_every_field_is_described(tmp_path: Path, scatter: bool) -> None:
    state = scattered(state_of()) if scatter else state_of()
    state.save(open_files(str(tmp_path)))
    for path in (tmp_path / state.folder).glob("*.json"):
        node = json.loads(path.read_bytes())
        for holder in (node, *node.get("chunks", [])[:1], *node.get("shards", [])[:1], *node.get("lineage", [])[:1]):
            assert [name for name in holder if f"`{name}`" not in PAGE and name not in ("attempt", "token")] == []
