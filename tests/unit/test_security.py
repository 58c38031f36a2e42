"""What docs/security.md states is tested, and nothing but what Ray brings is unpickled."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "security.md"
UNPICKLERS = {"pickle", "cloudpickle", "dill", "marshal", "joblib", "shelve", "torch"}
FROM_RAY = {f"resilient/{name}.py" for name in ("check_rank", "function_store", "local", "packing", "result", "worker")}


def test_every_test_that_the_page_names_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE.read_text())
    assert len(named) > 20
    for file, name in named:
        found = {each.name for each in ast.walk(ast.parse((ROOT / "tests/unit" / file).read_text())) if _is_test(each)}
        assert name in found, f"docs/security.md names {file}::{name}"


def test_only_what_ray_brings_is_unpickled() -> None:
    found = set()
    for package in ("actors", "resilient", "snapshot"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if any(_unpickles(node) for node in ast.walk(ast.parse(path.read_text()))):
                found.add(str(path.relative_to(ROOT)))
    assert found == FROM_RAY


def _is_test(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name.startswith("test_")


def _unpickles(node: ast.AST) -> bool:
    """cloudpickle.loads, torch.load and their like, called or passed on."""
    return (
        isinstance(node, ast.Attribute)
        and node.attr in ("load", "loads", "Unpickler")
        and isinstance(node.value, ast.Name)
        and node.value.id in UNPICKLERS
    )
