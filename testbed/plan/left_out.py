"""What of a scenario its prediction leaves out, so that whoever reads the figure knows."""

from __future__ import annotations

from collections.abc import Iterator

from testbed.scenario import AdmissionScheme, FlowsWorkload, LossRecovery, Scenario, ZonesFabric

_REORDERING_SCHEMES = ("spray", "adaptive")


def find_left_out(scenario: Scenario) -> tuple[str, ...]:
    """Return what the scenario has and max-min fair shares over its tables know nothing of, a line each."""
    return tuple(_left_out(scenario))


def _left_out(scenario: Scenario) -> Iterator[str]:
    if scenario.transport.admission.scheme is not AdmissionScheme.NONE:
        yield f"transport.admission: {scenario.transport.admission.scheme}: senders are taken to be granted all they could send"
    if len(scenario.qos.data_priorities) > 1:
        yield "qos.priorities: flows are taken to share ports as if all had one priority, whatever the weights"
    if _loses_frames(scenario):
        yield "lost frames and what is sent again for them"
    if any(fault.slow_receiver is not None for fault in scenario.faults):
        yield "slow receivers: hosts are taken to receive at the rate of their links"
    if _reorders_before_go_back_n(scenario):
        yield f"routing.scheme: {scenario.routing.scheme}: packets overtake each other, which go_back_n takes for losses"
    if _has_starts(scenario):
        yield "start times: what starts later is taken to start with the rest"


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
    items = [*scenario.workload, *(item for job in scenario.jobs for item in job.workload)]
    flows = (flow for item in items if isinstance(item, FlowsWorkload) for flow in item.flows)
    return any(flow.start_ns for flow in flows) or any(job.start_ns for job in scenario.jobs)
