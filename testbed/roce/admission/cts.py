"""Receiver-driven admission: a sender writes only what clear-to-send frames of its receiver have granted.

The receiver of a connection has a window of W bytes (its channels' buffers), which it grants in ``grants`` pieces. It begins
by granting all of them; a piece is granted anew when what it covered has arrived. So a connection never has more than W bytes
sent and not arrived, and N senders put at most N W into the network between them.

Pieces are counted in full packets: piece ``n`` ends at packet ``floor(n P / grants)``, ``P`` the whole packets in W. With several
queue pairs a connection has one window, which all of them draw on, whatever spreads the messages: what counts is how many packets
have arrived, not on which queue pair.

A lost grant is made up for by the next, because a grant stands for all before it. Where nothing arrives for ``silence_ns`` the
latest is repeated.

Source:
    Gangidi et al., "RDMA over Ethernet for Distributed AI Training at Meta Scale", SIGCOMM 2024 (receiver-driven traffic
    admission). NCCL, src/transport/net_ib.cc and net.cc: a FIFO of clear-to-send entries, ``NCCL_STEPS`` (8) of them per channel
    buffer of 4 MiB.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from testbed.roce.admission.protocol import GrantsDue, Ints

NAME = "cts"


@dataclass(frozen=True, slots=True)
class Parameters:
    """What bounds a connection.

    Attributes:
        window_bytes: W, payload that a connection may have sent and not arrived.
        grants: Pieces of the window, each of a full packet or more.
        mtu_bytes: Payload of a full packet.
        silence_ns: Repeat the latest grant after so long without an arrival.
    """

    window_bytes: int
    grants: int
    mtu_bytes: int
    silence_ns: float

    def __post_init__(self) -> None:
        if self.grants < 1:
            raise ValueError(f"cts needs at least one grant per window, got {self.grants}")
        if self.window_bytes < self.grants * self.mtu_bytes:
            raise ValueError(
                f"cts's {self.grants} grants must be of a packet of {self.mtu_bytes} bytes or more each, got a window of "
                f"{self.window_bytes} bytes"
            )
        if not self.silence_ns > 0:
            raise ValueError(f"cts's silence_ns must be above 0, got {self.silence_ns!r}")

    @property
    def window_packets(self) -> int:
        """Return the whole packets in the window."""
        return self.window_bytes // self.mtu_bytes


class Scheme:
    """Windows of all connections; see `protocol.AdmissionScheme`."""

    grants_needed = True

    def __init__(self, parameters: Parameters, connections: int) -> None:
        self._window, self._grants = parameters.window_packets, parameters.grants
        self._silence_ns = parameters.silence_ns
        self._packets = np.zeros(connections, np.int64)
        self._needed = np.zeros(connections, np.int64)
        self._arrived = np.zeros(connections, np.int64)
        self._quiet_since_ns = np.zeros(connections)

    def restart(self, now_ns: float, packets: Ints) -> None:
        """Begin an iteration; nothing is granted yet."""
        self._packets = packets.copy()
        # The first grant that ends at or behind the last packet.
        self._needed = -(-packets * self._grants // self._window)
        self._arrived = np.zeros_like(packets)
        self._quiet_since_ns = np.full(len(packets), float(now_ns))

    def due(self, now_ns: float, arrived_packets: Ints) -> GrantsDue:
        """Return what should be granted: the window beyond the pieces that have arrived whole, and no more than is needed."""
        moved = arrived_packets > self._arrived
        np.copyto(self._arrived, arrived_packets)
        self._quiet_since_ns[moved] = now_ns
        repeat = (now_ns - self._quiet_since_ns >= self._silence_ns) & (arrived_packets < self._packets)
        self._quiet_since_ns[repeat] = now_ns
        # Pieces n with floor(n P / grants) <= arrived.
        whole = ((arrived_packets + 1) * self._grants - 1) // self._window
        return GrantsDue(np.minimum(whole + self._grants, self._needed), repeat)

    def admitted_packets(self, grants: Ints) -> Ints:
        """Return where the latest grant received ends."""
        return np.minimum(grants * self._window // self._grants, self._packets)

    def granted_packets(self, connections: Ints, grants: Ints) -> tuple[Ints, Ints]:
        """Return where pieces begin, and their packets."""
        begin = (grants - 1) * self._window // self._grants
        return begin, np.minimum(grants * self._window // self._grants, self._packets[connections]) - begin
