"""Hosts with several NICs and GPUs: where ranks live, the hierarchical all-reduce, the NVLink model, and the plan of both."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from testbed.collectives import (
    Collective,
    HierarchicalAllReduce,
    IntraHostLinks,
    RingAllReduce,
    Schedule,
    ScheduleBuilder,
    find_algorithm,
    ideal_arrivals_ns,
    ideal_cct_ns,
    ring_order,
    wire_bytes,
)
from testbed.collectives.intra_host import IntraHostModel
from testbed.collectives.proof import find_counterexample
from testbed.engine.intra_host import IntraHostTransfers, run_inside_hosts
from testbed.engine.progress import Progress
from testbed.engine.stream import build_streams
from testbed.errors import PlanError
from testbed.measure.samples import MachineSamples
from testbed.measure.verdict import judge
from testbed.plan.compile import compile_plan
from testbed.plan.fabric import build_endpoints, build_rank_map
from testbed.plan.model import Plan
from testbed.plan.operations import AddRule
from testbed.plan.report import describe_paths
from testbed.results import FidelityVerdict
from testbed.roce.queue_pairs import build_connections
from testbed.routing import FlowKey, routing_scheme, trace_path
from testbed.scenario import load_scenario
from testbed.topology import LinkSpec, RankMap, Topology, build_clos, build_star, format_address

MTU = 4096
NIC_RATE = 400 * 10**9
GPU_RATE = 3600 * 10**9
DELAY_NS = 2000
LINK = LinkSpec(NIC_RATE, 600)

SCENARIO = """
name: gpu-hosts
fabric:
  kind: clos
  leaves: 2
  spines: 4
  hosts_per_leaf: 2
  nics_per_host: 2
  gpus_per_host: 4
  host_link: {rate: 400 Gbit/s, delay: 600 ns}
routing: {scheme: pinning}
workload:
  - {collective: all_reduce, algorithm: hierarchical, order: packed, size: 16 MiB}
