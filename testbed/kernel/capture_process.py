"""The capture process: ``python -m testbed.kernel.capture_process``, started by :mod:`testbed.fabric.capture`.

A process of its own, so that the engine never waits for it: it empties the rings of all captured ports into one pcapng file
on its standard output. Its job comes as JSON in its only argument; the sockets in it are inherited. It ends when the other
end of its control socket closes, whatever becomes of that process: nothing else can leave it behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import BinaryIO, TypedDict

import numpy as np
import numpy.typing as npt

from testbed.kernel.packet_ring import RETIRE_MS, PacketRing, RingShape, join_frames, parse_headers
from testbed.kernel.pcapng import Frames, render_frames, render_interface, render_section, render_statistics

READY = b"ready\n"
# Frames of all ports are put in order of time over so long a stretch: a quiet port's block may be this late.
_ORDER_NS = 5 * RETIRE_MS * 1_000_000
_DRAIN_S = 3 * RETIRE_MS / 1000
_OUTPUT_BUFFER_BYTES = 1 << 20


class PortJob(TypedDict):
    """A port to capture: its socket's descriptor, and what the file says of it."""

    descriptor: int
    name: str
    description: str
    rate_bits_per_s: int


@dataclass(frozen=True)
class CaptureJob:
    """What the process shall do.

    Attributes:
        control: Descriptor of the socket that holds it alive.
        blocks: Blocks of each port's ring.
        snap_bytes: Bytes kept of each frame; 0 for all.
        count: Frames after which it ends; 0 for no limit.
        dilation: Wall time / time in the file: 1 writes wall time.
        cpus: CPUs it may use.
        comment: Comment of the file.
        ports: The ports.
    """

    control: int
    blocks: int
    snap_bytes: int
    count: int
    dilation: float
    cpus: list[int]
    comment: str
    ports: list[PortJob]

    def to_json(self) -> str:
        """Return it as the process's argument."""
        return json.dumps(asdict(self))


class _Writer:
    """Writes frames of several rings to one file, in order of time."""

    def __init__(self, job: CaptureJob, rings: Sequence[PacketRing], output: BinaryIO) -> None:
        self._job = job
        self._rings = rings
        self._output = output
        self._pending: list[Frames] = []
        self._start_ns = time.time_ns()
        self.frames = [0] * len(rings)
        output.write(render_section("testbed capture", job.comment))
        for port in job.ports:
            output.write(
                render_interface(
                    port["name"],
                    port["description"],
                    snap_bytes=job.snap_bytes,
                    rate_bits_per_s=port["rate_bits_per_s"],
                )
            )
        output.flush()

    @property
    def is_full(self) -> bool:
        """Return whether as many frames are written as were asked for."""
        return 0 < self._job.count <= sum(self.frames)

    def collect(self) -> None:
        """Take what the rings hold."""
        for index, ring in enumerate(self._rings):
            for block, headers in ring.read_blocks():
                raw = np.frombuffer(block, np.uint8)
                self._pending.append(parse_headers(raw, np.array(headers, np.int64), interface=index))

    def write(self, *, until_ns: int | None = None) -> None:
        """Write the frames seen until then, or all, in order of time, and no more than were asked for."""
        frames = join_frames(self._pending)
        number = len(frames) if until_ns is None else int(np.searchsorted(frames.time_ns, until_ns, side="right"))
        self._pending = [frames.chosen(np.arange(number, len(frames)))] if number < len(frames) else []
        if self._job.count:
            number = min(number, self._job.count - sum(self.frames))
        if not number:
            return
        written = frames.chosen(np.arange(number))
        written = replace(written, time_ns=self._file_time_ns(written.time_ns))
        counts = np.bincount(written.interface, minlength=len(self.frames))
        self._output.write(render_frames(written).data)
        self._output.flush()
        self.frames = [count + more for count, more in zip(self.frames, counts.tolist(), strict=True)]

    def finish(self) -> dict[str, list[int]]:
        """Write what each port saw and lost; return frames written and frames lost by port."""
        now_ns = int(self._file_time_ns(np.array([time.time_ns()]))[0])
        report = {}
        for index, (port, ring) in enumerate(zip(self._job.ports, self._rings, strict=True)):
            received, lost = ring.read_statistics()
            self._output.write(render_statistics(index, now_ns, received_packets=received, lost_packets=lost))
            report[port["name"]] = [self.frames[index], lost]
        self._output.flush()
        return report

    def _file_time_ns(self, wall_time_ns: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        if self._job.dilation == 1:
            return wall_time_ns
        elapsed = (wall_time_ns - self._start_ns) / self._job.dilation
        return self._start_ns + np.rint(elapsed).astype(np.int64)


def run_job(job: CaptureJob, output: BinaryIO) -> None:
    """Capture until the control socket's other end closes or the count is reached, and report on that socket."""
    control = socket.socket(fileno=job.control)
    shape = RingShape(job.blocks)
    rings = [
        PacketRing(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0, fileno=port["descriptor"]), shape)
        for port in job.ports
    ]
    report: dict[str, object] = {"error": None, "ports": {}}
    writer = None
    try:
        control.sendall(READY)  # from here on every end is told in the report
        writer = _Writer(job, rings, output)
        _capture(writer, rings, control)
        report["ports"] = writer.finish()
    except OSError as error:  # a full disk, a reader that went
        report["error"] = error.strerror or str(error)
        if writer is not None:
            report["ports"] = {
                port["name"]: [frames, ring.read_statistics()[1]]
                for port, frames, ring in zip(job.ports, writer.frames, rings, strict=True)
            }
    with contextlib.suppress(OSError):  # nobody may be left to hear it
        control.sendall(json.dumps(report).encode())
    control.close()
    for ring in rings:
        ring.close()


def _capture(writer: _Writer, rings: Sequence[PacketRing], control: socket.socket) -> None:
    poller = select.poll()
    poller.register(control, select.POLLIN)
    for ring in rings:
        poller.register(ring, select.POLLIN)
    last: float | None = None  # set when the end is asked for: frames still stand in blocks that nobody has handed over
    while not writer.is_full:
        ready = poller.poll(RETIRE_MS if last is not None else 5 * RETIRE_MS)
        if last is None and any(descriptor == control.fileno() for descriptor, _ in ready):
            poller.unregister(control)
            last = time.monotonic() + _DRAIN_S
        time.sleep(RETIRE_MS / 1000)  # work comes in fewer, larger pieces
        writer.collect()
        if last is not None and time.monotonic() >= last:
            writer.write()
            return
        writer.write(until_ns=time.time_ns() - _ORDER_NS)


def main() -> None:
    """Do the job in the only argument."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the command that started this, which ends it in order
    fields = json.loads(sys.argv[1])
    job = CaptureJob(**fields)
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, job.cpus)
    output = open(sys.stdout.fileno(), "wb", buffering=_OUTPUT_BUFFER_BYTES, closefd=False)  # noqa: SIM115
    run_job(job, output)
    os._exit(0)  # the interpreter would try once more to write what could not be written


if __name__ == "__main__":
    main()
