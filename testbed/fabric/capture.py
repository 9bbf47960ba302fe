"""Captures what crosses a fabric's ports into one pcapng file, by a process of its own.

Why not dumpcap or tcpdump: they need a process in each namespace, know an interface by its bare name (every leaf has an
``up1``), and leave one file each to be merged. Here one process empties the rings of all ports, names them ``leaf0/up1``, writes
emulated time, and says what it lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from testbed.errors import KernelError, LabError, RunError, TestbedError
from testbed.kernel.capture_process import READY, CaptureJob, PortJob
from testbed.kernel.namespaces import NETNS_DIR, entered, open_namespace
from testbed.kernel.packet_ring import RingShape, open_ring_socket
from testbed.kernel.registry import LabState, namespace_of
from testbed.kernel.scheduling import available_cpus, choose_cpus
from testbed.topology import NodeKind, Topology

DEFAULT_SNAP_BYTES = 128
"""All headers of a RoCEv2 frame, and the whole of ACK, NAK, CNP and PFC frames; payloads say nothing."""

STDOUT = Path("-")
_START_S = 20.0
_END_S = 20.0
_LOOK_S = 0.2


@dataclass(frozen=True, slots=True)
class CapturedPort:
    """What was captured at one port.

    Attributes:
        name: Such as ``leaf0/up1``.
        packets: Frames in the file, both directions.
        lost_packets: Frames that the capture had no room for; the fabric carried them all the same.
    """

    name: str
    packets: int
    lost_packets: int


@dataclass(frozen=True, slots=True)
class CaptureReport:
    """What became of a capture.

    Attributes:
        file: The pcapng file.
        ports: Its interfaces, in order.
        error: Why it ended early; empty when it did not.
    """

    file: str
    ports: tuple[CapturedPort, ...]
    error: str = ""

    @property
    def packets(self) -> int:
        """Return the number of frames in the file."""
        return sum(port.packets for port in self.ports)

    @property
    def lost_packets(self) -> int:
        """Return the number of frames lost at all ports."""
        return sum(port.lost_packets for port in self.ports)

    def warnings(self) -> list[str]:
        """Return what a reader of the run's figures, or of the file, must know."""
        found = [
            f"{len(self.ports)} ports were captured ({self.packets} frames in {self.file}): that costs capacity of this machine, "
            "compare figures with a run without --pcap"
        ]
        if self.lost_packets:
            worst = max(self.ports, key=lambda port: port.lost_packets)
            found.append(
                f"the capture lost {self.lost_packets} frames, most at {worst.name} ({worst.lost_packets}): "
                "capture fewer ports, or raise time_dilation"
            )
        if self.error:
            found.append(f"the capture ended early: {self.error}")
        return found


def select_ports(topology: Topology, wanted: Sequence[str]) -> list[int]:
    """Return the ids of the ports that are meant, in the order of the topology.

    Args:
        topology: The fabric.
        wanted: Nodes (all their ports) and ports such as ``leaf0/up1``; none stands for the NICs of all hosts.

    Raises:
        LabError: There is no such node or port.
    """
    if not wanted:
        return [port.id for port in topology.ports if topology.nodes[port.node].kind is NodeKind.HOST]
    chosen: set[int] = set()
    for name in wanted:
        node_name, slash, ifname = name.partition("/")
        try:
            node = topology.node(node_name)
        except KeyError:
            known = ", ".join(node.name for node in topology.nodes)
            raise LabError(f"there is no node {node_name!r} to capture at (nodes: {known})") from None
        found = {port for port in node.ports if not slash or topology.port(port).ifname == ifname}
        if not found:
            known = ", ".join(topology.port_name(port) for port in node.ports)
            raise LabError(f"there is no port {name!r} to capture at (ports: {known})")
        chosen |= found
    return sorted(chosen)


class Capture:
    """A capture under way; see :func:`captured`."""

    def __init__(
        self, file: Path, process: subprocess.Popen[bytes], control: socket.socket, ports: list[str], watched: Path
    ) -> None:
        self._file = file
        self._process = process
        self._control = control
        self._ports = ports
        self._watched = watched
        self._report: CaptureReport | None = None

    def wait(self, wall_duration_s: float | None = None) -> None:
        """Return when the capture ends by itself, when the time is over, or when the lab is removed."""
        deadline = None if wall_duration_s is None else time.monotonic() + wall_duration_s
        while True:
            left = _LOOK_S if deadline is None else min(_LOOK_S, deadline - time.monotonic())
            if left <= 0 or not self._watched.exists() or select.select([self._control], [], [], left)[0]:
                return

    def stop(self) -> CaptureReport:
        """End the capture, complete the file, and return what is in it; once ended, return that again."""
        if self._report is not None:
            return self._report
        report: dict[str, Any] = {"error": "its process ended", "ports": {}}
        try:
            with contextlib.suppress(OSError):
                self._control.shutdown(socket.SHUT_WR)
            if answer := _read_to_end(self._control, _END_S):
                report = json.loads(answer)
        except TimeoutError:
            report["error"] = "its process did not end"
        finally:
            self._control.close()
            _end_process(self._process)
        ports = tuple(CapturedPort(name, *report["ports"].get(name, (0, 0))) for name in self._ports)
        self._report = CaptureReport(str(self._file), ports, report["error"] or "")
        return self._report


