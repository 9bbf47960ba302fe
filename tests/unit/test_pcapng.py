"""The bytes of pcapng files, and the reading of the kernel's packet rings, against other people's readers."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scapy.utils import RawPcapNgReader

from testbed.errors import LabError
from testbed.fabric.capture import CapturedPort, CaptureReport, select_ports
from testbed.kernel.packet_ring import RingShape, join_frames, parse_headers
from testbed.kernel.pcapng import Frames, render_frames, render_interface, render_section, render_statistics
from testbed.topology import LinkSpec, build_clos

LENGTHS = (0, 1, 13, 14, 60, 61, 62, 63, 64, 1500, 9000)
SECOND_NS = 1_000_000_000


def frames_of(payloads: list[bytes], *, original_bytes: int = 0) -> Frames:
    lengths = np.array([len(one) for one in payloads], np.int64)
    count = len(payloads)
    return Frames(
        raw=np.frombuffer(b"".join(payloads) or b"\0", np.uint8),
        start=np.cumsum(lengths) - lengths,
        kept_bytes=lengths,
        original_bytes=np.maximum(lengths, original_bytes),
        interface=np.arange(count, dtype=np.int64) % 2,
        time_ns=1_790_000_000 * SECOND_NS + np.arange(count, dtype=np.int64),
        outbound=np.arange(count) % 3 == 0,
    )


def write_file(path: Path, frames: Frames) -> Path:
    content = render_section("test", "a comment")
    for name in ("leaf0/up1", "host3/eth0"):
        content += render_interface(name, f"of {name}", snap_bytes=128, rate_bits_per_s=400_000_000_000)
    content += render_frames(frames).tobytes()
    content += render_statistics(1, SECOND_NS, received_packets=7, lost_packets=2)
    path.write_bytes(content)
    return path


def test_scapy_reads_every_frame_back(tmp_path: Path) -> None:
    payloads = [bytes([number]) * length for number, length in enumerate(LENGTHS)]
    file = write_file(tmp_path / "a.pcapng", frames_of(payloads, original_bytes=100))
    with RawPcapNgReader(str(file)) as reader:
        read = list(reader)
    assert [data for data, _ in read] == payloads
    assert [meta.wirelen for _, meta in read] == [max(100, length) for length in LENGTHS]
    times = [(meta.tshigh << 32) + meta.tslow for _, meta in read]
    assert times == [1_790_000_000 * SECOND_NS + number for number in range(len(LENGTHS))]
    assert [meta.ifname for _, meta in read] == [[b"leaf0/up1", b"host3/eth0"][n % 2] for n in range(len(LENGTHS))]


@pytest.mark.skipif(shutil.which("tshark") is None, reason="tshark is not installed (apt install tshark)")
def test_wireshark_reads_interfaces_directions_and_nanoseconds(tmp_path: Path) -> None:
    file = write_file(tmp_path / "a.pcapng", frames_of([bytes(60)] * 4))
    fields = ("frame.interface_name", "frame.interface_description", "frame.packet_flags_direction", "frame.time_epoch")
    command = ["tshark", "-r", str(file), "-T", "json", *(part for field in fields for part in ("-e", field))]
    read = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    layers = [packet["_source"]["layers"] for packet in read]
    assert [one["frame.interface_name"] for one in layers] == [["leaf0/up1"], ["host3/eth0"]] * 2
    assert layers[1]["frame.interface_description"] == ["of host3/eth0"]
    assert [int(one["frame.packet_flags_direction"][0], 0) for one in layers] == [2, 1, 1, 2]
    assert layers[3]["frame.time_epoch"][0].endswith("3")


def test_no_frames_are_no_blocks() -> None:
    assert len(render_frames(frames_of([]))) == 0
    assert len(join_frames([])) == 0


def ring_block(frames: list[tuple[int, bytes, int]], *, tag: tuple[int, int] | None = None) -> tuple[bytes, list[int]]:
    """Return a block as the kernel lays it out: ``(time, data, packet type)`` each."""
    block, headers = bytearray(48), []
    for time_ns, data, kind in frames:
        headers.append(len(block))
        mac = 48 + 20 + 14
        size = (mac + len(data) + 7) // 8 * 8
        status, tpid, tci = (0x10, *tag) if tag else (0, 0, 0)
        head = struct.pack(
            "=IIIIIIHHIIHH",
            *(size, time_ns // SECOND_NS, time_ns % SECOND_NS, len(data), 4000, status, mac, mac + 14, 0, tci, tpid, 0),
        )
        address = struct.pack("=HHiHBB8s", 17, 8, 3, 1, kind, 6, bytes(8))
        block += (head + bytes(8) + address).ljust(mac, b"\0") + data
        block += bytes(headers[-1] + size - len(block))
    return bytes(block), headers


def test_ring_headers_give_time_direction_and_bytes() -> None:
    block, headers = ring_block([(5 * SECOND_NS + 7, b"a" * 60, 0), (6 * SECOND_NS, b"b" * 61, 4)])
    frames = parse_headers(np.frombuffer(block, np.uint8), np.array(headers), interface=3)
    assert frames.time_ns.tolist() == [5 * SECOND_NS + 7, 6 * SECOND_NS]
    assert frames.outbound.tolist() == [False, True]
    assert frames.original_bytes.tolist() == [4000, 4000]
    assert frames.interface.tolist() == [3, 3]
    found = [frames.raw[s : s + n].tobytes() for s, n in zip(frames.start, frames.kept_bytes, strict=True)]
    assert found == [b"a" * 60, b"b" * 61]


def test_vlan_tag_that_the_kernel_took_out_is_put_back() -> None:
    block, headers = ring_block([(1, b"DDDDDDSSSSSS\x08\0rest", 0)], tag=(0x8100, 0x6003))
    frames = parse_headers(np.frombuffer(block, np.uint8), np.array(headers), interface=0)
    assert frames.kept_bytes.tolist() == [22]
    assert frames.original_bytes.tolist() == [4004]
    data = frames.raw[frames.start[0] :][:22].tobytes()
    assert data == b"DDDDDDSSSSSS\x81\x00\x60\x03\x08\0rest"


def test_frames_of_several_ports_are_put_in_order_of_time() -> None:
    parts = []
    for interface, times in enumerate(((1, 4, 5), (2, 3, 5))):
        block, headers = ring_block([(time, bytes([time, interface]) * 30, 0) for time in times])
        parts.append(parse_headers(np.frombuffer(block, np.uint8), np.array(headers), interface=interface))
    joined = join_frames(parts)
    assert joined.time_ns.tolist() == [1, 2, 3, 4, 5, 5]
    assert joined.interface.tolist() == [0, 1, 1, 0, 0, 1]
    for start, time, interface in zip(joined.start, joined.time_ns, joined.interface, strict=True):
        assert joined.raw[start : start + 2].tolist() == [time, interface]


def test_rings_share_the_memory_and_none_is_too_small() -> None:
    assert RingShape.for_ports(1).blocks == 64
    assert RingShape.for_ports(16).blocks == 32
    assert RingShape.for_ports(4096).blocks == 4
    assert 16 * RingShape.for_ports(16).nbytes == 64 << 20


def test_ports_are_chosen_by_node_and_by_name() -> None:
    topology = build_clos(hosts_per_leaf=(2, 2), spines=2, host_link=LinkSpec(10, 0), uplink=LinkSpec(10, 0))

    def names(*wanted: str) -> list[str]:
        return [topology.port_name(port) for port in select_ports(topology, wanted)]

    assert names() == ["host0/eth0", "host1/eth0", "host2/eth0", "host3/eth0"]
    assert names("leaf0/up1", "host0") == ["host0/eth0", "leaf0/up1"]
    assert names("leaf1", "leaf1/up0") == ["leaf1/down0", "leaf1/down1", "leaf1/up0", "leaf1/up1"]
    with pytest.raises(LabError, match="no node 'leaf7'"):
        names("leaf7")
    with pytest.raises(LabError, match=r"no port 'leaf0/up9' to capture at \(ports: leaf0/down0"):
        names("leaf0/up9")


def test_warnings_tell_cost_loss_and_early_end() -> None:
    ports = (CapturedPort("a/x", 3, 0), CapturedPort("b/x", 4, 5))
    assert len(CaptureReport("f", ports[:1]).warnings()) == 1
    cost, lost, early = CaptureReport("f", ports, "No space left on device").warnings()
    assert "2 ports were captured (7 frames in f)" in cost
    assert "lost 5 frames, most at b/x (5)" in lost
    assert "No space left" in early
