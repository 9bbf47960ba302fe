"""The numpy twins of ``bpf/fabric.h``; a test compares them with the compiled object's BTF."""

from __future__ import annotations

import mmap
import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from testbed.kernel import tc
from testbed.kernel.bpf import delete_map_entry, map_array, read_map, write_map

PRIORITIES = 8
FABRIC_PROGRAMS = ("switch_ingress", "host_egress", "host_ingress")
PROBE_PROGRAM = "probe_ingress"
ATTACHMENT_PROGRAM = "attachment_ingress"

PORT_HOST, PORT_PEER_HOST, PORT_DOWN, PORT_ATTACHED = 1, 2, 256, 512
# From a NIC's interface index to that of its attachment (TB_ATTACHMENT).
ATTACHMENT = 0x10000
PORT_KERNEL_QPS = 1024

PORT = np.dtype(
    [("peer", "u2"), ("node", "u2"), ("peer_node", "u2"), ("flags", "u2"), ("peer_mac", "u1", 6), ("reserved", "u1", 2)]
)
QUEUE = np.dtype(
    [
        ("enq_bytes", "u8"),
        ("enq_packets", "u8"),
        ("drop_packets", "u8"),
        ("peak_bytes", "u8"),
        ("deq_bytes", "u8"),
        ("deq_packets", "u8"),
        ("marked_packets", "u8"),
        ("lost_packets", "u8"),
        ("kmin_bytes", "u4"),
        ("kmax_bytes", "u4"),
        ("mark_slope", "u8"),
        ("limit_bytes", "u8"),
        ("reserved", "u8"),
        ("pause_frames", "u8"),
        ("pause_received_ns", "u8"),
        ("pause_quanta", "u2"),
        ("discard", "u2"),
        ("loss_threshold", "u4"),
        ("xoff_frames", "u8"),
    ]
)
INGRESS = np.dtype(
    [
        ("xoff_bytes", "u8"),
        ("alpha", "u8"),
        ("hysteresis_bytes", "u8"),
        ("headroom_bytes", "u8"),
        ("lossless", "u4"),
        ("xoff", "u4"),
        ("used_bytes", "i8"),
        ("changed_ns", "u8"),
        ("ceiling_bytes", "u8"),
        ("peak_bytes", "u8"),
        ("headroom_drops_packets", "u8"),
        ("xoffs", "u8"),
        ("headroom_peak_bytes", "u8"),
        ("changes", "u8"),
        ("reserved", "u8", 3),
    ]
)
NODE = np.dtype(
    [
        ("used_bytes", "i8"),
        ("limit_bytes", "u8"),
        ("no_route_packets", "u8"),
        ("shared_bytes", "u8"),
        ("reserved", "u8", 4),
    ]
)
GROUP = np.dtype(
    [
        ("first_member", "u4"),
        ("members", "u4"),
        ("hash_fields", "u4"),
        ("seed", "u4"),
        ("selector", "u4"),
        ("overrides", "u2"),
        ("hash_function", "u2"),
        ("gap_ns", "u8"),
    ]
)
GROUP_STATE = np.dtype([("turn", "u8"), ("zero", "u8")])
FLOWLET = np.dtype([("last_ns", "u8"), ("number", "u8")])
# Rows of the flowlet table (TB_FLOWLETS), members that "least depth" can look at (TB_MAX_CHOICES).
FLOWLETS = 65536
MAX_CHOICES = 64
OVERRIDES = "tb_overrides"
_OVERRIDE_KEY = struct.Struct("=4I")
_OVERRIDE_VALUE = struct.Struct("=I")
KERNEL_QPS = "tb_kernel_qps"
_KERNEL_QP_KEY = struct.Struct("=3I")
_KERNEL_QP_VALUE = struct.Struct("=I")
QP = np.dtype(
    [
        ("peer_qpn", "u4"),
        ("initial_rx_psn", "u4"),
        ("initial_tx_psn", "u4"),
        ("udp_source_port", "u2"),
        ("active", "u1"),
        ("selective", "u1"),
        ("rx_packets", "u8"),
        ("rx_payload_bytes", "u8"),
        ("rx_messages", "u8"),
        ("last_message_ns", "u8"),
        ("out_of_order_packets", "u8"),
        ("duplicate_packets", "u8"),
        ("sent_acks_packets", "u8"),
        ("sent_naks_packets", "u8"),
        ("nak_armed_at", "u8"),
        ("acked_packets", "u8"),
        ("naks_packets", "u8"),
        ("nak_position", "u8"),
        ("cnps_packets", "u8"),
        ("port", "u8"),
        ("cnp_interval_ns", "u8"),
        ("cnp_sent_ns", "u8"),
        ("sent_cnps_packets", "u8"),
        ("ce_packets", "u8"),
        ("grants", "u8"),
        ("cts_packets", "u8"),
        ("rx_highest", "u8"),
        ("sacked_until", "u8"),
    ]
)
# Packets of a QP that may be under way beyond the acknowledged ones (TB_WINDOW), where packets are taken out of order.
WINDOW_PACKETS = 4096
WINDOW = np.dtype([("received", "u8", WINDOW_PACKETS // 64), ("ends", "u8", WINDOW_PACKETS // 64)])
# Fractions in the maps are fixed-point.
ALPHA_ONE = 1 << 16
PROBABILITY_ONE = 1 << 32
SLOPE_ONE = 1 << 48
MAPS: dict[str, Any] = {
    "tb_ports": PORT,
    "tb_queues": QUEUE,
    "tb_ingress": INGRESS,
    "tb_nodes": NODE,
    "tb_fib": np.dtype("i4"),
    "tb_groups": GROUP,
    "tb_group_states": GROUP_STATE,
    "tb_flowlets": FLOWLET,
    "tb_members": np.dtype("u4"),
    "tb_qps": QP,
    "tb_windows": WINDOW,
}


def pack_config(
    *,
    ifindex_base: int,
    ports: int,
    slots: int,
    host_network: int,
    qpn_base: int,
    qps: int,
    control_priorities: int,
    data_classes: int,
) -> bytes:
    """Return ``struct tb_config``."""
    return struct.pack("=8I", ifindex_base, ports, slots, host_network, qpn_base, qps, control_priorities, data_classes)


def pack_data_classes(served: Sequence[int], rest: int) -> int:
    """Return the class of every priority, four bits each, as ``struct tb_config`` has them.

    Args:
        served: The data priorities, in the order of their classes.
        rest: The one whose class all other priorities have.
    """
    minors = {priority: tc.class_of(place) - tc.DATA_HANDLE for place, priority in enumerate(served)}
    return sum(minors.get(priority, minors[rest]) << 4 * priority for priority in range(PRIORITIES))


def pack_crc_table() -> bytes:
    """Return the 256 entries of the reflected CRC-32, taken from zlib one byte at a time."""
    # With init and final XOR undone, the table entry of byte b is the CRC register after b from a zero register.
    entries = [zlib.crc32(bytes([byte]), 0xFFFFFFFF) ^ 0xFFFFFFFF for byte in range(256)]
    return struct.pack("=256I", *entries)


def read_overrides(descriptor: int) -> dict[tuple[int, int, int, int], int]:
    """Return the exact-match entries of the map of that descriptor: node, addresses and flow, and the egress port id."""
    return {
        _OVERRIDE_KEY.unpack(key): _OVERRIDE_VALUE.unpack(value)[0]
        for key, value in read_map(descriptor, _OVERRIDE_KEY.size, _OVERRIDE_VALUE.size)
    }


def delete_overrides(descriptor: int, keys: Iterable[tuple[int, int, int, int]]) -> None:
    """Delete exact-match entries from the map of that descriptor; those that are not there do not matter."""
    for key in keys:
        delete_map_entry(descriptor, _OVERRIDE_KEY.pack(*key))


def write_overrides(descriptor: int, entries: Iterable[tuple[tuple[int, int, int, int], int]]) -> None:
    """Write exact-match entries into the map of that descriptor.

    Args:
        descriptor: Of the map ``tb_overrides``.
        entries: Node, source address, destination address and flow of each, and its egress port id.
    """
    for key, port in entries:
        write_map(descriptor, _OVERRIDE_KEY.pack(*key), _OVERRIDE_VALUE.pack(port))


def clear_kernel_qps(descriptor: int) -> None:
    """Forget all queue pairs of the kernel's in the map of that descriptor."""
    for key, _ in read_map(descriptor, _KERNEL_QP_KEY.size, _KERNEL_QP_VALUE.size):
        delete_map_entry(descriptor, key)


def write_kernel_qp(descriptor: int, *, port: int, dst_address: int, qpn: int, row: int) -> None:
    """Give a queue pair of the kernel's a row of the QP table, for what crosses a NIC.

    Args:
        descriptor: Of the map ``tb_kernel_qps``.
        port: Port id of the NIC.
        dst_address: Destination of the frames: the NIC's own for those that arrive.
        qpn: Destination QP of the frames.
        row: The row.
    """
    write_map(descriptor, _KERNEL_QP_KEY.pack(port, dst_address, qpn), _KERNEL_QP_VALUE.pack(row))


class MappedArrays:
    """The maps of a running fabric as numpy arrays that *are* the kernel's memory.

    Args:
        descriptors: Map name to file descriptor.
        entries: Map name to number of entries.
    """

    def __init__(self, descriptors: dict[str, int], entries: dict[str, int]) -> None:
        self._mappings: list[mmap.mmap] = []
        arrays: dict[str, npt.NDArray[Any]] = {}
        for name, dtype in MAPS.items():
            stride = (dtype.itemsize + 7) // 8 * 8  # the kernel rounds values up to eight bytes
            count = max(1, entries[name])
            mapping = map_array(descriptors[name], stride * count)
            self._mappings.append(mapping)
            raw = np.frombuffer(mapping, dtype=np.uint8, count=stride * count).reshape(count, stride)
            arrays[name] = raw[:, : dtype.itemsize].view(dtype)[:, 0]
        self.ports = arrays["tb_ports"]
        self.queues = arrays["tb_queues"].reshape(-1, PRIORITIES)
        self.ingress = arrays["tb_ingress"].reshape(-1, PRIORITIES)
        self.nodes = arrays["tb_nodes"]
        self.fib = arrays["tb_fib"]
        self.groups = arrays["tb_groups"]
        self.group_states = arrays["tb_group_states"]
        self.flowlets = arrays["tb_flowlets"]
        self.members = arrays["tb_members"]
        self.qps = arrays["tb_qps"]
        self.windows = arrays["tb_windows"]


def forget_kernel_qps(arrays: MappedArrays) -> None:
    """Let frames of the kernel's queue pairs pass unobserved again."""
    arrays.ports["flags"] &= ~np.uint16(PORT_KERNEL_QPS)
