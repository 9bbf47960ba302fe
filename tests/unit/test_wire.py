from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scapy.contrib.mac_control import MACControlClassBasedFlowControl
from scapy.contrib.roce import AETH, BTH, CNPPadding
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether
from scapy.utils import wrpcap

from testbed.collectives import ideal, wire_bytes
from testbed.roce import wire
from testbed.roce.bth import (
    RETH,
    FramePath,
    ImmDt,
    WriteTarget,
    build_ack,
    build_cnp,
    build_nak,
    build_pfc,
    build_write,
)
from testbed.roce.icrc import carried_icrc, compute_icrc
from testbed.roce.wire import Opcode

PATH = FramePath("02:00:00:01:00:00", "02:00:00:02:ff:ff", 0x0A000001, 0x0A000009, 0xC123)
TARGET = WriteTarget(virtual_address=0x1122334455667788, rkey=0xCAFE0001, dma_bytes=12289)


def write(opcode: Opcode, payload: bytes = bytes(64), **more: object) -> bytes:
    target = TARGET if opcode in wire.OPCODES_WITH_RETH else None
    values = {"dest_qp": 0xABCDE, "psn": 0x123456, "target": target, **more}
    return build_write(PATH, opcode=opcode, payload=payload, **values)  # type: ignore[arg-type]


def every_frame() -> dict[str, bytes]:
    return {
        "write first": write(Opcode.WRITE_FIRST, bytes(4096)),
        "write middle": write(Opcode.WRITE_MIDDLE, bytes(4096), ack_request=True),
        "write last": write(Opcode.WRITE_LAST, b"\x01\x02\x03\x04\x05", psn=0x1FFFFFF),
        "write only": write(Opcode.WRITE_ONLY, b"\x55"),
        "write last with immediate": write(Opcode.WRITE_LAST_WITH_IMMEDIATE, immediate=0xDEADBEEF),
        "write only with immediate": write(Opcode.WRITE_ONLY_WITH_IMMEDIATE, immediate=0xDEADBEEF),
        "ack": build_ack(PATH.reversed(), dest_qp=77, psn=9, msn=3),
        "nak": build_nak(PATH.reversed(), dest_qp=78, expected_psn=10, msn=4),
        "cnp": build_cnp(PATH.reversed(), dest_qp=79),
    }


def test_bth_of_a_write_is_what_was_asked() -> None:
    packet = Ether(write(Opcode.WRITE_MIDDLE, bytes(range(64)), ack_request=True))
    bth = packet[BTH]
    assert (bth.opcode, bth.dqpn, bth.psn, bth.ackreq, bth.padcount) == (0x07, 0xABCDE, 0x123456, 1, 0)
    assert bytes(bth.payload) == bytes(range(64))
    assert (packet[IP].tos, packet[IP].ttl, packet[UDP].sport, packet[UDP].dport) == (0x6A, 64, 0xC123, 4791)
    assert packet[UDP].chksum == 0


@pytest.mark.parametrize("opcode", [Opcode.WRITE_FIRST, Opcode.WRITE_ONLY])
def test_first_and_only_carry_a_reth(opcode: Opcode) -> None:
    reth = Ether(write(opcode, b"payload!"))[RETH]
    assert (reth.va, reth.rkey, reth.dmalen) == (0x1122334455667788, 0xCAFE0001, 12289)
    assert bytes(reth.payload) == b"payload!"


def test_immediate_data_follows_the_bth_or_the_reth() -> None:
    frames = every_frame()
    last, only = Ether(frames["write last with immediate"]), Ether(frames["write only with immediate"])
    assert last[ImmDt].data == only[ImmDt].data == 0xDEADBEEF
    assert RETH not in last
    assert only[RETH].payload.name == "ImmDt"


@pytest.mark.parametrize("nbytes", range(9))
def test_payload_is_padded_to_four_bytes(nbytes: int) -> None:
    frame = write(Opcode.WRITE_ONLY, bytes(nbytes))
    assert Ether(frame)[BTH].padcount == -nbytes % 4
    assert len(frame) == wire.frame_bytes(Opcode.WRITE_ONLY, nbytes)


