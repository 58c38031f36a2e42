"""The packages' promises about imports: one direction, pure cores, torch only where it must be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("resilient", "actors", "snapshot")

FORBIDDEN_IN = {
    "snapshot": {"ray", "actors", "resilient"},
    "actors": {"resilient"},
    "resilient": set[str](),
}
FORBIDDEN_IN_CORE = {
    "asyncio", "multiprocessing", "os", "random", "ray", "secrets", "socket", "subprocess", "threading",
    "time", "torch",
}  # fmt: skip
# What reads and writes live objects; keepers use the rest and start without torch.
MAY_IMPORT_TORCH_IN_SNAPSHOT = {
    f"snapshot/{name}.py"
    for name in (
        *("absent", "attributes", "capture", "compare", "export", "front", "load", "memory", "partial", "recapture"),
        *("sharded", "state_dict", "table", "watch", "writes"),
    )
}


def sources() -> list[Path]:
    found = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert found, f"no sources under {ROOT}"
    return [path.relative_to(ROOT) for path in found]


def imports_of(source: str, *, package: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Absolute dotted names of all imports, those inside functions included, with their lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = ".".join((*base, *([node.module] if node.module else [])))
            # `from package import module` is an import of package.module too, if there is such a module.
            names = [f"{prefix}.{a.name}" for a in node.names]
            modules = [name for name in names if (ROOT / Path(*name.split("."))).with_suffix(".py").exists()]
            yield from ((name, node.lineno) for name in modules or [prefix])


def imported_modules(path: Path) -> list[tuple[str, int]]:
    return list(imports_of((ROOT / path).read_text(encoding="utf-8"), package=path.parent.parts))


def violations(path: Path, forbidden: set[str]) -> list[str]:
    return [f"{path}:{line} imports {name}" for name, line in imported_modules(path) if name.split(".")[0] in forbidden]


@pytest.mark.parametrize("path", sources(), ids=str)
def test_imports_run_one_way(path: Path) -> None:
    assert violations(path, FORBIDDEN_IN[path.parts[0]]) == []


@pytest.mark.parametrize("path", [path for path in sources() if "core" in path.parts], ids=str)
def test_core_is_pure(path: Path) -> None:
    assert violations(path, FORBIDDEN_IN_CORE) == []


@pytest.mark.parametrize("path", [path for path in sources() if "core" in path.parts], ids=str)
def test_core_imports_nothing_of_ours_but_cores(path: Path) -> None:
    ours = [name for name, _ in imported_modules(path) if name.split(".")[0] in PACKAGES]
    assert [name for name in ours if "core" not in name.split(".")] == []


def test_torch_in_snapshot_is_confined_to_live_objects() -> None:
    users = {str(path) for path in sources() if path.parts[0] == "snapshot" and violations(path, {"torch"})}
    assert users <= MAY_IMPORT_TORCH_IN_SNAPSHOT


def test_relative_imports_are_resolved() -> None:
    # The checks above would be blind without this.
    source = "from .. import x\nfrom .a import y\nfrom . import z\nimport torch.nn\n"
    names = [name for name, _ in imports_of(source, package=("snapshot", "core"))]
    assert names == ["snapshot", "snapshot.core.a", "snapshot.core", "torch.nn"]


# Every module that must start in a second: torch alone takes four more.
@pytest.mark.parametrize(
    "module", ["resilient.controller", "actors.keeper", "actors.keeping", "snapshot.stored", "snapshot.objects"]
)
def test_control_processes_start_without_torch(module: str) -> None:
    program = f"import sys, {module}; sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


WALL_CLOCKS = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today"}
READ_WALL_CLOCKS = {
    "actors/moments.py": "where hosts differ, or an older version wrote it",
    "actors/saving.py": "a checkpoint's manifest says when it was made, for people",
    "resilient/departures.py": "the cluster says in this clock when it ends a node",
    "resilient/doctor_cluster.py": "compares the clocks of hosts",
    "resilient/feed.py": "the page says when something happened",
    "resilient/local_saving.py": "a checkpoint's manifest says when it was made, for people",
    "resilient/showing.py": "the event log says when something happened",
    "resilient/workers.py": "a keeper's number, which grows in any case",
}
"""They may be set by minutes at any time: nobody is declared dead or swept by them. By file, why it reads one."""


def test_intervals_are_not_measured_by_clocks_that_may_be_set() -> None:
    users = set()
    for path in sources():
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and f"{ast.unparse(node.value)}.{node.attr}" in WALL_CLOCKS:
                users.add(str(path))
    assert users == READ_WALL_CLOCKS.keys()
