"""What the tick loop is given and what it gives back, as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from testbed.collectives import IntraHostLinks
from testbed.engine.frames import ForeignMemory
from testbed.measure.samples import AdmissionSamples, MachineSamples
from testbed.roce.queue_pairs import Connection


class Clock(Protocol):
    """The only source of time."""

    def now_ns(self) -> int:
        """Return the time, ns."""

    def sleep_until_ns(self, when_ns: int) -> None:
        """Sleep until a time."""


class Probe(Protocol):
    """A frame sent through the fabric's CPU alone, to see how long it waits there."""

    def send(self, now_ns: int) -> None:
        """Send a probe unless one is under way."""

    def restart(self) -> None:
        """Forget the waits so far."""

    def waits_ns(self) -> list[int]:
        """Return the wait of every probe since the last restart."""


@dataclass(frozen=True)
class EngineSetup:
    """All that the loop needs to know, as values.

    Attributes:
        connections: Both ends of every connection over the network: the first ones of the schedules.
        one_way_ns: Propagation and frame times of each connection's path, shape ``(connections,)``, emulated.
        time_dilation: Wall time per emulated time.
        wall_tick_ns: Length of a tick.
        mtu: Payload of a full packet, bytes.
        nic_port: Port id of each NIC, shape ``(nics,)``.
        wall_port_rate_bytes_per_s: Line rate of each port id, shape ``(ports + 1,)``.
        priority_weights: Every priority that carries data, ascending, and its share of a link beside the others'; None: strict.
        retransmit_timeout_ns: Emulated.
        wall_burst_ns: What each port's token bucket holds, as time at its rate, shape ``(ports + 1,)``.
        shaper_gain_fraction: How much faster than its link each port's shaper is, shape ``(ports + 1,)``.
        max_backlog_frames: Frames that wait for the fabric's CPU before the kernel drops.
        resolution_error_fraction: What a tick more of latency would add to the ideal completion time.
        intra_host: What carries the schedules' other connections, inside hosts; None where there are none.
        wall_cnp_interval_ns: A responder sends at most one CNP per QP in this time; 0: none at all.
        selective: Whether what is missing alone is sent again; else go-back-N.
        reorder_time_ns: How long a packet may be overtaken before it counts as lost, emulated; None: some of its path's
            round trips, and some ticks.
        reorder_loops: How many round trips that is.
        foreign: What each connection writes into a peer that is not ours, such as the kernel's RoCE; None where the fabric's
            responders answer. What such a peer has acknowledged counts as arrived, a round trip late.
    """

    connections: Sequence[Connection]
    one_way_ns: npt.NDArray[np.int64]
    time_dilation: float
    wall_tick_ns: int
    mtu: int
    nic_port: npt.NDArray[np.int64]
    wall_port_rate_bytes_per_s: npt.NDArray[np.float64]
    priority_weights: Mapping[int, int | None]
    retransmit_timeout_ns: int
    wall_burst_ns: npt.NDArray[np.float64]
    shaper_gain_fraction: npt.NDArray[np.float64]
    max_backlog_frames: int = 1000
    resolution_error_fraction: float = 0.0
    intra_host: IntraHostLinks | None = None
    wall_cnp_interval_ns: int = 0
    selective: bool = False
    reorder_time_ns: int | None = None
    reorder_loops: int = 1
    foreign: Sequence[ForeignMemory] | None = None


@dataclass
class IterationResult:
    """What one iteration did.

    Attributes:
        wall_ns: From release to the last arrival.
        wall_seen_ns: From release to the tick that saw the last arrival: the same without the engine's account of
            propagation between ticks.
        retransmitted_packets: Packets sent again.
        timeouts: Retransmission timers that ran out.
        machine: What was noted about the machine.
        wall_paused_ns: Time each port was paused, at the priority for which that was longest, shape ``(ports + 1,)``.
        wall_end_ns: From release to the last arrival of each connection, shape ``(connections,)``.
        together_bytes: Payload that each connection had delivered when the first of them ended, shape ``(connections,)``.
        wall_together_ns: From release to the tick that saw the first connection's end.
        nvlink_bytes: Payload that the model of the links inside hosts carried.
        admission: What was noted about grants; None where there are none.
        wall_inside_end_ns: From release to the last arrival of each of the schedule's connections inside hosts, shape
            ``(schedule's connections,)``; 0 for all others.
    """

    wall_ns: int
    wall_seen_ns: int
    retransmitted_packets: int
    timeouts: int
    machine: MachineSamples
    wall_paused_ns: npt.NDArray[np.float64]
    wall_end_ns: npt.NDArray[np.float64]
    together_bytes: npt.NDArray[np.int64]
    wall_together_ns: int
    nvlink_bytes: int = 0
    admission: AdmissionSamples | None = None
    wall_inside_end_ns: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
