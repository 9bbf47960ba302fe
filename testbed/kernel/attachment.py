"""Leads RoCE between a NIC in its host's namespace and the namespace that this process is in.

Until Linux 7.1 soft-RoCE has its sockets in the initial namespace alone and looks its routes up there: a device on an interface
of a host's namespace hears nothing. An attachment is the interface that it stands on instead: a veth pair, one end here with
the NIC's own address and MAC, the other beside the NIC. eBPF hands RoCE over between that end and the NIC, both ways, so
the fabric and all that the NIC does (its shaper, pauses, counters) are as they are with any other carrier.

The end beside the NIC is in a namespace of the lab's own: by it :mod:`testbed.kernel.registry` removes the pair.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from testbed.errors import KernelError, MachineError
from testbed.kernel.bpf import load_object
from testbed.kernel.layout import ATTACHMENT, ATTACHMENT_PROGRAM
from testbed.kernel.links import (
    IFLA_IFALIAS,
    address_text,
    create_address,
    create_neighbour,
    create_veth,
    move_link,
    set_link_up,
)
from testbed.kernel.namespaces import entered, write_sysctl
from testbed.kernel.netlink import RTM_GETADDR, RouteSocket, split_attributes
from testbed.kernel.rps import has_default_mask, steer_ports
from testbed.kernel.tc import TC_H_INGRESS_HOOK, attach_filter, create_clsact

# All addresses of the fabric's hosts are this machine's own here: frames come from an address of ours to another, and the other's
# interface must not answer for it. No IPv6: it would announce itself.
_SYSCTLS = {
    "?net/ipv6/conf/{0}/disable_ipv6": "1",
    "net/ipv4/conf/{0}/rp_filter": "0",
    "net/ipv4/conf/{0}/accept_local": "1",
    "net/ipv4/conf/{0}/arp_ignore": "1",
    "net/ipv4/conf/{0}/arp_announce": "2",
}
_STRICT_RP_FILTER = "1"
# The kernel chooses a transmit queue for a connected socket, as rxe's of a queue pair, at the first device that has several, and
# keeps to it at all that follow. That must be the NIC, where our program says which is the shaped one. Source: Linux,
# net/core/dev.c, netdev_pick_tx().
_TRANSMIT_QUEUES = 1
_MARK = b"testbed:"
_IFA_LOCAL = 2


@dataclass(frozen=True, slots=True)
class AttachedNic:
    """A NIC and what is needed to stand in for it.

    Attributes:
        index: Interface index in its host's namespace.
        ifname: Name there.
        mac: MAC address.
        mtu: MTU in bytes.
        address: IPv4 address.
        next_hop_mac: MAC address of the other end of its link.
        others: IPv4 addresses of the fabric's other NICs.
    """

    index: int
    ifname: str
    mac: str
    mtu: int
    address: int
    next_hop_mac: str
    others: tuple[int, ...]


def create_attachment(nic: AttachedNic, netns_fd: int, mark: str, cpu: int) -> str:
    """Attach a NIC to the calling thread's namespace; return the name of the interface here.

    There is no route: soft-RoCE asks for the way out of its own interface, and without a route the kernel takes what it is asked
    for to be on that link. The link's neighbours are the other NICs, all behind the switch. So nothing else that this machine
    sends is led astray.

    Args:
        nic: The NIC.
        netns_fd: Its host's namespace.
        mark: Proof of ownership, set as the alias of the interface here.
        cpu: The CPU that serves the host's ports.

    Raises:
        MachineError: Addresses of the fabric are in use here, or frames from addresses of this machine's own would be dropped.
        KernelError: The kernel refused it.

    Source:
        Linux, net/ipv4/route.c, ip_route_output_key_hash_rcu(): "Assume, that the destination is on link."
    """
    with RouteSocket() as here:
        _check_free(nic, here)
        ifname = f"tbx{hashlib.blake2b(f'{mark} {nic.index}'.encode(), digest_size=6).hexdigest()}"
        origin = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _create_pair(nic, ifname, netns_fd, origin, mark)
        finally:
            os.close(origin)
        if not has_default_mask():
            steer_ports(netns_fd, [_host_ifname(nic)], cpu)
        for key, value in _SYSCTLS.items():
            write_sysctl(key.format(ifname), value)
        index = socket.if_nametoindex(ifname)
        here.request(
            [
                set_link_up(index, ifname),
                create_address(index, nic.address, 32),
                *(create_neighbour(index, other, nic.next_hop_mac) for other in nic.others),
            ]
        )
    return ifname


def _host_ifname(nic: AttachedNic) -> str:
    return f"{nic.ifname}-rdma"


def _create_pair(nic: AttachedNic, ifname: str, netns_fd: int, origin: int, mark: str) -> None:
    """Make both ends in the host's namespace, where they are ours whenever this process ends, then move one here."""
    index, host_ifname = nic.index + ATTACHMENT, _host_ifname(nic)
    loaded = load_object(map_entries={}, initial_values={}, programs=(ATTACHMENT_PROGRAM,))
    with contextlib.closing(loaded), entered(netns_fd), RouteSocket() as route:
        program = loaded.programs[ATTACHMENT_PROGRAM]
        route.request(
            [
                create_veth(
                    ifname=host_ifname,
                    index=index,
                    mac=f"06{nic.mac[2:]}",
                    mtu=nic.mtu,
                    peer_ifname=ifname,
                    peer_index=0,
                    peer_mac=nic.mac,
                    peer_netns_fd=netns_fd,
                    transmit_queues=_TRANSMIT_QUEUES,
                ),
                *move_link(ifname, mark, origin),
                create_clsact(index, host_ifname),
                attach_filter(index, host_ifname, TC_H_INGRESS_HOOK, program, ATTACHMENT_PROGRAM),
                set_link_up(index, host_ifname),
            ]
        )


