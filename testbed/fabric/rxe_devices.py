"""The soft-RoCE devices of a deployed lab: one for each NIC, recorded before they are made."""

from __future__ import annotations

import os
from collections.abc import Mapping

from testbed.errors import LabError
from testbed.kernel import registry
from testbed.kernel.namespaces import open_namespace
from testbed.kernel.rxe import create_rxe, has_device
from testbed.plan.model import Plan
from testbed.scenario import Carrier


def create_lab_devices(plan: Plan, state: registry.LabState) -> None:
    """Make a device on every NIC of a lab whose scenario has the carrier rxe.

    Raises:
        LabError: A device of such a name exists.
        MachineError: The kernel or a program for it is missing, or rxe does not know namespaces.
        KernelError: The kernel refused one.
    """
    if plan.scenario.transport.carrier is not Carrier.RXE:
        return
    names = device_names(plan, state.name)
    for name in names.values():
        if has_device(name):
            raise LabError(f"an RDMA device named {name!r} exists already", hint="choose another lab name with --name")
    state.rxe_devices = {str(port_id): name for port_id, name in names.items()}
    registry.write_state(state)
    for port_id, name in names.items():
        port = plan.topology.port(port_id)
        netns = open_namespace(state.namespaces[plan.topology.nodes[port.node].name])
        try:
            create_rxe(name, port.ifname, netns)
        finally:
            os.close(netns)


def device_names(plan: Plan, lab: str) -> Mapping[int, str]:
    """Return the name of the device of each NIC, by port id: names of devices are the machine's, so the lab's stands in them."""
    topology = plan.topology
    found = {}
    for port in topology.nics:
        host = topology.nodes[port.node]
        found[port.id] = f"{lab}-{host.name}" + ("" if len(host.ports) == 1 else f"-{port.ifname}")
    return found
