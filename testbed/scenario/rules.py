"""Rules between keys: combinations of valid values that no fabric can have.

Each rule names the keys that it needs and is skipped where one of them is itself mistaken, so that all mistakes of a
file are reported at once and none twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from testbed.scenario.application import ApplicationWorkload
from testbed.scenario.application_rules import check_application
from testbed.scenario.congestion import CongestionControl
from testbed.scenario.expect import FIGURE_METRIC, JOB_METRIC
from testbed.scenario.fabric import ClosFabric, ZonesFabric
from testbed.scenario.faults import MAX_FLAPS, FaultKind
from testbed.scenario.jobs import Job, MeasuredJobs, job_host_counts, job_rounds
from testbed.scenario.keypath import KeyPath
from testbed.scenario.model import Scenario
from testbed.scenario.qos import GateChoice, SchedulerChoice
from testbed.scenario.ranges import MAX_HOSTS
from testbed.scenario.sweep import MAX_SIZES, count_sizes
from testbed.scenario.transport import AdmissionScheme, Carrier, LinkDelay, LossRecovery, QpStrategy, UdpSourcePort
from testbed.scenario.violation import Valid, Violation
from testbed.scenario.workload import (
    Algorithm,
    Collective,
    CollectiveWorkload,
    FlowsWorkload,
    IncastWorkload,
    PermutationWorkload,
    Workload,
    WorkloadItem,
)
from testbed.units import format_size, format_time

MAX_FRAME_HEADER_BYTES = 74
"""Ethernet 14, IPv4 20, UDP 8, BTH 12, RETH 16, ICRC 4."""

WIRE_OVERHEAD_BYTES = 24
"""FCS 4, preamble 8, gap 12."""

MAX_CONNECTIONS = 8192
"""Half the rows of the fabric's QP table: a connection has a QP at each end."""


def find_violations(scenario: Scenario, valid: Valid) -> Iterator[Violation]:
    """Yield every rule between keys that does not hold.

    Args:
        scenario: The scenario, with stand-ins where keys are mistaken.
        valid: Tells whether keys may be looked at.
    """
    for check in (
        _check_shape,
        _check_size,
        _check_buffer,
        _check_routing,
        _check_faults,
        _check_timeout,
        _check_timely,
        _check_admission,
        _check_carrier,
        _check_priorities,
        _check_workload,
        _check_jobs,
        _check_expectations,
    ):
        yield from check(scenario, valid)


_KIND: KeyPath = ("fabric", "kind")
_LEAVES: KeyPath = ("fabric", "leaves")
_SPINES: KeyPath = ("fabric", "spines")
_ZONES: KeyPath = ("fabric", "zones")
_SUPERSPINES: KeyPath = ("fabric", "superspines")
_HOSTS: KeyPath = ("fabric", "hosts_per_leaf")
_NICS: KeyPath = ("fabric", "nics_per_host")
_GPUS: KeyPath = ("fabric", "gpus_per_host")
_BUFFER: KeyPath = ("fabric", "switch", "buffer")
_MTU: KeyPath = ("transport", "mtu")


def _check_shape(scenario: Scenario, valid: Valid) -> Iterator[Violation]:
    fabric = scenario.fabric
    if not isinstance(fabric, ClosFabric) or not valid(_KIND):
        return
    zones = isinstance(fabric, ZonesFabric)
    leaves = fabric.leaves * (fabric.zones if isinstance(fabric, ZonesFabric) else 1)
    if valid(_LEAVES, _SPINES) and fabric.spines == 0 and fabric.leaves > 1:
        yield Violation(
            _SPINES, f"must be at least 1 to join {fabric.leaves} leaves", "add spines, or use `kind: star`"
        )
    if valid(_LEAVES, _ZONES, _HOSTS) and len(fabric.host_counts) != leaves:
        rule = f"must have one number per leaf: {leaves}, not {len(fabric.host_counts)}"
        length = "with one for every leaf of every zone" if zones else "as long as `leaves`"
        yield Violation(_HOSTS, rule, f"give one number for all leaves, or a list {length}")


