"""Priority flow control in the tick: who must be asked to pause, who was asked and must obey, and when.

The eBPF programs note, packet by packet, when an ingress port's lossless priority crosses its thresholds and what PFC frames a
port has received. The tick sends the frames, and moves the gates of ports that have received one. A cable's delay is not on
the wire here, so a gate moves two cable delays and the response time after the threshold was crossed: that is when the last
frame sent before the pause would have arrived. The wall time that the frame and the tick have taken is part of it.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

MAX_QUANTA = 0xFFFF
_PRIORITIES = 8


QueueKey = tuple[int, int]
"""A queue: port id and priority."""


class Gates(Protocol):
    """Holds back and lets go the data queues of ports."""

    def move(self, close: Sequence[QueueKey], open: Sequence[QueueKey]) -> None:
        """Close some gates and open others."""

    def set_rates(self, wall_rates_bytes_per_s: Mapping[int, int]) -> None:
        """Let ports that are open, or will be, have another rate; ports without a gate do not matter."""


class PauseSender(Protocol):
    """Sends PFC frames out of ports."""

    def send(self, port: int, priority: int, quanta: int) -> None:
        """Send one frame about one priority: ``quanta`` > 0 is XOFF, 0 is XON."""


@dataclass(frozen=True, slots=True)
class PausableLink:
    """One priority of one direction of a link, which its receiving end can pause.

    Attributes:
        sender: Port id of the end that sends data and can be paused.
        receiver: Port id of the end that receives data and asks for pauses.
        priority: The priority.
        wall_delay_ns: From a crossed threshold to the last frame: two cable delays and the response time.
        wall_quantum_ns: Duration of one pause quantum.
        wall_refill_ns: What a reopened gate lets go at once, as time at the link's rate: it opens that much later.
    """

    sender: int
    receiver: int
    priority: int
    wall_delay_ns: int
    wall_quantum_ns: float
    wall_refill_ns: int


@dataclass(frozen=True, slots=True)
class WatchdogSetup:
    """The PFC watchdog: wall times, and whether a released queue's frames are dropped or forwarded."""

    wall_detect_ns: int
    wall_restore_ns: int
    drops: bool


class NoFlowControl:
    """A fabric without PFC."""

    def __init__(self, ports: int) -> None:
        self.closed = np.zeros((ports, _PRIORITIES), bool)
        self.blocked = np.zeros((ports, _PRIORITIES), bool)
        self.any_closed = False
        self.lateness_ns: list[int] = []

    def paused_until(self, now_ns: int) -> npt.NDArray[np.float64]:
        """Return zeros: nothing was ever paused."""
        return np.zeros(self.closed.shape)

    def tick(self, now_ns: int) -> None:
        """Do nothing."""

    def forget_blocked(self) -> None:
        """Do nothing."""

    def forget_frames(self) -> None:
        """Do nothing."""

    def set_dead(self, ports: frozenset[int], now_ns: int) -> None:
        """Do nothing."""

    def set_rates(self, wall_rates_bytes_per_s: Mapping[int, int]) -> None:
        """Do nothing."""