def test_ack_nak_and_cnp_say_what_they_should() -> None:
    frames = every_frame()
    ack, nak, cnp = (Ether(frames[name]) for name in ("ack", "nak", "cnp"))
    assert (ack[AETH].syndrome, ack[AETH].msn, ack[BTH].psn, ack[BTH].dqpn) == (0x1F, 3, 9, 77)
    assert (nak[AETH].syndrome, nak[AETH].msn, nak[BTH].psn, nak[BTH].dqpn) == (0x60, 4, 10, 78)
    assert (cnp[BTH].opcode, cnp[BTH].becn, cnp[BTH].psn, cnp[BTH].dqpn) == (0x81, 1, 0, 79)
    assert bytes(cnp[CNPPadding]) == bytes(16)
    assert {packet[IP].tos for packet in (ack, nak, cnp)} == {0xC0}
    assert (ack[IP].src, ack[IP].dst, ack.src) == ("10.0.0.9", "10.0.0.1", "02:00:00:02:ff:ff")


def test_lengths_are_those_of_the_frames_built() -> None:
    frames = every_frame()
    assert len(frames["write first"]) == wire.frame_bytes(Opcode.WRITE_FIRST, 4096) == 4096 + 58 + 16
    assert len(frames["write middle"]) == wire.frame_bytes(Opcode.WRITE_MIDDLE, 4096) == 4096 + 58
    assert len(frames["write last"]) == wire.frame_bytes(Opcode.WRITE_LAST, 5) == 8 + 58
    immediate = wire.frame_bytes(Opcode.WRITE_ONLY_WITH_IMMEDIATE, 64)
    assert len(frames["write only with immediate"]) == immediate
    assert len(frames["ack"]) == wire.frame_bytes(Opcode.ACKNOWLEDGE) == 62
    assert len(frames["cnp"]) == wire.frame_bytes(Opcode.CNP) == 74


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097, 8192, 12289])
def test_a_message_occupies_what_the_ideal_model_charges(nbytes: int) -> None:
    total = 0
    for offset in range(0, nbytes, 4096):
        begins, ends = offset == 0, offset + 4096 >= nbytes
        opcode = {
            (True, True): Opcode.WRITE_ONLY,
            (True, False): Opcode.WRITE_FIRST,
            (False, False): Opcode.WRITE_MIDDLE,
            (False, True): Opcode.WRITE_LAST,
        }[begins, ends]
        total += len(write(opcode, bytes(min(4096, nbytes - offset)))) + wire.LINK_OVERHEAD_BYTES
    assert total == wire_bytes(nbytes, 4096)
    assert wire.FRAME_OVERHEAD_BYTES + wire.LINK_OVERHEAD_BYTES == ideal.PACKET_OVERHEAD_BYTES
    assert ideal.RETH_BYTES == wire.RETH_BYTES


def test_offsets_point_at_their_fields() -> None:
    frame = write(Opcode.WRITE_MIDDLE, ack_request=True)
    assert frame[wire.BTH_OFFSET] == Opcode.WRITE_MIDDLE
    assert frame[wire.DEST_QP_OFFSET : wire.DEST_QP_OFFSET + 3] == bytes.fromhex("0abcde")
    assert frame[wire.ACK_REQUEST_OFFSET] == wire.ACK_REQUEST_BIT
    assert frame[wire.PSN_OFFSET : wire.PSN_OFFSET + 3] == bytes.fromhex("123456")
    first = write(Opcode.WRITE_FIRST)
    assert first[wire.RETH_OFFSET : wire.RETH_OFFSET + 8] == bytes.fromhex("1122334455667788")


def test_priorities_of_data_and_control() -> None:
    assert (wire.DATA_TOS, wire.CONTROL_TOS) == (0x6A, 0xC0)
    assert (wire.DATA_DSCP >> 3, wire.CONTROL_DSCP >> 3) == (3, 6)


def test_source_port_follows_linux() -> None:
    def linux(lqpn: int, rqpn: int) -> int:
        v = lqpn * rqpn
        v ^= v >> 20
        v ^= v >> 40
        fl = v & 0xFFFFF
        low, high = fl & 0x03FFF, fl & 0xFC000
        return (low ^ (high >> 14)) | 0xC000

    rng = np.random.default_rng(0)
    local, remote = rng.integers(0, 1 << 24, (2, 2000))
    ports = wire.source_port(local, remote)
    assert ports.dtype == np.uint16
    assert ports.tolist() == [linux(int(a), int(b)) for a, b in zip(local, remote, strict=True)]
    assert int(wire.source_port(17, 18)) == linux(17, 18)
    assert len(set(ports.tolist())) > 1500