def _check_free(nic: AttachedNic, here: RouteSocket) -> None:
    """Check that this namespace has no use of its own for the NIC's address.

    Raises:
        MachineError: It has.
    """
    for line in Path("/proc/thread-self/net/route").read_text().splitlines()[1:]:
        fields = line.split()
        # As the kernel prints them: 32-bit words of this machine's byte order.
        destination, mask = (int.from_bytes(bytes.fromhex(fields[column])[::-1], "big") for column in (1, 7))
        if mask and nic.address & mask == destination:
            _refuse(nic, f"a route to {address_text(destination)}/{mask.bit_count()}")
    for body in here.dump("ip addr show", RTM_GETADDR, struct.pack("=BBBBi", socket.AF_INET, 0, 0, 0, 0)):
        index = struct.unpack_from("=i", body, 4)[0]
        if split_attributes(body[8:]).get(_IFA_LOCAL) == struct.pack("!I", nic.address) and not _is_ours(index, here):
            _refuse(nic, "that address")
    if Path("/proc/sys/net/ipv4/conf/all/rp_filter").read_text().strip() == _STRICT_RP_FILTER:
        raise MachineError(
            "net.ipv4.conf.all.rp_filter is 1: this machine drops frames from addresses of its own, and this kernel's rxe needs "
            "all hosts' in one network namespace",
            hint="sysctl net.ipv4.conf.all.rp_filter=2",
        )


def _refuse(nic: AttachedNic, what: str) -> NoReturn:
    raise MachineError(
        f"this machine has {what}, and this kernel's rxe needs {address_text(nic.address)}, a host's of the fabric, here",
        hint="`testbed vm run -- COMMAND` gives it a machine of its own",
    )


def _is_ours(index: int, here: RouteSocket) -> bool:
    """Return whether an interface here is an attachment, of whatever lab."""
    try:
        return here.read_link(index).get(IFLA_IFALIAS, b"").startswith(_MARK)
    except KernelError:
        return True  # gone since
