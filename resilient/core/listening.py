"""Where a run is served, as users write it: "auto", "HOST:PORT" or ":PORT". Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

AUTO = "auto"
_WRITTEN = re.compile(r"(?P<host>\[[0-9a-fA-F:.%a-z]+\]|[^\s:/\[\]]*):(?P<port>[0-9]{1,5})")
MOST_PORTS = 65535
VARIABLE = "RESILIENT_OBSERVE"
ANYWHERE = ("0.0.0.0", "::")


def address_of(written: str, node_address: str) -> tuple[str, int]:
    """Host and port; port 0 is any that is free. Without a host it is the node's address, for "auto" the node alone.

    Raises ValueError for what can't be read.
    """
    if written == AUTO:
        return "::1" if ":" in node_address else "127.0.0.1", 0
    found = _WRITTEN.fullmatch(written)
    if found is None or int(found["port"]) > MOST_PORTS:
        raise ValueError(
            f'observe={written!r}: is "auto", "HOST:PORT" or ":PORT", such as "0.0.0.0:9400", or None to serve nothing'
        )
    return found["host"].strip("[]") or node_address, int(found["port"])


def wished(written: str, environment: Mapping[str, str]) -> str:
    """What the controller's node says of "auto", if it says something: that is for a cluster's keeper to decide."""
    return environment.get(VARIABLE, AUTO) if written == AUTO else written


def in_url(host: str, port: int, node_address: str) -> str:
    """How it is reached: host:port. Who listens everywhere is reached at the node's address."""
    reached = node_address if host in ANYWHERE else host
    return f"[{reached}]:{port}" if ":" in reached else f"{reached}:{port}"
