"""The time series of a run on disk: which ports are looked at, and what the files' headers say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from testbed.engine.recorder import TickRecorder
from testbed.fabric import Fabric
from testbed.plan.model import Plan
from testbed.results.series import (
    QP_COLUMNS,
    QPS_FILE,
    QUEUE_COLUMNS,
    QUEUES_FILE,
    RATE_COLUMN,
    opened_series,
    state_column,
)
from testbed.roce.congestion import CongestionControl
from testbed.topology import NodeKind

# Both files together, before compression; a compressed one is a small part of it.
LIMIT_BYTES = 256 << 20


@contextlib.contextmanager
def recording(
    fabric: Fabric, folder: Path, control: CongestionControl | None, *, limit_bytes: int = LIMIT_BYTES
) -> Iterator[TickRecorder]:
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
    states = [] if control is None else [RATE_COLUMN, *map(state_column, control.state())]
    header = series_header(plan)
    names = [plan.topology.port_name(port) for port in ports]
    with (
        opened_series(
            folder / QUEUES_FILE,
            QUEUE_COLUMNS,
            {**header, "ports": [describe_port(plan, port) for port in ports]},
            {"port": names},
        ) as queues,
        opened_series(folder / QPS_FILE, [*QP_COLUMNS, *states], header, {}) as qps,
    ):
        recorder = TickRecorder(
            ports,
            queues=fabric.arrays.queues,
            ingress=fabric.arrays.ingress,
            qps=fabric.arrays.qps,
            priority=plan.scenario.qos.lossless_priority,
            time_dilation=plan.dilation.value,
            limit_bytes=limit_bytes,
            queue_sink=queues,
            qp_sink=qps,
        )
        try:
            yield recorder
        finally:
            recorder.close()


def ports_with_data(plan: Plan) -> list[int]:
    """Return the ports that send data in some workload item, and the switch ports that receive it, ascending."""
    topology = plan.topology
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
