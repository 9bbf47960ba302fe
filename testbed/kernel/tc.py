"""Requests about qdiscs: mq, htb, tbf, pfifo, clsact."""

from __future__ import annotations

import errno
import struct

from testbed.kernel.netlink import (
    NLA_F_NESTED,
    NLM_F_CREATE,
    NLM_F_REPLACE,
    RTM_GETQDISC,
    RTM_GETTCLASS,
    RTM_NEWQDISC,
    RTM_NEWTCLASS,
    RTM_NEWTFILTER,
    Message,
    RouteSocket,
    attribute,
    attribute_text,
    attribute_u32,
    split_attributes,
)

TC_H_ROOT = 0xFFFFFFFF
TC_H_CLSACT = 0xFFFFFFF1
TC_H_INGRESS_HOOK = 0xFFFFFFF2
TC_H_EGRESS_HOOK = 0xFFFFFFF3
_TCA_KIND, _TCA_OPTIONS, _TCA_XSTATS = 1, 2, 4
_TCMSG_BYTES = 20
_TCA_TBF_PARMS, _TCA_TBF_RATE64, _TCA_TBF_BURST = 1, 4, 6
_LINKLAYER_ETHERNET = 1
_TCA_BPF_FD, _TCA_BPF_NAME, _TCA_BPF_FLAGS, _TCA_BPF_FLAG_ACT_DIRECT = 6, 7, 8, 1
_ETH_P_ALL = 0x0003
# The qdisc never drops: admission does, before the frame is counted (docs/architecture.md).
_TBF_LIMIT_BYTES = 0x7FFFFFFF

ROOT_HANDLE = 0x1_0000
DATA_HANDLE = 0x10_0000
CONTROL_HANDLE = 0x20_0000
# Of the qdiscs of a priority's queue; the priority is added to the major number.
SHAPER_HANDLE, RED_HANDLE, PLUG_HANDLE, NETEM_HANDLE = 0x30_0000, 0x40_0000, 0x50_0000, 0x60_0000
# A FIFO that never drops.
MOST_PACKETS = 0x7FFFFFFF
_TCA_HTB_PARMS, _TCA_HTB_INIT, _TCA_HTB_RATE64, _TCA_HTB_CEIL64 = 1, 2, 6, 7
# Qdiscs that refuse options without the flag that says what they are.
_STRICT_KINDS = frozenset({"ets"})
_HTB_VERSION, _HTB_RATE2QUANTUM = 3, 10
# A psched tick (PSCHED_SHIFT 6).
_TICK_NS = 64


def _tcmsg(index: int, handle: int, parent: int, info: int = 0) -> bytes:
    return struct.pack("=BxHiIII", 0, 0, index, handle, parent, info)


def handle_text(handle: int) -> str:
    """Return ``1:2`` for ``0x10002``."""
    minor = handle & 0xFFFF
    return f"{handle >> 16:x}:{minor:x}" if minor else f"{handle >> 16:x}:"


def read_qdiscs(route: RouteSocket) -> list[tuple[int, int, str, bytes]]:
    """Return interface index, handle, kind and statistics of its own of every qdisc in the socket's namespace."""
    found = []
    for body in route.dump("tc -s qdisc show", RTM_GETQDISC, _tcmsg(0, 0, 0)):
        index, handle = struct.unpack_from("=iI", body, 4)
        values = split_attributes(body[_TCMSG_BYTES:])
        kind = values.get(_TCA_KIND, b"").rstrip(b"\0").decode()
        found.append((index, handle, kind, values.get(_TCA_XSTATS, b"")))
    return found


def read_classes(route: RouteSocket, index: int, ifname: str) -> list[int]:
    """Return the numbers of all classes of an interface in the socket's namespace."""
    bodies = route.dump(f"tc class show dev {ifname}", RTM_GETTCLASS, _tcmsg(index, 0, 0))
    return [struct.unpack_from("=I", body, 8)[0] for body in bodies]


