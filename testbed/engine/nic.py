"""The sending side of every NIC: line-rate pacing in virtual time, and the share of each QP.

A NIC is a server that is free again one frame time after it began to send. The tick asks how many frames it will have
begun by the next tick, so a late tick catches up and the rate is exact over any stretch in which the NIC had something to
send. Frames leave up to a tick early; when they *count* as sent is exact (``started_at_ns``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


class NicPacer:
    """Virtual-time pacing of all NICs.

    Args:
        wall_ns_per_byte: Time of one wire byte on each NIC, shape ``(nics,)``.
        frame_wire_bytes: Wire bytes of a full frame.
        wall_tick_ns: Length of a tick.
    """

    def __init__(self, wall_ns_per_byte: npt.NDArray[np.float64], frame_wire_bytes: int, wall_tick_ns: int) -> None:
        self._frame_wire_bytes = frame_wire_bytes
        self._tick_ns = wall_tick_ns
        self.set_rates(wall_ns_per_byte)
        self._free_at = np.zeros(len(wall_ns_per_byte))
        self._busy = np.zeros(len(wall_ns_per_byte), bool)
        self._scratch = np.zeros(len(wall_ns_per_byte))

    def set_rates(self, wall_ns_per_byte: npt.NDArray[np.float64]) -> None:
        """Let each NIC need another time for a byte from its next frame on, shape ``(nics,)``."""
        self._ns_per_byte = wall_ns_per_byte
        self._frame_ns = wall_ns_per_byte * self._frame_wire_bytes
        self._frames_per_ns = 1.0 / self._frame_ns

    def budget(
        self,
        now_ns: int,
        wants: npt.NDArray[np.int64],
        credit: npt.NDArray[np.floating[Any]],
        available_at_ns: npt.NDArray[np.float64],
    ) -> npt.NDArray[np.int64]:
        """Return how many full frames each NIC may begin before the next tick.

        Args:
            now_ns: The clock.
            wants: Frames each NIC has to send, shape ``(nics,)``.
            credit: Frames its queue has room for, shape ``(nics,)``; may be negative.
            available_at_ns: When a NIC that had nothing to send got something, shape ``(nics,)``.
        """
        demand = wants > 0
        fresh = demand > self._busy
        if fresh.any():
            self._free_at[fresh] = np.maximum(self._free_at[fresh], available_at_ns[fresh])
        self._busy = demand
        np.subtract(now_ns + self._tick_ns, self._free_at, out=self._scratch)
        self._scratch *= self._frames_per_ns
        due: npt.NDArray[np.int64] = np.minimum(self._scratch + 1.0, credit).astype(np.int64)
        np.minimum(due, wants, out=due)
        np.maximum(due, 0, out=due)
        return due

    def hold_until(self, nics: npt.NDArray[np.bool_], when_ns: npt.NDArray[np.float64] | float) -> None:
        """Let some NICs begin no frame before a time: what they did not send before is not made up for.

        Args:
            nics: Which, shape ``(nics,)``.
            when_ns: The time of each, shape ``(nics,)``, or of all.
        """
        np.maximum(self._free_at, when_ns, out=self._free_at, where=nics)

    def forgone_ns(
        self, due_at_ns: npt.NDArray[np.float64], when_ns: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        """Return what each NIC loses of its time by being held until ``when_ns``, shape ``(nics,)``.

        Args:
            due_at_ns: Until when it would have been held anyhow, infinite for one that has nothing to send.
            when_ns: No earlier than that.
        """
        lost = np.zeros(len(due_at_ns))
        np.subtract(when_ns, np.maximum(self._free_at, due_at_ns), out=lost, where=np.isfinite(due_at_ns))
        return np.maximum(0.0, lost)

    def charge(self, wire_bytes: npt.NDArray[np.integer[Any]]) -> None:
        """Charge the bytes that were sent, shape ``(nics,)``."""
        self._free_at += wire_bytes * self._ns_per_byte

    @property
    def started_at_ns(self) -> npt.NDArray[np.float64]:
        """Return when each NIC begins the last frame it was given, shape ``(nics,)``, for full frames."""
        return self._free_at - self._frame_ns

    def lag_ns(self, now_ns: int, wants: npt.NDArray[np.int64]) -> float:
        """Return how far the latest NIC that still has ``wants`` frames to send is behind its schedule, wall ns.

        At most about a frame time while the machine keeps up; negative when every NIC is ahead.
        """
        return float(((now_ns - self._free_at) * (wants > 0)).max(initial=0.0))

    def rest(self) -> None:
        """Note that no NIC has anything to send."""
        self._busy[:] = False


def take_turns(frames: Sequence[int], turn: int) -> list[int]:
    """Return the NICs that send in a tick in the order in which they do so: each begins as often as any other.

    What a tick sends reaches a shared queue NIC by NIC. The last would always find it deepest, and be marked, dropped or held
    back more than the first: with DCQCN, shares of 17:12:11:9 where equal ones are due. NICs that send nothing have no turn, or
    the one behind them would have theirs.

    Args:
        frames: What each NIC sends in this tick.
        turn: Number of the tick.
    """
    senders = [nic for nic, count in enumerate(frames) if count > 0]
    first = turn % max(len(senders), 1)
    return senders[first:] + senders[:first]


def share_budget(
    nic: npt.NDArray[np.int64],
    wants: npt.NDArray[np.int64],
    budget: npt.NDArray[np.int64],
    turn: int,
) -> npt.NDArray[np.int64]:
    """Divide each NIC's budget over its QPs, max-min fair, the odd frame going round.

    Args:
        nic: NIC of each active QP, shape ``(n,)``, ascending.
        wants: Frames each has to send, shape ``(n,)``.
        budget: Frames each NIC may send, shape ``(nics,)``.
        turn: Rotates who gets the odd frame.

    Returns:
        Frames for each QP, shape ``(n,)``.
    """
    counts = np.bincount(nic, minlength=len(budget))
    if counts.max(initial=0) <= 1:
        return np.minimum(wants, budget[nic])
    given = np.zeros(len(nic), np.int64)
    left = budget.copy()
    starts = np.concatenate(([0], np.cumsum(counts)[:-1]))
    for _ in range(int(counts.max()) + 1):
        hungry = given < wants
        users = np.bincount(nic[hungry], minlength=len(budget))
        share = np.where(users > 0, left // np.maximum(users, 1), 0)
        if not share.any():
            break
        more = np.where(hungry, np.minimum(wants - given, share[nic]), 0)
        given += more
        left -= np.bincount(nic, weights=more, minlength=len(budget)).astype(np.int64)
    # What is left of each NIC's budget is less than one frame a hungry QP: one each, beginning with another QP every turn. A QP's
    # rank is the number of hungry ones before it, counted round from the first QP of this turn.
    hungry = given < wants
    before = np.concatenate(([0], np.cumsum(hungry)))
    users = np.maximum(np.diff(before[np.concatenate((starts, [len(nic)]))]), 1)
    first = before[starts + turn % np.maximum(counts, 1)]
    rank = (before[:-1] - first[nic]) % users[nic]
    given += hungry & (rank < left[nic])
    return given
