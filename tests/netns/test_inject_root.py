"""A user's own frames in a lab: what answers, what is counted, and that broken ones break nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from testbed.cli.main import app
from testbed.errors import LabError
from testbed.fabric.inject import Injection, inject_frames
from testbed.roce.queue_pairs import REQUESTER, RESPONDER, qpn_of
from testbed.roce.wire import PSN_MASK
from tests.netns.labs import activate_qps, assert_drained, listening_socket, small_fabric
from tests.netns.test_cli_root import A, B, deployed, run_command, small

__all__ = ["small"]  # the fixture

pytestmark = pytest.mark.root

LAYERS = """
from scapy.contrib.roce import BTH
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.l2 import ARP, Dot1Q, Ether
from testbed.roce.bth import RETH

def write_only(nic, to, qpn, psn):
    return IP(dst=nic.addresses[to], tos=0x6A) / UDP(sport=49152) / BTH(
        opcode=0x0A, dqpn=qpn, psn=psn, ackreq=1) / RETH(dmalen=64) / bytes(64)

"""


def write_frames(folder: Path, body: str) -> Path:
    file = folder / "frames.py"
    file.write_text(LAYERS + "def frames(nic):\n" + "".join(f"    {line}\n" for line in body.splitlines()))
    return file


def moved(injection: Injection, where: str) -> dict[str, int]:
    return {one.counter: one.moved for one in injection.counters if one.where == where}


def test_write_to_no_queue_pair_is_refused_by_the_kernel(tmp_path: Path) -> None:
    with small_fabric() as fabric:
        file = write_frames(tmp_path, "yield write_only(nic, 'host3', 0x101, 7)")
        injection = inject_frames(fabric.name, "host0", file, timeout_s=1.0)
        assert_drained(fabric)
    assert (injection.sent_packets, injection.refused, injection.received_packets) == (1, (), 1)
    (answer,) = injection.received
    assert "ICMP 10.0.0.7 > 10.0.0.1 dest-unreach port-unreachable" in answer.text
    assert "BTH" in answer.text
    assert bytes.fromhex(answer.hex)[14 + 9] == 1
    assert answer.wall_time_ns >= 20000 * answer.time_ns - 20000
    assert moved(injection, "host0/eth0 priority 3") == {"sent_packets": 1, "sent_bytes": injection.sent_bytes}
    assert moved(injection, "leaf1/down1 priority 3")["sent_packets"] == 1
    assert not any(one.counter == "drops_packets" or one.where.startswith("qp") for one in injection.counters)


def test_active_queue_pair_acknowledges_in_order_and_refuses_ahead(tmp_path: Path) -> None:
    with small_fabric() as fabric:
        connection = activate_qps(fabric)[0]
        src, dst = connection.requester.local.rank, connection.responder.local.rank
        psn = connection.initial_psn
        qpn = qpn_of(0, RESPONDER)
        body = "\n".join(
            f"yield write_only(nic, 'host{dst}', {qpn}, {(psn + ahead) & PSN_MASK})" for ahead in (0, 1, 5)
        )
        injection = inject_frames(fabric.name, f"host{src}/eth0", write_frames(tmp_path, body), timeout_s=1.0)
        assert_drained(fabric)
    requester = qpn_of(0, REQUESTER)
    expected = [
        f"ACKNOWLEDGE qp {requester:#x} psn {psn}, AETH ACK msn 1",
        f"ACKNOWLEDGE qp {requester:#x} psn {(psn + 1) & PSN_MASK}, AETH ACK msn 2",
        f"ACKNOWLEDGE qp {requester:#x} psn {(psn + 2) & PSN_MASK}, AETH NAK PSN sequence error msn 2",
    ]
    assert [frame.text.partition(f"10.0.0.{2 * src + 1} ")[2] for frame in injection.received] == expected
    assert moved(injection, f"qp {qpn:#x} at host{dst}/eth0") == {
        "rx_packets": 2,
        "rx_payload_bytes": 128,
        "rx_messages": 2,
        "out_of_order_packets": 1,
        "sent_acks_packets": 2,
        "sent_naks_packets": 1,
    }
    assert moved(injection, f"qp {requester:#x} at host{src}/eth0") == {"acked_packets": 2, "naks_packets": 1}


def test_malformed_frames_are_carried_or_refused_and_leave_the_queues_even(tmp_path: Path) -> None:
    body = """
whole = bytes(Ether(src=nic.mac, dst=nic.next_hop_mac) / write_only(nic, "host3", 0x101, 7))
whole = whole[:26] + bytes([10, 0, 0, 1]) + whole[30:]
for length in (0, 1, 13, 14, 15, 20, 33, 34, 35, 41, 42, 43, 53, 54, 58, 70, 9000):
    yield whole[:length].ljust(length, b"\\0") if length < 9000 else bytes(length)
