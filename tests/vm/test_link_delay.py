"""Link delay on the wire: the kernel's own protocols, and whoever pings, see it."""

from __future__ import annotations

import re

import pytest

from testbed.fabric import Fabric
from tests.netns.labs import address_of, run_in, small_fabric
from tests.vm.test_run import run_scenario

pytestmark = pytest.mark.root

DILATION = 4000
# Over four links, there and back: 32 ms of the guest's clock, of which its own work is a fraction of one.
LINK_DELAY_NS = 1000
PINGS = 5


def least_round_trip_ns(fabric: Fabric) -> float:
    done = run_in(fabric, "host0", "ping", "-q", "-c", str(PINGS), "-i", "0.2", address_of(fabric, 2))
    found = re.search(r"rtt min/avg/max/mdev = ([\d.]+)/", done.stdout)
    assert found, done.stdout + done.stderr
    return float(found[1]) * 1e6


def round_trip_of(link_delay: str) -> float:
    settings = (
        "transport.carrier=rxe",
        f"transport.link_delay={link_delay}",
        f"fabric.host_link.delay={LINK_DELAY_NS} ns",
        f"time_dilation={DILATION}",
    )
    with small_fabric(*settings, name="delay") as fabric:
        assert fabric.back_ends.link_delay == link_delay.replace("auto", "netem")
        assert all(link.delay_ns == LINK_DELAY_NS for link in fabric.plan.topology.links)
        return least_round_trip_ns(fabric)


def test_a_round_trip_takes_the_delay_of_every_link_twice() -> None:
    without, delayed = round_trip_of("carrier"), round_trip_of("auto")
    expected = 2 * 4 * LINK_DELAY_NS * DILATION
    print(f"round trip {without / 1e6:.3f} ms without, {delayed / 1e6:.3f} ms with four links of {LINK_DELAY_NS} ns")
    # No frame comes early. Late ones: where this host is busy, an idle guest's timers wait for it.
    assert 0.99 * expected <= delayed - without <= 1.25 * expected
    assert without < expected / 4


@pytest.mark.parametrize("carrier", ["rxe", "tcp"])
@pytest.mark.parametrize("link_delay", ["netem", "carrier"])
def test_collective_that_waits_for_delay_comes_near_its_ideal(carrier: str, link_delay: str) -> None:
    """Six steps of a ring over four links each, a frame or two in each: next to nothing but propagation."""
    result = run_scenario(
        "rxe.yaml",
        f"transport.carrier={carrier}",
        f"transport.link_delay={link_delay}",
        "fabric.host_link.delay=20 us",
        "fabric.uplink.delay=20 us",
        f"time_dilation={DILATION}",  # a tick is then small beside a step
        "expect=[]",
        size="16 KiB",
    )
    row = result["results"][0]
    assert result["back_ends"]["link_delay"] == link_delay
    assert row["wrong_elements"] == 0
    print(f"{carrier}, {link_delay}: {row['cct_ratio']:.4f} of {row['cct_ideal_ns'] / 1e3:.1f} us")
    assert row["cct_ideal_ns"] > 0.9 * 6 * 4 * 20_000
    assert 0.99 <= row["cct_ratio"] <= 1.08
    said = [one for one in result["warnings"] if "transport.link_delay: carrier" in one]
    assert bool(said) is (link_delay == "carrier")
