"""How frames leave: runs of a connection's ring where a NIC sends on one QP, else frame by frame in turns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from testbed.engine.frames import FrameWriter
from testbed.engine.nic import take_turns


class FrameSender:
    """Sends frames that were written ahead; every tick another NIC begins.

    Args:
        writer: The frames of every connection.
        nic: NIC of each connection, shape ``(connections,)``.
        sockets: File descriptor of each NIC's packet socket.
    """

    def __init__(self, writer: FrameWriter, nic: npt.NDArray[np.int64], sockets: Sequence[int]) -> None:
        self._writer, self._nic, self._sockets = writer, nic, sockets
        self._turn = 0

    def send_runs(self, shares: npt.NDArray[np.int64], packet: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Send ``shares`` packets of every connection from ``packet`` on, a run of its ring each.

        Returns:
            How many the kernel took of each, shape ``(connections,)``.
        """
        writer, sockets = self._writer, self._sockets
        depth, send = writer.depth, writer.ring.send_slots
        np.minimum(shares, writer.ready_until - packet, out=shares)
        np.maximum(shares, 0, out=shares)
        counts = shares.tolist()
        places = (packet % depth).tolist()
        for connection in take_turns(counts, self._turn):
            count, place = counts[connection], places[connection]
            run = min(count, depth - place)
            done = send(sockets[connection], connection * depth + place, run)
            if done == run and run < count:
                done += send(sockets[connection], connection * depth, count - run)
            if done < count:
                shares[connection] = done
        self._turn += 1
        return shares

    def send_interleaved(
        self, active: npt.NDArray[np.intp], shares: npt.NDArray[np.int64], packet: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Send packets of several QPs per NIC, the QPs of a NIC taking turns packet by packet.

        Args:
            active: Connections that send, those of a NIC beside each other, shape ``(n,)``.
            shares: Packets of each.
            packet: Next packet of every connection.

        Returns:
            How many the kernel took of each, shape ``(n,)``.
        """
        writer, nic = self._writer, self._nic[active]
        shares = np.maximum(np.minimum(shares, (writer.ready_until - packet)[active]), 0)
        total = int(shares.sum())
        if not total:
            return shares
        row = np.repeat(np.arange(len(active)), shares)
        offset = np.arange(total) - np.repeat(np.cumsum(shares) - shares, shares)
        order = np.lexsort((row, offset, nic[row]))
        row, offset = row[order], offset[order]
        ring = writer.ring
        ring.line_up(writer.slots_of(active[row], packet[active][row] + offset))
        taken = shares
        counts = np.bincount(nic, weights=shares).astype(np.int64)
        positions = (np.cumsum(counts) - counts).tolist()
        of_hosts = counts.tolist()
        for host in take_turns(of_hosts, self._turn):
            frames, position = of_hosts[host], positions[host]
            done = ring.send_lined_up(self._sockets[host], position, frames)
            if done < frames:
                refused = np.bincount(row[position + done : position + frames], minlength=len(active))
                taken = taken - refused
        self._turn += 1
        return taken
