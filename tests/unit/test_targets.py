"""Where Prometheus finds a run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from resilient import targets
from resilient.targets import VARIABLE, Target, own_folder, run_folder


def test_a_target_as_file_sd_wants_it_there_as_long_as_the_run(tmp_path: Path) -> None:
    target = Target(tmp_path, "gpt", 2)
    target.show("10.0.0.7:9400")
    assert json.loads((tmp_path / "targets" / "gpt-2.json").read_text()) == [
        {"targets": ["10.0.0.7:9400"], "labels": {"__meta_resilient_run": "gpt", "__meta_resilient_attempt": "2"}}
    ]
    target.remove()
    target.remove()
    assert list((tmp_path / "targets").iterdir()) == []


def test_only_what_earlier_attempts_of_this_run_have_left_is_removed(tmp_path: Path) -> None:
    others = ["gpt-3.json", "gpt-1-1.json", "gpt2-1.json", "other-1.json", "gpt-x.json"]
    (tmp_path / "targets").mkdir()
    for name in ("gpt-1.json", *others):
        (tmp_path / "targets" / name).touch()
    Target(tmp_path, "gpt", 2).show("10.0.0.7:9400")
    assert sorted(path.name for path in (tmp_path / "targets").iterdir()) == sorted([*others, "gpt-2.json"])


def test_the_folder_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "a" / "b"))
    assert own_folder() == tmp_path / "a" / "b" and own_folder().is_dir()


def test_the_default_hides_no_package_from_scripts_beside_it() -> None:
    """A folder under /tmp is a namespace package for each script there, if its name is one that an import can have."""
    assert not Path(targets.DEFAULT).name.isidentifier()


@pytest.mark.parametrize("bad", ["a link", "a file", "open to all"])
def test_a_folder_that_others_may_have_put_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    folder = tmp_path / "resilient"
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(targets, "DEFAULT", str(folder))
    own = tmp_path / f"resilient-{os.geteuid()}"

    def plant(at: Path) -> None:
        at.rmdir()
        match bad:
            case "a link":
                at.symlink_to(tmp_path)
            case "a file":
                at.touch()
            case _:
                at.mkdir()
                at.chmod(0o777)

    assert own_folder() == folder
    plant(folder)
    assert own_folder() == own
    plant(own)
    with pytest.raises(PermissionError, match=f"set {VARIABLE} to another folder"):
        own_folder()


def test_a_runs_folder_is_this_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    (tmp_path / "older").mkdir(0o755)
    assert [run_folder(name).stat().st_mode & 0o777 for name in ("gpt", "older")] == [0o700, 0o700]
