"""Frames captured at ports of a fabric, as scapy and tshark read them."""

from __future__ import annotations

import contextlib
import shutil
import signal
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scapy.contrib.roce import BTH
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether
from scapy.utils import RawPcapReader

from testbed.fabric import Fabric
from testbed.roce.icrc import carried_icrc, compute_icrc
from tests.conftest import skip_or_fail
from tests.netns.labs import PATIENCE_S, address_of, ip_checksum, run_in, start_in, wait_until


@dataclass(frozen=True)
class Captured:
    """A RoCEv2 frame, and what scapy makes of it."""

    raw: bytes
    packet: Any

    @property
    def opcode(self) -> int:
        return int(self.packet[BTH].opcode)

    @property
    def psn(self) -> int:
        return int(self.packet[BTH].psn)

    @property
    def qpn(self) -> int:
        return int(self.packet[BTH].dqpn)


@contextlib.contextmanager
def captured(fabric: Fabric, places: dict[str, str], folder: Path) -> Iterator[dict[str, Path]]:
    """Capture on one interface of each node for the block, to the last frame.

    Args:
        fabric: The lab.
        places: Node to interface.
        folder: Where the files go.
    """
    for program in ("tcpdump", "tshark"):
        if shutil.which(program) is None:
            skip_or_fail(f"needs {program}")
    files = {node: folder / f"{node}.pcap" for node in places}
    with contextlib.ExitStack() as stack:
        children = {}
        for node, ifname in places.items():
            command = [
                "tcpdump",
                "-Z",
                "root",
                "-n",
                "--immediate-mode",
                "-U",
                "-s",
                "5000",
                "-B",
                "16384",
                "-i",
                ifname,
            ]
            child = stack.enter_context(start_in(fabric, node, *command, "-w", str(files[node])))
            stack.callback(child.kill)
            assert child.stderr is not None
            heard = ""
            while "listening on" not in heard:
                heard = child.stderr.readline()
                assert heard, f"tcpdump on {node} ended"
            children[node] = child
        yield files
        # A frame behind all others: once it is in a file, so are they.
        mark = "c0ffee0ddba11c0ffee0"
        ping = run_in(fabric, "host0", "ping", "-n", "-c1", "-W5", "-s", "64", "-p", mark, address_of(fabric, 1))
        assert ping.returncode == 0
        for node, child in children.items():
            wait_until(lambda node=node: files[node].read_bytes().count(bytes.fromhex(mark)) >= 2, f"mark on {node}")
            child.send_signal(signal.SIGINT)
            _, words = child.communicate(timeout=PATIENCE_S)
            assert "0 packets dropped by kernel" in words, words


def read_roce(file: Path) -> list[Captured]:
    with RawPcapReader(str(file)) as reader:
        frames = [raw for raw, _ in reader]
    return [Captured(raw, Ether(raw)) for raw in frames if raw[12:14] == b"\x08\0" and raw[36:38] == b"\x12\xb7"]


def read_tshark(file: Path, *fields: str) -> list[dict[str, str]]:
    columns = [part for field in fields for part in ("-e", field)]
    shown = subprocess.run(
        [
            "tshark",
            "-n",
            "-r",
            str(file),
            "-Y",
            "infiniband and not _ws.malformed",
            "-T",
            "fields",
            "-E",
            "separator=;",
            *columns,
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    return [dict(zip(fields, line.split(";"), strict=True)) for line in shown.stdout.splitlines()]


def number(text: str) -> int:
    return int(text, 0)


def check_headers(frame: Captured, ttl: int) -> None:
    """Check what every frame must have, whatever it carries."""
    ip, udp = frame.packet[IP], frame.packet[UDP]
    assert (len(frame.raw), ip.ihl) == (14 + ip.len, 5)
    assert udp.len == ip.len - 20
    assert (udp.dport, udp.chksum, ip.flags) == (4791, 0, "DF")
    assert ip.chksum == ip_checksum(frame.raw[14:34])
    assert ip.ttl == ttl
    assert carried_icrc(frame.raw) == compute_icrc(frame.raw)
    # scapy computes it by its own means; its dissection knows no RETH, so the frame goes in as BTH and bytes.
    again = Ether(frame.raw)
    assert again[BTH].icrc == struct.unpack("!I", frame.raw[-4:])[0]
    assert (frame.packet[BTH].version, frame.packet[BTH].pkey, frame.packet[BTH].migreq) == (0, 0xFFFF, 1)


def as_captured(raw: bytes) -> Captured:
    return Captured(raw, Ether(raw))
