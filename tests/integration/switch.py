"""python -m tests.integration.switch ADDRESS...: a network of this machine's own, whose cables can be cut.

A switch in user space. Each address gets a TAP device: the first in the network that all processes here share, each
other one in a network namespace of its own. Frames go from one to another through this process, which drops or delays
them as it is told on its standard input. Everything ends with it: it needs no tool, and leaves nothing to clean up.

A machine that emulates networks in its kernel (`tc netem`) would do the same faster; many don't have that.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MTU = 9000
CLONE_NEWNET = 0x40000000
IFF_TAP, IFF_NO_PI, IFF_UP, IFF_RUNNING = 0x2, 0x1000, 0x1, 0x40
TUNSETIFF = 0x400454CA
SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK, SIOCSIFMTU, SIOCSIFHWADDR = 0x8914, 0x8916, 0x891C, 0x8922, 0x8924
ARPHRD_ETHER = 1
DEVICE = "resilient-test"
START_LIMIT_S = 20.0


@dataclass(slots=True)
class Cable:
    """One direction between a device and the switch."""

    cut: bool = False
    delay_s: float = 0.0
    bits_per_s: float = 0.0
    """0: as fast as it goes."""
    free_at: float = 0.0

    def arrives_at(self, now: float, frame: bytes) -> float:
        if self.bits_per_s:
            self.free_at = max(now, self.free_at) + 8 * len(frame) / self.bits_per_s
            now = self.free_at
        return now + self.delay_s


@dataclass(slots=True)
class Port:
    descriptor: int
    namespace: int
    """A descriptor of its namespace."""
    out: Cable = field(default_factory=Cable)
    """From the device to the switch."""
    back: Cable = field(default_factory=Cable)


def mac(port: int) -> bytes:
    return bytes([2, 0x77, 0, 0, 0, port])


def open_port(number: int, address: str, *, own_namespace: bool) -> Port:
    """In a thread of its own, which alone enters a new namespace."""
    found: list[Port] = []
    failed: list[OSError] = []

    def work() -> None:
        try:
            if own_namespace and ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
            found.append(Port(_tap(number, address), os.open("/proc/thread-self/ns/net", os.O_RDONLY)))
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


def _tap(number: int, address: str) -> int:
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    name = DEVICE.encode()
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name, IFF_TAP | IFF_NO_PI))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:

        def internet(address: str) -> bytes:
            return struct.pack("16sH2x4s16x", name, socket.AF_INET, socket.inet_aton(address))

        fcntl.ioctl(control, SIOCSIFHWADDR, struct.pack("16sH6s16x", name, ARPHRD_ETHER, mac(number)))
        fcntl.ioctl(control, SIOCSIFMTU, struct.pack("16si20x", name, MTU))
        fcntl.ioctl(control, SIOCSIFADDR, internet(address))
        fcntl.ioctl(control, SIOCSIFNETMASK, internet("255.255.255.0"))
        for device in (name, b"lo"):
            fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", device, IFF_UP | IFF_RUNNING))
    return tap


class Switch:
    def __init__(self, ports: list[Port]) -> None:
        self.ports = ports
        self._under_way: list[tuple[float, int, int, bytes]] = []
        self._losses: dict[tuple[int, int], float] = {}
        """From one port to another, the share of frames that is dropped."""
        self._random = random.Random(1)
        self._sequence = 0

    def run(self) -> None:
        """Until standard input ends."""
        numbers = {port.descriptor: number for number, port in enumerate(self.ports)}
        commands = bytearray()
        while True:
            wait_s = max(0.0, self._under_way[0][0] - time.monotonic()) if self._under_way else None
            ready, _, _ = select.select([0, *numbers], [], [], wait_s)
            for descriptor in ready:
                if descriptor:
                    self._take_in(numbers[descriptor])
                    continue
                if not (read := os.read(0, 4096)):
                    return
                commands += read
                while b"\n" in commands:
                    line, _, rest = commands.partition(b"\n")
                    commands = bytearray(rest)
                    self._change(json.loads(line))
            self._deliver()

    def _change(self, command: dict[str, Any]) -> None:
        if "losses" in command:
            self._losses = {(source, target): share for source, target, share in command["losses"]}
            print(json.dumps({}), flush=True)
            return
        port = self.ports[command["port"]]
        for name in ("out", "back"):
            if name in command:
                setattr(port, name, Cable(**command[name]))
        print(json.dumps({}), flush=True)

    def _take_in(self, source: int) -> None:
        for _ in range(64):
            try:
                frame = os.read(self.ports[source].descriptor, MTU + 64)
            except BlockingIOError:
                return
            for number in self._receivers(source, frame[:6]):
                self._send(source, number, frame)

    def _receivers(self, source: int, receiver: bytes) -> Iterator[int]:
        for number in range(len(self.ports)):
            if number != source and (receiver == mac(number) or receiver[0] & 1):
                yield number

    def _send(self, source: int, number: int, frame: bytes) -> None:
        out, back = self.ports[source].out, self.ports[number].back
        if not (out.cut or back.cut or self._random.random() < self._losses.get((source, number), 0.0)):
            due = back.arrives_at(out.arrives_at(time.monotonic(), frame), frame)
            self._sequence += 1
            heapq.heappush(self._under_way, (due, self._sequence, number, frame))

    def _deliver(self) -> None:
        now = time.monotonic()
        while self._under_way and self._under_way[0][0] <= now:
            _, _, number, frame = heapq.heappop(self._under_way)
            try:
                os.write(self.ports[number].descriptor, frame)
            except (BlockingIOError, OSError):  # no room: a frame may be lost, as on any network
                continue


class Network:
    """The switch as a process, for as long as this is open; ports are numbered as their addresses are given."""

    def __init__(self, *addresses: str) -> None:
        program = [sys.executable, "-m", "tests.integration.switch", *addresses]
        home = Path(__file__).resolve().parents[2]
        self._process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=home
        )
        assert self._process.stdout is not None and self._process.stderr is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                "no network could be made: this test needs Linux, /dev/net/tun, and the right to create network "
                "namespaces and devices (root, or a container with CAP_SYS_ADMIN and CAP_NET_ADMIN): "
                + self._process.stderr.read()[-500:]
            )
        self._namespaces: list[int] = json.loads(line)["namespaces"]

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        finally:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdout, self._process.stderr):
                if stream is not None:
                    stream.close()

    def namespace(self, port: int) -> str:
        """Its path, for `nsenter --net=`."""
        return f"/proc/{self._process.pid}/fd/{self._namespaces[port]}"

    def inside(self, port: int) -> list[int]:
        """Processes that live there."""
        namespace = os.stat(self.namespace(port))
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                theirs = os.stat(entry / "ns/net")
            except OSError:  # just ended
                continue
            if (theirs.st_dev, theirs.st_ino) == (namespace.st_dev, namespace.st_ino):
                found.append(int(entry.name))
        return found

    def cut(self, port: int, *directions: str) -> None:
        """ "out": what this machine sends is lost; "back": what is sent to it. Both if none is given."""
        self._change(port, {direction: {"cut": True} for direction in directions or ("out", "back")})

    def slow(self, port: int, *, delay_s: float, bits_per_s: float) -> None:
        """In each direction."""
        cable = {"delay_s": delay_s, "bits_per_s": bits_per_s}
        self._change(port, {"out": cable, "back": cable})

    def mend(self, port: int) -> None:
        self._change(port, {"out": {}, "back": {}})

    def lose(self, *losses: tuple[int, int, float]) -> None:
        """Of what is sent from one port to another this share, and nothing else any more."""
        self._tell({"losses": losses})

    def _change(self, port: int, cables: dict[str, dict[str, Any]]) -> None:
        self._tell({"port": port, **cables})

    def _tell(self, command: dict[str, Any]) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline(), "the switch has ended"


def main(addresses: list[str]) -> None:
    ports = [open_port(number, address, own_namespace=number > 0) for number, address in enumerate(addresses)]
    print(json.dumps({"namespaces": [port.namespace for port in ports]}), flush=True)
    Switch(ports).run()


if __name__ == "__main__":
    main(sys.argv[1:])
