"""The gate that every kernel has: the queue's token bucket filter, turned down to a crawl.

Closed, its rate lets the one frame go that a real port would finish; open, it has its rate again. The filter does not look at
its queue when it is changed, so a kick follows: a small frame through the queue.
"""

from __future__ import annotations

from testbed.kernel import tc
from testbed.kernel.gate import DataQueue
from testbed.kernel.netlink import Message

# A frame a week: it never sends a second one, and the kernel's arithmetic holds.
_CRAWL_BYTES_PER_S = 1
# Where a class above makes the rate, an open gate limits nothing.
_OPEN_SPEEDUP = 16


class TbfGate:
    """See the module."""

    name = "tbf"
    is_shaper = True
    needs_kick = True

    def create(self, queue: DataQueue, parent: int) -> list[Message]:
        """Return nothing: the shaper is the gate."""
        return []

    def close(self, queue: DataQueue) -> Message:
        """Return what turns the queue's shaper down."""
        return _shaper(queue, _CRAWL_BYTES_PER_S, queue.frame_wire_bytes)

    def open(self, queue: DataQueue) -> Message:
        """Return what gives it its rate again."""
        return create_shaper(queue)


def create_shaper(queue: DataQueue) -> Message:
    """Return what creates a queue's token bucket filter, or opens it."""
    speedup = _OPEN_SPEEDUP if queue.is_class else 1
    return _shaper(queue, queue.wall_rate_bytes_per_s * speedup, queue.burst_bytes)


def shaper_handle(queue: DataQueue) -> int:
    """Return the handle of a queue's token bucket filter."""
    return tc.SHAPER_HANDLE + (queue.priority << 16) if queue.is_class else tc.DATA_HANDLE


def _shaper(queue: DataQueue, rate: int, burst: int) -> Message:
    return tc.create_tbf(
        queue.index,
        queue.ifname,
        queue.parent,
        shaper_handle(queue),
        rate_bytes_per_s=rate,
        burst_bytes=burst,
        overhead_bytes=queue.overhead_bytes,
    )