def _check_size(scenario: Scenario, valid: Valid) -> Iterator[Violation]:
    fabric = scenario.fabric
    if valid(_NICS, _GPUS) and fabric.gpus_per_host % fabric.nics_per_host:
        rule = (
            f"must be a multiple of nics_per_host ({fabric.nics_per_host}): the NICs of a host serve as many GPUs each"
        )
        yield Violation(_GPUS, rule, f"give `gpus_per_host: {fabric.nics_per_host}`, or more")
    if not valid(_KIND, _LEAVES, _ZONES, _HOSTS, _NICS, _GPUS):
        return
    if fabric.nranks < 2:
        yield Violation(
            _HOSTS, "must give at least 2 hosts in total", "one host will do where gpus_per_host is 2 or more"
        )
    if fabric.nhosts > MAX_HOSTS:
        yield Violation(_HOSTS, f"must give at most {MAX_HOSTS} hosts in total, not {fabric.nhosts}")
    elif fabric.nranks > MAX_HOSTS:
        yield Violation(_GPUS, f"must give at most {MAX_HOSTS} ranks in total, not {fabric.nranks}")


def _check_buffer(scenario: Scenario, valid: Valid) -> Iterator[Violation]:
    frame_bytes = scenario.transport.mtu_bytes + MAX_FRAME_HEADER_BYTES
    if valid(_BUFFER, _MTU) and scenario.fabric.switch.buffer_bytes < frame_bytes:
        rule = f"must hold at least one frame of {format_size(frame_bytes)} (mtu {scenario.transport.mtu_bytes})"
        yield Violation(_BUFFER, rule, "enlarge the buffer, or lower transport.mtu")


def _check_routing(scenario: Scenario, valid: Valid) -> Iterator[Violation]:
    scheme, gap = ("routing", "scheme"), ("routing", "flowlet_gap")
    gap_ns = scenario.routing.flowlet_gap_ns
    if not valid(scheme, gap) or scenario.routing.scheme != "flowlet":
        return
    if gap_ns is None:
        yield Violation(gap, "is required by scheme flowlet", "give a pause longer than what paths differ in delay")
    elif gap_ns == 0:
        yield Violation(gap, "must be above 0", "use `scheme: spray` for a path per packet")


def _check_faults(scenario: Scenario, valid: Valid) -> Iterator[Violation]:
    carrier: KeyPath = ("transport", "carrier")
    if scenario.faults and valid(carrier) and scenario.transport.carrier is not Carrier.ENGINE:
        yield Violation(carrier, "must be engine where there are faults: its tick makes them happen", "remove `faults`")
    for index, fault in enumerate(scenario.faults):
        path: KeyPath = ("faults", index)
        if not valid(path):
            continue
        names = ", ".join(FaultKind)
        if len(fault.kinds) != 1:
            got = " and ".join(fault.kinds) or "none"
            yield Violation(path, f"must say one thing that happens, not {got}", f"give one of {names}")
        elif fault.heal is not None and fault.for_ns is not None:
            yield Violation((*path, "for"), "does not go with `heal`, which lasts", "remove it")
        elif fault.flap is not None and fault.for_ns is None:
            yield Violation((*path, "for"), "is required by `flap`", "say for how long the link flaps")
        elif fault.flap is not None and fault.for_ns is not None:
            flaps = fault.for_ns // (fault.flap.down_ns + fault.flap.up_ns)
            if flaps > MAX_FLAPS:
                yield Violation((*path, "for"), f"must let the link flap at most {MAX_FLAPS} times, not {flaps}")


def _check_timely(scenario: Scenario, valid: Valid) -> Iterator[Violation]:
    timely = scenario.transport.timely
    path: KeyPath = ("transport", "timely", "t_low")
    if timely and valid(path, ("transport", "timely", "t_high")) and timely.t_low_ns > timely.t_high_ns:
        yield Violation(path, f"must be at most t_high ({format_time(timely.t_high_ns)})")


def _check_admission(scenario: Scenario, valid: Valid) -> Iterator[Violation]:
    admission, mtu = scenario.transport.admission, scenario.transport.mtu_bytes
    names = ("scheme", "channels", "channel_buffer", "grants")
    paths: list[KeyPath] = [("transport", "admission", name) for name in names]
    if admission.scheme is not AdmissionScheme.CTS or not valid(*paths, _MTU):
        return
    most = admission.window_bytes // mtu
    if admission.grants > most:
        rule = (
            f"must be at most {most}: each of them a full packet or more of the window of "
            f"{format_size(admission.window_bytes)}"
        )
        yield Violation(paths[-1], rule, "use fewer grants, or a larger channel_buffer")