for value in (0x00, 0x04, 0xFF):
    yield bytes([value]) * 60
for position in (12, 14, 16, 17, 20, 22, 23, 36, 38, 42, 43, 46, 50):
    yield whole[:position] + b"\\xff" + whole[position + 1:]
yield Ether() / IP(dst="10.0.0.7", ihl=15) / UDP()
yield Ether() / IP(dst="10.0.0.7", len=60000) / UDP()
yield Ether() / IP(dst="10.0.0.7", ttl=0) / UDP()
yield Ether() / IP(dst="10.0.0.8") / UDP()
yield Ether() / IP(dst="10.0.0.7", flags="MF", frag=3) / bytes(40)
yield Ether() / Dot1Q(vlan=3) / IP(dst="10.0.0.7") / UDP()
yield Ether(dst="ff:ff:ff:ff:ff:ff") / ARP(pdst="10.0.0.0")
yield Ether(src="02:00:00:05:00:06") / IP(dst="10.0.0.7") / ICMP()
"""
    with small_fabric() as fabric:
        activate_qps(fabric)
        injection = inject_frames(fabric.name, "host0", write_frames(tmp_path, body), timeout_s=1.0, frames_per_s=500)
        assert_drained(fabric)
    assert injection.sent_packets + len(injection.refused) == 17 + 3 + 13 + 8
    assert {frame.length_bytes for frame in injection.refused} >= {1, 13, 9000}
    assert all("EMSGSIZE" in one.reason for one in injection.refused if one.length_bytes == 9000)
    assert any("echo-reply" in frame.text for frame in injection.received)


def test_frames_leave_at_the_pace_and_number_asked_for(tmp_path: Path) -> None:
    body = "while True:\n    yield bytes(Ether(src=nic.mac, dst=nic.next_hop_mac, type=0x88B5)) + bytes(986)"
    file = write_frames(tmp_path, body)
    with small_fabric() as fabric, listening_socket(fabric, "leaf0", "down0") as listener:
        for pace in ({"frames_per_s": 50.0}, {"rate_bits_per_s": 8 * 1000 * 50 * 20000}):
            injection = inject_frames(fabric.name, "host0", file, count=11, timeout_s=0, **pace)  # type: ignore[arg-type]
            assert (injection.sent_packets, injection.sent_bytes) == (11, 11_000)
            for _ in range(11):
                assert len(listener.recv(2000)) == 1000
            assert not injection.counters  # neither IPv4 nor counted


def test_command_shows_what_happened_as_text_and_json(small: Path, tmp_path: Path) -> None:
    file = write_frames(tmp_path, "yield IP(dst='10.0.0.7') / ICMP()\nyield bytes(9000)")
    with deployed(small, A) as name:
        shown = run_command("inject", "host0", file, "--lab", name, "--timeout", 0.5)
        assert shown.returncode == 0, shown.stderr
        assert "# sent 1 frames, 42 bytes, from host0/eth0" in shown.stdout
        assert "# refused: frame 2 of 9000 bytes: EMSGSIZE" in shown.stdout
        assert "ICMP 10.0.0.7 > 10.0.0.1 echo-reply" in shown.stdout
        assert "sent_packets +1, sent_bytes +42" in shown.stdout
        told = json.loads(
            run_command("inject", "host0", file, "--lab", name, "--timeout", 0.5, "--format", "json").stdout
        )
        assert (told["port"], told["sent_packets"], told["received_packets"]) == ("host0/eth0", 1, 1)
        assert told["received"][0]["hex"].startswith("02")
        assert told["refused"][0]["number"] == 2


def test_mistakes_end_with_1_and_name_their_line(small: Path, tmp_path: Path) -> None:
    file = write_frames(tmp_path, "yield b'x' * 60\nyield 1 / 0")
    line = file.read_text().splitlines().index("    yield 1 / 0") + 1
    with deployed(small, A) as name:
        failed = run_command("inject", "host0", file, "--lab", name)
        assert (failed.returncode, failed.stdout) == (1, "")
        assert failed.stderr == f"error: {file}:{line}: ZeroDivisionError: division by zero\n"
        at_a_switch = run_command("inject", "leaf0", file, "--lab", name)
        assert at_a_switch.stderr.startswith(f"error: lab '{A}' has no host 'leaf0' (hosts: host0, ")
        assert run_command("inject", "host0/eth7", file, "--lab", name).returncode == 1
        for usage in (("--pps", "1", "--rate", "1 Gbit/s"), ("--rate", "fast")):
            assert CliRunner().invoke(app, ["inject", "host0", str(file), "--lab", name, *usage]).exit_code == 2
    with pytest.raises(LabError, match="no lab named"):
        inject_frames(B, "host0", file)
