"""The engine aimed at an end that is not the fabric's: here ours in user space, which keeps bytes; tests/vm has the kernel's."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from testbed.carriers.interop import store_endpoint, store_responder, write_to_foreign
from testbed.engine.frames import ForeignMemory
from testbed.errors import RunError
from testbed.fabric import Fabric
from testbed.roce.responder import StoreQueuePair, Syndrome
from tests.netns.labs import activate_qps, assert_drained, run_in, small_fabric

pytestmark = pytest.mark.root

SIZE, MESSAGE, MTU = (1 << 20) - 1, 100_000, 4096
ADDRESS, RKEY = 0x7E57_0000_1000, 0x1BADCAFE


def make_store(fabric: Fabric, memory: bytearray) -> StoreQueuePair:
    requester = fabric.plan.workloads[0].connections[0].requester
    return store_responder(fabric, requester.qpn, memory, virtual_address=ADDRESS, rkey=RKEY)


@contextlib.contextmanager
def served(fabric: Fabric, store: StoreQueuePair) -> Iterator[None]:
    """Have the responder answer for the block, beside what runs in it."""
    done = threading.Event()
    with store_endpoint(fabric, store) as endpoint:

        def serve() -> None:
            while not done.is_set():
                endpoint.serve(0.01)

        server = threading.Thread(target=serve)
        server.start()
        try:
            yield
        finally:
            done.set()
            server.join()


@pytest.mark.parametrize("overrides", [(), ("fabric.uplink.loss=0.02", "fabric.host_link.loss=0.02")])
def test_bytes_that_the_engine_writes_arrive(overrides: tuple[str, ...]) -> None:
    sent, memory = np.random.default_rng(1).integers(0, 256, SIZE, np.uint8), bytearray(SIZE)
    with small_fabric("time_dilation=10000", "transport.retransmit_timeout=20 us", *overrides) as fabric:
        store = make_store(fabric, memory)
        with served(fabric, store):
            result = write_to_foreign(fabric, store.qp.qpn, ForeignMemory(RKEY, sent), ADDRESS, message_bytes=MESSAGE)
        lost = int(fabric.arrays.queues["lost_packets"].sum())
        answers = run_in(fabric, "host2", "nstat", "-asz", "IcmpOutDestUnreachs").stdout
        assert_drained(fabric)
    assert memory == sent.tobytes()
    packets = sum(-(-min(MESSAGE, SIZE - at) // MTU) for at in range(0, SIZE, MESSAGE))
    assert store.responder.counts["in_order"] == packets
    assert (lost > 0) == bool(overrides)
    assert not lost or result.retransmitted_packets > 0
    assert answers.split()[-2] == "0"  # nobody said that a port is unreachable


def test_refusal_is_not_taken_for_an_ack() -> None:
    with small_fabric("transport.retransmit_timeout=5 us") as fabric:
        store = make_store(fabric, memory := bytearray(MTU))
        foreign = ForeignMemory(RKEY ^ 1, np.ones(MTU, np.uint8))
        with served(fabric, store), pytest.raises(RunError, match="no ACK after 7 retries"):
            write_to_foreign(fabric, store.qp.qpn, foreign, ADDRESS, message_bytes=MTU)
    assert store.responder.failed == Syndrome.REMOTE_ACCESS_ERROR
    assert not any(memory)


def test_selective_recovery_is_refused_for_an_end_that_does_not_know_it() -> None:
    with small_fabric("transport.loss_recovery=selective") as fabric, pytest.raises(ValueError, match="go-back-N"):
        write_to_foreign(fabric, 17, ForeignMemory(RKEY, np.ones(1, np.uint8)), ADDRESS, message_bytes=1)


def test_queue_pair_that_the_fabric_answers_is_not_served_twice() -> None:
    with small_fabric() as fabric:
        activate_qps(fabric)
        with (
            pytest.raises(RunError, match="queue pair 0x101 is answered by the fabric"),
            store_endpoint(fabric, make_store(fabric, bytearray(1))),
        ):
            pass