"""


def plan_of(*overrides: str) -> Plan:
    return compile_plan(load_scenario(SCENARIO, overrides), capacity_packets_per_s=None)


def clos(nics: int = 2) -> Topology:
    return build_clos(hosts_per_leaf=[2, 1], spines=2, host_link=LINK, uplink=LINK, nics_per_host=nics)


def links_of(nranks: int, gpus: int, rate: int = GPU_RATE, delay_ns: int = DELAY_NS) -> IntraHostLinks:
    return IntraHostLinks(np.arange(nranks) // gpus, rate, delay_ns)


def gpu_ns(nbytes: float, rate: int = GPU_RATE) -> float:
    return nbytes * 8e9 / rate


# --- where ranks live -------------------------------------------------------------------------------------------------


def test_gpus_share_the_nics_of_their_host_evenly_and_in_order() -> None:
    ranks = RankMap(nhosts=2, gpus_per_host=4, nics_per_host=2)
    assert ranks.nranks == 8
    assert [ranks.host(rank) for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [ranks.gpu(rank) for rank in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [ranks.nic(rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [RankMap(3).nic(rank) for rank in range(3)] == [0, 1, 2]
    for wrong in ((0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 3, 2), (1, 1, 2)):
        with pytest.raises(ValueError, match=r"at least 1|cannot share"):
            RankMap(*wrong)


def test_every_nic_has_a_link_of_its_own_to_the_leaf() -> None:
    topology = clos()
    assert [topology.port_name(nic.id) for nic in topology.nics] == [
        f"host{host}/eth{nic}" for host in range(3) for nic in range(2)
    ]
    assert [topology.port_name(nic.peer) for nic in topology.nics] == [
        *(f"leaf0/down{port}" for port in range(4)),
        *(f"leaf1/down{port}" for port in range(2)),
    ]
    assert [topology.slot_of_port(nic.id) for nic in topology.nics] == [0, 1, 2, 3, 4, 5]
    assert [format_address(nic.address) for nic in topology.nics] == [f"10.0.0.{2 * slot + 1}" for slot in range(6)]
    assert topology.link("host0/eth1:leaf0").a == topology.nics[1].id
    assert topology.host_port(2, 1) == topology.nics[5]
    assert len({link.name for link in topology.links}) == len(topology.links)
    assert clos(nics=1).links[0].name == "host0:leaf0"
    star = build_star(hosts=2, host_link=LINK, nics_per_host=3)
    assert [topology.slot_of_port(nic.id) for nic in star.nics] == [*range(6)]
    for build in (lambda: clos(0), lambda: build_star(hosts=1, host_link=LINK, nics_per_host=0)):
        with pytest.raises(PlanError, match="NIC"):
            build()
    with pytest.raises(KeyError, match="NICs are 0 to 1"):
        topology.host_port(0, 2)


@pytest.mark.parametrize("scheme", ["ecmp", "pinning"])
def test_every_nic_reaches_every_nic_of_other_hosts(scheme: str) -> None:
    topology = clos()
    tables = routing_scheme(scheme).build_tables(topology, hash_seed=1)
    for src in topology.nics:
        for dst in topology.nics:
            if src.node != dst.node:
                path = trace_path(topology, tables, src.id, FlowKey(src.address, dst.address, 50000, 4791, 17, 0x101))
                assert path.ports[0] == src.id
                assert topology.port(path.ports[-1]).peer == dst.id


def test_packets_from_a_nics_address_leave_by_that_nic() -> None:
    plan = plan_of("time_dilation=20000")
    topology = plan.topology
    default, *by_source = topology.kernel_routes(topology.node("host1"))
    assert [hop.port for hop in default.next_hops] == list(topology.node("host1").ports)
    assert [(route.source, [hop.port for hop in route.next_hops]) for route in by_source] == [
        (nic.address, [nic.id]) for nic in (topology.host_port(1, 0), topology.host_port(1, 1))
    ]
    rules = [
        operation for operation in plan.operations(["n"] * 99, any_workload=True) if isinstance(operation, AddRule)
    ]
    assert [rule.source for rule in rules] == [nic.address for nic in topology.nics]
    assert rules[1].describe() == "ip rule add from 10.0.0.3 table 101"
    assert len(clos(nics=1).kernel_routes(clos(nics=1).node("host0"))) == 1


def test_rails_changes_the_leaf_at_every_hop_and_packed_visits_the_gpus_of_a_host_in_turn() -> None:
    ranks = RankMap(nhosts=4, gpus_per_host=4, nics_per_host=4)  # two hosts under each of two leaves
    rails = ring_order("rails", [8, 8])
    for here, there in zip(rails, (*rails[1:], rails[0]), strict=True):
        assert ranks.host(here) // 2 != ranks.host(there) // 2
    crossing = [(here, there) for here, there in itertools.pairwise(rails) if here < there]
    assert all(ranks.gpu(here) == ranks.gpu(there) for here, there in crossing)
    packed = [ranks.host(rank) for rank in ring_order("packed", [8, 8])]
    assert packed == sorted(packed)


# --- hierarchical all-reduce ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "hosts"), [pair for pair in itertools.product((1, 2, 3, 4, 8), (1, 2, 3, 4)) if pair != (1, 1)]
)
@pytest.mark.parametrize("size", [1, 7, 97, 1000])
def test_hierarchical_all_reduce_computes_the_sum(gpus: int, hosts: int, size: int) -> None:
    rng = np.random.default_rng([gpus, hosts, size])
    order = rng.permutation(gpus * hosts).tolist()
    for slices in (1, 3):
        schedule = HierarchicalAllReduce(gpus).build_schedule(order, size, slices)
        assert find_counterexample(schedule, Collective.ALL_REDUCE, order, rng, executions=2) is None


@pytest.mark.parametrize(("gpus", "hosts"), [(4, 4), (2, 3), (8, 2)])
def test_hierarchical_all_reduce_sends_what_the_formulas_say(gpus: int, hosts: int) -> None:
    nranks, size = gpus * hosts, gpus * hosts * 8 * 64
    schedule = HierarchicalAllReduce(gpus).build_schedule(range(nranks), size)
    inside = links_of(nranks, gpus).find_connections(schedule)[schedule.connection]
    assert (schedule.src[inside] // gpus == schedule.dst[inside] // gpus).all()
    out = np.bincount(schedule.src[~inside], weights=schedule.nbytes[~inside], minlength=nranks)
    assert out.tolist() == [2 * (hosts - 1) * size / hosts / gpus] * nranks
    nvlink = np.bincount(schedule.src[inside], weights=schedule.nbytes[inside], minlength=nranks)
    assert nvlink.tolist() == [2 * (gpus - 1) * size / gpus] * nranks
    # Every GPU talks to its like on the next host: a ring per GPU.
    pairs = {(int(src), int(dst)) for src, dst in zip(schedule.src[~inside], schedule.dst[~inside], strict=True)}
    assert pairs == {(rank, (rank + gpus) % nranks) for rank in range(nranks)}
    assert longest_chain(schedule) == 2 * (gpus - 1) + 2 * (hosts - 1)


def longest_chain(schedule: Schedule) -> int:
    """The steps that follow each other at least, for want of what they send."""
    steps = [0] * len(schedule)
    for transfer in range(len(schedule)):
        steps[transfer] = 1 + max((steps[dep] for dep in schedule.dependencies(transfer).tolist()), default=0)
    return max(steps)


def test_a_shard_that_leaves_before_its_host_has_summed_it_is_found_out() -> None:
    """The negative control: without what waits for NVLink, other hosts get partial sums."""
    order = list(range(6))
    schedule = HierarchicalAllReduce(3).build_schedule(order, 60, 1)
    inside = links_of(6, 3).find_connections(schedule)[schedule.connection]
    owner = np.repeat(np.arange(len(schedule)), np.diff(schedule.dep_offsets))
    kept = ~(inside[schedule.deps] & ~inside[owner])
    assert not kept.all()
    counts = np.bincount(owner[kept], minlength=len(schedule))
    broken = dataclasses.replace(
        schedule, deps=schedule.deps[kept], dep_offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
    )
    rng = np.random.default_rng(1)
    assert find_counterexample(broken, Collective.ALL_REDUCE, order, rng, executions=8) is not None


def test_hierarchical_needs_whole_hosts() -> None:
    with pytest.raises(ValueError, match="do not fill hosts of 4"):
        HierarchicalAllReduce(4).build_schedule(range(6), 100)
    on_hosts = find_algorithm("all_reduce", "hierarchical").on_hosts(2)
    assert (
        on_hosts.build_schedule(range(4), 64, 1).connections != RingAllReduce().build_schedule(range(4), 64).connections
    )
    assert find_algorithm("all_reduce", "ring").on_hosts(2) is find_algorithm("all_reduce", "ring")


# --- the NVLink model -------------------------------------------------------------------------------------------------


def run_model(schedule: Schedule, links: IntraHostLinks, released_ns: list[float]) -> list[float]:
    model = IntraHostModel(schedule, links)
    for transfer, when in sorted(enumerate(released_ns), key=lambda pair: pair[1]):
        for _ in model.arrivals(when):
            pytest.fail("the test's transfers all outlast the releases")
        model.release(transfer, when)
    arrived = {transfer: now for now, transfer in model.arrivals()}
    assert model.next_ns == math.inf
    return [arrived[transfer] for transfer in range(len(schedule))]


def transfers(*ends: tuple[int, int], nbytes: int = 450_000) -> Schedule:
    builder = ScheduleBuilder(4, nbytes)
    for number, (src, dst) in enumerate(ends):
        builder.add(src, dst, offset_bytes=0, nbytes=nbytes, channel=number)
    return builder.build()


def test_a_transfer_on_idle_links_takes_its_delay_and_its_bytes_time() -> None:
    assert run_model(transfers((0, 1)), links_of(4, 4), [5.0]) == [5.0 + DELAY_NS + 1000]
    assert run_model(transfers((0, 1), (1, 0), (2, 3)), links_of(4, 4), [0.0] * 3) == [3000.0] * 3


def test_a_gpu_sends_one_transfer_at_a_time_the_first_in_the_schedule_first() -> None:
    found = run_model(transfers((0, 1), (0, 2), (0, 3)), links_of(4, 4), [20.0, 10.0, 0.0])
    # The last was released first and is under way when the others come.
    assert found == [4000.0, 5000.0, 3000.0]


def test_a_gpu_receives_one_transfer_at_a_time() -> None:
    assert run_model(transfers((0, 3), (1, 3), (2, 3)), links_of(4, 4), [10.0, 0.0, 20.0]) == [4000.0, 3000.0, 5000.0]


@pytest.mark.parametrize("nranks", [2, 5, 8])
def test_ring_inside_a_host_takes_what_the_formula_says(nranks: int) -> None:
    chunk = 450_000
    schedule = RingAllReduce().build_schedule(range(nranks), nranks * chunk, 1)
    links = links_of(nranks, nranks)
    expected = 2 * (nranks - 1) * (DELAY_NS + gpu_ns(chunk))
    assert run_inside_hosts(schedule, links) == (pytest.approx(expected), 2 * (nranks - 1) * chunk * nranks)


def test_the_engine_and_the_ideal_execute_the_same_model() -> None:
    for algorithm in ("direct", "pairwise"):
        schedule = find_algorithm("all_to_all", algorithm).build_schedule(range(8), 8 << 20)
        links = links_of(8, 8)
        ideal = ideal_cct_ns(schedule, nic_rate_bits_per_s=1, latency_ns=no_latency, mtu=MTU, intra_host=links)
        assert run_inside_hosts(schedule, links)[0] == pytest.approx(ideal, rel=1e-12)
    with pytest.raises(ValueError, match="different hosts"):
        run_inside_hosts(schedule, links_of(8, 4))


def no_latency(src: int, dst: int) -> float:
    return 0.0


def test_ideal_time_passes_from_nvlink_to_the_network_and_back() -> None:
    builder = ScheduleBuilder(4, 450_000)
    first = builder.add(0, 1, offset_bytes=0, nbytes=450_000)
    second = builder.add(1, 2, offset_bytes=0, nbytes=450_000, after=[first])
    builder.add(2, 3, offset_bytes=0, nbytes=450_000, after=[second])
    found = ideal_arrivals_ns(
        builder.build(), nic_rate_bits_per_s=NIC_RATE, latency_ns=lambda *_: 3000.0, mtu=MTU, intra_host=links_of(4, 2)
    )
    over_nvlink, over_network = DELAY_NS + 1000.0, 3000.0 + int(wire_bytes(450_000, MTU)) * 8e9 / NIC_RATE
    assert found.tolist() == pytest.approx([over_nvlink, over_nvlink + over_network, 2 * over_nvlink + over_network])


def test_ranks_that_share_a_nic_share_its_rate() -> None:
    schedule = transfers((0, 2), (1, 3), nbytes=1 << 20)
    alone, shared = (
        ideal_cct_ns(schedule, nic_rate_bits_per_s=NIC_RATE, latency_ns=no_latency, mtu=MTU, nic_of_rank=nics)
        for nics in (None, [0, 0, 1, 1])
    )
    assert shared == pytest.approx(2 * alone)


def test_ideal_hierarchical_all_reduce_is_bound_by_its_nics_where_nvlink_is_fast() -> None:
    gpus, hosts, size = 4, 4, 64 << 20
    schedule = HierarchicalAllReduce(gpus).build_schedule(range(16), size)
    fast = links_of(16, gpus, rate=10**17, delay_ns=0)
    found = ideal_cct_ns(schedule, nic_rate_bits_per_s=NIC_RATE, latency_ns=no_latency, mtu=MTU, intra_host=fast)
    slices = size // (16 * 8)
    expected = 2 * (hosts - 1) * 8 * int(wire_bytes(slices, MTU)) * 8e9 / NIC_RATE
    assert found == pytest.approx(expected, rel=1e-6)
    slow = links_of(16, gpus, rate=10**11, delay_ns=0)
    found = ideal_cct_ns(schedule, nic_rate_bits_per_s=NIC_RATE, latency_ns=no_latency, mtu=MTU, intra_host=slow)
    nvlink_alone = gpu_ns(2 * (gpus - 1) * size / gpus, 10**11)
    assert nvlink_alone < found < 1.1 * nvlink_alone


# --- in step with the ticks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tick_ns", [100.0, 1900.0, 5000.0])
@pytest.mark.parametrize(("hosts", "gpus"), [(2, 2), (3, 2), (2, 4)])
def test_ticks_do_not_change_when_transfers_inside_hosts_arrive(hosts: int, gpus: int, tick_ns: float) -> None:
    """The network is a delay here, longer than a tick, so that the ideal model tells every arrival exactly."""
    network_ns, dilation, begin = 9000.0, 7.0, 1e9
    nranks = hosts * gpus
    links = links_of(nranks, gpus)
    order = np.random.default_rng(hosts).permutation(nranks).tolist()
    schedule = HierarchicalAllReduce(gpus).build_schedule(order, nranks * 300_000, 1)
    inside = links.find_connections(schedule)
    schedule, networked = schedule.sorted_by_sender(last=inside), int((~inside).sum())
    streams = build_streams(schedule, MTU, networked)
    transfers_inside = IntraHostTransfers(schedule, links, dilation)
    progress = Progress(schedule, streams, transfers_inside.release)
    progress.released_at_ns[:] = begin
    transfers_inside.begin(begin)
    arrivals: list[tuple[float, int, int]] = []  # over the network: when, connection, messages
    sent, now, latest = [0] * networked, begin, 0.0
    while progress.pending_transfers:
        while arrivals and arrivals[0][0] <= now + tick_ns * dilation:
            arrival, connection, messages = arrivals.pop(0)
            latest = max(latest, progress.record_arrivals([connection], [messages], lambda *_, at=arrival: at))
        latest = max(latest, transfers_inside.advance(now + tick_ns * dilation, progress))
        for connection in range(networked):
            queue = streams.transfers_of[connection].tolist()
            limit = progress.released_packets[connection]
            while sent[connection] < len(queue) and streams.message_end_packet[queue[sent[connection]]] <= limit:
                sent[connection] += 1
                arrivals.append(
                    (float(progress.released_at_ns[connection]) + network_ns * dilation, connection, sent[connection])
                )
        arrivals.sort()
        now += tick_ns * dilation
        assert now < begin + 1e9, "never ends"
    assert not transfers_inside.busy
    assert transfers_inside.arrived_bytes == schedule.nbytes[schedule.connection >= networked].sum()
    ideal = ideal_cct_ns(
        schedule, nic_rate_bits_per_s=1e21, latency_ns=lambda *_: network_ns, mtu=MTU, intra_host=links
    )
    assert (latest - begin) / dilation == pytest.approx(ideal, rel=1e-6)


def test_what_stays_inside_a_host_needs_something_to_carry_it() -> None:
    schedule = transfers((0, 1))
    with pytest.raises(ValueError, match="nothing joins"):
        Progress(schedule, build_streams(schedule, MTU, 0), IntraHostTransfers(schedule, None, 1.0).release)


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_queue_pairs_join_hosts_only_and_come_in_the_order_of_their_nics() -> None:
    plan = plan_of("workload[0]={collective: all_to_all, size: 1 MiB}")
    planned, topology = plan.workloads[0], plan.topology
    ranks = build_rank_map(plan.scenario)
    assert len(planned.connections) == 16 * 12 == len(planned.paths) == len(planned.one_way_ns)
    assert len(planned.schedule.connections) == 16 * 15
    for connection, path in zip(planned.connections, planned.paths, strict=True):
        local, remote = connection.requester.local, connection.requester.remote
        assert local.host != remote.host
        assert (local.nic, remote.nic) == (ranks.nic(local.rank), ranks.nic(remote.rank))
        assert path.ports[0] == topology.nics[local.nic].id
        assert topology.port(path.ports[-1]).peer == topology.nics[remote.nic].id
    nics = [connection.requester.local.nic for connection in planned.connections]
    assert nics == sorted(nics)
    inside = planned.schedule.connections[len(planned.connections) :]
    assert all(ranks.host(src) == ranks.host(dst) for src, dst in inside)
    with pytest.raises(ValueError, match="both on host0"):
        build_connections(
            [(0, 1)], build_endpoints(topology, ranks), source_port_per_qp=True, rng=np.random.default_rng(1)
        )


def test_plan_says_what_goes_over_nvlink_and_that_it_is_a_model() -> None:
    plan = plan_of()
    planned = plan.workloads[0]
    assert planned.nvlink_bytes == 16 * 2 * 3 * (16 << 20) // 4
    assert any("NVLink, which is a model (3.6 Tbit/s per GPU and direction, 2 us)" in line for line in plan.warnings)
    assert planned.predicted_cct_ratio == pytest.approx(1.0)
    # Two GPUs share each NIC, so the NIC carries two rings.
    size = 16 << 20
    bandwidth_ns = 2 * 2 * 3 / 4 * size / 4 * 8e9 / NIC_RATE
    assert bandwidth_ns < planned.ideal_cct_ns < 1.2 * bandwidth_ns
    assert describe_paths(plan).flows[0].name == "host0/eth0>host1/eth0#0x100"
    flat = plan_of("workload[0].algorithm=ring", "fabric.nics_per_host=1", "fabric.gpus_per_host=1").warnings
    assert not any("NVLink" in line for line in flat)


def test_offered_load_counts_nics_not_ranks() -> None:
    rings = [plan_of(f"fabric.gpus_per_host={gpus}", "workload[0].order=rails") for gpus in (2, 4)]
    assert rings[0].dilation.offered_packets_per_s == rings[1].dilation.offered_packets_per_s


@pytest.mark.parametrize("item", ["collective: all_reduce, algorithm: hierarchical", "collective: all_to_all"])
def test_a_host_alone_needs_no_network(item: str) -> None:
    plan = plan_of(
        "fabric={kind: star, hosts_per_leaf: 1, gpus_per_host: 8, host_link: {rate: 400 Gbit/s}}",
        f"workload[0]={{{item}, size: 8 MiB}}",
    )
    planned = plan.workloads[0]
    assert planned.connections == planned.paths == ()
    assert planned.nvlink_bytes == planned.schedule.nbytes.sum()
    assert planned.predicted_cct_ratio == 1.0
    assert run_inside_hosts(planned.schedule, planned.intra_host)[0] == pytest.approx(planned.ideal_cct_ns, rel=1e-12)
    assert any("computed, not measured" in line for line in plan.warnings)


def test_nvlink_limits_what_it_should() -> None:
    fast, slow = (
        plan_of(f"fabric.nvlink.rate={rate}", "fabric.nvlink.delay=0").workloads[0]
        for rate in ("3600 Gbit/s", "50 Gbit/s")
    )
    assert slow.ideal_cct_ns > 4 * fast.ideal_cct_ns
    assert slow.predicted_cct_ratio == pytest.approx(1.0)  # of the ideal, which has the same links


def test_a_time_that_the_model_told_does_not_depend_on_the_machine() -> None:
    none = np.zeros(0, np.int64)
    computed = MachineSamples(10**6, none, none, none, 1000, 0.0)
    ticked = dataclasses.replace(computed, wall_lateness_ns=np.zeros(5, np.int64))
    busy_machine = {"wall_tick_ns": 10**6, "softnet_drops": 3, "steal_fraction": 0.5}
    assert judge([computed], **busy_machine).verdict is FidelityVerdict.TRUSTED
    assert judge([ticked], **busy_machine).verdict is FidelityVerdict.INVALID
