from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess

import pytest

from tests.nodecache.remote.swift import Swift

#: Enough for what a test writes, little enough to be filled.
DISK_BYTES = 192 << 20


def has_attributes(path):
    try:
        os.setxattr(path, "user.kvray", b"1")
    except OSError:
        return False
    return True


@pytest.fixture(scope="session")
def swift(tmp_path_factory):
    """One S3 server for all tests, on a small disk of its own where that can be mounted; running, and empty enough."""
    if importlib.util.find_spec("swift") is None:
        pytest.skip("OpenStack Swift is not installed")
    root = tmp_path_factory.mktemp("swift")
    devices = root / "devices"
    devices.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", devices]
    is_mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
    if is_mounted and not has_attributes(devices):  # a tmpfs has them since Linux 6.6
        subprocess.run(["umount", devices], check=True)
        is_mounted = False
    if not has_attributes(devices):
        pytest.skip(f"no user attributes on {devices}, which Swift wants")
    server = None
    try:
        server = Swift(root, devices)
        yield server
    finally:
        if server is not None:
            server.close()
        if is_mounted:
            subprocess.run(["umount", "--lazy", devices], check=True)


@pytest.fixture
def bucket(swift, request, _numbers=itertools.count()):  # noqa: B008 - counts over all tests
    """The name of a new bucket; deleted afterwards."""
    name = f"bucket-{next(_numbers)}"
    swift.raw().create_dir(name)
    yield name
    raw = swift.raw()
    raw.delete_dir_contents(name)
    raw.delete_dir(name)
