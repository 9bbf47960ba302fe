"""Which of the kernel's means a fabric uses, chosen by trying them."""

from __future__ import annotations

from testbed.kernel.probe import probe_qdisc
from testbed.plan.model import Plan
from testbed.plan.operations import BackEnds
from testbed.scenario import GateChoice, MarkerChoice


def choose_back_ends(plan: Plan) -> BackEnds:
    """Return what holds back and what marks: as the scenario says, or what suits this kernel best.

    A plug is the better gate, for an opened port sends no bucketful at once. The eBPF marker is the better one, exact and
    counted by priority, so RED is for who asks for it. What is asked for and absent is the kernel's error when a port is made.
    """
    qos = plan.scenario.qos
    gate = str(qos.pfc.gate)
    if qos.pfc.gate is GateChoice.AUTO:
        gate = "plug" if plan.pausing and probe_qdisc("plug") else "tbf"
    return BackEnds(gate, "bpf" if qos.ecn.marker is MarkerChoice.AUTO else str(qos.ecn.marker))