def test_wrong_headers_are_refused() -> None:
    with pytest.raises(ValueError, match="WRITE_FIRST needs a RETH"):
        build_write(PATH, opcode=Opcode.WRITE_FIRST, dest_qp=1, psn=1, payload=b"")
    with pytest.raises(ValueError, match="WRITE_MIDDLE has no RETH"):
        build_write(PATH, opcode=Opcode.WRITE_MIDDLE, dest_qp=1, psn=1, payload=b"", target=TARGET)
    with pytest.raises(ValueError, match="needs immediate data"):
        write(Opcode.WRITE_LAST_WITH_IMMEDIATE)
    with pytest.raises(ValueError, match="is no WRITE opcode"):
        write(Opcode.ACKNOWLEDGE)


def test_pfc_frame_is_the_checked_vector() -> None:
    expected = "0180c2000001 020000000001 8808 0101 0008 0000 0000 0000 ffff 0000 0000 0000 0000"
    frame = build_pfc("02:00:00:00:00:01", {3: 65535})
    assert frame == bytes.fromhex(expected.replace(" ", "")) + bytes(26)
    resume = Ether(build_pfc("02:00:00:00:00:01", {3: 0, 7: 5}))[MACControlClassBasedFlowControl]
    assert (resume.c3_enabled, resume.c3_pause_time) == (1, 0)
    assert (resume.c7_enabled, resume.c7_pause_time, resume.c0_enabled) == (1, 5, 0)
    for wrong in ({8: 1}, {-1: 1}, {0: 65536}):
        with pytest.raises(ValueError, match="got"):
            build_pfc("02:00:00:00:00:01", wrong)


def test_wire_and_icrc_do_not_import_scapy() -> None:
    code = "import sys, testbed.roce.wire, testbed.roce.icrc; sys.exit('scapy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(shutil.which("tshark") is None, reason="tshark is not installed")
def test_tshark_decodes_every_frame(tmp_path: Path) -> None:
    frames = every_frame()
    capture = tmp_path / "frames.pcap"
    wrpcap(str(capture), [Ether(frame) for frame in frames.values()])
    fields = [
        "infiniband.bth.opcode",
        "infiniband.bth.destqp",
        "infiniband.bth.psn",
        "infiniband.bth.a",
        "infiniband.bth.padcnt",
        "infiniband.reth.va",
        "infiniband.reth.r_key",
        "infiniband.reth.dmalen",
        "infiniband.aeth.syndrome",
        "infiniband.aeth.msn",
        "infiniband.immdt",
        "infiniband.invariant.crc",
        "_ws.malformed",
        "_ws.expert.message",
    ]
    options = [option for field in fields for option in ("-e", field)]
    command = ["tshark", "-r", str(capture), "-T", "fields", "-E", "separator=/t", *options]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = {
        name: dict(zip(fields, line.split("\t"), strict=True))
        for name, line in zip(frames, result.stdout.rstrip("\n").split("\n"), strict=True)
    }

    def numbers(name: str, *keys: str) -> list[int]:
        return [int(rows[name][f"infiniband.{key}"], 0) for key in keys]

    for name, frame in frames.items():
        assert rows[name]["_ws.malformed"] == "", name
        assert rows[name]["_ws.expert.message"] == "", name
        if name != "cnp":  # tshark shows no ICRC after a CNP's padding
            assert numbers(name, "invariant.crc") == [int.from_bytes(frame[-4:], "big")], name
        assert carried_icrc(frame) == compute_icrc(frame), name
    opcodes = [numbers(name, "bth.opcode")[0] for name in frames]
    assert opcodes == [0x06, 0x07, 0x08, 0x0A, 0x09, 0x0B, 0x11, 0x11, 0x81]
    assert numbers("write middle", "bth.destqp", "bth.psn", "bth.padcnt") == [0xABCDE, 0x123456, 0]
    assert rows["write middle"]["infiniband.bth.a"] in ("1", "True")
    assert rows["write first"]["infiniband.bth.a"] in ("0", "False")
    assert numbers("write last", "bth.psn", "bth.padcnt") == [0xFFFFFF, 3]
    reth = [0x1122334455667788, 0xCAFE0001, 12289]
    for name in ("write first", "write only", "write only with immediate"):
        assert numbers(name, "reth.va", "reth.r_key", "reth.dmalen") == reth
    assert "deadbeef" in rows["write last with immediate"]["infiniband.immdt"].replace(":", "")
    assert numbers("ack", "aeth.syndrome", "aeth.msn", "bth.psn", "bth.destqp") == [0x1F, 3, 9, 77]
    assert numbers("nak", "aeth.syndrome", "aeth.msn", "bth.psn", "bth.destqp") == [0x60, 4, 10, 78]
    assert numbers("cnp", "bth.psn", "bth.destqp") == [0, 79]
