"""What of a scenario its prediction leaves out, so that whoever reads the figure knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from testbed.scenario import (
    AdmissionScheme,
    CongestionControl,
    FlowsWorkload,
    IncastWorkload,
    LossRecovery,
    Scenario,
    Workload,
    ZonesFabric,
)
from testbed.units import format_size

_REORDERING_SCHEMES = ("spray", "adaptive")


def find_left_out(scenario: Scenario) -> tuple[str, ...]:
    """Return what the scenario has and max-min fair shares over its tables know nothing of, a line each."""
    return tuple(_left_out(scenario))


def _left_out(scenario: Scenario) -> Iterator[str]:
    if scenario.transport.admission.scheme is not AdmissionScheme.NONE:
        yield f"transport.admission: {scenario.transport.admission.scheme}: senders are taken to be granted all they could send"
    if len(scenario.qos.data_priorities) > 1:
        strict = ", and none to be strict" * any(one.is_strict for one in scenario.qos.data_priorities)
        yield f"qos.priorities: flows are taken to share ports as if all had one priority, whatever the weights{strict}"
    if scenario.qos.pfc.enabled:
        yield "qos.pfc: pauses: a paused port holds up frames that go elsewhere too (head-of-line blocking)"
    if (control := scenario.transport.congestion_control) is not CongestionControl.NONE:
        yield f"transport.congestion_control: {control}: senders are taken to have their fair shares from the beginning"
    if (drops := _find_drops(scenario)) is not None:
        yield drops
    if _loses_frames(scenario):
        yield "lost frames and what is sent again for them"
    if any(fault.slow_receiver is not None for fault in scenario.faults):
        yield "slow receivers: hosts are taken to receive at the rate of their links"
    if _reorders_before_go_back_n(scenario):
        yield f"routing.scheme: {scenario.routing.scheme}: packets overtake each other, which go_back_n takes for losses"
    if _has_starts(scenario):
        yield "start times: what starts later is taken to start with the rest"


def _items(scenario: Scenario) -> list[Workload]:
    return [*scenario.workload, *(item for job in scenario.jobs for item in job.workload)]


def _find_drops(scenario: Scenario) -> str | None:
    """Return what to say of the largest pile before a receiver, if no switch has room for it and nothing holds senders back."""
    if scenario.qos.pfc.enabled or scenario.transport.admission.scheme is not AdmissionScheme.NONE:
        return None
    switch = scenario.fabric.switch
    room_bytes = min(switch.buffer_bytes, switch.port_buffer_bytes or switch.buffer_bytes)
    piles = [_largest_pile_bytes(item, scenario.fabric.gpus_per_host) for item in _items(scenario)]
    if max(piles, default=0) <= room_bytes:
        return None
    return (
        f"drops: without PFC, senders can pile up {format_size(max(piles))} before one receiver, where {format_size(room_bytes)} "
        "have room; what is dropped is sent again"
    )


def _largest_pile_bytes(item: Workload, gpus_per_host: int) -> int:
    """Return what stands before a receiver at most, all of whose senders send at line rate and wait for nothing."""
    if isinstance(item, IncastWorkload):
        sent = [(rank, 0, item.size_bytes) for rank in range(1, item.fan_in + 1)]
    elif isinstance(item, FlowsWorkload):
        sent = [(flow.src, flow.dst, flow.size_bytes) for flow in item.flows]
    else:
        return 0
    total = Counter[int]()
    senders: dict[int, set[int]] = {}
    for src, dst, size_bytes in sent:
        if src // gpus_per_host != dst // gpus_per_host:
            total[dst] += size_bytes
            senders.setdefault(dst, set()).add(src)
    # While n send, the receiver takes an nth.
    return max((nbytes - nbytes // len(senders[dst]) for dst, nbytes in total.items()), default=0)


def _loses_frames(scenario: Scenario) -> bool:
    fabric = scenario.fabric
    kinds = [fabric.host_link, getattr(fabric, "uplink", None)]
    kinds += [fabric.superspine_link] if isinstance(fabric, ZonesFabric) else []
    lossy = any(kind is not None and kind.loss_fraction > 0 for kind in kinds)
    return lossy or bool(fabric.lossy_links) or any(fault.loss is not None for fault in scenario.faults)


def _reorders_before_go_back_n(scenario: Scenario) -> bool:
    reorders = str(scenario.routing.scheme) in _REORDERING_SCHEMES
    return reorders and scenario.transport.loss_recovery is LossRecovery.GO_BACK_N


def _has_starts(scenario: Scenario) -> bool:
    flows = (flow for item in _items(scenario) if isinstance(item, FlowsWorkload) for flow in item.flows)
    return any(flow.start_ns for flow in flows) or any(job.start_ns for job in scenario.jobs)
