"""Requests about links, addresses, neighbours and routes, as :class:`testbed.kernel.netlink.Message` values."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import socket
import struct
from collections.abc import Sequence

from testbed.errors import KernelError
from testbed.kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    RTM_DELLINK,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWNEIGH,
    RTM_NEWROUTE,
    RTM_NEWRULE,
    Message,
    attribute,
    attribute_text,
    attribute_u32,
)

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_TXQLEN, _IFLA_LINKINFO = 1, 3, 4, 13, 18
IFLA_IFALIAS = 20
_IFLA_NET_NS_FD, _IFLA_NUM_TX_QUEUES, _IFLA_NUM_RX_QUEUES = 28, 31, 32
_IFLA_INFO_KIND, _IFLA_INFO_DATA, _VETH_INFO_PEER = 1, 2, 1
_IFF_UP = 1
_NUD_PERMANENT = 0x80
_RT_TABLE_MAIN, _RTPROT_STATIC, _RT_SCOPE_UNIVERSE, _RT_SCOPE_LINK, _RTN_UNICAST = 254, 4, 0, 253, 1
_RTN_UNREACHABLE = 7
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_MULTIPATH = 1, 4, 5, 9
_FRA_SRC, _FR_ACT_TO_TABLE = 2, 1

# Two transmit queues: 0 for data (shaped and paused), 1 for control (ACK, CNP, PFC).
TRANSMIT_QUEUES = 2
LOOPBACK_IFINDEX = 1

_SIOCETHTOOL = 0x8946
# ETHTOOL_STXCSUM, _STSO, _SGSO, _SGRO: frames stay as the sender built them, one packet each. Scatter-gather stays on: without
# it every frame of the engine is copied once more to make it linear.
_OFFLOADS = ((0x17, "tx"), (0x1F, "tso"), (0x24, "gso"), (0x2C, "gro"))


def mac_bytes(mac: str) -> bytes:
    """Return the six bytes of ``02:00:…``."""
    return bytes.fromhex(mac.replace(":", ""))


def _ifinfo(index: int, flags: int = 0, change: int = 0) -> bytes:
    return struct.pack("=BxHiII", 0, 0, index, flags, change)


def _link_attributes(ifname: str, mac: str, mtu: int, transmit_queues: int) -> bytes:
    return (
        attribute_text(_IFLA_IFNAME, ifname)
        + attribute(_IFLA_ADDRESS, mac_bytes(mac))
        + attribute_u32(_IFLA_MTU, mtu)
        + attribute_u32(_IFLA_NUM_TX_QUEUES, transmit_queues)
        + attribute_u32(_IFLA_NUM_RX_QUEUES, 1)
    )


def create_veth(
    *,
    ifname: str,
    index: int,
    mac: str,
    mtu: int,
    peer_ifname: str,
    peer_index: int,
    peer_mac: str,
    peer_netns_fd: int,
    transmit_queues: int = TRANSMIT_QUEUES,
) -> Message:
    """Return the request for a veth pair: this end in the socket's namespace, the peer in ``peer_netns_fd``'s."""
    peer = (
        _ifinfo(peer_index)
        + _link_attributes(peer_ifname, peer_mac, mtu, transmit_queues)
        + attribute_u32(_IFLA_NET_NS_FD, peer_netns_fd)
    )
    info = attribute(_IFLA_INFO_KIND, b"veth") + attribute(_IFLA_INFO_DATA, attribute(_VETH_INFO_PEER, peer))
    payload = _ifinfo(index) + _link_attributes(ifname, mac, mtu, transmit_queues) + attribute(_IFLA_LINKINFO, info)
    operation = f"ip link add {ifname} index {index} type veth peer {peer_ifname} index {peer_index}"
    return Message(operation, RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, payload)


def set_link_up(index: int, ifname: str) -> Message:
    """Return the request of ``ip link set IFNAME up``."""
    return Message(f"ip link set {ifname} up", RTM_NEWLINK, 0, _ifinfo(index, _IFF_UP, _IFF_UP))


def set_alias(index: int, alias: str) -> Message:
    """Return the request of ``ip link set … alias``; how a namespace of ours is marked."""
    return Message(
        f"ip link set index {index} alias {alias}",
        RTM_NEWLINK,
        0,
        _ifinfo(index) + attribute(IFLA_IFALIAS, alias.encode()),
    )


def delete_link(index: int, ifname: str) -> Message:
    """Return the request of ``ip link del``; a link already gone is no error."""
    return Message(f"ip link del {ifname}", RTM_DELLINK, 0, _ifinfo(index), frozenset({errno.ENODEV}))


def address_text(address: int) -> str:
    """Return the dotted quad of an IPv4 address."""
    return socket.inet_ntoa(struct.pack("!I", address))


def create_address(index: int, address: int, prefix_len: int) -> Message:
    """Return the request of ``ip addr add``."""
    packed = struct.pack("!I", address)
    payload = (
        struct.pack("=BBBBi", socket.AF_INET, prefix_len, 0, 0, index) + attribute(1, packed) + attribute(2, packed)
    )
    operation = f"ip addr add {address_text(address)}/{prefix_len} dev {index}"
    return Message(operation, RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, payload)


def create_neighbour(index: int, address: int, mac: str) -> Message:
    """Return the request of a permanent neighbour, so that the fabric carries no ARP."""
    payload = struct.pack("=BxHiHBB", socket.AF_INET, 0, index, _NUD_PERMANENT, 0, 0)
    payload += attribute(1, struct.pack("!I", address)) + attribute(2, mac_bytes(mac))
    operation = f"ip neigh add {address_text(address)} lladdr {mac} dev {index} nud permanent"
    return Message(operation, RTM_NEWNEIGH, NLM_F_CREATE, payload)


def move_link(ifname: str, alias: str, netns_fd: int) -> list[Message]:
    """Return the requests that move an interface into a namespace, marked first: it has its alias when it gets there."""
    named = _ifinfo(0) + attribute_text(_IFLA_IFNAME, ifname)
    return [
        Message(f"ip link set {ifname} alias {alias}", RTM_NEWLINK, 0, named + attribute(IFLA_IFALIAS, alias.encode())),
        Message(f"ip link set {ifname} netns", RTM_NEWLINK, 0, named + attribute_u32(_IFLA_NET_NS_FD, netns_fd)),
    ]


def create_route(
    prefix: int, prefix_len: int, next_hops: Sequence[tuple[int, int]], table: int = _RT_TABLE_MAIN
) -> Message:
    """Return the request of a static route.

    Args:
        prefix: Destination network.
        prefix_len: Its length in bits.
        next_hops: ``(gateway address, interface index)``, several for a multipath route, none for an unreachable one.
        table: Number of the routing table, below 256.
    """
    scope, kind = _RT_SCOPE_UNIVERSE, _RTN_UNICAST if next_hops else _RTN_UNREACHABLE
    payload = struct.pack("=BBBBBBBBI", socket.AF_INET, prefix_len, 0, 0, table, _RTPROT_STATIC, scope, kind, 0)
    if prefix_len:
        payload += attribute(_RTA_DST, struct.pack("!I", prefix))
    if len(next_hops) == 1:
        gateway, index = next_hops[0]
        payload += attribute(_RTA_GATEWAY, struct.pack("!I", gateway)) + attribute_u32(_RTA_OIF, index)
    elif next_hops:
        hops = b""
        for gateway, index in next_hops:
            nested = attribute(_RTA_GATEWAY, struct.pack("!I", gateway))
            hops += struct.pack("=HBBi", 8 + len(nested), 0, 0, index) + nested
        payload += attribute(_RTA_MULTIPATH, hops)
    via = " ".join(f"nexthop via {address_text(gateway)} dev {index}" for gateway, index in next_hops)
    operation = f"ip route add {address_text(prefix)}/{prefix_len} table {table} {via or 'type unreachable'}"
    return Message(operation, RTM_NEWROUTE, NLM_F_CREATE, payload)


def create_rule(source: int, table: int) -> Message:
    """Return the request of ``ip rule add from SOURCE table TABLE``; it comes before the rules of the kernel's own tables."""
    payload = struct.pack("=BBBBBBBBI", socket.AF_INET, 0, 32, 0, table, 0, 0, _FR_ACT_TO_TABLE, 0)
    payload += attribute(_FRA_SRC, struct.pack("!I", source))
    operation = f"ip rule add from {address_text(source)} table {table}"
    return Message(operation, RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, payload)


def disable_offloads(ifname: str) -> None:
    """Turn off segmentation and checksum offload in the calling thread's namespace (``ethtool -K``)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        for command, feature in _OFFLOADS:
            value = ctypes.create_string_buffer(struct.pack("=II", command, 0))
            request = struct.pack("16sP16x", ifname.encode(), ctypes.addressof(value))
            try:
                fcntl.ioctl(control, _SIOCETHTOOL, request)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise KernelError(f"ethtool -K {ifname} {feature} off", error.errno or 0) from error
