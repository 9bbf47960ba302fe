"""Receiver-driven admission on a running fabric: the engine's half with the plan's delays and the NICs' sockets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from testbed.engine.admission import Admission, GrantedAdmission, NoAdmission
from testbed.kernel.scheduling import read_max_backlog
from testbed.plan.admission import grant_one_way_ns, grant_priority, grants_share_queue
from testbed.plan.model import Plan
from testbed.roce.admission import make

# What all receivers may send at once of what the fabric's CPU can have waiting (net.core.netdev_max_backlog); data has the rest.
_BACKLOG_SHARE = 0.3
_MIN_FRAMES_PER_TICK = 4
# A lost grant is repeated before the sender gives up waiting for an ACK of what it sent last: a window may end without an AckReq.
_SILENCE_TIMEOUTS = 0.5


def admission(plan: Plan, workload: int, qps: npt.NDArray[Any], sockets: Sequence[int]) -> Admission:
    """Return the admission of a workload's QPs.

    Args:
        plan: The plan.
        workload: Index of the workload.
        qps: The fabric's QP table.
        sockets: Descriptor of each NIC's packet socket.
    """
    planned, scenario = plan.workloads[workload], plan.scenario
    if planned.admission is None:
        return NoAdmission()
    wanted, dilation = planned.admission, plan.dilation
    count = planned.qps_per_connection
    parameters = {
        "window_bytes": wanted.window_bytes,
        "grants": wanted.grants,
        "mtu_bytes": scenario.transport.mtu_bytes,
        "silence_ns": plan.retransmit_timeout_ns * _SILENCE_TIMEOUTS,
    }
    receivers = {connection.responder.local.nic for connection in planned.connections}
    firsts = planned.paths[::count]
    return GrantedAdmission(
        make(str(scenario.transport.admission.scheme), parameters, len(firsts)),
        connections=planned.connections,
        qps_per_connection=count,
        qps=qps,
        sockets=sockets,
        priority=grant_priority(scenario),
        shares_queue=grants_share_queue(scenario),
        mtu=scenario.transport.mtu_bytes,
        time_dilation=dilation.value,
        wall_tick_ns=dilation.wall_tick_ns,
        wall_data_delay_ns=np.rint(planned.one_way_ns * dilation.value).astype(np.int64),
        wall_grant_delay_ns=np.rint(grant_one_way_ns(firsts, plan.topology) * dilation.value).astype(np.int64),
        max_grants=wanted.grants,
        max_frames_per_tick=max(_MIN_FRAMES_PER_TICK, int(_BACKLOG_SHARE * read_max_backlog()) // len(receivers)),
    )
