"""What the fabric's counters say about a stretch of time: the difference of two snapshots.

The eBPF programs only ever add, so a reader takes a baseline and subtracts it. The exception is the greatest depth of a
queue, which the reader sets to 0 before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Copies of the counters at one time.

    Attributes:
        queues: The egress queue of each port and priority, shape ``(ports + 1, 8)``, dtype ``layout.QUEUE``.
        out_of_order_packets: Sum over all QPs.
        nak_packets: NAKs received by requesters, sum over all QPs.
        cnp_packets: CNPs received by requesters, sum over all QPs.
        headroom_drops_packets: Lossless frames for which there was no room, by ingress port, shape ``(ports + 1,)``.
        duplicate_packets: Data packets that responders had already, sum over all QPs.
    """

    queues: npt.NDArray[Any]
    out_of_order_packets: int
    nak_packets: int
    cnp_packets: int = 0
    headroom_drops_packets: npt.NDArray[np.int64] | None = None
    duplicate_packets: int = 0

    @classmethod
    def of(cls, queues: npt.NDArray[Any], qps: npt.NDArray[Any], ingress: npt.NDArray[Any] | None = None) -> Self:
        """Return a snapshot of the running fabric's arrays; without ``ingress`` nothing is lossless."""
        return cls(
            queues.copy(),
            int(qps["out_of_order_packets"].sum()),
            int(qps["naks_packets"].sum()),
            int(qps["cnps_packets"].sum()),
            None if ingress is None else ingress["headroom_drops_packets"].astype(np.int64).sum(axis=1),
            int(qps["duplicate_packets"].sum()),
        )


@dataclass(frozen=True, eq=False)
class FabricCounters:
    """What the fabric did over some stretches of time.

    Attributes:
        sent_bytes: Frame bytes without FCS that left each port's queues, shape ``(ports + 1,)``, int64; by port id.
        sent_packets: Frames that did, the same shape.
        drops_packets: Frames dropped before each port's queues, the same shape.
        peak_bytes: Greatest depth of any queue of each port, the same shape.
        out_of_order_packets: Frames that receivers refused for their PSN.
        nak_packets: NAKs that reached their requester.
        wall_duration_ns: Length of those stretches.
        marked_packets: Frames on which each port set CE, shape ``(ports + 1,)``.
        lost_packets: Frames lost on the link behind each port, the same shape.
        pause_frames: PFC frames each port received, XOFF and XON, by priorities named in them, the same shape.
        headroom_drops_packets: Lossless frames for which their ingress port had no room left, the same shape.
        cnp_packets: CNPs that reached their requester.
        duplicate_packets: Data packets that reached their responder again.
    """

    sent_bytes: npt.NDArray[np.int64]
    sent_packets: npt.NDArray[np.int64]
    drops_packets: npt.NDArray[np.int64]
    peak_bytes: npt.NDArray[np.int64]
    out_of_order_packets: int
    nak_packets: int
    wall_duration_ns: int
    marked_packets: npt.NDArray[np.int64]
    lost_packets: npt.NDArray[np.int64]
    pause_frames: npt.NDArray[np.int64]
    headroom_drops_packets: npt.NDArray[np.int64]
    cnp_packets: int
    duplicate_packets: int = 0

    @classmethod
    def between(cls, before: Snapshot, after: Snapshot, *, wall_duration_ns: int) -> Self:
        """Return what was counted between two snapshots of one run of the QP table."""

        def moved(name: str) -> npt.NDArray[np.int64]:
            difference: npt.NDArray[np.int64] = (after.queues[name] - before.queues[name]).astype(np.int64).sum(axis=1)
            return difference

        return cls(
            sent_bytes=moved("deq_bytes"),
            sent_packets=moved("deq_packets"),
            drops_packets=moved("drop_packets"),
            peak_bytes=after.queues["peak_bytes"].max(axis=1).astype(np.int64),
            out_of_order_packets=after.out_of_order_packets - before.out_of_order_packets,
            nak_packets=after.nak_packets - before.nak_packets,
            wall_duration_ns=wall_duration_ns,
            marked_packets=moved("marked_packets"),
            lost_packets=moved("lost_packets"),
            pause_frames=moved("pause_frames"),
            headroom_drops_packets=np.zeros(len(after.queues), np.int64)
            if after.headroom_drops_packets is None or before.headroom_drops_packets is None
            else after.headroom_drops_packets - before.headroom_drops_packets,
            cnp_packets=after.cnp_packets - before.cnp_packets,
            duplicate_packets=after.duplicate_packets - before.duplicate_packets,
        )

    def __add__(self, other: FabricCounters) -> FabricCounters:
        """Return the counters of both stretches together."""
        return FabricCounters(
            self.sent_bytes + other.sent_bytes,
            self.sent_packets + other.sent_packets,
            self.drops_packets + other.drops_packets,
            np.maximum(self.peak_bytes, other.peak_bytes),
            self.out_of_order_packets + other.out_of_order_packets,
            self.nak_packets + other.nak_packets,
            self.wall_duration_ns + other.wall_duration_ns,
            self.marked_packets + other.marked_packets,
            self.lost_packets + other.lost_packets,
            self.pause_frames + other.pause_frames,
            self.headroom_drops_packets + other.headroom_drops_packets,
            self.cnp_packets + other.cnp_packets,
            self.duplicate_packets + other.duplicate_packets,
        )

    def utilisation_fraction(self, port: int, *, wall_rate_bytes_per_s: float, overhead_bytes: int) -> float | None:
        """Return how full a port's link was: wire bytes over what it could have carried; None where no time passed.

        Args:
            port: Port id.
            wall_rate_bytes_per_s: Line rate on this machine's clock.
            overhead_bytes: Bytes on the wire beside each frame.
        """
        if not self.wall_duration_ns:
            return None
        wire_bytes = int(self.sent_bytes[port]) + overhead_bytes * int(self.sent_packets[port])
        return wire_bytes * 1e9 / (wall_rate_bytes_per_s * self.wall_duration_ns)