def _check_carrier(scenario: Scenario, valid: Valid) -> Iterator[Violation]:
    """What only our own RoCEv2 can do must not be asked of the kernel's protocols, nor the other way round."""
    transport = scenario.transport
    delay: KeyPath = ("transport", "link_delay")
    if (
        valid(("transport", "carrier"), delay)
        and transport.carrier is Carrier.ENGINE
        and transport.link_delay is LinkDelay.NETEM
    ):
        yield Violation(
            delay,
            "must be auto or carrier with carrier engine, which delays by itself",
            f"leave it out, or use `carrier: {Carrier.RXE}` or `carrier: {Carrier.TCP}`",
        )
    if not valid(("transport", "carrier")) or transport.carrier is Carrier.ENGINE:
        return
    hint = f"leave it out, or use `carrier: {Carrier.ENGINE}`"
    asked = (
        ("qp_strategy", transport.qp_strategy is QpStrategy.DYNAMIC, "split or round_robin"),
        ("udp_source_port", transport.udp_source_port is not UdpSourcePort.PER_QP, "per_qp"),
        ("loss_recovery", transport.loss_recovery is not LossRecovery.GO_BACK_N, "go_back_n"),
        ("admission.scheme", transport.admission.scheme is not AdmissionScheme.NONE, "none"),
    )
    for key, wrong, must in asked:
        path: KeyPath = ("transport", *key.split("."))
        if wrong and valid(path):
            yield Violation(path, f"must be {must} with carrier {transport.carrier}", hint)
    yield from _check_kernel_congestion_control(scenario, valid)


def _check_kernel_congestion_control(scenario: Scenario, valid: Valid) -> Iterator[Violation]:
    """What shapes the kernel's queue pairs goes by CNPs, knows the carrier's queue pairs, and hangs below one queue of a NIC."""
    transport, qos = scenario.transport, scenario.qos
    path: KeyPath = ("transport", "congestion_control")
    if not valid(path) or transport.congestion_control is CongestionControl.NONE:
        return
    hint = f"leave it out, or use `carrier: {Carrier.ENGINE}`"
    if transport.carrier is not Carrier.RXE:
        yield Violation(path, f"must be none with carrier {transport.carrier}", hint)
    elif transport.congestion_control is not CongestionControl.DCQCN:
        yield Violation(path, "must be none or dcqcn with carrier rxe, whose round trips nobody measures", hint)
    elif scenario.applications and valid(("workload",)):
        yield Violation(
            path, "must be none where there are applications: their queue pairs are not known", "leave it out"
        )
    else:
        priorities, gate = ("qos", "priorities"), ("qos", "pfc", "gate")
        if valid(priorities) and len(qos.data_priorities) > 1:
            rule = (
                "must name no further priority where dcqcn slows rxe down: its rates hang below a NIC's only data queue"
            )
            yield Violation(priorities, rule, "leave it out, or use `congestion_control: none`")
        if valid(gate) and qos.pfc.gate is GateChoice.PLUG:
            rule = "must be auto or tbf where dcqcn slows rxe down: no rates can hang below a plug"
            yield Violation(gate, rule, "leave it out")


