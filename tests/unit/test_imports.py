"""Modules of the user's that would hide ours in the workers; what Python itself finds is the judge."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from resilient.imports import HOME, check_not_hidden


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    return path


def imported(name: str, search: list[Path]) -> Path:
    """Where Python finds a package when it looks through these folders only."""
    folders = [str(folder) for folder in search]
    code = f"import sys; sys.path[:0] = {folders}; import {name}; print({name}.__path__[0])"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return Path(done.stdout.strip())


@pytest.mark.parametrize("name", ["actors.py", "snapshot/__init__.py", "resilient/__init__.py", "resilient.py"])
def test_hidden(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    shown = path.parent if path.name == "__init__.py" else path
    with pytest.raises(ValueError, match=r"would hide the package .*rename it") as caught:
        check_not_hidden(["/nowhere", str(tmp_path), str(HOME)])
    assert str(shown) in str(caught.value)
    assert f"`{shown.stem}`" in str(caught.value)
    check_not_hidden([str(HOME), str(tmp_path)])


def test_ours_is_fine(tmp_path: Path) -> None:
    check_not_hidden([str(HOME)])
    check_not_hidden([])
    (tmp_path / "resilient").symlink_to(HOME / "resilient")
    check_not_hidden([str(tmp_path), str(HOME)])


def test_a_folder_without_init_gives_way_to_a_package_further_on(tmp_path: Path) -> None:
    write(tmp_path / "snapshot" / "weights.bin")
    assert imported("snapshot", [tmp_path, HOME]) == HOME / "snapshot"
    check_not_hidden([str(tmp_path), str(HOME)])


def test_a_folder_without_init_hides_what_is_not_on_the_path(tmp_path: Path) -> None:
    """As after an editable installation, whose finder is asked only when the path has nothing."""
    write(tmp_path / "snapshot" / "weights.bin")
    assert imported("snapshot", [tmp_path]) == tmp_path / "snapshot"
    with pytest.raises(ValueError, match="would hide the package `snapshot`"):
        check_not_hidden([str(tmp_path)])


def test_the_scripts_folder_and_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray puts both in front of the workers' path, the current one first."""
    script, current = tmp_path / "script", tmp_path / "current"
    path = write(script / "actors.py")
    current.mkdir()
    check_not_hidden()
    with monkeypatch.context() as patch:
        patch.chdir(current)
        patch.syspath_prepend(str(script))
        with pytest.raises(ValueError, match="would hide") as caught:
            check_not_hidden()
        assert str(path) in str(caught.value)
        patch.chdir(HOME)
        check_not_hidden()
    monkeypatch.chdir(script)
    with pytest.raises(ValueError, match="would hide"):
        check_not_hidden()
