"""Faults on a running fabric: what a dead link loses, where flows go instead, and that nothing of it is left behind."""

from __future__ import annotations

import os
import socket
from fractions import Fraction

import numpy as np
import pytest

from testbed import api
from testbed.carriers.protocol import WorkloadSamples
from testbed.errors import LabError, PlanError, RunError
from testbed.fabric import Fabric
from testbed.fabric.broken import note_disturbed
from testbed.fabric.faults import state_writer
from testbed.kernel import bpf, layout
from testbed.plan.faults import FabricState
from testbed.plan.victims import find_victims
from testbed.routing import Knowledge, dead_ports_of
from testbed.scenario import load_scenario
from tests.netns.labs import (
    SCENARIO,
    Quiet,
    address_of,
    assert_drained,
    in_node,
    ip_frame,
    lab_name,
    plain_carrier,
    run_in,
    small_fabric,
    wait_until,
)

pytestmark = pytest.mark.root

RING = "workload[0]={collective: all_reduce, size: 1 MiB, iters: 1, warmup_iters: 0}"
QUICK = ("routing.detection_time=1 us", "routing.convergence_time=3 us", "routing.te_loop_time=6 us")
QPS = "transport.qps_per_connection=8"
WIDE = ("fabric.spines=4", "fabric.hosts_per_leaf=2", RING, *QUICK)


def ping(fabric: Fabric, src: int, dst: int) -> bool:
    return run_in(fabric, f"host{src}", "ping", "-c1", "-W1", address_of(fabric, dst)).returncode == 0


def run(fabric: Fabric) -> WorkloadSamples:
    with plain_carrier(fabric) as carrier:
        return carrier.run(0, Quiet())


def overrides_of(fabric: Fabric) -> dict[tuple[int, int, int, int], int]:
    descriptor = bpf.open_map(fabric.state.details["maps"][layout.OVERRIDES])
    try:
        return layout.read_overrides(descriptor)
    finally:
        os.close(descriptor)


def assert_whole(fabric: Fabric) -> None:
    """Assert that nothing is broken any more and the switches forward by the plan's tables."""
    assert not (fabric.arrays.ports["flags"] & layout.PORT_DOWN).any()
    assert not fabric.arrays.queues["loss_threshold"].any()
    fib, tables = fabric.arrays.fib, fabric.plan.tables
    used = tables.fib.reshape(-1)
    np.testing.assert_array_equal(fib < 0, used < 0)
    for row, index in {(int(row), int(index)) for row, index in zip(fib, used, strict=True) if index >= 0}:
        group = fabric.arrays.groups[row]
        first, count = int(group["first_member"]), int(group["members"])
        members = {int(member) & 0xFFFF for member in fabric.arrays.members[first : first + count]}
        assert members == set(tables.groups[index].members)
    assert overrides_of(fabric) == {tuple(key): port for key, port in tables.overrides.items()}


def test_a_dead_link_loses_what_is_in_its_queue_and_other_links_nothing() -> None:
    with small_fabric(name="faults") as fabric, state_writer(fabric, FabricState(), ()) as writer:
        topology = fabric.plan.topology
        host1, queues = topology.host_port(1), fabric.arrays.queues
        down = FabricState(dead_ports_of(topology, ["host1:leaf0"]))
        assert ping(fabric, 0, 1)
        assert ping(fabric, 0, 2)
        before = int(queues["lost_packets"].sum())
        with in_node(fabric, "host0"):
            raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
            raw.bind(("eth0", 0))
        with raw:
            arrived = int(queues["deq_packets"][host1.peer].sum())
            for number in range(20):  # 1.7 ms each, so they still stand before the leaf's port when the link dies
                raw.send(ip_frame(fabric, 0, host1.address, bytes(3980), ident=number))
            wait_until(lambda: int(queues["enq_packets"][host1.peer].sum()) > arrived + 1, "the leaf has a queue")
            writer.write(down, None)
            wait_until(lambda: int(queues["deq_packets"][host1.peer].sum()) == arrived + 20, "all have gone")
        assert_drained(fabric)
        lost = int(queues["lost_packets"].sum()) - before
        assert 0 < lost <= 20
        assert lost == int(queues["lost_packets"][host1.peer].sum())
        assert not ping(fabric, 0, 1)
        assert ping(fabric, 0, 2)
        writer.write(FabricState(), None)
        assert ping(fabric, 0, 1)
        assert_drained(fabric)