def _check_priorities(scenario: Scenario, valid: Valid) -> Iterator[Violation]:
    qos, listed, usual = scenario.qos, ("qos", "priorities"), ("qos", "lossless_priority")
    scheduler: KeyPath = ("qos", "scheduler")
    if not valid(listed, usual):
        return
    weighted = [one.priority for one in qos.data_priorities if not one.is_strict]
    stopping = [one for one in weighted if one in qos.paused_priorities]
    if (
        valid(scheduler, ("qos", "pfc", "enabled"))
        and qos.scheduler is SchedulerChoice.ETS
        and stopping
        and weighted[1:]
    ):
        rule = (
            f"must be auto or htb where qos.pfc pauses one of several priorities that have a weight, as {stopping[0]}: "
            "a paused band of an ETS stops the others"
        )
        yield Violation(scheduler, rule, "leave it out")
    if valid(scheduler) and qos.scheduler is SchedulerChoice.PRIO and len(qos.data_priorities) > 1 and weighted:
        rule = f"must be auto, htb or ets where a data priority has a weight, as {weighted[0]} has: prio knows strict ones alone"
        yield Violation(
            scheduler, rule, f"give {{priority: {weighted[0]}, weight: strict}} in qos.priorities, or leave it out"
        )
    seen: set[int] = set()
    for index, one in enumerate(qos.priorities):
        path: KeyPath = (*listed, index, "priority")
        if one.priority in seen:
            yield Violation(path, "must stand in the list once", "remove one of the two")
        seen.add(one.priority)
        if one.priority == qos.lossless_priority and not one.lossless:
            rule = f"must be true for qos.lossless_priority ({one.priority})"
            yield Violation((*listed, index, "lossless"), rule, "give qos.lossless_priority another number")
    known = [one.priority for one in qos.data_priorities]
    places: list[tuple[KeyPath, int | None]] = []
    items: list[tuple[KeyPath, Workload]] = [
        (("workload", index), item)
        for index, item in enumerate(scenario.items)
        if not isinstance(item, ApplicationWorkload)
    ]
    for number, job in enumerate(scenario.jobs):
        items += [(("jobs", number, "workload", index), item) for index, item in enumerate(job.workload)]
    for place, item in items:
        places.append(((*place, "priority"), item.priority))
        if isinstance(item, FlowsWorkload):
            places += [((*place, "flows", index, "priority"), flow.priority) for index, flow in enumerate(item.flows)]
    for path, priority in places:
        if priority is not None and priority not in known and valid(path):
            names = ", ".join(map(str, known))
            yield Violation(path, f"must be a priority that carries data ({names})", "add it to qos.priorities")


