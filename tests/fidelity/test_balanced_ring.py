"""A ring is self-clocked: on paths of its own PFC hardly ever pauses it, and DCQCN beside PFC changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.results import Result
from tests.fidelity.runs import trusted_run

pytestmark = [pytest.mark.root, pytest.mark.fidelity]

CONGESTION = Path(__file__).parents[2] / "scenarios/congestion"
DCQCN = ("transport.congestion_control=dcqcn", "qos.ecn.enabled=true")
# Of the completion time under PFC alone over that with DCQCN. What the machine adds to either is below MACHINE.
TOLERANCE = 0.05
MACHINE = 0.02
MOST_PAUSED = 0.01


def cct_ns_of(result: Result) -> float:
    (row,) = result.results
    (cct_ns,) = row.cct_ns
    return cct_ns


def paused_fraction(result: Result) -> float:
    assert result.fabric.paused_fraction_max is not None
    return result.fabric.paused_fraction_max


def ring_run(*settings: str) -> Result:
    short = ("workload[0].size=16MiB", "workload[0].warmup_iters=0")
    return trusted_run(CONGESTION / "ring-pfc.yaml", *short, *settings, tolerance=MACHINE)


def test_pfc_alone_takes_a_balanced_ring_as_long_as_dcqcn_and_hardly_pauses() -> None:
    alone, controlled = ring_run(), ring_run(*DCQCN)
    assert abs(cct_ns_of(alone) / cct_ns_of(controlled) - 1) <= TOLERANCE
    for result in (alone, controlled):
        assert paused_fraction(result) < MOST_PAUSED
        assert result.fabric.headroom_drops_packets == 0


def test_an_incast_is_paused() -> None:
    """Negative control: the bound on pauses does not hold where flows meet that nothing clocks."""
    shorter = ("workload[0].size=1MiB", "workload[0].iters=1", "qos.pfc.xoff=300KB", "expect=[]")
    assert paused_fraction(trusted_run(CONGESTION / "incast-15-pfc.yaml", *shorter)) > MOST_PAUSED
