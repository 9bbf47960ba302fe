"""Unmodified verbs applications across the fabric: perftest over rxe devices, its frames counted where they pass."""

from __future__ import annotations

import contextlib
import os
import re

import pytest

from testbed.kernel.namespaces import open_namespace
from testbed.kernel.rxe import find_gid, rxe_devices
from tests.netns.labs import address_of, assert_drained, run_in, small_fabric, start_in, wait_until

pytestmark = pytest.mark.root

MESSAGES, MESSAGE_BYTES = 64, 65536
PRIORITY, TRAFFIC_CLASS = 3, 106
# A link of 100 Mbit/s on the guest's clock: 4 KiB frames are 98 % payload.
DILATION, WALL_RATE_BITS_PER_S = 4000, 100e6


def test_perftest_writes_at_the_rate_of_the_link() -> None:
    with small_fabric(f"time_dilation={DILATION}", name="perftest") as fabric, contextlib.ExitStack() as stack:
        topology = fabric.plan.topology
        wanted = {}
        for host in (0, 2):
            netns = open_namespace(fabric.namespace_of(f"host{host}"))
            stack.callback(os.close, netns)
            wanted[f"tbapp{host}"] = ("eth0", netns)
        stack.enter_context(rxe_devices(wanted))
        index = {host: find_gid(f"tbapp{host}", address_of(fabric, host))[0] for host in (0, 2)}

        def command(host: int, *peer: str) -> list[str]:
            options = f"-d tbapp{host} -x {index[host]} -F -m 4096 -u 18 -s {MESSAGE_BYTES} -n {MESSAGES}"
            return ["ib_write_bw", *options.split(), f"--tclass={TRAFFIC_CLASS}", "--report_gbits", *peer]

        with start_in(fabric, "host2", *command(2)) as server:
            wait_until(lambda: ":18515" in run_in(fabric, "host2", "ss", "-tln").stdout, "the server's socket")
            client = run_in(fabric, "host0", *command(0, address_of(fabric, 2)))
            out, err = server.communicate(timeout=60)
        assert client.returncode == 0, client.stdout + client.stderr
        assert server.returncode == 0, out + err
        row = re.search(rf"^ *{MESSAGE_BYTES} +{MESSAGES} +(\S+) +(\S+)", client.stdout, re.MULTILINE)
        assert row, client.stdout
        assert float(row[2]) * 1e9 == pytest.approx(0.98 * WALL_RATE_BITS_PER_S, rel=0.1)
        # The second leaf is reached over a spine: each payload byte passes one, once.
        spines = [port.id for port in topology.ports if topology.nodes[port.node].name.startswith("spine")]
        passed = int(fabric.arrays.queues["deq_bytes"][spines, PRIORITY].sum())
        payload = MESSAGES * MESSAGE_BYTES
        assert payload <= passed <= 1.2 * payload  # headers, ACKs, and what perftest tells first
        assert_drained(fabric)
