"""The ucx road and its process: ports, what cannot be set up, clean ends."""

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ucxx", reason="ucxx is not installed: the extra kvray[ucx-cu12]")

from messages.errors import ConfigError
from tests.transport.links import wait_until
from tests.transport.ucx_peer import HOST
from transport.ucx.road import UcxTransport


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_it_listens_on_the_given_address_only_and_within_the_range(host):
    before = set(psutil.Process().net_connections())
    transport = UcxTransport(host, port_range=(22300, 22400))
    sockets = [each for each in set(psutil.Process().net_connections()) - before if each.status == psutil.CONN_LISTEN]
    assert {each.laddr.ip for each in sockets} == {host}
    assert all(22300 <= each.laddr.port <= 22400 for each in sockets)
    transport.close()
    await asyncio.to_thread(wait_until, lambda: not set(sockets) & set(psutil.Process().net_connections()), 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"host": "192.0.2.77"}, "no interface of this node has that address"),
        ({"host": HOST, "port_range": (21001, 21000)}, "two ports in order wanted"),
        ({"host": HOST, "devices": ["mlx5_99:1"]}, r"no transport of 'tcp,self' on \['mlx5_99:1'\], only .*tcp/lo"),
        ({"host": HOST, "transports": "self"}, r"no transport of 'self' on \['lo'\]"),
        ({"host": HOST, "transports": "nonsense"}, "cannot be set up"),
    ],
)
def test_what_cannot_be_set_up_is_a_config_error(arguments, message):
    with pytest.raises(ConfigError, match=message):
        UcxTransport(**arguments)


def test_full_port_range_is_a_config_error():
    """UCX itself would try for ever."""
    transport = UcxTransport(HOST, port_range=(22500, 22501))
    with pytest.raises(ConfigError, match=r"0 ports of .* are free"):
        UcxTransport(HOST, port_range=(22500, 22501))
    transport.close()


_USER = """
import asyncio, os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever started us (nohup) may have it ignored
from tests.transport.links import linked, wait_until
from transport.memory import Memory
from transport.protocol import Copy
from transport.ucx.road import UcxTransport

async def main():
    owner, puller = (UcxTransport("127.0.0.1", port_range=(22000, 22999)) for _ in range(2))
    memory = Memory.allocate(32 << 20)
    region, link = owner.register(memory), linked(puller, owner)
    await puller.pull(link, region, [Copy(0, 0, 10)], memory, 5)
    task = asyncio.create_task(puller.pull(link, region, [Copy(0, 16 << 20, 16 << 20)], memory, 5))
    await asyncio.sleep(0.001)
    for each in (owner, puller) if "close" in sys.argv else ():
        each.close()
    await asyncio.gather(task, return_exceptions=True)

asyncio.run(main())
if "hang up" in sys.argv:
    os.kill(os.getpid(), signal.SIGHUP)
"""


_CLOSING = """
import asyncio, random
from tests.transport.links import linked, wait_until
from transport.memory import Memory
from transport.protocol import Copy, TransferError
from transport.ucx.road import UcxTransport

async def main():
    owner, puller = (UcxTransport("127.0.0.1", port_range=(22000, 22999)) for _ in range(2))
    memory, target = Memory.allocate(64 << 20), Memory.allocate(64 << 20)
    region = owner.register(memory)
    copies = [Copy(i << 20, i << 20, 1 << 20) for i in random.sample(range(64), 64)]
    for _ in range(60):
        link = linked(puller, owner)
        task = asyncio.create_task(puller.pull(link, region, copies, target, 5))
        await asyncio.sleep(random.choice([0.01, 0.02, 0.04]))
        ends = [(puller, link), (owner, next(iter(owner._mover._states)))]
        for transport, end in random.sample(ends, 2):
            transport.on_link_lost(end)
        await asyncio.gather(task, return_exceptions=True)
    await puller.pull(linked(puller, owner), region, copies, target, 5)
    assert puller.num_unsettled == 0

asyncio.run(main())
"""


@pytest.mark.alone
def test_connections_that_both_ends_close_in_mid_transfer_do_no_harm():
    """UCX's other kind of connection, made from worker addresses, crashed the process here."""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", _CLOSING], cwd=root, check=True, timeout=60)


@pytest.mark.alone
@pytest.mark.parametrize("how", ["close", "forget", "hang up"])
def test_process_ends_cleanly(how):
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", _USER, how], cwd=root, capture_output=True, timeout=20, text=True)
    assert done.returncode == (-signal.SIGHUP if how == "hang up" else 0)
    assert done.stdout + done.stderr == ""