def qdisc_payload(index: int, handle: int, parent: int, kind: str, options: bytes) -> bytes:
    """Return the body of a request about a qdisc or a class."""
    nested = NLA_F_NESTED if kind in _STRICT_KINDS else 0
    return _tcmsg(index, handle, parent) + attribute_text(_TCA_KIND, kind) + attribute(_TCA_OPTIONS | nested, options)


def class_of(place: int) -> int:
    """Return the class of the data priority in that place of the order of service, as frames name it in ``skb->priority``."""
    return DATA_HANDLE + 1 + place


def create_htb(index: int, ifname: str, parent: int, handle: int, default_class: int) -> Message:
    """Return the request of an HTB; what names no class of it goes to ``default_class``."""
    options = attribute(
        _TCA_HTB_INIT, struct.pack("=5I", _HTB_VERSION, _HTB_RATE2QUANTUM, default_class & 0xFFFF, 0, 0)
    )
    operation = (
        f"tc qdisc replace dev {ifname} parent {handle_text(parent)} handle {handle_text(handle)} htb "
        f"default {default_class & 0xFFFF:x}"
    )
    return Message(
        operation, RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, qdisc_payload(index, handle, parent, "htb", options)
    )


def create_htb_class(
    index: int,
    ifname: str,
    parent: int,
    classid: int,
    *,
    rate_bytes_per_s: int,
    ceil_bytes_per_s: int,
    burst_bytes: int,
    quantum_bytes: int,
    overhead_bytes: int,
    rank: int = 0,
) -> Message:
    """Return the request of an HTB class.

    Args:
        index: Interface.
        ifname: Its name, for messages.
        parent: Class, or qdisc for the outermost.
        classid: Its own number.
        rate_bytes_per_s: What it always gets.
        ceil_bytes_per_s: What it may borrow up to.
        burst_bytes: Its bucket, at either rate.
        quantum_bytes: What it sends in its turn while several borrow.
        overhead_bytes: Charged per frame beside its length.
        rank: Who borrows first, 0 before 1, up to 7: ``tc`` calls it prio.

    Source:
        Linux net/sched/sch_htb.c ``htb_change_class()``: buckets in psched ticks; with the link layer set no rate table.
    """

    def spec(rate: int) -> bytes:
        return struct.pack("=BBHhHI", 0, _LINKLAYER_ETHERNET, overhead_bytes, 0, 0, min(rate, 0xFFFFFFFF))

    def ticks(rate: int) -> int:
        return min(0xFFFFFFFF, burst_bytes * 1_000_000_000 // rate // _TICK_NS)

    parms = spec(rate_bytes_per_s) + spec(ceil_bytes_per_s)
    parms += struct.pack("=5I", ticks(rate_bytes_per_s), ticks(ceil_bytes_per_s), quantum_bytes, 0, rank)
    options = attribute(_TCA_HTB_PARMS, parms)
    options += attribute(_TCA_HTB_RATE64, struct.pack("=Q", rate_bytes_per_s))
    options += attribute(_TCA_HTB_CEIL64, struct.pack("=Q", ceil_bytes_per_s))
    operation = (
        f"tc class replace dev {ifname} parent {handle_text(parent)} classid {handle_text(classid)} htb "
        f"rate {rate_bytes_per_s * 8}bit ceil {ceil_bytes_per_s * 8}bit burst {burst_bytes} quantum {quantum_bytes} prio {rank}"
    )
    return Message(
        operation, RTM_NEWTCLASS, NLM_F_CREATE | NLM_F_REPLACE, qdisc_payload(index, classid, parent, "htb", options)
    )


def create_mq(index: int, ifname: str) -> Message:
    """Return the request of ``tc qdisc add dev IFNAME root handle 1: mq``."""
    payload = _tcmsg(index, ROOT_HANDLE, TC_H_ROOT) + attribute_text(_TCA_KIND, "mq")
    return Message(
        f"tc qdisc replace dev {ifname} root handle 1: mq", RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, payload
    )


def create_pfifo(index: int, ifname: str, parent: int, handle: int, limit_packets: int) -> Message:
    """Return the request of a plain FIFO under ``parent``."""
    payload = _tcmsg(index, handle, parent) + attribute_text(_TCA_KIND, "pfifo")
    payload += attribute(_TCA_OPTIONS, struct.pack("=I", limit_packets))
    operation = f"tc qdisc replace dev {ifname} parent {handle_text(parent)} pfifo limit {limit_packets}"
    return Message(operation, RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, payload)


def create_tbf(
    index: int,
    ifname: str,
    parent: int,
    handle: int,
    *,
    rate_bytes_per_s: int,
    burst_bytes: int,
    overhead_bytes: int,
) -> Message:
    """Return the request that creates or changes a token bucket filter.

    Args:
        index: Interface.
        ifname: Its name, for messages.
        parent: Class it hangs under.
        handle: Its own handle.
        rate_bytes_per_s: Wall rate on the wire.
        burst_bytes: Bucket size.
        overhead_bytes: Charged per frame beside its length (FCS, preamble, gap).

    Source:
        Linux net/sched/sch_tbf.c ``tbf_change()``: RATE64 and BURST replace the 32-bit fields; with the link layer
        set no rate table is needed.
    """
    rate32 = min(rate_bytes_per_s, 0xFFFFFFFF)
    spec = struct.pack("=BBHhHI", 0, _LINKLAYER_ETHERNET, overhead_bytes, 0, 0, rate32)
    none = struct.pack("=BBHhHI", 0, 0, 0, 0, 0, 0)
    parms = spec + none + struct.pack("=III", _TBF_LIMIT_BYTES, 0, 0)
    options = attribute(_TCA_TBF_PARMS, parms)
    options += attribute(_TCA_TBF_RATE64, struct.pack("=Q", rate_bytes_per_s))
    options += attribute_u32(_TCA_TBF_BURST, burst_bytes)
    payload = _tcmsg(index, handle, parent) + attribute_text(_TCA_KIND, "tbf") + attribute(_TCA_OPTIONS, options)
    operation = (
        f"tc qdisc replace dev {ifname} parent {handle_text(parent)} handle {handle_text(handle)} tbf "
        f"rate {rate_bytes_per_s * 8}bit burst {burst_bytes} overhead {overhead_bytes}"
    )
    return Message(operation, RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, payload)


def create_clsact(index: int, ifname: str) -> Message:
    """Return the request of ``tc qdisc add dev IFNAME clsact``, for kernels without TCX."""
    payload = _tcmsg(index, TC_H_CLSACT & 0xFFFF0000, TC_H_CLSACT) + attribute_text(_TCA_KIND, "clsact")
    return Message(f"tc qdisc add dev {ifname} clsact", RTM_NEWQDISC, NLM_F_CREATE, payload, frozenset({errno.EEXIST}))


def attach_filter(index: int, ifname: str, hook: int, program_fd: int, name: str) -> Message:
    """Return the request of ``tc filter add dev IFNAME ingress|egress bpf direct-action``."""
    info = (1 << 16) | ((_ETH_P_ALL & 0xFF) << 8 | _ETH_P_ALL >> 8)
    options = attribute_u32(_TCA_BPF_FD, program_fd) + attribute_text(_TCA_BPF_NAME, name)
    options += attribute_u32(_TCA_BPF_FLAGS, _TCA_BPF_FLAG_ACT_DIRECT)
    payload = _tcmsg(index, 1, hook, info) + attribute_text(_TCA_KIND, "bpf") + attribute(_TCA_OPTIONS, options)
    direction = "ingress" if hook == TC_H_INGRESS_HOOK else "egress"
    return Message(f"tc filter add dev {ifname} {direction} bpf da {name}", RTM_NEWTFILTER, NLM_F_CREATE, payload)
