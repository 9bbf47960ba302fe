"""How long a fabric takes to build and to remove, beside Mininet building the same graph with ``TCLink``, in one run.

``python -m benchmarks.bring_up`` prints a table; ``--write`` keeps it. Mininet (Debian package ``mininet``) runs in the system's
Python; without it its rows are missing.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import time

from benchmarks.machine import watched
from benchmarks.record import Column, Row, Table, run_benchmark
from testbed.fabric import Fabric
from testbed.plan.compile import compile_plan
from testbed.scenario import load_scenario

TABLE: Table = Table(
    "bring_up",
    (
        Column("fabric", "leaves x spines x hosts per leaf"),
        Column("with", "with"),
        Column("build_s", "build", "s", ".2f"),
        Column("remove_s", "remove", "s", ".2f"),
        Column("runs", "runs", "", ",.0f"),
    ),
)
_SIZES = ((4, 4, 4), (8, 8, 8))
_RUNS = 5
_MININET_RUNS = 2
# Plain nodes as switches, so that no controller is waited for; 100 Mbit/s is near what links have at auto dilation.
_MININET = """
import sys, time
from mininet.net import Mininet
from mininet.node import Node
from mininet.link import TCLink
from mininet.log import setLogLevel
setLogLevel("critical")
leaves, spines, hosts = map(int, sys.argv[1:4])
begin = time.monotonic()
net = Mininet(topo=None, controller=None, build=False, link=TCLink)
nodes = {}
for name in ([f"h{i}" for i in range(leaves * hosts)] + [f"l{i}" for i in range(leaves)] + [f"s{i}" for i in range(spines)]):
    nodes[name] = net.addHost(name, cls=Node, ip=None)
for host in range(leaves * hosts):
    net.addLink(nodes[f"h{host}"], nodes[f"l{host // hosts}"], bw=100)
for leaf in range(leaves):
    for spine in range(spines):
        net.addLink(nodes[f"l{leaf}"], nodes[f"s{spine}"], bw=100)
built = time.monotonic()
net.stop()
print(built - begin, time.monotonic() - built)
"""


def build_once(leaves: int, spines: int, hosts: int) -> tuple[float, float]:
    """Build and remove a fabric; return the seconds of each."""
    text = (
        f"name: bringup\nfabric: {{kind: clos, leaves: {leaves}, spines: {spines}, hosts_per_leaf: {hosts}, "
        "host_link: {rate: 400 Gbit/s, delay: 600 ns}}\nrouting: {scheme: pinning}\n"
        "workload: [{collective: all_reduce, size: 1 MiB}]\ntime_dilation: 4000\n"
    )
    plan = compile_plan(load_scenario(text), capacity_packets_per_s=None)
    begin = time.monotonic()
    fabric = Fabric.deploy(plan, f"bringup-{os.getpid()}")
    built = time.monotonic()
    fabric.destroy()
    return built - begin, time.monotonic() - built


def mininet_once(leaves: int, spines: int, hosts: int) -> tuple[float, float] | None:
    """Let Mininet build and remove the same graph; None where it is not installed."""
    command = ["/usr/bin/python3", "-c", _MININET, str(leaves), str(spines), str(hosts)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return None
    build, remove = done.stdout.split()[-2:]
    return float(build), float(remove)


def measure(quick: bool) -> list[Row]:
    """Return all rows."""
    rows: list[Row] = []
    for size in ((2, 2, 1),) if quick else _SIZES:
        for name, once, runs in (("testbed", build_once, _RUNS), ("Mininet TCLink", mininet_once, _MININET_RUNS)):
            with watched() as taken:
                results = [once(*size) for _ in range(1 if quick else runs)]
            times = [result for result in results if result is not None]
            if times:
                row = {
                    "fabric": "x".join(map(str, size)),
                    "with": name,
                    "build_s": statistics.median(build for build, _ in times),
                    "remove_s": statistics.median(remove for _, remove in times),
                    "runs": len(times),
                }
                rows.append(row | taken.row())
    return rows


if __name__ == "__main__":
    run_benchmark(TABLE, measure, __doc__ or "")
