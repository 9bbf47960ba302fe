"""What an uplink costs that is down, and one that dies on the way, against what the tables and the times of rerouting give."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fidelity.runs import trusted_run

pytestmark = [pytest.mark.root, pytest.mark.fidelity]

SCENARIOS = Path(__file__).parents[2] / "scenarios" / "faults"
# Switch ports are 0.3 % fast, and their buckets hold some ticks' worth: a shared link may be that much faster than predicted.
TOLERANCE = 0.04


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param(("routing.scheme=spray", "transport.loss_recovery=selective"), 4 / 3, marks=pytest.mark.slow),
        pytest.param(("routing.scheme=e-ecmp", "transport.qps_per_connection=16"), 1.5, marks=pytest.mark.slow),
        (("routing.scheme=pinning",), 2.0),
        pytest.param(("routing.scheme=ecmp",), 3.0, marks=pytest.mark.slow),
    ],
    ids=["spray", "e-ecmp, 16 QPs", "pinning", "ecmp"],
)
def test_an_uplink_that_is_down_costs_what_the_tables_say(settings: tuple[str, ...], expected: float) -> None:
    short = ("workload[0].size=8MiB", "workload[0].warmup_iters=0", "time_dilation=3000")
    (broken,) = trusted_run(SCENARIOS / "uplink-down.yaml", *short, *settings).results
    assert broken.predicted_cct_ratio == pytest.approx(expected)
    assert broken.cct_ratio == pytest.approx(expected, rel=TOLERANCE)
    if settings == ("routing.scheme=pinning",):  # the negative control: it is the link's absence that costs
        (whole,) = trusted_run(SCENARIOS / "uplink-down.yaml", *short, "faults=[]").results
        assert whole.cct_ratio == pytest.approx(1.0, abs=0.01)


def test_a_link_that_dies_costs_the_detour_and_at_most_the_outage() -> None:
    settings = ("workload[0].iters=1", "workload[0].warmup_iters=0", "time_dilation=3000")
    (row,) = trusted_run(SCENARIOS / "link-dies.yaml", *settings).results
    (fault,) = row.faults
    assert row.cct_ideal_ns is not None
    assert row.cct_ratio is not None
    # Before, all goes at line rate; after, two flows share an uplink. In between the victims stand still, until all switches know
    # and at the latest a retransmission timeout later.
    timely = (fault.at_ns + 2 * (row.cct_ideal_ns - fault.at_ns)) / row.cct_ideal_ns
    outage_ns = 100_000 + 400_000
    assert (1 - TOLERANCE) * timely <= row.cct_ratio <= (1 + TOLERANCE) * (timely + outage_ns / row.cct_ideal_ns)
    assert fault.moved_qps > 0
    assert fault.lost_packets > 0
    assert row.fabric.retransmitted_packets is not None
    assert row.fabric.retransmitted_packets > 0
