"""Users' files of frames: what is filled in, what is left alone, whose fault an error is."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from scapy.contrib.roce import BTH
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import ARP, Dot1Q, Ether

from testbed.errors import TestbedError
from testbed.fabric.frame_file import Nic, complete_packet, read_frames
from testbed.fabric.inject import describe_frame
from testbed.roce.bth import FramePath, WriteTarget, build_ack, build_cnp, build_nak, build_pfc, build_write
from testbed.roce.icrc import carried_icrc, compute_icrc
from testbed.roce.wire import Opcode

NIC = Nic("host0", "eth0", "02:00:00:01:00:00", "10.0.0.1", "02:00:00:02:ff:ff", 4200, {"host3": "10.0.0.7"})
PATH = FramePath(NIC.mac, NIC.next_hop_mac, 0x0A000001, 0x0A000007, 49152)
HEAD = "from scapy.layers.inet import IP, UDP\nfrom scapy.layers.l2 import Ether\n"


def read(tmp_path: Path, content: str) -> list[bytes]:
    file = tmp_path / "frames.py"
    file.write_text(content)
    return list(read_frames(file, NIC))


def test_what_is_left_out_is_filled_in() -> None:
    for packet in (IP(dst="10.0.0.7") / UDP(), Ether() / IP(dst="10.0.0.7") / UDP()):
        built = Ether(bytes(complete_packet(packet, NIC)))
        assert (built.src, built.dst) == (NIC.mac, NIC.next_hop_mac)
        assert (built[IP].src, built[IP].dst) == ("10.0.0.1", "10.0.0.7")
    arp = Ether(bytes(complete_packet(ARP(pdst="10.0.0.0"), NIC)))
    assert (arp.type, arp.dst) == (0x0806, NIC.next_hop_mac)


def test_what_is_set_stays_however_wrong() -> None:
    packet = Ether(src="00:00:00:00:00:01", dst="ff:ff:ff:ff:ff:ff") / IP(src="9.9.9.9", dst="10.0.0.7", ihl=15, len=3)
    built = bytes(complete_packet(packet, NIC))
    assert built[:12].hex() == "ffffffffffff000000000001"
    assert (built[14], built[16:18], built[26:30]) == (0x4F, b"\0\3", b"\t\t\t\t")
    assert "src" not in (IP() / UDP()).fields  # the user's own packet is not touched


def test_roce_frames_get_their_icrc() -> None:
    built = bytes(complete_packet(IP(dst="10.0.0.7") / UDP(sport=5, dport=4791) / BTH(opcode=4, dqpn=7) / b"abcd", NIC))
    assert carried_icrc(built) == compute_icrc(built)


def test_file_may_yield_return_take_the_nic_and_import_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_frames.py").write_text("FRAME = b'n' * 60\n")
    assert read(tmp_path, "def frames():\n  yield b'1'\n  yield bytearray(b'2')\n") == [b"1", b"2"]
    assert read(tmp_path, "def frames():\n  return [b'1', b'2']\n") == [b"1", b"2"]
    assert read(tmp_path, "def frames():\n  return b'12'\n") == [b"12"]
    assert read(tmp_path, "def frames(nic):\n  yield nic.addresses['host3'].encode()\n") == [b"10.0.0.7"]
    assert read(tmp_path, "from neighbour_of_frames import FRAME\ndef frames(): yield FRAME\n") == [b"n" * 60]
    assert len(read(tmp_path, HEAD + "def frames(): return IP(dst='10.0.0.7') / UDP()\n")[0]) == 42
    data = "from dataclasses import dataclass\n@dataclass\nclass A:\n  x: 'int'\ndef frames(): yield bytes(A(3).x)\n"
    assert read(tmp_path, data) == [bytes(3)]


def test_endless_files_are_read_as_far_as_wanted(tmp_path: Path) -> None:
    file = tmp_path / "frames.py"
    file.write_text("import itertools\ndef frames(): return (bytes([n % 256]) for n in itertools.count())\n")
    assert list(itertools.islice(read_frames(file, NIC), 3)) == [b"\0", b"\1", b"\2"]


def test_what_the_file_prints_is_kept_out_of_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read(tmp_path, "print('one')\ndef frames():\n  print('two')\n  yield b'x'\n  print('three')\n")
    seen = capsys.readouterr()
    assert (seen.out, seen.err) == ("", "one\ntwo\nthree\n")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("def frames(:\n  pass\n", "frames.py:1: SyntaxError: "),
        ("import nosuchmodule\n", "frames.py:1: ModuleNotFoundError: No module named 'nosuchmodule'"),
        ("def frames():\n  yield b'x'\n  yield 1 / 0\n", "frames.py:3: ZeroDivisionError: division by zero"),
        ("def f():\n  raise KeyError\ndef frames():\n  f()\n  yield\n", "frames.py:2: KeyError"),
        ("def frames():\n  return int('x')\n", "frames.py:2: ValueError: invalid literal"),
        ("x = 1\n", "frames.py: there is no function frames()"),
        ("frames = 3\n", "frames.py: there is no function frames()"),
        ("def frames(): return None\n", "frames.py: frames() gave NoneType, which cannot be iterated"),
        ("def frames(): yield 'text'\n", "frames.py: frame 1 is str, neither a scapy packet nor bytes"),
        (HEAD + "def frames():\n  yield b'x'\n  yield IP(ttl='a')\n", "frames.py: scapy cannot build frame 2 ("),
        ("def frames(a, b): yield b''\n", "frames.py: TypeError: frames() missing 1 required positional argument"),
    ],
)
def test_errors_name_file_and_line_on_one_line(tmp_path: Path, content: str, words: str) -> None:
    with pytest.raises(TestbedError) as caught:
        read(tmp_path, content)
    assert f"{tmp_path}/{words}" in caught.value.message
    assert "\n" not in caught.value.message


def test_signals_end_the_file_instead_of_being_its_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        read(tmp_path, "def frames():\n  raise SystemExit(143)\n  yield\n")


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        (
            build_write(
                PATH,
                opcode=Opcode.WRITE_ONLY,
                dest_qp=0x101,
                psn=7,
                payload=b"abcd",
                ack_request=True,
                target=WriteTarget(0x1000, 5, 4),
            ),
            "10.0.0.1 > 10.0.0.7 WRITE_ONLY qp 0x101 psn 7, asks for an ACK, RETH address 0x1000 rkey 0x5 length 4, 4 bytes",
        ),
        (build_ack(PATH, dest_qp=2, psn=9, msn=1), "10.0.0.1 > 10.0.0.7 ACKNOWLEDGE qp 0x2 psn 9, AETH ACK msn 1"),
        (
            build_nak(PATH, dest_qp=2, expected_psn=9, msn=1),
            "10.0.0.1 > 10.0.0.7 ACKNOWLEDGE qp 0x2 psn 9, AETH NAK PSN sequence error msn 1",
        ),
        (build_cnp(PATH, dest_qp=2), "10.0.0.1 > 10.0.0.7 CNP qp 0x2 psn 0"),
    ],
)
def test_roce_frames_are_told_on_one_line(frame: bytes, text: str) -> None:
    assert describe_frame(frame) == text


def test_any_bytes_are_told_on_one_line() -> None:
    whole = build_write(PATH, opcode=Opcode.WRITE_MIDDLE, dest_qp=1, psn=7, payload=bytes(60))
    frames = [whole[:length] for length in range(len(whole))]
    frames += [bytes([value]) * 70 for value in range(256)]
    frames += [build_pfc(NIC.mac, {3: 5}), bytes(Ether() / Dot1Q(vlan=3) / IP()), whole[:42] + b"\xee" * 60]
    for frame in frames:
        assert "\n" not in describe_frame(frame)
