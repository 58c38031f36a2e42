"""The places for checkpoints: one conformance suite for all of them, and which URLs are refused."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from snapshot.files import Files, LocalFiles, StorageError, open_files


@pytest.fixture(params=["local", "memory"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Files]:
    if request.param == "local":
        yield open_files(f"file://{tmp_path}/some/where")
        return
    yield open_files("memory://some/where", allow_memory=True)
    fsspec.filesystem("memory").store.clear()


def test_what_is_written_is_read(files: Files) -> None:
    assert files.names() == files.names("a") == []
    assert files.write("a/b", [b"one", memoryview(b""), memoryview(b"two")]) == 6
    assert files.write("a/c", []) == 0
    assert files.names() == ["a"] and files.names("a") == ["b", "c"]
    assert files.size("a/b") == 6 and files.size("a/c") == 0
    assert files.read("a/b") == b"onetwo" and files.read("a/c") == b""
    assert files.read("a/b", 2, 4) == b"et" and files.read("a/b", 0, 3) == b"one" and files.read("a/b", 3) == b"two"
    into = bytearray(3)
    files.read_into("a/b", 1, memoryview(into))
    assert into == b"net"


def test_a_file_is_replaced(files: Files) -> None:
    files.write("a/b", [b"one"])
    files.write("a/b", [b"other"])
    assert files.read("a/b") == b"other" and files.names("a") == ["b"]


def test_a_file_that_could_not_be_made_is_not_there(files: Files) -> None:
    def parts() -> Iterator[bytes]:
        yield b"half"
        raise ZeroDivisionError

    files.write("a/c", [b"former"])
    for name in ("a/b", "a/c"):
        with pytest.raises(ZeroDivisionError):
            files.write(name, parts())
    assert files.names("a") == ["c"] and files.read("a/c") == b"former"


def test_what_is_missing_is_said(files: Files) -> None:
    for ask in (files.size, files.read):
        with pytest.raises(FileNotFoundError):
            ask("a/b")
    with pytest.raises(FileNotFoundError):
        files.read_into("a/b", 0, memoryview(bytearray(1)))
    files.remove("a/b")
    files.remove_folder("a")


def test_a_file_that_is_shorter_than_it_must_be_is_an_error(files: Files) -> None:
    files.write("a/b", [b"one"])
    with pytest.raises(StorageError, match="a/b"):
        files.read("a/b", 1, 7)
    with pytest.raises(StorageError, match="a/b"):
        files.read_into("a/b", 2, memoryview(bytearray(2)))


def test_folders_are_removed(files: Files) -> None:
    for name in ("a/manifest.json", "a/b", "c/b"):
        files.write(name, [b"x"])
    files.remove("a/b")
    assert files.names("a") == ["manifest.json"]
    files.remove_folder("a")
    assert files.names() == ["c"] and files.names("a") == []


def test_only_local_files_have_paths(files: Files, tmp_path: Path) -> None:
    files.write("a/b", [b"x"])
    path = files.path("a/b")
    assert path is None or path.read_bytes() == b"x"
    assert (path is None) == files.url.startswith("memory")


def test_a_folder_where_a_file_is_expected_is_an_error(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(StorageError, match="Is a directory"):
        files.write("a/b", [b"x"])
    with pytest.raises(StorageError, match="a/b can't be read"):
        files.read("a/b", 0, 1)
    assert files.names("a") == ["b"]


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "absolute path"),
        ("checkpoints/gpt", "absolute path"),
        ("~/gpt", "absolute path"),
        ("/", "below the root"),
        ("/data/../etc", "absolute path"),
        ("file://host/data", "absolute path"),
        ("S3://bucket/gpt", "no URL of a storage"),
        ("simplecache::s3://bucket/gpt", "no URL of a storage"),
        ("memory://gpt", "dies with it"),
        ("http://host/gpt", "half-written"),
        ("nonsense://gpt", "half-written"),
        ("s3://", "names no bucket"),
    ],
)
def test_urls_that_are_refused(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as refused:
        open_files(url)
    assert str(refused.value).startswith(f"checkpoint url: {url!r}")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match=r'pip install "resilient-runtime\[gcs\]"'):
        open_files("gs://bucket/gpt")
