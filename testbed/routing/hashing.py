"""The switch's hash, in integers and in numpy: twins of the eBPF program's, equal to the bit.

Source:
    docs/architecture.md ("The hash"). The mixing function is the 32-bit finaliser of MurmurHash3 (Austin
    Appleby, public domain, MurmurHash3.cpp, ``fmix32``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from testbed.routing.tables import Group, HashField, OverrideKey

_WORD = 0xFFFF_FFFF
_SEED_OFFSET = 0x9E37_79B9  # 2**32 / golden ratio: seeds 0 and 1 start far apart


class FlowKey(NamedTuple):
    """The header fields that a switch can see.

    Attributes:
        src_address: IPv4 source address, as an integer.
        dst_address: IPv4 destination address, as an integer.
        src_port: UDP or TCP source port; 0 for other protocols and fragments.
        dst_port: UDP or TCP destination port; 0 likewise.
        protocol: IP protocol number.
        dst_qp: Destination queue pair, 24 bits; 0 unless the packet is RoCEv2.
    """

    src_address: int
    dst_address: int
    src_port: int
    dst_port: int
    protocol: int
    dst_qp: int


def hash_flow(flow: FlowKey, *, hash_fields: HashField, seed: int) -> int:
    """Return the 32-bit hash of a flow.

    Args:
        flow: The header fields.
        hash_fields: Which of them to read; the others count as 0.
        seed: 0 to 2**32 - 1.
    """
    src_address, dst_address, src_port, dst_port, protocol, dst_qp = (
        value if field in hash_fields else 0 for value, field in zip(flow, _FIELDS, strict=True)
    )
    h = mix((seed + _SEED_OFFSET) & _WORD)
    for word in (src_address, dst_address, src_port << 16 | dst_port, protocol, dst_qp):
        h = mix(h ^ word)
    return h


def hash_flows(flows: npt.NDArray[np.uint32], *, hash_fields: HashField, seed: int) -> npt.NDArray[np.uint32]:
    """Return the 32-bit hashes of many flows; the vectorised twin of ``hash_flow``.

    Args:
        flows: Shape ``(n, 6)``, uint32: a flow per row, the fields of ``FlowKey`` in its order.
        hash_fields: Which fields to read; the others count as 0.
        seed: 0 to 2**32 - 1.

    Returns:
        Shape ``(n,)``, uint32.
    """
    columns = [column if field in hash_fields else None for column, field in zip(flows.T, _FIELDS, strict=True)]
    return hash_columns(columns, np.full(len(flows), seed, np.uint32))


def hash_columns(
    columns: Sequence[npt.NDArray[np.uint32] | None], seeds: npt.NDArray[np.uint32]
) -> npt.NDArray[np.uint32]:
    """Return the 32-bit hashes of many flows, each with a seed of its own.

    Args:
        columns: The fields of ``FlowKey`` in its order, each shape ``(n,)``, uint32; None for one that is not read.
        seeds: Seed of each, shape ``(n,)``, uint32; or several for each, shape ``(seeds, n)``.

    Returns:
        Shape of the seeds, uint32.
    """
    src_address, dst_address, src_port, dst_port, protocol, dst_qp = (
        None if column is None else column.astype(np.uint32, copy=False) for column in columns
    )
    ports = dst_port
    if src_port is not None:
        ports = src_port << np.uint32(16)
        if dst_port is not None:
            ports = ports | dst_port
    h = _mix_array(seeds + np.uint32(_SEED_OFFSET))
    for word in (src_address, dst_address, ports, protocol, dst_qp):
        if word is not None:
            h ^= word
        h = _mix_array(h)
    return h


def tier_seed(hash_seed: int, tier: int) -> int:
    """Return the seed of a tier's hash, another for every tier: 0 for leaves, 1 for the switches above them.

    With one seed for all, the switches that a tier's hash has chosen see only flows of like hashes and send them all to the
    same members: polarisation.

    Source:
        Cisco and Arista call the per-switch seed that cures it "universal ID" and "hash seed"; the derivation is ours.
    """
    return hash_seed if tier == 0 else mix((hash_seed ^ mix(tier)) & _WORD)


def override_key(node: int, flow: FlowKey) -> OverrideKey:
    """Return what an exact-match entry of a switch must name to catch a flow."""
    entropy = flow.dst_qp or flow.src_port
    return OverrideKey(node, flow.src_address, flow.dst_address, entropy)


def select_member(group: Group, flow: FlowKey) -> int:
    """Return the egress port id that a flow takes by its hash; under flowlet switching, until it first pauses."""
    h = hash_flow(flow, hash_fields=group.hash_fields, seed=group.seed)
    return group.members[h * len(group.members) >> 32]


def select_members(group: Group, flows: npt.NDArray[np.uint32]) -> npt.NDArray[np.int32]:
    """Return the egress port ids that many flows take; the vectorised twin of ``select_member``.

    Args:
        group: The group that all of them meet.
        flows: Shape ``(n, 6)``, uint32, as for ``hash_flows``.

    Returns:
        Shape ``(n,)``, int32, port ids.
    """
    h = hash_flows(flows, hash_fields=group.hash_fields, seed=group.seed).astype(np.uint64)
    index = h * np.uint64(len(group.members)) >> np.uint64(32)
    return np.array(group.members, dtype=np.int32)[index.astype(np.intp)]


_FIELDS = (
    HashField.SRC_ADDRESS,
    HashField.DST_ADDRESS,
    HashField.SRC_PORT,
    HashField.DST_PORT,
    HashField.PROTOCOL,
    HashField.DST_QP,
)
"""The bit of each field of ``FlowKey``, in its order."""


def mix(h: int) -> int:
    """Return the 32-bit finaliser of MurmurHash3."""
    h ^= h >> 16
    h = h * 0x85EB_CA6B & _WORD
    h ^= h >> 13
    h = h * 0xC2B2_AE35 & _WORD
    return h ^ h >> 16


def _mix_array(h: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Return what `mix` makes of each number; the array is overwritten."""
    shifted = h >> np.uint32(16)
    h ^= shifted
    h *= np.uint32(0x85EB_CA6B)
    np.right_shift(h, np.uint32(13), out=shifted)
    h ^= shifted
    h *= np.uint32(0xC2B2_AE35)
    np.right_shift(h, np.uint32(16), out=shifted)
    h ^= shifted
    return h