def idle_rtt_ns(scenario: Scenario) -> int:
    """Return the round trip of a full frame and its ACK over the longest path, when nothing else is under way.

    Propagation of every link both ways, and the frame's own time on each link; the ACK's is left out.
    """
    fabric = scenario.fabric
    links = [fabric.host_link] * 2
    if isinstance(fabric, ClosFabric) and fabric.leaves > 1:
        links += [fabric.uplink] * 2
    if isinstance(fabric, ZonesFabric) and fabric.zones > 1:
        links += [fabric.superspine_link] * 2
    wire_bits = 8 * (scenario.transport.mtu_bytes + MAX_FRAME_HEADER_BYTES + WIRE_OVERHEAD_BYTES)
    return sum(2 * link.delay_ns + wire_bits * 10**9 // link.rate_bits_per_s for link in links)


def _check_timeout(scenario: Scenario, valid: Valid) -> Iterator[Violation]:
    path: KeyPath = ("transport", "retransmit_timeout")
    timeout_ns = scenario.transport.retransmit_timeout_ns
    if timeout_ns is None or not valid(path, _MTU, _KIND, _LEAVES, ("fabric", "host_link"), ("fabric", "uplink")):
        return
    rtt_ns = idle_rtt_ns(scenario)
    if timeout_ns <= rtt_ns:
        rule = f"must be longer than the longest path's round trip of {format_time(rtt_ns)}"
        yield Violation(path, rule, "use `auto`, or several round trips")


def _check_workload(scenario: Scenario, valid: Valid) -> Iterator[Violation]:
    if valid(("workload",)) and not scenario.items and not scenario.jobs:
        yield Violation(("workload",), "must have at least one item", "add {collective: all_reduce, size: 64 MiB}")
    if valid(("workload",)) and scenario.items and scenario.jobs:
        yield Violation(("workload",), "must not stand beside jobs", "move it into a job of its own")
    nranks = scenario.fabric.nranks
    if scenario.applications and scenario.workload and valid(("workload",)):
        rule = "must not have applications beside collectives and patterns"
        yield Violation(("workload",), rule, "give the applications a scenario of their own")
    yield from _check_items(scenario, scenario.items, ("workload",), nranks, valid)


def _check_items(
    scenario: Scenario, items: Sequence[WorkloadItem], place: KeyPath, nranks: int, valid: Valid
) -> Iterator[Violation]:
    """Yield what is wrong with the items of the workload, or of a job, which has ``nranks`` ranks."""
    for index, item in enumerate(items):
        path: KeyPath = (*place, index)
        if isinstance(item, ApplicationWorkload):
            yield from check_application(scenario, item, path, valid)
            continue
        if not isinstance(item, FlowsWorkload):
            yield from _check_sweep(item, path, valid)
        if isinstance(item, CollectiveWorkload):
            yield from _check_collective(scenario, item, path, nranks, valid)
        elif isinstance(item, IncastWorkload):
            yield from _check_incast(item, path, nranks, valid)
        elif isinstance(item, FlowsWorkload):
            yield from _check_flows(item, path, nranks, valid)


_JOBS: KeyPath = ("jobs",)


def _check_jobs(scenario: Scenario, valid: Valid) -> Iterator[Violation]:
    if not valid(_KIND, _LEAVES, _ZONES, _HOSTS, _GPUS):
        return
    measured: KeyPath = ("measure_jobs",)
    if valid(measured) and scenario.measure_jobs is not MeasuredJobs.TOGETHER and len(scenario.jobs) < 2:
        yield Violation(measured, "needs at least two jobs", "add `jobs`, or remove it")
    counts = job_host_counts(scenario.jobs, scenario.fabric.nhosts)
    names = Counter(job.name for job in scenario.jobs)
    seen: set[int] = set()
    for index, (job, hosts) in enumerate(zip(scenario.jobs, counts, strict=True)):
        path: KeyPath = (*_JOBS, index)
        placed = valid((*path, "placement"), (*path, "hosts"))
        if names[job.name] > 1 and valid((*path, "name")):
            yield Violation((*path, "name"), "must be that of one job alone")
        if not job.workload and valid((*path, "workload")):
            yield Violation((*path, "workload"), "must have at least one item")
        if isinstance(job.placement, tuple) and placed:
            yield from _check_placement(scenario, job, path, seen)
            seen |= set(job.placement)
        nranks = hosts * scenario.fabric.gpus_per_host
        if nranks < 2 and placed:
            yield Violation((*path, "hosts"), f"must give the job at least 2 ranks, not {nranks}")
        elif placed:
            yield from _check_items(scenario, job.workload, (*path, "workload"), nranks, valid)
    if sum(counts) > scenario.fabric.nhosts and valid(_JOBS):
        rule = f"must need at most the {scenario.fabric.nhosts} hosts of the fabric together, not {sum(counts)}"
        yield Violation(_JOBS, rule, "give jobs fewer `hosts`")
    yield from _check_rounds(scenario, valid)


def _check_placement(scenario: Scenario, job: Job, path: KeyPath, taken: set[int]) -> Iterator[Violation]:
    listed = job.placement
    assert isinstance(listed, tuple)
    place = (*path, "placement")
    if job.hosts is not None and job.hosts != len(listed):
        yield Violation((*path, "hosts"), f"must be as many as placement lists, {len(listed)}", "remove it")
    if beyond := [host for host in listed if host >= scenario.fabric.nhosts]:
        yield Violation(place, f"must name hosts from 0 to {scenario.fabric.nhosts - 1}, not {beyond[0]}")
    if repeated := [host for host, count in Counter(listed).items() if count > 1]:
        yield Violation(place, f"must name a host once, not host {repeated[0]} again")
    if both := sorted(taken & set(listed)):
        yield Violation(place, f"must not name a host of another job, as host {both[0]} is")


def _check_rounds(scenario: Scenario, valid: Valid) -> Iterator[Violation]:
    """Yield what keeps the items of a job from running together with those of the jobs before it."""
    for index in range(1, len(scenario.jobs)):
        path: KeyPath = (*_JOBS, index, "workload")
        if not valid(*((*_JOBS, job, "workload") for job in range(index + 1))):
            return
        try:
            rounds = job_rounds(scenario.jobs[: index + 1])
        except ValueError:
            yield Violation(path, "must have as many items and sizes as the other jobs have, or a single one")
            return
        if any(len({(item.iters, item.warmup_iters) for item in items}) > 1 for _, items in rounds):
            rule = "must have the iters and warmup_iters of what runs at the same time: an iteration is one of all jobs"
            yield Violation(path, rule)
            return


def _check_expectations(scenario: Scenario, valid: Valid) -> Iterator[Violation]:
    names = [job.name for job in scenario.jobs]
    for index, expectation in enumerate(scenario.expect):
        path: KeyPath = ("expect", index)
        job = JOB_METRIC.fullmatch(expectation.metric)
        if job and valid(path, _JOBS) and job[1] not in names:
            yield Violation(path, f"must name one of the jobs, not {job[1]}", f"jobs: {', '.join(names) or 'none'}")
        yield from _check_figure(scenario, expectation.metric, path, valid)
        slows = expectation.metric.rpartition(".")[2] == "slowdown"
        if slows and valid(path, ("measure_jobs",)) and scenario.measure_jobs is MeasuredJobs.TOGETHER:
            yield Violation(path, "needs every job to run alone too", "add `measure_jobs: alone`")


# What counts frames, whatever sent them.
_FABRIC_METRICS = frozenset(
    {
        "drops_packets",
        "headroom_drops_packets",
        "lost_packets",
        "ecn_marked_packets",
        "pause_frames",
        "paused_fraction_max",
        "leaf_down_peak_bytes",
    }
)


def _check_figure(scenario: Scenario, metric: str, path: KeyPath, valid: Valid) -> Iterator[Violation]:
    """Yield what an expectation asks of applications that they have not."""
    if not valid(path, ("workload",)):
        return
    names = {figure.name for item in scenario.applications for figure in item.figures}
    figure = FIGURE_METRIC.fullmatch(metric)
    if figure and figure[1] not in names:
        known = ", ".join(sorted(names)) or "none"
        yield Violation(path, f"must name one of the applications' figures, not {figure[1]}", f"figures: {known}")
    elif scenario.applications and not figure and metric not in _FABRIC_METRICS:
        rule = "must be a figure of an application, or what the fabric counts"
        yield Violation(path, rule, f"use figure.NAME, or one of {', '.join(sorted(_FABRIC_METRICS))}")


def _check_sweep(
    item: CollectiveWorkload | IncastWorkload | PermutationWorkload, path: KeyPath, valid: Valid
) -> Iterator[Violation]:
    first, last, factor, step = ((*path, key) for key in ("size", "max_size", "size_factor", "size_step"))
    if not valid(first, last, factor, step):
        return
    if item.max_size_bytes is None:
        for key, value in ((factor, item.size_factor), (step, item.size_step_bytes)):
            if value is not None:
                yield Violation(key, "needs `max_size`, where the sweep ends", "add max_size, or remove this")
    elif item.size_factor is not None and item.size_step_bytes is not None:
        yield Violation(step, "must not stand beside size_factor: sizes grow by one of them", "remove one of the two")
    elif item.max_size_bytes < item.size_bytes:
        yield Violation(last, f"must be at least `size`, {format_size(item.size_bytes)}")
    else:
        count = count_sizes(
            item.size_bytes, item.max_size_bytes, factor=item.size_factor, step_bytes=item.size_step_bytes
        )
        if count > MAX_SIZES:
            rule = f"must give at most {MAX_SIZES} sizes, not {count}"
            yield Violation(step, rule, "use a larger step, or `size_factor`")


ALGORITHMS: Mapping[Collective, tuple[Algorithm, ...]] = {
    Collective.ALL_REDUCE: (
        Algorithm.RING,
        Algorithm.HALVING_DOUBLING,
        Algorithm.DOUBLE_BINARY_TREE,
        Algorithm.HIERARCHICAL,
    ),
    Collective.REDUCE_SCATTER: (Algorithm.RING,),
    Collective.ALL_GATHER: (Algorithm.RING,),
    Collective.ALL_TO_ALL: (Algorithm.DIRECT, Algorithm.PAIRWISE),
    Collective.BROADCAST: (Algorithm.RING, Algorithm.BINARY_TREE),
    Collective.REDUCE: (Algorithm.RING, Algorithm.BINARY_TREE),
    Collective.GATHER: (Algorithm.DIRECT,),
    Collective.SCATTER: (Algorithm.DIRECT,),
    Collective.SEND_RECV: (Algorithm.DIRECT,),
}
"""The algorithms of each collective, the usual one first."""

# Those that cut the buffer into a block for each rank.
_BLOCKWISE = frozenset(
    {
        Collective.ALL_REDUCE,
        Collective.REDUCE_SCATTER,
        Collective.ALL_GATHER,
        Collective.ALL_TO_ALL,
        Collective.GATHER,
        Collective.SCATTER,
    }
)


def _check_collective(
    scenario: Scenario, item: CollectiveWorkload, path: KeyPath, nranks: int, valid: Valid
) -> Iterator[Violation]:
    collective, order, algorithm, size = ((*path, key) for key in ("collective", "order", "algorithm", "size"))
    possible = ALGORITHMS[item.collective]
    fits = item.algorithm in possible
    if not fits and valid(collective, algorithm):
        yield Violation(algorithm, f"must be an algorithm of {item.collective}", f"use {_alternatives(possible)}")
    if not valid(_KIND, _LEAVES, _HOSTS, _GPUS):
        return
    if isinstance(item.order, tuple) and valid(order):
        yield from _check_order(item.order, nranks, order)
    if item.collective in _BLOCKWISE and item.size_bytes < nranks and valid(collective, size):
        yield Violation(size, f"must be at least one byte for each of the {nranks} ranks")
    if fits and item.algorithm is Algorithm.HALVING_DOUBLING and nranks & (nranks - 1) and valid(collective, algorithm):
        rule = f"must have a power of two of ranks, not {nranks}: every rank needs a partner at every step"
        yield Violation(algorithm, rule, "use `algorithm: ring` or `double_binary_tree`, or other hosts")
    if item.collective is Collective.ALL_TO_ALL and valid(collective):
        # Within a host there are no connections, but for NVLink's.
        yield from _check_connections(nranks * (nranks - scenario.fabric.gpus_per_host), collective)


def _alternatives(algorithms: Sequence[Algorithm]) -> str:
    names = [str(one) for one in algorithms]
    return " or ".join(", ".join(f"`{name}`" for name in part) for part in (names[:-1], names[-1:]) if part)


def _check_connections(connections: int, path: KeyPath) -> Iterator[Violation]:
    if connections > MAX_CONNECTIONS:
        yield Violation(path, f"must need at most {MAX_CONNECTIONS} connections, not {connections}")


def _check_incast(item: IncastWorkload, path: KeyPath, nranks: int, valid: Valid) -> Iterator[Violation]:
    fan_in = (*path, "fan_in")
    senders = nranks - 1
    if valid(_KIND, _LEAVES, _HOSTS, _GPUS, fan_in) and item.fan_in > senders:
        yield Violation(fan_in, f"must be at most {senders}: that many ranks can send to rank 0")


def _check_flows(item: FlowsWorkload, path: KeyPath, nranks: int, valid: Valid) -> Iterator[Violation]:
    flows = (*path, "flows")
    if not item.flows and valid(flows):
        yield Violation(flows, "must have at least one flow", "add {src: 0, dst: 1, size: 1 MiB}")
    yield from _check_connections(len(item.flows), flows)
    for index, flow in enumerate(item.flows):
        src, dst = (*flows, index, "src"), (*flows, index, "dst")
        for end, rank in ((src, flow.src), (dst, flow.dst)):
            if valid(_KIND, _LEAVES, _HOSTS, _GPUS, end) and rank >= nranks:
                yield Violation(end, f"must be a rank from 0 to {nranks - 1}")
        if flow.src == flow.dst and valid(src, dst):
            yield Violation(dst, "must be another rank than src")


def _check_order(order: tuple[int, ...], nranks: int, path: KeyPath) -> Iterator[Violation]:
    repeated = sorted(rank for rank, count in Counter(order).items() if count > 1)
    missing = sorted(set(range(nranks)) - set(order))
    unknown = sorted(set(order) - set(range(nranks)))
    if not (repeated or missing or unknown):
        return
    parts = [
        f"{word} {', '.join(map(str, ranks[:8]))}{', …' if len(ranks) > 8 else ''}"
        for word, ranks in (("repeated:", repeated), ("missing:", missing), ("no such rank:", unknown))
        if ranks
    ]
    yield Violation(path, f"must name each of the ranks 0 to {nranks - 1} once ({'; '.join(parts)})")
