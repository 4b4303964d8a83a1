"""Several hosts on one machine: network namespaces joined by virtual cables. Needs root and Debian's iproute2."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest


@dataclass(frozen=True, slots=True)
class Host:
    """A namespace, its end of the cable, and its address."""

    name: str
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """What goes before a command that runs there."""
        return ("ip", "netns", "exec", self.name)

    def run(self, *command: str) -> str:
        """A short command's output."""
        return subprocess.run([*self.prefix, *command], check=True, capture_output=True, text=True).stdout

    def set_link(self, state: str) -> None:
        """`up` or `down`: pull the cable out, put it in again."""
        self.run("ip", "link", "set", "eth0", state)

    def set_rate(self, rate: str | None) -> None:
        """What leaves through the cable, e.g. "20mbit"; None: as fast as it goes."""
        if rate is None:
            self.run("tc", "qdisc", "del", "dev", "eth0", "root")
        else:
            command = f"tc qdisc replace dev eth0 root tbf rate {rate} burst 64kb latency 200ms"
            self.run(*command.split())


def _ip(command: str) -> None:
    done = subprocess.run(["ip", *command.split()], check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"ip {command}: {done.stderr}"


def _skip_where_impossible() -> None:
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("hosts of their own need root and iproute2 (ip, tc)")


@contextlib.contextmanager
def hosts_on_a_switch(count: int) -> Iterator[list[Host]]:
    """Hosts that reach each other; the test's own namespace reaches all. Skips where they cannot be made."""
    _skip_where_impossible()
    number = os.getpid() % 1000
    net = f"10.{110 + number // 250}.{number % 250}"
    switch = f"kvsw{number}"
    hosts = [Host(f"kvh{number}-{index}", f"{net}.{index + 1}") for index in range(count)]
    try:
        _ip(f"link add {switch} type bridge")
        _ip(f"addr add {net}.254/24 dev {switch}")
        _ip(f"link set {switch} up")
        for index, host in enumerate(hosts):
            port = f"kvp{number}-{index}"
            _ip(f"netns add {host.name}")
            _ip(f"link add {port} type veth peer name eth0 netns {host.name}")
            _ip(f"link set {port} master {switch} up")
            _ip(f"-n {host.name} link set lo up")
            _ip(f"-n {host.name} addr add {host.address}/24 dev eth0")
            _ip(f"-n {host.name} link set eth0 up")
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", switch], check=False, capture_output=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Hosts a and b; the test's own namespace reaches b, and a through it. Skips where they cannot be made."""
    _skip_where_impossible()
    number = os.getpid() % 1000
    net = f"10.{100 + number // 250}.{number % 250}"  # tests may run beside each other
    a, b = Host(f"kva{number}", f"{net}.1"), Host(f"kvb{number}", f"{net}.2")
    outside = f"kvx{number}"
    try:
        for host in (a, b):
            _ip(f"netns add {host.name}")
            _ip(f"-n {host.name} link set lo up")
        _ip(f"link add eth0 netns {a.name} type veth peer name eth0 netns {b.name}")
        _ip(f"link add {outside} type veth peer name eth1 netns {b.name}")
        for host in (a, b):
            _ip(f"-n {host.name} addr add {host.address}/30 dev eth0")
            _ip(f"-n {host.name} link set eth0 up")
        _ip(f"addr add {net}.129/30 dev {outside}")
        _ip(f"-n {b.name} addr add {net}.130/30 dev eth1")
        _ip(f"link set {outside} up")
        _ip(f"-n {b.name} link set eth1 up")
        b.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        _ip(f"-n {a.name} route add {net}.128/30 via {b.address}")
        for host in (a, b):
            _ip(f"route add {host.address}/32 via {net}.130 dev {outside}")
        yield a, b
    finally:
        for name in (a.name, b.name):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", outside], check=False, capture_output=True)
