from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.contrib.roce import BTH
from scapy.layers.l2 import Ether

from testbed.roce import wire
from testbed.roce.bth import FramePath, WriteTarget, build_ack, build_write
from testbed.roce.icrc import (
    VARIANT_COLUMNS,
    IcrcPatcher,
    carried_icrc,
    compute_icrc,
    delta_table,
    with_icrc,
)
from testbed.roce.wire import Opcode

PATH = FramePath("02:00:00:01:00:00", "02:00:00:02:ff:ff", 0x0A000001, 0x0A000009, 0xC123)
TARGET = WriteTarget(virtual_address=1 << 40, rkey=7, dma_bytes=4096)

CAPTURED_CNP = bytes.fromhex(
    "e41d2dab2bc27cfe90643b320800"
    "45c2003c718c4000401191610a0011010a001201"
    "000012b700280000"
    "8100ffff4000011800000000" + "00" * 16 + "82fd002a"
)
"""From a ConnectX-4 Lx; scapy, test/contrib/roce.uts."""


def template(payload: bytes = bytes(range(256)) * 16, opcode: Opcode = Opcode.WRITE_FIRST) -> bytes:
    target = TARGET if opcode in wire.OPCODES_WITH_RETH else None
    return build_write(PATH, opcode=opcode, dest_qp=5, psn=99, payload=payload, target=target)


def test_captured_cnp_has_the_icrc_that_is_computed() -> None:
    assert compute_icrc(CAPTURED_CNP).to_bytes(4, "little").hex() == "82fd002a"
    assert carried_icrc(CAPTURED_CNP) == compute_icrc(CAPTURED_CNP)
    assert with_icrc(CAPTURED_CNP[:-4] + bytes(4)) == CAPTURED_CNP


@pytest.mark.parametrize("nbytes", [0, 1, 2, 3, 4, 1000, 4096])
def test_scapy_computes_the_same_icrc(nbytes: int) -> None:
    frame = template(bytes(nbytes), Opcode.WRITE_ONLY)
    again = Ether(frame)
    again[BTH].icrc = None
    assert bytes(again) == frame
    assert carried_icrc(frame) == compute_icrc(frame)


def test_a_switch_may_change_the_variant_fields_only() -> None:
    frame = template(bytes(64))
    for column in range(wire.ETHERNET_BYTES, len(frame) - 4):
        changed = bytearray(frame)
        changed[column] ^= 0x02
        if column in {14, 14 + 9}:  # then it is no IPv4 UDP frame
            continue
        assert (compute_icrc(changed) == compute_icrc(frame)) == (column in VARIANT_COLUMNS), column


@settings(max_examples=60, deadline=None)
@given(data=st.binary(min_size=1, max_size=300), position=st.integers(0, 299), value=st.integers(0, 255))
def test_delta_table_is_the_change_of_a_crc(data: bytes, position: int, value: int) -> None:
    position %= len(data)
    changed = bytearray(data)
    changed[position] ^= value
    delta = int(delta_table(len(data) - position)[value])
    assert zlib.crc32(changed) == zlib.crc32(data) ^ delta


def test_delta_table_needs_a_distance() -> None:
    assert delta_table(4200).shape == (256,)
    assert delta_table(1)[0] == 0
    with pytest.raises(ValueError, match="at least 1"):
        delta_table(0)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_patched_frames_have_the_icrc_of_frames_built_anew(data: st.DataObject) -> None:
    payload = data.draw(st.binary(max_size=64))
    frame = data.draw(
        st.sampled_from(
            [
                template(payload),
                template(payload, Opcode.WRITE_MIDDLE),
                build_ack(PATH, dest_qp=1, psn=2, msn=3),
            ]
        )
    )
    fixed = {12, 13, 14, 14 + 9}  # EtherType, version and protocol: what makes it a RoCEv2 frame
    allowed = [column for column in range(len(frame) - 4) if column not in fixed]
    columns = data.draw(st.lists(st.sampled_from(allowed), max_size=20))
    count = data.draw(st.integers(0, 4))
    rows = np.tile(np.frombuffer(frame, np.uint8), (count, 1))
    for row in rows:
        for column in columns:
            row[column] = data.draw(st.integers(0, 255))
    icrcs = IcrcPatcher(frame, columns).icrcs(rows)
    assert icrcs.dtype == np.uint32
    assert icrcs.tolist() == [compute_icrc(row.tobytes()) for row in rows]


def test_patched_frame_equals_the_one_scapy_builds() -> None:
    frame = template(bytes(4096))
    columns = [
        *range(wire.DEST_QP_OFFSET, wire.DEST_QP_OFFSET + 3),
        *range(wire.ACK_REQUEST_OFFSET, wire.PSN_OFFSET + 3),
        *range(wire.RETH_OFFSET, wire.RETH_OFFSET + 16),
        *range(26, 36),  # addresses and source port
        *range(12),  # MACs, which the ICRC does not cover
        15,  # TOS, which it does not cover either
    ]
    wanted = build_write(
        FramePath("02:00:00:07:00:00", "02:00:00:08:ff:ff", 0x0A000003, 0x0A00000D, 0xFEDC),
        opcode=Opcode.WRITE_FIRST,
        dest_qp=0xFEDCBA,
        psn=0xFFFFFE,
        payload=bytes(4096),
        ack_request=True,
        target=WriteTarget(0x0123456789ABCDEF, 0x55AA55AA, 999_999),
        tos=0x6B,
    )
    header = np.frombuffer(wanted[: wire.RETH_OFFSET + 16], np.uint8)[None, :]
    patcher = IcrcPatcher(frame, columns)
    assert patcher.icrcs(header).astype("<u4").tobytes() == wanted[-4:]
    assert 15 not in patcher.columns


def test_patcher_without_columns_returns_the_template_icrc() -> None:
    frame = template()
    icrcs = IcrcPatcher(frame, []).icrcs(np.zeros((3, 70), np.uint8))
    assert icrcs.tolist() == [compute_icrc(frame)] * 3


def test_wrong_templates_and_columns_are_refused() -> None:
    frame = template(bytes(8))
    for column in (-1, len(frame) - 4):
        with pytest.raises(ValueError, match="columns must be in"):
            IcrcPatcher(frame, [column])
    for wrong in (frame[:50], frame[:12] + b"\x86\xdd" + frame[14:], frame[:14] + b"\x46" + frame[15:]):
        with pytest.raises(ValueError, match=r"RoCEv2 frame|untagged IPv4"):
            compute_icrc(wrong)
