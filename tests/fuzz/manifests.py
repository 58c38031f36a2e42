"""make fuzz: bytes that atheris makes up are read as manifests and as a frame; only our own errors may come of them.

Half of them get a checksum that is right first, or nothing would ever come past it.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

import atheris
import xxhash

with atheris.instrument_imports(include=["snapshot"]):
    from snapshot.coding import CodingError, Decoder
    from snapshot.core.manifest import Manifest, ShardManifest
    from snapshot.core.spelling import ManifestError
    from snapshot.files import open_files
    from snapshot.skeleton import Skeleton
    from tests.shards import scattered, state_of


def one(data: bytes) -> None:
    """Raises what must not be raised, which atheris reports."""
    for reader in (Manifest, ShardManifest):
        for candidate in (data, with_checksum(data)):
            with contextlib.suppress(ManifestError):
                found = reader.from_bytes(candidate, file="here.json")
                assert found.to_bytes() == candidate
    with contextlib.suppress(CodingError):
        Decoder().decode(data, 4, memoryview(bytearray(64)))
    with contextlib.suppress(ValueError, AttributeError):
        Skeleton.from_bytes(data)


def with_checksum(data: bytes) -> bytes:
    front = data[: data.rfind(b'"checksum":')]
    return front + b'"checksum":"%b"\n}\n' % xxhash.xxh3_128_hexdigest(front).encode()


def seeds(folder: Path) -> None:
    """True ones to begin with."""
    with tempfile.TemporaryDirectory() as base:
        for state in (state_of(), scattered(state_of(step=501))):
            state.save(open_files(base), 1)
            for path in (Path(base) / state.folder).iterdir():
                (folder / f"{state.step}-{path.name}").write_bytes(path.read_bytes())


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        if not argument.startswith("-"):
            seeds(Path(argument))
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
