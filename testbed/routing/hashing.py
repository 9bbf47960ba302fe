"""The switch's hash, in integers and in numpy: twins of the eBPF program's, equal to the bit.

Source:
    docs/architecture.md ("The hash"). The mixing function is the 32-bit finaliser of MurmurHash3 (Austin
    Appleby, public domain, MurmurHash3.cpp, ``fmix32``). CRC-32: IEEE 802.3, 3.2.9, as zlib computes it, without the final
    complement; CRC-16: ITU-T V.41 (polynomial 0x1021). Switches offer both by name: ``SAI_HASH_ALGORITHM_CRC_32LO``,
    ``SAI_HASH_ALGORITHM_CRC_CCITT`` (Open Compute Project, SAI, inc/saiswitch.h).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from testbed.routing.tables import Group, HashField, HashFunction, OverrideKey

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


def hash_flow(
    flow: FlowKey, *, hash_fields: HashField, seed: int, function: HashFunction = HashFunction.MURMUR3
) -> int:
    """Return the 32-bit hash of a flow.

    Args:
        flow: The header fields.
        hash_fields: Which of them to read; the others count as 0.
        seed: 0 to 2**32 - 1.
        function: What to hash them with.
    """
    src_address, dst_address, src_port, dst_port, protocol, dst_qp = (
        value if field in hash_fields else 0 for value, field in zip(flow, _FIELDS, strict=True)
    )
    if function is not HashFunction.MURMUR3:
        words = (src_address, dst_address, src_port << 16 | dst_port, protocol << 24 | dst_qp & 0xFF_FFFF)
        header = b"".join(word.to_bytes(4) for word in words)
        return _crc32(header, seed) if function is HashFunction.CRC32 else _crc16(header, seed)
    h = mix((seed + _SEED_OFFSET) & _WORD)
    for word in (src_address, dst_address, src_port << 16 | dst_port, protocol, dst_qp):
        h = mix(h ^ word)
    return h


def hash_flows(
    flows: npt.NDArray[np.uint32],
    *,
    hash_fields: HashField,
    seed: int,
    function: HashFunction = HashFunction.MURMUR3,
) -> npt.NDArray[np.uint32]:
    """Return the 32-bit hashes of many flows; the vectorised twin of ``hash_flow``.

    Args:
        flows: Shape ``(n, 6)``, uint32: a flow per row, the fields of ``FlowKey`` in its order.
        hash_fields: Which fields to read; the others count as 0.
        seed: 0 to 2**32 - 1.
        function: What to hash them with.

    Returns:
        Shape ``(n,)``, uint32.
    """
    columns = [column if field in hash_fields else None for column, field in zip(flows.T, _FIELDS, strict=True)]
    return hash_columns(columns, np.full(len(flows), seed, np.uint32), function)


def hash_columns(
    columns: Sequence[npt.NDArray[np.uint32] | None],
    seeds: npt.NDArray[np.uint32],
    function: HashFunction = HashFunction.MURMUR3,
) -> npt.NDArray[np.uint32]:
    """Return the 32-bit hashes of many flows, each with a seed of its own.

    Args:
        columns: The fields of ``FlowKey`` in its order, each shape ``(n,)``, uint32; None for one that is not read.
        seeds: Seed of each, shape ``(n,)``, uint32; or several for each, shape ``(seeds, n)``.
        function: What to hash them with.

    Returns:
        Shape of the seeds, uint32.
    """
    src_address, dst_address, src_port, dst_port, protocol, dst_qp = (
        None if column is None else column.astype(np.uint32, copy=False) for column in columns
    )
    ports = _join(None if src_port is None else src_port << np.uint32(16), dst_port)
    if function is not HashFunction.MURMUR3:
        crc_bytes = _crc32_bytes if function is HashFunction.CRC32 else _crc16_bytes
        rest = _join(None if protocol is None else protocol << np.uint32(24), dst_qp, keep=0xFF_FFFF)
        return crc_bytes((src_address, dst_address, ports, rest), seeds)
    h = _mix_array(seeds + np.uint32(_SEED_OFFSET))
    for word in (src_address, dst_address, ports, protocol, dst_qp):
        if word is not None:
            h ^= word
        h = _mix_array(h)
    return h


def tier_seed(hash_seed: int, tier: int) -> int:
    """Return the seed of a tier's hash, another for every tier: 0 for leaves, 1 for the switches above them.

    With one seed for all, the switches that a tier's hash has chosen see only flows of like hashes and send them all to the
    same members: polarisation. Under a CRC another seed is no cure: it XORs the same constant to all hashes, which only renames
    the members where their number is a power of two.

    Source:
        Cisco and Arista call the per-switch seed that cures it "universal ID" and "hash seed"; the derivation is ours.
        Zhang et al., "Hashing Linearity Enables Relative Path Control in Data Centers", USENIX ATC 2021 (they hash linearly).
    """
    return hash_seed if tier == 0 else mix((hash_seed ^ mix(tier)) & _WORD)


def override_key(node: int, flow: FlowKey) -> OverrideKey:
    """Return what an exact-match entry of a switch must name to catch a flow."""
    entropy = flow.dst_qp or flow.src_port
    return OverrideKey(node, flow.src_address, flow.dst_address, entropy)


def select_member(group: Group, flow: FlowKey) -> int:
    """Return the egress port id that a flow takes by its hash; under flowlet switching, until it first pauses."""
    h = hash_flow(flow, hash_fields=group.hash_fields, seed=group.seed, function=group.hash_function)
    return group.members[h * len(group.members) >> 32]


def select_members(group: Group, flows: npt.NDArray[np.uint32]) -> npt.NDArray[np.int32]:
    """Return the egress port ids that many flows take; the vectorised twin of ``select_member``.

    Args:
        group: The group that all of them meet.
        flows: Shape ``(n, 6)``, uint32, as for ``hash_flows``.

    Returns:
        Shape ``(n,)``, int32, port ids.
    """
    h = hash_flows(flows, hash_fields=group.hash_fields, seed=group.seed, function=group.hash_function)
    index = h.astype(np.uint64) * np.uint64(len(group.members)) >> np.uint64(32)
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


def _join(
    high: npt.NDArray[np.uint32] | None, low: npt.NDArray[np.uint32] | None, keep: int = _WORD
) -> npt.NDArray[np.uint32] | None:
    """Return words of two parts, of which either may be missing; ``keep`` masks the lower."""
    if low is None:
        return high
    low = low & np.uint32(keep)
    return low if high is None else high | low


def _crc32(header: bytes, seed: int) -> int:
    """Return the CRC-32 register after some bytes, from a seed on, without the complements of IEEE 802.3."""
    return zlib.crc32(header, seed ^ _WORD) ^ _WORD


def _crc16(header: bytes, seed: int) -> int:
    """Return the CRC-16 register after some bytes, from a folded seed on, in the upper half of a word."""
    crc = (seed ^ seed >> 16) & 0xFFFF
    for byte in header:
        crc = (crc << 8 & 0xFFFF) ^ _CRC16_TABLE[crc >> 8 ^ byte]
    return crc << 16


def _crc16_entry(byte: int) -> int:
    crc = byte << 8
    for _ in range(8):
        crc = crc << 1 ^ (0x1021 if crc & 0x8000 else 0)
    return crc & 0xFFFF


_CRC16_TABLE = [_crc16_entry(byte) for byte in range(256)]
_CRC16_ARRAY = np.array(_CRC16_TABLE, np.uint32)
_CRC32_ARRAY = np.array([_crc32(bytes([byte]), 0) for byte in range(256)], np.uint32)

_Words = Sequence[npt.NDArray[np.uint32] | None]


def _bytes_of(words: _Words) -> Iterator[npt.NDArray[np.uint32] | np.uint32]:
    for word in words:
        for shift in (24, 16, 8, 0):
            yield np.uint32(0) if word is None else word >> np.uint32(shift) & np.uint32(0xFF)


def _crc32_bytes(words: _Words, seeds: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Return what `_crc32` makes of the bytes of each row of words, from its seed on."""
    crc = seeds
    for byte in _bytes_of(words):
        crc = _CRC32_ARRAY[(crc ^ byte) & np.uint32(0xFF)] ^ crc >> np.uint32(8)
    return crc


def _crc16_bytes(words: _Words, seeds: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Return what `_crc16` makes of the bytes of each row of words, from its seed on."""
    crc = (seeds ^ seeds >> np.uint32(16)) & np.uint32(0xFFFF)
    for byte in _bytes_of(words):
        crc = (crc << np.uint32(8) & np.uint32(0xFFFF)) ^ _CRC16_ARRAY[crc >> np.uint32(8) ^ byte]
    return crc << np.uint32(16)