def test_a_link_that_dies_on_the_way_costs_time_and_the_job_completes() -> None:
    fault = 'faults=[{at: 6 us, link_down: "leaf0:spine1"}]'
    with small_fabric(*WIDE, "routing.scheme=pinning", name="faults") as fabric:
        healthy = run(fabric)
        assert healthy.retransmitted_packets == 0  # the negative control
        assert not fabric.arrays.queues["lost_packets"].any()
        assert healthy.faults == ()
    with small_fabric(*WIDE, "routing.scheme=pinning", fault, name="faults") as fabric:
        (victims,) = find_victims(fabric.plan, 0)
        samples = run(fabric)
        assert victims.victims.sum() > 0
        assert victims.moved > 0
        assert "spine1 -> " in victims.detours[0] or "spine1 > " in victims.detours[0]
        ((sighting,),) = samples.faults
        assert sighting.happened
        assert sighting.lost_packets > 0
        assert int(fabric.arrays.queues["lost_packets"].sum()) >= sighting.lost_packets
        assert samples.retransmitted_packets > 0
        assert samples.cct_ns[0] > 1.05 * healthy.cct_ns[0]
        assert_drained(fabric)
        assert_whole(fabric)


@pytest.mark.parametrize("resilient", ["false", "true"])
def test_a_switch_that_dies_is_passed_by(resilient: str) -> None:
    hashing = ("routing.scheme=e-ecmp", f"routing.resilient_hashing={resilient}", QPS)
    with small_fabric(*WIDE, *hashing, "faults=[{at: 6 us, switch_down: spine0}]", name="faults") as fabric:
        samples = run(fabric)
        assert samples.faults[0][0].lost_packets > 0
        assert_drained(fabric)
        assert_whole(fabric)


def test_a_dead_leaf_ends_the_run_and_says_who_cannot_go_where() -> None:
    with small_fabric(*WIDE, "routing.scheme=ecmp", "faults=[{at: 6 us, switch_down: leaf1}]", name="faults") as fabric:
        with pytest.raises(RunError, match=r"rank \d+ to \d+, QP 0x\w+ \(host.*switch_down leaf1 since 6 us"):
            run(fabric)
        wait_until(lambda: not (fabric.arrays.ports["flags"] & layout.PORT_DOWN).any(), "mended")
        assert_drained(fabric)
        assert_whole(fabric)


def test_entries_of_the_controller_follow_it_late_and_come_back() -> None:
    with small_fabric(
        *WIDE, "routing.scheme=te", 'faults=[{at: 6 us, link_down: "leaf0:spine1"}]', name="faults"
    ) as fabric:
        steps = fabric.plan.faults.steps
        entries = [len(step.tables.overrides) for step in steps]
        assert min(entries) < entries[0] == entries[-1]
        before = overrides_of(fabric)
        assert len(before) == entries[0]
        run(fabric)
        assert overrides_of(fabric) == before
        assert_whole(fabric)


def test_a_degraded_link_has_another_rate_and_then_its_own_again() -> None:
    def rate_of(fabric: Fabric, node: str, ifname: str) -> str:
        out = run_in(fabric, node, "tc", "qdisc", "show", "dev", ifname).stdout
        return next(line for line in out.splitlines() if " tbf " in line).split(" rate ")[1].split()[0]

    with small_fabric(name="faults") as fabric:
        link = fabric.plan.topology.link("leaf0:spine1")
        with state_writer(fabric, FabricState(), (link.a, link.b)) as writer:
            whole = rate_of(fabric, "leaf0", "up1")
            quarter = tuple((port, 100_000_000_000) for port in (link.a, link.b))
            changed = writer.write(FabricState(rates_bits_per_s=quarter), None)
            assert changed.keys() == {link.a, link.b}
            assert rate_of(fabric, "leaf0", "up1") != whole
            assert rate_of(fabric, "leaf0", "up0") == whole
            writer.write(FabricState(), None)
            assert rate_of(fabric, "leaf0", "up1") == whole


def test_a_slow_link_slows_the_engine_and_its_own_flows_alone() -> None:
    flows = "{src: 0, dst: 2, size: 512 KiB}, {src: 1, dst: 3, size: 512 KiB}"
    pair = f"workload[0]={{pattern: flows, flows: [{flows}], iters: 1, warmup_iters: 0}}"
    slow = 'faults=[{at: 1 ns, rate: {link: "host0:leaf0", rate: 100 Gbit/s}}]'
    with small_fabric("routing.scheme=pinning", pair, slow, name="faults") as fabric:
        samples = run(fabric)
        line_rate_ns = 8e9 * 512 * 1024 / 400e9  # no machine is too fast for that
        assert samples.end_ns[0] > 3.9 * line_rate_ns
        assert samples.end_ns[1] < samples.end_ns[0] / 1.5
        assert samples.retransmitted_packets == 0
        assert_drained(fabric)