class FlowControl:
    """PFC on all links of a fabric, of each priority for itself.

    Args:
        links: Directions that can be paused.
        queues: Egress queues, shape ``(ports + 1, 8)``.
        ingress: Ingress accounts, the same shape.
        gates: Stops and releases data queues.
        sender: Sends PFC frames.
        wall_tick_ns: Length of a tick.
        watchdog: The watchdog, or None.

    Attributes:
        closed: Whether each queue is paused now, shape ``(ports + 1, 8)``.
        blocked: Whether it was at any tick since :meth:`forget_blocked`.
        paused_ns: Wall time each queue was paused in pauses that have ended, shape ``(ports + 1, 8)``.
        pauses: How many pauses each port obeyed.
        lateness_ns: How late each closing was, wall ns; negative where a tick was early.
        expired_pauses: Pauses that ended for want of a refresh.
        watchdog_releases: Times the watchdog stepped in.
    """

    def __init__(
        self,
        links: Sequence[PausableLink],
        *,
        queues: npt.NDArray[Any],
        ingress: npt.NDArray[Any],
        gates: Gates,
        sender: PauseSender,
        wall_tick_ns: int,
        watchdog: WatchdogSetup | None = None,
    ) -> None:
        self._links = list(links)
        self._gates, self._sender, self._watchdog = gates, sender, watchdog
        self._half_tick_ns = wall_tick_ns // 2
        priorities = np.array([link.priority for link in links], np.int64)
        receivers = np.array([link.receiver for link in links], np.int64), priorities
        senders = np.array([link.sender for link in links], np.int64), priorities
        self._xoff, self._changed_ns = ingress["xoff"], ingress["changed_ns"]
        self._changes, self._used_bytes = ingress["changes"], ingress["used_bytes"]
        self._queues = queues
        self._frames = queues["pause_frames"]
        self._receivers, self._senders = receivers, senders
        self._keys: list[QueueKey] = [(link.sender, link.priority) for link in links]
        self._changes_seen = self._changes[receivers]
        self._frames_seen = self._frames[senders]
        count = len(self._links)
        self._asked = [False] * count
        self._asked_ns = [0] * count
        self._crossed_ns = [0] * count
        self._own_frames = self._frames_seen.astype(np.int64).tolist()
        self._pending: list[tuple[int, int, int, int, int]] = []
        self._number = 0
        self._dead = [False] * count
        self._is_closed = [False] * count
        self._closed_ns = [0] * count
        self._until_ns = [0] * count
        self._heard_ns = [0] * count
        self._storm = [False] * count
        self._storms = 0
        self._refresh_ns = [int(link.wall_quantum_ns * MAX_QUANTA / 2) for link in self._links]
        self._open_count = 0
        ports = len(queues)
        self.closed = np.zeros((ports, _PRIORITIES), bool)
        self.blocked = np.zeros((ports, _PRIORITIES), bool)
        self.any_closed = False
        self.paused_ns = np.zeros((ports, _PRIORITIES))
        self.pauses = np.zeros(ports, np.int64)
        self.lateness_ns: list[int] = []
        self.expired_pauses = 0
        self.watchdog_releases = 0

    def open_all(self, now_ns: int) -> None:
        """Open every gate, whatever it was."""
        self._gates.move((), self._keys)
        self._pending.clear()
        for index in range(len(self._links)):
            if self._is_closed[index]:
                self._note_open(index, now_ns)
            if self._storm[index]:
                self._set_storm(index, on=False)

    def paused_until(self, now_ns: int) -> npt.NDArray[np.float64]:
        """Return the wall time that each queue has been paused so far, shape ``(ports + 1, 8)``."""
        result = self.paused_ns.copy()
        for index, closed in enumerate(self._is_closed):
            if closed:
                result[self._keys[index]] += now_ns - self._closed_ns[index]
        return result

    def forget_blocked(self) -> None:
        """Begin to gather `blocked` anew."""
        np.copyto(self.blocked, self.closed)

    def forget_frames(self) -> None:
        """Take it that no port holds a frame: those still accounted for were lost by the machine."""
        self._used_bytes[self._receivers] = 0
        self._xoff[self._receivers] = 0
        for index, asked in enumerate(self._asked):
            if asked:
                self._sender.send(self._links[index].receiver, self._links[index].priority, 0)
                self._own_frames[index] += 1
                self._asked[index] = False

    def set_rates(self, wall_rates_bytes_per_s: Mapping[int, int]) -> None:
        """Note that shapers have been given other rates, by port id: open gates have those from now on."""
        self._gates.set_rates(wall_rates_bytes_per_s)
        closed = [key for key in self._keys if key[0] in wall_rates_bytes_per_s and self.closed[key]]
        if closed:  # the change has opened them
            self._gates.move(closed, ())

    def set_dead(self, ports: frozenset[int], now_ns: int) -> None:
        """Note which links are down: no PFC frame crosses them, and what one has said is forgotten.

        A port whose link goes down is no longer paused: what stands in its queue goes, and is lost. When the link is up again
        and the other end still has too much, it says so anew.

        Args:
            ports: Both ends of all links that are down.
            now_ns: The clock.
        """
        opening = []
        for index, link in enumerate(self._links):
            was, self._dead[index] = self._dead[index], link.sender in ports
            if self._dead[index] and not was:
                self._asked[index] = False
                self._pending = [one for one in self._pending if one[2] != index]
                if self._is_closed[index]:
                    self._note_open(index, now_ns)
                    opening.append(self._keys[index])
                if self._storm[index]:
                    self._set_storm(index, on=False)
            elif was and not self._dead[index] and self._xoff[link.receiver, link.priority]:
                self._changes_seen[index] -= 1  # the next tick announces it
        heapq.heapify(self._pending)
        if opening:
            self._gates.move((), opening)
            for key in opening:
                self.closed[key] = False
                self.blocked[key] = True

    def tick(self, now_ns: int) -> None:
        """Send what PFC frames are due and move the gates of ports that have received some."""
        changes = self._changes[self._receivers]
        if (changes != self._changes_seen).any():
            self._announce(now_ns, changes)
        frames = self._frames[self._senders]
        if (frames != self._frames_seen).any():
            self._hear(frames)
        if any(self._asked):
            self._refresh(now_ns)
        if self._pending or self.any_closed or self._storms:
            self._obey(now_ns)

    def _announce(self, now_ns: int, changes: npt.NDArray[Any]) -> None:
        """Send PFC frames out of ports whose thresholds were crossed since the last tick."""
        for index in np.flatnonzero(changes != self._changes_seen).tolist():
            if self._dead[index]:
                continue
            account = self._links[index].receiver, self._links[index].priority
            asks = bool(self._xoff[account])
            moves = int(changes[index] - self._changes_seen[index])
            self._crossed_ns[index] = int(self._changed_ns[account])
            if not asks and moves > 1 and not self._asked[index]:
                self._send(index, MAX_QUANTA, now_ns)  # up and down again between two ticks
            self._send(index, MAX_QUANTA if asks else 0, now_ns)
            self._asked[index] = asks
        self._changes_seen = changes

    def _refresh(self, now_ns: int) -> None:
        for index, asked in enumerate(self._asked):
            if asked and now_ns - self._asked_ns[index] >= self._refresh_ns[index]:
                self._send(index, MAX_QUANTA, now_ns)

    def _send(self, index: int, quanta: int, now_ns: int) -> None:
        self._sender.send(self._links[index].receiver, self._links[index].priority, quanta)
        self._own_frames[index] += 1
        self._asked_ns[index] = now_ns

    def _hear(self, frames: npt.NDArray[Any]) -> None:
        """Note the PFC frames that ports have received since the last tick: the last of each counts."""
        for index in np.flatnonzero(frames != self._frames_seen).tolist():
            link = self._links[index]
            row = self._queues[link.sender, link.priority]
            quanta, received_ns = int(row["pause_quanta"]), int(row["pause_received_ns"])
            if quanta:
                self._heard_ns[index] = received_ns
            # A frame of ours stands for a threshold crossed a while ago; one that somebody injected, for its arrival.
            foreign = int(frames[index]) > self._own_frames[index]
            begin_ns = received_ns if foreign else self._crossed_ns[index]
            if foreign:
                self._own_frames[index] = int(frames[index])
            due_ns = begin_ns + link.wall_delay_ns + (0 if quanta else link.wall_refill_ns)
            until_ns = received_ns + link.wall_delay_ns + int(quanta * link.wall_quantum_ns)
            self._number += 1
            heapq.heappush(self._pending, (due_ns, self._number, index, quanta, until_ns))
        self._frames_seen = frames

    def _obey(self, now_ns: int) -> None:
        """Move the gates whose time has come."""
        close: list[int] = []
        open_: list[int] = []
        horizon_ns = now_ns + self._half_tick_ns
        while self._pending and self._pending[0][0] <= horizon_ns:
            due_ns, _, index, quanta, until_ns = heapq.heappop(self._pending)
            if quanta:
                self._until_ns[index] = until_ns
                if not self._is_closed[index] and not self._storm[index]:
                    self._note_closed(index, now_ns)
                    self.lateness_ns.append(now_ns - due_ns)
                    close.append(index)
            elif self._is_closed[index]:
                self._note_open(index, now_ns)
                open_.append(index)
        if self.any_closed or self._storms:
            open_ += self._find_releases(now_ns, horizon_ns)
        # What closes and opens in the same tick only opens.
        closing = [self._keys[index] for index in close if self._is_closed[index]]
        opening = [self._keys[index] for index in open_ if not self._is_closed[index]]
        if closing or opening:
            self._gates.move(closing, opening)
            for key in closing:
                self.closed[key] = self.blocked[key] = True
            for key in opening:
                self.closed[key] = False
                self.blocked[key] = True

    def _find_releases(self, now_ns: int, horizon_ns: int) -> list[int]:
        """Return gates that open without being told to: quanta that ran out, the watchdog."""
        released = []
        for index in range(len(self._links)):
            if self._is_closed[index] and self._until_ns[index] <= horizon_ns:
                self.expired_pauses += 1
                self._note_open(index, now_ns)
                released.append(index)
            elif self._watchdog is not None:
                if self._is_closed[index] and now_ns - self._closed_ns[index] >= self._watchdog.wall_detect_ns:
                    self.watchdog_releases += 1
                    self._set_storm(index, on=True)
                    self._note_open(index, now_ns)
                    released.append(index)
                elif self._storm[index] and now_ns - self._heard_ns[index] >= self._watchdog.wall_restore_ns:
                    self._set_storm(index, on=False)
        return released

    def _set_storm(self, index: int, *, on: bool) -> None:
        self._storm[index] = on
        self._storms = sum(self._storm)
        if self._watchdog is not None and self._watchdog.drops:
            self._queues["discard"][self._keys[index]] = on

    def _note_closed(self, index: int, now_ns: int) -> None:
        self._is_closed[index] = True
        self._closed_ns[index] = now_ns
        self._open_count += 1
        self.any_closed = True
        self.pauses[self._links[index].sender] += 1

    def _note_open(self, index: int, now_ns: int) -> None:
        self._is_closed[index] = False
        self.paused_ns[self._keys[index]] += now_ns - self._closed_ns[index]
        self._open_count -= 1
        self.any_closed = self._open_count > 0
