"""JSON files that end with a checksum of themselves, and of which every byte is as it must be.

One field per line, and one element per line of a list of objects, so that people can read them and tools compare
them; no other white space. The last field, `checksum`, is the xxh3_128 of all bytes before its line. A reader
spells what it has read again and compares: a file that differs in any byte is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import xxhash

VERSION = 1
"""Of the formats that had no other yet."""
LIMIT_BYTES = 256 << 20


class ManifestError(ValueError):
    """A file of a checkpoint is not what it must be: damaged, of another format, or of a newer version.

    Nothing was changed. The message names the file, the field and what was found there.
    """


def spelled(form: str, fields: Mapping[str, object], version: int = VERSION) -> bytes:
    """The file. form: the name of its format. fields: in this order.

    Raises ManifestError if no reader would accept its length.
    """
    lines = [f'"{name}":{_value(value)}' for name, value in {"format": form, "version": version, **fields}.items()]
    body = ("{\n" + ",\n".join(lines) + ",\n").encode("ascii")
    data = b'%b"checksum":"%b"\n}\n' % (body, xxhash.xxh3_128_hexdigest(body).encode())
    if len(data) > LIMIT_BYTES:
        raise ManifestError(f"{form}: {len(data)} bytes, more than {LIMIT_BYTES}; cut the state into more shards")
    return data


def unspelled(form: str, data: bytes, newest: int = VERSION) -> tuple[int, dict[str, Any]]:
    """The version, and the fields without format, version and checksum. The caller owes the comparison with the
    spelling.

    newest: the highest version of this format that there is.
    Raises ManifestError for another format, a newer version, or a wrong checksum.
    """
    if len(data) > LIMIT_BYTES:
        raise ManifestError(f"{len(data)} bytes, more than {LIMIT_BYTES}: no manifest is so long")
    try:
        node = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"damaged: not JSON: {error!s:.200}") from error
    if not isinstance(node, dict):
        raise ManifestError("damaged: not a JSON object")
    found, version, checksum = node.pop("format", None), node.pop("version", None), node.pop("checksum", None)
    if found != form:
        raise ManifestError(f"format: {found!r:.80}, must be {form!r}")
    if type(version) is not int or version < 1:
        raise ManifestError(f"version: {version!r:.80}, must be 1..{newest}")
    if version > newest:
        raise ManifestError(
            f"version: {version}, written by a newer version of this package; upgrade: this one reads up to {newest}"
        )
    body = data[: data.rfind(b'"checksum":')]
    if xxhash.xxh3_128_hexdigest(body) != checksum:
        raise ManifestError(f"checksum: {checksum!r:.80}, but that of the file is {xxhash.xxh3_128_hexdigest(body)!r}")
    return version, node


def _value(value: object) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(map(_compact, value)) + "\n]"
    return _compact(value)


_compact = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