def test_a_slow_receiver_makes_its_leaf_pause_others_and_loses_nothing() -> None:
    ring = "workload[0]={collective: all_reduce, size: 1 MiB, iters: 1, warmup_iters: 0}"
    slow = "faults=[{at: 1 us, slow_receiver: {host: host1, rate: 50 Gbit/s}}]"
    common = ("routing.scheme=pinning", "qos.pfc={enabled: true, xoff: 64 KiB}", ring)
    with small_fabric(*common, name="faults") as fabric:
        healthy = run(fabric)
        assert not fabric.arrays.queues["pause_frames"].any()  # the negative control
    with small_fabric(*common, slow, name="faults") as fabric:
        samples = run(fabric)
        assert fabric.arrays.queues["pause_frames"].any()
        assert not fabric.arrays.queues["lost_packets"].any()
        assert not fabric.arrays.queues["drop_packets"].any()
        assert samples.cct_ns[0] > 2 * healthy.cct_ns[0]
        assert_drained(fabric)


def test_a_paused_port_whose_link_dies_does_not_stay_paused() -> None:
    scenario = (
        "fabric.hosts_per_leaf=3",
        "qos.pfc.enabled=true",
        "fabric.switch.buffer=4 MiB",
        "workload[0]={pattern: incast, fan_in: 5, size: 512 KiB, iters: 1, warmup_iters: 0}",
        'faults=[{at: 20 us, for: 5 us, link_down: "leaf1:spine0"}, {at: 22 us, for: 5 us, link_down: "host1:leaf0"}]',
        *QUICK,
    )
    with small_fabric(*scenario, name="faults") as fabric:
        run(fabric)
        assert fabric.arrays.queues["pause_frames"].any()  # precondition
        assert fabric.arrays.queues["lost_packets"].any()
        assert_drained(fabric)
        assert not fabric.arrays.ingress["used_bytes"].any()


def test_what_is_broken_by_hand_is_routed_around_shown_and_healed() -> None:
    name = lab_name("broken")
    wide = ("fabric.spines=4", "routing.scheme=pinning", "transport.qps_per_connection=1")
    with api.deploy(load_scenario(SCENARIO, wide), name) as fabric:
        topology = fabric.plan.topology
        # The uplink that host0's pings to host2 take.
        port = fabric.plan.tables.group_at(topology.leaves[0].index, topology.slot_of_port(topology.host_port(2).id))
        assert port is not None
        link = f"leaf0:{topology.peer_node(port.members[0]).name}"
    try:
        assert api.break_lab(name, link) == [f"link_down {link}"]
        assert ping(fabric, 0, 2)  # another way
        assert api.inspect(name).broken == (f"link_down {link}",)
        scenario = load_scenario(SCENARIO, wide)
        uplink = f"leaf0/{topology.port(port.members[0]).ifname}>"
        assert any(load.name.startswith(uplink) for load in api.paths(scenario).links if load.flows)
        assert not any(load.name.startswith(uplink) for load in api.paths(scenario, name).links if load.flows)
        with pytest.raises(LabError, match="another `routing`"):
            api.paths(load_scenario(SCENARIO, (*wide, "routing.scheme=ecmp")), name)
        assert not (fabric.arrays.queues["lost_packets"]).any()
        assert len(api.break_lab(name, "host2:leaf1")) == 2
        assert not ping(fabric, 0, 2)  # there is no other
        assert ping(fabric, 0, 3)
        with pytest.raises(PlanError, match=rf'must be a link of lab {name}, got "leaf0:spine9"'):
            api.break_lab(name, "leaf0:spine9")
        with pytest.raises(PlanError, match=rf'must be a link of lab {name}, got "spine3"'):
            api.break_lab(name, "spine3", rate="1 Gbit/s")
        with pytest.raises(LabError, match="nothing is broken at 'leaf1'"):
            api.heal_lab(name, "leaf1")
        assert api.heal_lab(name, "host2:leaf1") == [f"link_down {link}"]
        assert ping(fabric, 0, 2)
        assert api.break_lab(name, "leaf1:spine0", loss="1/1")[1:] == ["loss leaf1:spine0 1"]
        assert fabric.arrays.queues["loss_threshold"][topology.link("leaf1:spine0").a].all()
        assert api.heal_lab(name) == []
        assert_whole(fabric)
        # A run that broke something was killed: whoever takes the lab next puts it right.
        up = topology.link("leaf0:spine1").a
        rate = run_in(fabric, "leaf0", "tc", "qdisc", "show", "dev", "up1").stdout
        with state_writer(fabric, FabricState(), (up,)) as writer:
            slow = FabricState(dead_ports_of(topology, ["spine2"]), ((up, 1_000_000_000),), ((up, Fraction(1, 2)),))
            writer.write(slow, fabric.plan.faults.tables_for(Knowledge.of(slow.links)))
        assert run_in(fabric, "leaf0", "tc", "qdisc", "show", "dev", "up1").stdout != rate
        with Fabric.attach(fabric.plan, name) as taken:
            note_disturbed(taken, [up])
        assert api.heal_lab(name) == []
        assert_whole(fabric)
        assert run_in(fabric, "leaf0", "tc", "qdisc", "show", "dev", "up1").stdout == rate
        assert api.inspect(name).broken == ()
    finally:
        api.destroy(name)
