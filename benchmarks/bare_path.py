"""The kernel path without the engine: a C program sends the same frames through the same namespaces."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from testbed.errors import MachineError
from testbed.fabric import Fabric
from testbed.kernel.host_tuning import tuned_host
from testbed.kernel.scheduling import choose_cpus, engine_thread
from testbed.plan.model import Plan
from testbed.roce.bth import FramePath, build_write
from testbed.roce.queue_pairs import RESPONDER, qp_index
from testbed.roce.wire import PSN_OFFSET, Opcode, data_tos
from testbed.topology import NodeKind

_SOURCE = Path(__file__).with_name("bare_sender.c")
_DRAIN_S = 5.0
_DRAIN_LOOK_S = 0.02


class Shaping(StrEnum):
    """How much of the fabric's data plane is left."""

    WHOLE = "eBPF and shapers"
    UNSHAPED = "eBPF, no shapers"
    KERNEL = "kernel forwarding"
    """No shaper, and switches that route as any Linux does; only the NICs are ours."""


@dataclass(frozen=True)
class Sent:
    """What a bare sender did: frames sent, frames that arrived in order, and how long it sent."""

    packets: int
    arrived_packets: int
    seconds: float


@contextlib.contextmanager
def compiled_sender() -> Iterator[Path]:
    """Compile the sender for the block.

    Raises:
        MachineError: There is no C compiler.
    """
    compiler = shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        raise MachineError("there is no C compiler", hint="apt-get install clang")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "bare_sender"
        subprocess.run([compiler, "-O2", "-Wall", "-o", str(program), str(_SOURCE)], check=True)
        yield program


def _strip(fabric: Fabric, shaping: Shaping) -> None:
    """Take shapers and the switches' programs off a fabric."""
    if shaping is Shaping.WHOLE:
        return
    topology = fabric.plan.topology
    for node in topology.nodes:
        names = [topology.port(port).ifname for port in node.ports]
        commands = [f"qdisc del dev {name} root" for name in names]
        if shaping is Shaping.KERNEL and node.kind is not NodeKind.HOST:
            commands += [f"qdisc del dev {name} clsact" for name in names]
        command = ["tc", "-netns", fabric.namespace_of(node.name), "-batch", "-"]
        subprocess.run(command, input="\n".join(commands) + "\n", text=True, check=True)


class BareSender:
    """Sends over the connections of the plan's first workload item.

    Args:
        fabric: A fabric of its own.
        program: The compiled sender.
        sockets: Descriptor of each rank's packet socket.
    """

    def __init__(self, fabric: Fabric, program: Path, sockets: list[int]) -> None:
        self._fabric, self._program, self._sockets = fabric, program, sockets
        plan = fabric.plan
        self._connections = plan.workloads[0].connections
        tos = data_tos(plan.scenario.qos.lossless_priority)
        self._frames = []
        for connection in self._connections:
            qp = connection.requester
            path = FramePath.of(qp)
            payload = bytes(plan.scenario.transport.mtu_bytes)
            self._frames.append(
                build_write(
                    path,
                    opcode=Opcode.WRITE_MIDDLE,
                    dest_qp=qp.peer_qpn,
                    psn=connection.initial_psn,
                    payload=payload,
                    tos=tos,
                )
            )

    def _prepare_nics(self) -> None:
        qps, topology = self._fabric.arrays.qps, self._fabric.plan.topology
        qps["active"] = 0
        for index, connection in enumerate(self._connections):
            row = qps[qp_index(index, RESPONDER)]
            row["peer_qpn"] = connection.responder.peer_qpn
            row["port"] = topology.host_port(connection.responder.local.rank).id
            row["initial_rx_psn"] = connection.initial_psn
            row["rx_packets"] = 0
            row["active"] = 1

    def _arrived_packets(self) -> int:
        rows = [qp_index(index, RESPONDER) for index in range(len(self._connections))]
        return int(self._fabric.arrays.qps["rx_packets"][rows].sum())

    def send(self, seconds: float, packets_per_s: float) -> Sent:
        """Send for a while, at a rate or, with rate 0, as fast as it goes; return when all has arrived."""
        self._prepare_nics()
        fds = [self._sockets[connection.requester.local.rank] for connection in self._connections]
        numbers = [seconds, packets_per_s, len(self._frames[0]), PSN_OFFSET, *fds]
        done = subprocess.run(
            [str(self._program), *map(str, numbers)],
            input=b"".join(self._frames),
            stdout=subprocess.PIPE,
            check=True,
            pass_fds=fds,
        )
        packets, took = done.stdout.split()
        deadline, arrived = time.monotonic() + _DRAIN_S, -1
        while arrived != (now := self._arrived_packets()) and time.monotonic() < deadline:
            arrived = now
            time.sleep(_DRAIN_LOOK_S)
        return Sent(int(packets), now, float(took))


@contextlib.contextmanager
def bare_sender(plan: Plan, name: str, program: Path, shaping: Shaping) -> Iterator[BareSender]:
    """Build a fabric, reduced to ``shaping``, and open a sender on it, at the engine's place and priority, for the block."""
    engine_cpu, port_cpus = choose_cpus()
    with Fabric.build(plan, name) as fabric:
        _strip(fabric, shaping)
        with fabric.packet_sockets() as sockets, tuned_host(port_cpus), engine_thread(engine_cpu):
            yield BareSender(fabric, program, [one.fileno() for one in sockets])
