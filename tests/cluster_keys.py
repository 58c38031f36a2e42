"""The cluster's keys, kept in a dict."""

from __future__ import annotations

import pytest

from actors import launch


def keys_in_memory(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    found: dict[str, bytes] = {}

    def create(key: str, value: bytes, creator: str = "") -> bool:
        return found.setdefault(key, value) is value

    def delete(prefix: str) -> None:
        for key in [key for key in found if key.startswith(prefix)]:
            del found[key]

    monkeypatch.setattr(launch, "create_key", create)
    monkeypatch.setattr(launch, "write_key", found.__setitem__)
    monkeypatch.setattr(launch, "read_key", found.get)
    monkeypatch.setattr(launch, "list_keys", lambda prefix: sorted(key for key in found if key.startswith(prefix)))
    monkeypatch.setattr(launch, "delete_keys", delete)
    return found
