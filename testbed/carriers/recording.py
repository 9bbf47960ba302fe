"""The time series of a run on disk: which ports are looked at, what the files' headers say, and who writes them."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from testbed.carriers.series_process import READY, SeriesJob
from testbed.engine.recorder import TickRecorder
from testbed.errors import TestbedError
from testbed.fabric import Fabric
from testbed.measure.sample_ring import SampleRing
from testbed.measure.sample_rows import RATE_STATE
from testbed.plan.model import Plan
from testbed.roce.congestion import CongestionControl
from testbed.topology import NodeKind

# Both files together.
LIMIT_BYTES = 256 << 20
# For what is left in the ring; the process is not killed before.
_PATIENCE_S = 60.0


class Recording:
    """The time series of a run while it is written.

    Attributes:
        recorder: Takes the samples.
    """

    def __init__(self, recorder: TickRecorder, process: subprocess.Popen[str]) -> None:
        self.recorder = recorder
        self._process = process

    def warnings(self) -> list[str]:
        """Return what a reader of the series should know."""
        recorder = self.recorder
        found = []
        if recorder.sample_ticks > 1:
            end = ", and it ends before the run" if recorder.is_full else ""
            found.append(f"the time series became large: in the end it has every {recorder.sample_ticks}th tick{end}")
        elif recorder.skipped_samples:
            found.append(
                f"the time series lacks {recorder.skipped_samples} samples: this machine was too busy to write"
            )
        if self._process.poll() is not None:
            reason = self._process.communicate()[1].strip() or f"exit code {self._process.returncode}"
            found.append(f"the time series ends before the run: {reason}")
        return found


@contextlib.contextmanager
def recording(
    fabric: Fabric, folder: Path, control: CongestionControl | None, *, limit_bytes: int = LIMIT_BYTES
) -> Iterator[Recording]:
    """Write the time series of what runs in the block into a folder.

    Args:
        fabric: The fabric.
        folder: It exists.
        control: A congestion control such as the workloads', for the names of its states.
        limit_bytes: See `TickRecorder`.

    Raises:
        TestbedError: The files cannot be written.
    """
    plan = fabric.plan
    ports = ports_with_data(plan)
    descriptor = os.memfd_create("testbed-series")
    try:
        job = series_job(plan, ports, folder, [] if control is None else [RATE_STATE, *control.state()], descriptor)
        size = job.shape.ring.itemsize
        os.ftruncate(descriptor, size)
        ring = SampleRing(mmap.mmap(descriptor, size), job.shape)
        process = _start_process(job)
    finally:
        os.close(descriptor)
    try:
        recorder = TickRecorder(
            ring,
            [(port, priority) for port in ports for priority in job.priorities],
            queues=fabric.arrays.queues,
            ingress=fabric.arrays.ingress,
            qps=fabric.arrays.qps,
            limit_bytes=limit_bytes,
        )
        yield Recording(recorder, process)
    finally:
        _end_process(process)


def _start_process(job: SeriesJob) -> subprocess.Popen[str]:
    """Start the process that writes, and wait until its files are there.

    Raises:
        TestbedError: They cannot be written.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "testbed.carriers.series_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[job.descriptor],
        start_new_session=True,  # Ctrl-C is for the run alone
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(job.to_json() + "\n")
            process.stdin.flush()
        if process.stdout.readline().strip() != READY:
            reason = process.communicate()[1].strip().splitlines() or ["no reason was given"]
            raise TestbedError(f"time series: {reason[-1]}", hint="use --no-series, or another --output")
    except BaseException:
        _end_process(process)
        raise
    return process


def _end_process(process: subprocess.Popen[str]) -> None:
    """Let the process write what it has and end."""
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()
    try:
        process.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def series_job(plan: Plan, ports: list[int], folder: Path, states: list[str], descriptor: int) -> SeriesJob:
    """Return the job of the process that writes the series of a plan's run."""
    ends = [[connection.requester for connection in planned.connections] for planned in plan.workloads]
    return SeriesJob(
        descriptor=descriptor,
        ports=len(ports),
        qps=max(map(len, ends), default=0),
        folder=str(folder.absolute()),
        header=series_header(plan),
        port_details=[describe_port(plan, port) for port in ports],
        port_names=[plan.topology.port_name(port) for port in ports],
        qpn=[[end.qpn for end in row] for row in ends],
        src_rank=[[end.local.rank for end in row] for row in ends],
        dst_rank=[[end.remote.rank for end in row] for row in ends],
        states=states,
        time_dilation=plan.dilation.value,
        priorities=[one.priority for one in plan.scenario.qos.data_priorities],
    )


def ports_with_data(plan: Plan) -> list[int]:
    """Return the ports that send data in some workload item, and the switch ports that receive it, ascending."""
    topology = plan.topology
    if plan.faults.is_eventful:  # flows change their ways
        switches = [port.id for port in topology.ports if topology.nodes[port.node].kind is not NodeKind.HOST]
        return sorted({nic.id for nic in topology.nics} | set(switches))
    senders = {port for planned in plan.workloads for path in planned.paths for port in path.ports}
    peers = {topology.port(port).peer for port in senders}
    receivers = {port for port in peers if topology.nodes[topology.port(port).node].kind is not NodeKind.HOST}
    return sorted(senders | receivers)


def series_header(plan: Plan) -> dict[str, Any]:
    """Return what both files say of the run: names, seed, time dilation, tick, rows and the whole scenario."""
    scenario, dilation = plan.scenario, plan.dilation
    return {
        "scenario_name": scenario.name,
        "seed": scenario.seed,
        "time_dilation": dilation.value,
        "wall_tick_ns": dilation.wall_tick_ns,
        "tick_ns": dilation.wall_tick_ns / dilation.value,
        "mtu_bytes": scenario.transport.mtu_bytes,
        "frame_wire_bytes": plan.frame_wire_bytes,
        "congestion_control": str(scenario.transport.congestion_control),
        "rows": [
            {
                "collective": planned.collective_name,
                "algorithm": planned.algorithm_name,
                "size_bytes": planned.size_bytes,
                "nranks": planned.nranks,
            }
            for planned in plan.workloads
        ],
        "faults": [
            {"text": one.text, "at_ns": one.begin_ns, "until_ns": one.end_ns}
            for one in plan.faults.incidents
            if plan.faults.is_eventful and not one.mends
        ],
        "scenario": scenario.resolved(),
    }


def describe_port(plan: Plan, port_id: int) -> dict[str, Any]:
    """Return a port's name, peer, rate and thresholds; None for a threshold that it does not have."""
    topology = plan.topology
    port = topology.port(port_id)
    marks, pause = plan.marking.get(port_id), plan.pausing.get(port_id)
    return {
        "name": topology.port_name(port_id),
        "peer": topology.port_name(port.peer),
        "is_host": topology.nodes[port.node].kind is NodeKind.HOST,
        "rate_bits_per_s": port.rate_bits_per_s,
        "kmin_bytes": marks.kmin_bytes if marks else None,
        "kmax_bytes": marks.kmax_bytes if marks else None,
        "pmax_fraction": marks.pmax if marks else None,
        "xoff_bytes": pause.xoff_bytes if pause else None,
        "alpha": float(pause.alpha) if pause else None,
        "headroom_bytes": pause.headroom_bytes if pause else None,
    }
