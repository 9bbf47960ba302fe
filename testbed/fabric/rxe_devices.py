"""The soft-RoCE devices of a lab: on the NICs, or on their attachments where rxe does not know namespaces."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import numpy as np

from testbed.errors import LabError
from testbed.fabric.apply import ifindex_of
from testbed.kernel import layout, registry
from testbed.kernel.attachment import AttachedNic, create_attachment
from testbed.kernel.namespaces import open_namespace
from testbed.kernel.rxe import create_rxe, create_rxe_here, delete_rxe, has_device
from testbed.plan.model import Plan
from testbed.scenario import Carrier
from testbed.topology import Port


def create_lab_devices(plan: Plan, state: registry.LabState, arrays: layout.MappedArrays) -> None:
    """Make a device on every NIC of a lab whose scenario has the carrier rxe, recorded before they are made.

    Raises:
        LabError: A device of such a name exists.
        MachineError: The kernel or a program for it is missing, or this machine's namespace cannot have them.
        KernelError: The kernel refused one.
    """
    if plan.scenario.transport.carrier is not Carrier.RXE:
        return
    names = device_names(plan, state.name)
    check_free(names.values())
    state.rxe_devices = {str(port_id): name for port_id, name in names.items()}
    registry.write_state(state)
    create_devices(plan, state, arrays, {name: plan.topology.port(port_id) for port_id, name in names.items()})


def check_free(names: Iterable[str]) -> None:
    """Check that no device has any of these names: they are the machine's.

    Raises:
        LabError: One has.
    """
    for name in names:
        if has_device(name):
            raise LabError(f"an RDMA device named {name!r} exists already", hint="choose another lab name with --name")


def device_names(plan: Plan, lab: str) -> Mapping[int, str]:
    """Return the name of the device of each NIC, by port id: names of devices are the machine's, so the lab's stands in them."""
    topology = plan.topology
    found = {}
    for port in topology.nics:
        host = topology.nodes[port.node]
        found[port.id] = f"{lab}-{host.name}" + ("" if len(host.ports) == 1 else f"-{port.ifname}")
    return found


def create_devices(
    plan: Plan, state: registry.LabState, arrays: layout.MappedArrays, wanted: Mapping[str, Port]
) -> None:
    """Make devices; the first tells whether rxe knows namespaces, and where the others go.

    Args:
        plan: The lab's plan.
        state: The lab's record; notes the attachments before they are made.
        arrays: The lab's maps.
        wanted: The NIC of each, by the device's name.

    Raises:
        MachineError: The kernel or a program for it is missing, or this machine's namespace cannot have them.
        KernelError: The kernel refused one.
    """
    knows_namespaces = True
    for name, port in wanted.items():
        namespace = state.namespaces[plan.topology.nodes[port.node].name]
        netns = open_namespace(namespace)
        try:
            knows_namespaces = knows_namespaces and create_rxe(name, port.ifname, netns)
            if not knows_namespaces:
                state.attachments[str(port.id)] = (namespace, ifindex_of(port.id) + layout.ATTACHMENT)
                registry.write_state(state)
                cpus = state.details["port_cpus"]
                ifname = create_attachment(_attached_nic(plan, port), netns, state.mark, cpus[port.node % len(cpus)])
                arrays.ports["flags"][port.id] |= layout.PORT_ATTACHED
                create_rxe_here(name, ifname)
        finally:
            os.close(netns)


def delete_devices(state: registry.LabState, arrays: layout.MappedArrays, unwanted: Mapping[str, Port]) -> None:
    """Delete devices and their attachments, and wait until they are gone; those that were not made do not matter."""
    for name in unwanted:
        if has_device(name):
            delete_rxe(name)
    ports = [port.id for port in unwanted.values() if str(port.id) in state.attachments]
    registry.delete_attachments(state, [str(port_id) for port_id in ports])
    forget_attachments(state, arrays, ports)


def forget_attachments(state: registry.LabState, arrays: layout.MappedArrays, ports: Iterable[int]) -> None:
    """Let the kernel of each host have the RoCE of NICs that are attached no more."""
    for port_id in ports:
        if str(port_id) not in state.attachments:
            arrays.ports["flags"][port_id] &= ~np.uint16(layout.PORT_ATTACHED)


def _attached_nic(plan: Plan, port: Port) -> AttachedNic:
    topology = plan.topology
    return AttachedNic(
        index=ifindex_of(port.id),
        ifname=port.ifname,
        mac=port.mac,
        mtu=plan.port_mtu_bytes,
        address=port.address,
        next_hop_mac=topology.port(port.peer).mac,
        others=tuple(nic.address for nic in topology.nics if nic is not port),
    )
