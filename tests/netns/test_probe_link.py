"""The fidelity probe: what it measures is its own frames' wait, whoever else sends where it does."""

from __future__ import annotations

import contextlib
import time

import pytest

from testbed.kernel.namespaces import entered
from testbed.kernel.packet_socket import open_packet_socket
from testbed.kernel.probe_link import ProbeLink
from tests.netns.labs import small_fabric, wait_until

pytestmark = pytest.mark.root

_ETHERNET = bytes.fromhex("020000000002 020000000001".replace(" ", ""))
# As the kernel's own solicitations, for seconds after the link came up.
_STRANGER = _ETHERNET + bytes.fromhex("86dd") + bytes(46)
_PROBE = _ETHERNET + bytes.fromhex("88b5") + bytes(46)
_LATER_S = 0.2


def _wait_beside(frame: bytes, arrivals: int) -> tuple[int, int, int]:
    """Return a probe's wait, and at most and at least how long after it another frame was sent, all in ns.

    Args:
        frame: The other.
        arrivals: How many are to count as a probe's.
    """
    with contextlib.closing(ProbeLink(0, time.monotonic_ns)) as probe:
        with entered(probe._netns), contextlib.closing(open_packet_socket("probe0")) as other:
            before = time.monotonic_ns()
            probe.send(before)
            after = time.monotonic_ns()
            wait_until(lambda: not probe.waits_ns(), "the probe's arrival")
            sent = time.monotonic_ns()
            other.send(frame)
            time.sleep(_LATER_S)
            wait_until(lambda: int(probe._arrival[1]) == arrivals, "the arrivals")
            probe.send(time.monotonic_ns())  # notes the wait of the one before
        return probe.waits_ns()[0], sent - before, sent - after


def test_strangers_frame_is_no_probe() -> None:
    wait, most, _ = _wait_beside(_STRANGER, arrivals=1)
    assert wait < most


def test_control_another_probe_would_be_taken_for_it() -> None:
    wait, _, least = _wait_beside(_PROBE, arrivals=2)
    assert wait >= least


def test_first_probe_arrives_while_the_kernel_removes_fabrics() -> None:
    for _ in range(10):
        with small_fabric("fabric.leaves=4", "fabric.spines=4", "fabric.hosts_per_leaf=4"):
            pass
        with contextlib.closing(ProbeLink(0, time.monotonic_ns)) as probe:
            probe.send(time.monotonic_ns())
            wait_until(lambda probe=probe: not probe.waits_ns(), "the probe's arrival")  # type: ignore[misc]