@contextlib.contextmanager
def opened_capture_file(path: Path) -> Iterator[BinaryIO]:
    """Open the file to capture to, ``-`` for standard output; remove it if nothing was written.

    Raises:
        TestbedError: It cannot be written.
    """
    if path == STDOUT:
        yield sys.stdout.buffer
        return
    try:
        file = path.open("wb")
    except OSError as error:
        raise TestbedError(f"{path} cannot be written: {error.strerror}", hint="name another file") from None
    try:
        yield file
    finally:
        empty = not os.fstat(file.fileno()).st_size
        file.close()
        if empty and path.is_file():
            path.unlink()


@contextlib.contextmanager
def captured(
    state: LabState,
    topology: Topology,
    ports: Sequence[int],
    output: BinaryIO,
    file: Path,
    *,
    snap_bytes: int = DEFAULT_SNAP_BYTES,
    count: int = 0,
    emulated_time: bool = True,
) -> Iterator[Capture]:
    """Capture for the block.

    Args:
        state: The lab.
        topology: Its topology.
        ports: Ids of the ports.
        output: Where the file goes; must be a file of the operating system.
        file: Its name, for the report.
        snap_bytes: Bytes kept of each frame; 0 for all.
        count: Frames after which it ends; 0 for no limit.
        emulated_time: Divide the time since the beginning by the lab's time dilation, so that times between frames are emulated
            ones; otherwise the file tells wall time.

    Raises:
        KernelError: A port could not be opened.
        RunError: The capture's process did not start.
    """
    dilation = float(state.details["time_dilation"]) if emulated_time else 1.0
    shape = RingShape.for_ports(len(ports))
    names = [topology.port_name(port) for port in ports]
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as stack:
        stack.enter_context(ours)
        job_ports: list[PortJob] = []
        with contextlib.ExitStack() as handed_over:
            handed_over.enter_context(theirs)
            for port_id, name in zip(ports, names, strict=True):
                port = topology.port(port_id)
                opened = handed_over.enter_context(
                    _ring_socket_in(
                        namespace_of(state, topology.nodes[port.node].name), port.ifname, name, shape, snap_bytes
                    )
                )
                job_ports.append(
                    PortJob(
                        descriptor=opened.fileno(),
                        name=name,
                        description=f"to {topology.port_name(port.peer)}",
                        rate_bits_per_s=port.rate_bits_per_s,
                    )
                )
            job = CaptureJob(
                control=theirs.fileno(),
                blocks=shape.blocks,
                snap_bytes=snap_bytes,
                count=count,
                dilation=dilation,
                cpus=_capture_cpus(),
                comment=_describe_time(state.name, dilation),
                ports=job_ports,
            )
            process = _start_process(job, output)
        watched = NETNS_DIR / namespace_of(state, topology.nodes[topology.port(ports[0]).node].name)
        capture = Capture(file, process, ours, names, watched)
        stack.callback(capture.stop)
        _wait_until_ready(ours)
        yield capture


def _start_process(job: CaptureJob, output: BinaryIO) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-m", "testbed.kernel.capture_process", job.to_json()],
        stdin=subprocess.DEVNULL,
        stdout=output,
        pass_fds=[job.control, *(port["descriptor"] for port in job.ports)],
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,  # Ctrl-C is for us, who end it in order
    )


def _end_process(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(1.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_until_ready(control: socket.socket) -> None:
    control.settimeout(_START_S)
    try:
        greeting = control.recv(len(READY), socket.MSG_WAITALL)
    except TimeoutError:
        greeting = b""
    if greeting != READY:
        raise RunError("the capture's process did not start", hint="its own words stand above")


def _read_to_end(control: socket.socket, timeout_s: float) -> bytes:
    control.settimeout(timeout_s)
    parts = []
    while part := control.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def _ring_socket_in(namespace: str, ifname: str, name: str, shape: RingShape, snap_bytes: int) -> socket.socket:
    descriptor = open_namespace(namespace)
    try:
        with entered(descriptor):
            return open_ring_socket(ifname, shape, snap_bytes=snap_bytes)
    except KernelError as error:
        raise KernelError(f"capture at {name}", error.code) from None
    finally:
        os.close(descriptor)


def _capture_cpus() -> list[int]:
    """Return the CPUs that are not the engine's, where there are others."""
    engine, _ = choose_cpus()
    return [cpu for cpu in available_cpus() if cpu != engine] or [engine]


def _describe_time(lab: str, dilation: float) -> str:
    if dilation == 1:
        return f"lab {lab}; time is this machine's"
    return f"lab {lab}; time is emulated: time since the beginning / {dilation:g}; the links' delay shows nowhere"
