"""Commands on frames in labs: inject one's own, capture what passes. Both need root."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from testbed.cli.options import Format, OutputFormat, SnapLength

if TYPE_CHECKING:
    from testbed.fabric.inject import Injection


def inject(
    host: Annotated[str, typer.Argument(metavar="HOST", help="Such as host0, or host0/eth1.", show_default=False)],
    file: Annotated[
        Path, typer.Argument(metavar="FILE.py", help="Python code that defines frames().", show_default=False)
    ],
    lab: Annotated[
        str | None,
        typer.Option(
            "--lab", metavar="LAB", envvar="TESTBED_LAB", help="The lab, where there are several.", show_default=False
        ),
    ] = None,
    pps: Annotated[
        float | None,
        typer.Option(
            "--pps",
            metavar="N",
            min=0.001,
            envvar="TESTBED_PPS",
            help="Frames per second of this machine's clock. [default: 1000]",
            show_default=False,
        ),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(
            "--rate",
            metavar="RATE",
            envvar="TESTBED_RATE",
            help='Emulated rate of frame bytes instead, such as "10 Gbit/s".',
            show_default=False,
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option("--count", min=1, envvar="TESTBED_COUNT", help="Frames to send at most.", show_default=False),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout",
            metavar="SECONDS",
            min=0,
            envvar="TESTBED_TIMEOUT",
            help="How long to listen after the last frame, on this machine's clock.",
        ),
    ] = 2.0,
    output_format: Format = OutputFormat.TABLE,
) -> None:
    """Send your own frames from a host of a deployed lab; show what came back and which counters moved.

    FILE.py is code, and runs as the user who calls: root. Its frames() yields scapy packets or bytes, bytes being whole Ethernet
    frames. If it takes an argument it is given the NIC: .mac, .address, .next_hop_mac, .mtu, .addresses["host3"]. What a
    packet leaves out is filled in: the Ethernet header, its MACs (to the next hop), the IPv4 source address. Nothing is
    corrected. scapy.contrib.roce has BTH and AETH, testbed.roce.bth RETH and ImmDt.

    \b
    from scapy.contrib.roce import BTH
    from scapy.layers.inet import IP, UDP
    from testbed.roce.bth import RETH
    \b
    def frames(nic):
        yield IP(dst=nic.addresses["host3"]) / UDP(sport=49152) / BTH(opcode=10, dqpn=257) / RETH()
    """
    from testbed import api
    from testbed.cli.text import render_json
    from testbed.errors import TestbedError
    from testbed.units import parse_rate

    if pps is not None and rate is not None:
        raise typer.BadParameter("give either --pps or --rate")
    try:
        rate_bits_per_s = None if rate is None else parse_rate(rate)
    except ValueError as error:
        raise typer.BadParameter(f"--rate {error}") from None
    if rate_bits_per_s == 0:
        raise TestbedError("--rate 0 would never send", hint="give a rate above 0")
    injection = api.inject(
        lab, host, file, frames_per_s=pps, rate_bits_per_s=rate_bits_per_s, count=count, timeout_s=timeout
    )
    if output_format is OutputFormat.JSON:
        print(render_json(injection))
    else:
        print(_render_injection(injection), end="")


def capture(
    lab: Annotated[str, typer.Argument(metavar="LAB", envvar="TESTBED_LAB", help="The lab.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.pcapng",
            envvar="TESTBED_CAPTURE_OUTPUT",
            help="File to write; - for stdout, as in `… -o - | tshark -r -`.",
            show_default=False,
        ),
    ],
    ports: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NODE[/IFNAME]",
            help="Nodes and ports such as leaf0/up1. [default: all NICs of hosts]",
            show_default=False,
        ),
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(
            "--duration",
            metavar="SECONDS",
            min=0.001,
            envvar="TESTBED_DURATION",
            help="How long, on this machine's clock. [default: until Ctrl-C]",
            show_default=False,
        ),
    ] = None,
    count: Annotated[
        int,
        typer.Option("--count", min=0, envvar="TESTBED_COUNT", help="Frames after which to end; 0 for no limit."),
    ] = 0,
    snap_length: SnapLength = None,
    wall_time: Annotated[
        bool,
        typer.Option(
            "--wall-time", envvar="TESTBED_WALL_TIME", help="Write this machine's time instead of emulated time."
        ),
    ] = False,
) -> None:
    """Capture what passes ports of a lab into one pcapng file, an interface a port, named leaf0/up1.

    A frame is seen as it leaves its queue and as it arrives, before the NIC or switch acts on it. Times are emulated: wall time
    since the beginning / time dilation; the delay of a link is none of them, for the engine adds it where it is felt. Wireshark
    and tshark decode RoCEv2 and PFC without options. Capturing costs capacity: figures of a run meanwhile are not those
    of a run alone.
    """
    from testbed import api
    from testbed.cli.run import StderrListener
    from testbed.cli.text import render_columns
    from testbed.errors import RunError
    from testbed.fabric.capture import STDOUT

    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C is how a capture ends, not how it fails
    report = api.capture(
        lab,
        ports or (),
        output,
        wall_duration_s=duration,
        count=count,
        snap_bytes=snap_length,
        emulated_time=not wall_time,
        listener=StderrListener(),
    )
    rows = [(port.name, port.packets, port.lost_packets) for port in report.ports]
    table = render_columns(("port", "frames", "lost"), rows, right=("frames", "lost"))
    print(table, end="", file=sys.stderr if output == STDOUT else sys.stdout)
    if report.error:
        raise RunError(f"the capture ended early: {report.error}")


def _render_injection(injection: Injection) -> str:
    """Return what became of the frames as text for people."""
    from testbed.cli.text import render_columns

    lines = [f"# sent {injection.sent_packets} frames, {injection.sent_bytes} bytes, from {injection.port}\n"]
    lines += [
        f"# refused: frame {frame.number} of {frame.length_bytes} bytes: {frame.reason}\n"
        for frame in injection.refused
    ]
    lines.append(f"# received {injection.received_packets} frames\n")
    if injection.lost_packets:
        lines.append(f"# warning: {injection.lost_packets} frames that reached the host found no room in our memory\n")
    if injection.received:
        seen = [(f"{frame.time_ns / 1e3:.3f}", frame.length_bytes, frame.text) for frame in injection.received]
        lines.append(render_columns(("time (us)", "bytes", "frame"), seen, right=("time (us)", "bytes")))
        more = injection.received_packets - len(injection.received)
        if more:
            lines.append(f"# and {more} more\n")
    moved: dict[str, list[str]] = {}
    for counter in injection.counters:
        moved.setdefault(counter.where, []).append(f"{counter.counter} {counter.moved:+d}")
    if moved:
        rows = [(where, ", ".join(changes)) for where, changes in moved.items()]
        lines.append("\n" + render_columns(("where", "counters that moved"), rows))
    return "".join(lines)
