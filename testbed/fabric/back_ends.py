"""Which of the kernel's means a fabric uses, chosen by trying them."""

from __future__ import annotations

from testbed.kernel.probe import probe_qdisc
from testbed.plan.model import Plan
from testbed.plan.operations import BackEnds
from testbed.scenario import Carrier, CongestionControl, GateChoice, LinkDelay, MarkerChoice, SchedulerChoice


def choose_back_ends(plan: Plan) -> BackEnds:
    """Return what holds back, marks and delays: as the scenario says, or what suits this kernel best.

    A plug is the better gate, for an opened port sends no bucketful at once. The eBPF marker is the better one, exact and
    counted by priority, so RED is for who asks for it. Netem is the better delay for the kernel's protocols, whose own loops then
    see it; the engine delays by itself, and where no link has a delay nothing has to. Prio is the cheapest scheduler where it
    serves, that is where all priorities are strict and nothing is paused. What is asked for and absent is the kernel's error when
    a port is made.
    """
    transport = plan.scenario.transport
    delay = str(transport.link_delay)
    if transport.link_delay is LinkDelay.AUTO:
        delayed = transport.carrier is not Carrier.ENGINE and any(link.delay_ns for link in plan.topology.links)
        delay = str(LinkDelay.NETEM if delayed and probe_qdisc("netem") else LinkDelay.CARRIER)
    qos = plan.scenario.qos
    gate = str(qos.pfc.gate)
    if qos.pfc.gate is GateChoice.AUTO:
        # A plug is a leaf: no rates of queue pairs can hang below it.
        shaped = transport.carrier is Carrier.RXE and transport.congestion_control is not CongestionControl.NONE
        gate = "plug" if plan.pausing and not shaped and probe_qdisc("plug") else "tbf"
    marker = "bpf" if qos.ecn.marker is MarkerChoice.AUTO else str(qos.ecn.marker)
    scheduler = str(qos.scheduler)
    if qos.scheduler is SchedulerChoice.AUTO:
        classes = plan.queue_classes
        strict = len(classes) > 1 and all(one.weight is None for one in classes)
        scheduler = "prio" if strict and not plan.pausing and probe_qdisc("prio") else "htb"
    return BackEnds(gate=gate, marker=marker, scheduler=scheduler, link_delay=delay)
