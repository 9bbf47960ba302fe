"""Our RoCEv2 meets the kernel's in each way there is; are all bytes there?"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from testbed.carriers.buffers import Bytes
from testbed.carriers.interop import (
    RxeEnd,
    answer_foreign,
    connect_rxe,
    rxe_end,
    store_endpoint,
    store_responder,
    write_to_foreign,
)
from testbed.engine.frames import ForeignMemory
from testbed.errors import RunError
from testbed.fabric import Fabric
from testbed.roce.queue_pairs import REQUESTER, RESPONDER

_MESSAGE_BYTES = 1 << 20
_MOST_MESSAGES = 32
_STALL_S = 20.0
# What rxe is told of memory of ours: numbers of our own choosing.
_ADDRESS, _RKEY = 0x7E57_0000_1000, 0x1BADCAFE


@dataclass(frozen=True, slots=True)
class InteropRow:
    """What came of one direction.

    Attributes:
        direction: Who sends to whom.
        size_bytes: Payload.
        lost_packets: Frames that links have lost, either way.
        nak_packets: NAKs of whoever answers.
        retransmitted_packets: Packets sent again by whoever sends.
        is_whole: Whether all bytes were there: compared, or counted where nobody keeps them.
        error: Why it did not end, if it did not.
    """

    direction: str
    size_bytes: int
    lost_packets: int = 0
    nak_packets: int = 0
    retransmitted_packets: int = 0
    is_whole: bool = False
    error: str | None = None


def _write_engine_to_rxe(fabric: Fabric, sent: Bytes) -> tuple[bool, int, int]:
    memory = np.zeros(len(sent), np.uint8)
    with _connected(fabric, RESPONDER, memory) as end:
        foreign = ForeignMemory(end.rkey, sent)
        result = write_to_foreign(
            fabric, end.qpn, foreign, end.virtual_address, message_bytes=_message_bytes(len(sent))
        )
        return bool((memory == sent).all()), end.counters()["out_of_seq_request"], result.retransmitted_packets


def _write_rxe_to_store(fabric: Fabric, sent: Bytes) -> tuple[bool, int, int]:
    memory = bytearray(len(sent))
    with _connected(fabric, REQUESTER, sent) as end:
        store = store_responder(fabric, end.qpn, memory, virtual_address=_ADDRESS, rkey=_RKEY)
        with store_endpoint(fabric, store) as endpoint:
            again = _write_all(fabric, end, len(sent), lambda: endpoint.serve(0.01))
    return memory == sent.tobytes(), store.responder.counts["naks"], again


def _write_rxe_to_fabric(fabric: Fabric, sent: Bytes) -> tuple[bool, int, int]:
    with _connected(fabric, REQUESTER, sent) as end:
        row = answer_foreign(fabric, end.qpn)
        again = _write_all(fabric, end, len(sent), lambda: time.sleep(0.01))
        return int(row["rx_payload_bytes"]) == len(sent), int(row["sent_naks_packets"]), again


_Way = Callable[[Fabric, Bytes], tuple[bool, int, int]]
DIRECTIONS: Mapping[str, _Way] = {
    "engine to rxe": _write_engine_to_rxe,
    "rxe to our store": _write_rxe_to_store,
    "rxe to the fabric (counted)": _write_rxe_to_fabric,
}
"""Whether all bytes were there, NAKs and packets sent again, of random bytes over a fabric that nothing else uses."""


def check_direction(direction: str, fabric: Fabric, size_bytes: int) -> InteropRow:
    """Write that many random bytes in one of the directions, once per fabric."""
    sent = np.random.default_rng(fabric.plan.scenario.seed).integers(0, 256, size_bytes, np.uint8)
    try:
        is_whole, naks, again = DIRECTIONS[direction](fabric, sent)
    except RunError as error:
        return InteropRow(direction, size_bytes, _count_lost(fabric), error=error.message)
    return InteropRow(direction, size_bytes, _count_lost(fabric), naks, again, is_whole)


@contextlib.contextmanager
def _connected(fabric: Fabric, role: int, buffer: Bytes) -> Iterator[RxeEnd]:
    connection = fabric.plan.workloads[0].connections[0]
    nic = (connection.requester if role == REQUESTER else connection.responder).local.nic
    with rxe_end(fabric, nic, buffer) as end:
        connect_rxe(fabric, end, role)
        yield end


def _message_bytes(size_bytes: int) -> int:
    return max(_MESSAGE_BYTES, -(-size_bytes // _MOST_MESSAGES))


def _write_all(fabric: Fabric, end: RxeEnd, size_bytes: int, work: Callable[[], object]) -> int:
    """Let rxe write all of its buffer to us; return how many packets it sent again."""
    message = _message_bytes(size_bytes)
    begins = range(0, size_bytes, message)
    sizes = [min(message, size_bytes - begin) for begin in begins]
    for begin, nbytes in zip(begins, sizes, strict=True):
        end.write(begin, nbytes, virtual_address=_ADDRESS + begin, rkey=_RKEY)
    statuses: list[int] = []
    moved = time.monotonic()
    while len(statuses) < len(sizes):
        work()
        if found := end.poll():
            statuses, moved = statuses + found, time.monotonic()
        if any(statuses):
            raise RunError(f"rxe gave up: a request ended with status {max(statuses)}")
        if time.monotonic() - moved > _STALL_S:
            raise RunError(f"{len(statuses)} of {len(sizes)} requests of rxe are complete, and none for {_STALL_S:g} s")
    mtu = fabric.plan.scenario.transport.mtu_bytes
    return end.counters()["sent_pkts"] - sum(-(-nbytes // mtu) for nbytes in sizes)


def _count_lost(fabric: Fabric) -> int:
    return int(fabric.arrays.queues["lost_packets"].sum())
