"""torchft's lighthouse: `python -m benchmarks.lighthouse HEARTBEAT_MS JOIN_MS`; prints its address."""

from __future__ import annotations

import sys
import threading


def main() -> None:
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(
        bind="127.0.0.1:0", min_replicas=2, join_timeout_ms=int(sys.argv[2]), heartbeat_timeout_ms=int(sys.argv[1])
    )
    print(server.address(), flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
