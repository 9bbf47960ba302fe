"""The gate of kernels that have it: the plug qdisc, which holds its queue while it is closed.

What the queue above has already asked for still leaves, the frame that a real port would finish. Opening it makes the kernel look
at the queue: no kick, and no bucket that was filled meanwhile.

Source:
    Linux net/sched/sch_plug.c; include/uapi/linux/pkt_sched.h, ``struct tc_plug_qopt``.
"""

from __future__ import annotations

import struct

from testbed.kernel import tc
from testbed.kernel.gate import DataQueue
from testbed.kernel.netlink import NLM_F_CREATE, NLM_F_REPLACE, RTM_NEWQDISC, Message

# enum: what ``struct tc_plug_qopt`` asks for. BUFFER plugs a queue that flows.
_BUFFER, _RELEASE_INDEFINITE = 0, 2
# The qdisc never drops: admission does, before the frame is counted (docs/architecture.md).
_LIMIT_BYTES = 0x7FFFFFFF


class PlugGate:
    """See the module."""

    name = "plug"
    is_shaper = False
    needs_kick = False

    def create(self, queue: DataQueue, parent: int) -> list[Message]:
        """Return what hangs a plug under a class and opens it: a fresh one is closed."""
        payload = tc.qdisc_payload(queue.index, plug_handle(queue), parent, "plug", pack_plug(_BUFFER, _LIMIT_BYTES))
        operation = f"tc qdisc replace dev {queue.ifname} parent {tc.handle_text(parent)} plug limit {_LIMIT_BYTES}"
        return [Message(operation, RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, payload), self.open(queue)]

    def close(self, queue: DataQueue) -> Message:
        """Return what plugs the queue."""
        return self._change(queue, _BUFFER, "block")

    def open(self, queue: DataQueue) -> Message:
        """Return what lets it flow."""
        return self._change(queue, _RELEASE_INDEFINITE, "release_indefinite")

    def _change(self, queue: DataQueue, action: int, word: str) -> Message:
        handle = plug_handle(queue)
        payload = tc.qdisc_payload(queue.index, handle, 0, "plug", pack_plug(action, 0))
        operation = f"tc qdisc change dev {queue.ifname} handle {tc.handle_text(handle)} plug {word}"
        return Message(operation, RTM_NEWQDISC, 0, payload)


def plug_handle(queue: DataQueue) -> int:
    """Return the handle of a queue's plug."""
    return tc.PLUG_HANDLE + (queue.priority << 16)


def pack_plug(action: int, limit_bytes: int) -> bytes:
    """Return ``struct tc_plug_qopt``."""
    return struct.pack("=iI", action, limit_bytes)
