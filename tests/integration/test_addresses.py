"""A host without IPv4 beyond loopback, without DNS, and with several addresses: in a network namespace of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

HOST = """
    import fcntl, socket, struct, sys
    SIOCSIFFLAGS, SIOCSIFADDR, IFF_UP, IFF_RUNNING = 0x8914, 0x8916, 0x1, 0x40
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", IFF_UP | IFF_RUNNING))
    index = socket.if_nametoindex("lo")
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as control:
        for address in ("fd77::1", "fd77::2", "fd78::1"):
            wanted = struct.pack("16sIi", socket.inet_pton(socket.AF_INET6, address), 128, index)
            fcntl.ioctl(control, SIOCSIFADDR, wanted)
    try:
        socket.getaddrinfo("example.org", 80)
    except OSError:
        print("no DNS", flush=True)

    import ray, resilient
    from tests.integration.loops import train
    ray.init(_node_ip_address="fd77::2", include_dashboard=False, num_cpus=3, log_to_driver=False)
    said = {}
    function = train("addressed", workers=2, snapshot=resilient.Snapshot(every=1), observe=":0")
    result = function.watched(said.update, steps=8)
    print(ray.util.get_node_ip_address(), result.digest == train("alone").local(steps=8).digest, flush=True)
    print(*said["messages"], sep="\\n")
"""


def test_a_host_of_ipv6_alone_without_dns_and_with_several_addresses() -> None:
    if shutil.which("unshare") is None:
        pytest.fail("unshare is missing: install util-linux")
    home = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", textwrap.dedent(HOST)],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(home)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("no DNS\nfd77::2 True\n"), done.stdout
    assert "http://[fd77::2]:" in done.stdout, "where the page is"
