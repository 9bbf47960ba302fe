"""What each port marks, pauses and keeps in reserve: thresholds as values, computed from the scenario.

Sources:
    Thresholds: HPCC's simulator (Kmin 100 KB per 25 Gbit/s, Kmax four times that, Pmax 0.2; alpha 1/8), SimAI (800/3200 KB at
    400 Gbit/s, 0.2), Zhu et al., "Congestion Control for Large-Scale RDMA Deployments", SIGCOMM 2015 (5/200 KB at 40 Gbit/s,
    1 %).
    Response times: IEEE 802.3, 31B.3.7. Headroom: docs/flow-control.md derives it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from testbed.errors import PlanError
from testbed.plan.dilation import TimeDilation
from testbed.roce.congestion import cnp_interval_ns
from testbed.roce.wire import LINK_OVERHEAD_BYTES
from testbed.scenario import CongestionControl, EcnPreset, Scenario, Switch, Transport, ZonesFabric
from testbed.topology import Node, NodeKind, Port, Topology

QUANTUM_BITS = 512
MAX_QUANTA = 0xFFFF
# Time that a port may take to stop after a PFC frame has arrived, in quanta, up to each rate (IEEE 802.3, 31B.3.7).
_RESPONSE_QUANTA = ((100 * 10**9, 394), (200 * 10**9, 453))
_FASTEST_RESPONSE_QUANTA = 905
# A PFC frame: 60 bytes, FCS, preamble and gap.
_PFC_WIRE_BYTES = 84
# The gate moves at the tick nearest to its time, and a NIC has handed out its frames up to a tick ahead.
_GATE_TICKS = 1.5
# Without a measurement of this machine: how late a tick is at its 99th percentile, as a part of it.
_DEFAULT_LATENESS_TICKS = 0.25
# The bucket of a port that can be paused. A change of the shaper fills it, and all of it leaves at once at the next resume.
PAUSABLE_BURST_TICKS = 1.5


@dataclass(frozen=True, slots=True)
class Marking:
    """ECN thresholds of a port, bytes and probability."""

    kmin_bytes: int
    kmax_bytes: int
    pmax: float


@dataclass(frozen=True, slots=True)
class PauseThresholds:
    """PFC thresholds of an ingress port's lossless priorities.

    Attributes:
        priorities: Those that they hold for, each with an account of its own.
        xoff_bytes: Static threshold; None: ``alpha`` decides.
        alpha: Share of the free shared memory.
        hysteresis_bytes: Resume this far below the threshold.
        headroom_bytes: Room for what arrives after a pause was asked for.
        needed_headroom_bytes: What the delays and this machine's reaction time ask for.
        delay_ns: From the threshold's crossing to the last frame's arrival, emulated: two cables and the peer's response.
    """

    priorities: tuple[int, ...]
    xoff_bytes: int | None
    alpha: Fraction
    hysteresis_bytes: int
    headroom_bytes: int
    needed_headroom_bytes: int
    delay_ns: float

    @property
    def all_headrooms_bytes(self) -> int:
        """Return what the port takes of its switch's memory: a headroom for each priority."""
        return self.headroom_bytes * len(self.priorities)


def gate_allowance_ns(dilation: TimeDilation, lateness_ns: int | None) -> float:
    """Return how late this machine may obey a pause, wall: what the headroom makes room for.

    Args:
        dilation: Of the run.
        lateness_ns: How late its ticks are, wall, 99th percentile; None where it was not measured.
    """
    tick_ns = dilation.wall_tick_ns
    return _GATE_TICKS * tick_ns + (lateness_ns if lateness_ns is not None else _DEFAULT_LATENESS_TICKS * tick_ns)


def response_ns(rate_bits_per_s: int) -> float:
    """Return the time that a port of that rate may take to obey a PFC frame."""
    quanta = next((quanta for rate, quanta in _RESPONSE_QUANTA if rate_bits_per_s <= rate), _FASTEST_RESPONSE_QUANTA)
    return quanta_ns(quanta, rate_bits_per_s)


def quanta_ns(quanta: int, rate_bits_per_s: int) -> float:
    """Return the duration of pause quanta on a link, emulated."""
    return quanta * QUANTUM_BITS * 1e9 / rate_bits_per_s


def marking_of(scenario: Scenario, port: Port) -> Marking | None:
    """Return the ECN thresholds of a switch port, or None where nothing is marked."""
    ecn = scenario.qos.ecn
    if not ecn.enabled:
        return None
    rate = port.rate_bits_per_s
    if ecn.preset is EcnPreset.HPCC:
        kmin = 100_000 * rate // (25 * 10**9)
        kmax, pmax = 4 * kmin, 0.2
    elif ecn.preset is EcnPreset.SIMAI:
        kmin, kmax, pmax = 800_000 * rate // (400 * 10**9), 3_200_000 * rate // (400 * 10**9), 0.2
    else:
        kmin, kmax, pmax = 5_000 * rate // (40 * 10**9), 200_000 * rate // (40 * 10**9), 0.01
    kmin = ecn.kmin_bytes if ecn.kmin_bytes is not None else kmin
    kmax = ecn.kmax_bytes if ecn.kmax_bytes is not None else kmax
    pmax = float(ecn.pmax) if ecn.pmax is not None else pmax
    if kmin > kmax:
        raise PlanError(
            f"qos.ecn: kmin ({kmin} bytes) must not be above kmax ({kmax} bytes) at {rate / 1e9:g} Gbit/s",
            hint="give both, or neither",
        )
    return Marking(kmin, kmax, pmax)


def notification_interval_ns(transport: Transport) -> int:
    """Return the time in which a responder sends at most one CNP per QP; 0 where nobody listens to CNPs."""
    return cnp_interval_ns(str(transport.congestion_control), transport.congestion_parameters)


def switch_of(scenario: Scenario, node: Node) -> Switch:
    """Return the packet memory of a switch."""
    fabric = scenario.fabric
    if node.kind is NodeKind.SUPERSPINE and isinstance(fabric, ZonesFabric):
        return fabric.superspine_switch
    return fabric.spine_switch if node.kind is NodeKind.SPINE else fabric.switch


def pause_thresholds(
    scenario: Scenario,
    topology: Topology,
    dilation: TimeDilation,
    burst_bytes: Mapping[int, int],
    lateness_ns: int | None,
) -> dict[int, PauseThresholds]:
    """Return the PFC thresholds of every switch port by port id; empty without PFC.

    Args:
        scenario: What is asked for.
        topology: Ports and links.
        dilation: Of the run.
        burst_bytes: Bucket of each port's shaper, by port id.
        lateness_ns: How late this machine's ticks are, wall, 99th percentile; None where it was not measured.

    Raises:
        PlanError: The headrooms do not leave room for anything else.
    """
    pfc, priorities = scenario.qos.pfc, scenario.qos.paused_priorities
    if not pfc.enabled:
        return {}
    tick_ns = dilation.wall_tick_ns
    frame_bytes = scenario.transport.mtu_bytes + 58 + LINK_OVERHEAD_BYTES
    result = {}
    for port in topology.ports:
        node = topology.nodes[port.node]
        if node.kind is NodeKind.HOST:
            continue
        switch = switch_of(scenario, node)
        bytes_per_ns = port.rate_bits_per_s / 8e9
        delay_ns = 2 * port.delay_ns + response_ns(port.rate_bits_per_s)
        gate_ns = gate_allowance_ns(dilation, lateness_ns) / dilation.value
        burst = burst_bytes[port.peer]
        needed = round(2 * frame_bytes + bytes_per_ns * (delay_ns + gate_ns) + burst + _PFC_WIRE_BYTES)
        headroom = pfc.headroom_bytes if pfc.headroom_bytes is not None else needed
        hysteresis = round(max(2 * frame_bytes, burst + 2 * bytes_per_ns * tick_ns / dilation.value))
        xoff = pfc.xoff_bytes
        if xoff is None and switch.port_buffer_bytes is not None:
            xoff = switch.port_buffer_bytes // len(priorities) - headroom
            if xoff < 2 * frame_bytes:
                raise PlanError(
                    "fabric.switch.port_buffer must hold, for each lossless priority, two frames and the headroom of "
                    f"{headroom} bytes, got {switch.port_buffer_bytes}"
                )
        if xoff is not None and pfc.xon_bytes is not None:
            if pfc.xon_bytes > xoff:
                raise PlanError(f"qos.pfc.xon must not be above xoff ({xoff} bytes), got {pfc.xon_bytes}")
            hysteresis = xoff - pfc.xon_bytes
        hysteresis = min(hysteresis, xoff) if xoff is not None else hysteresis
        result[port.id] = PauseThresholds(priorities, xoff, switch.alpha, hysteresis, headroom, needed, delay_ns)
    for node in topology.nodes:
        if node.kind is not NodeKind.HOST:
            _check_room(node, switch_of(scenario, node), result, frame_bytes)
    return result


def shared_bytes(switch: Switch, node: Node, thresholds: Mapping[int, PauseThresholds]) -> int:
    """Return what of a switch's memory is not headroom."""
    return switch.buffer_bytes - sum(thresholds[port].all_headrooms_bytes for port in node.ports if port in thresholds)


def _check_room(node: Node, switch: Switch, thresholds: Mapping[int, PauseThresholds], frame_bytes: int) -> None:
    """Raise PlanError where a switch's memory cannot do what the thresholds ask for, whatever the traffic."""
    for port in node.ports:
        one = thresholds.get(port)
        if one is not None and one.xoff_bytes is not None and one.xoff_bytes + one.headroom_bytes > switch.buffer_bytes:
            raise PlanError(
                f"qos.pfc: a port of {node.name} may hold {one.xoff_bytes + one.headroom_bytes} bytes before it has paused its "
                f"neighbour (xoff {one.xoff_bytes}, headroom {one.headroom_bytes}), more than the {switch.buffer_bytes} bytes of "
                "buffer: the lossless priority would drop",
                hint="a smaller qos.pfc.xoff, or a larger fabric.switch.buffer",
            )
    left = shared_bytes(switch, node, thresholds)
    if left < 2 * frame_bytes * len(node.ports):
        total = switch.buffer_bytes - left
        raise PlanError(
            f"fabric: the headrooms of {node.name}'s {len(node.ports)} ports take {total} of its {switch.buffer_bytes} bytes "
            "of buffer and leave no room for frames",
            hint="a larger fabric.switch.buffer, shorter links, or a smaller qos.pfc.headroom",
        )


def find_qos_warnings(
    scenario: Scenario,
    topology: Topology,
    marking: Mapping[int, Marking],
    thresholds: Mapping[int, PauseThresholds],
) -> list[str]:
    """Return what of the thresholds could make a lossless class drop, or pause before it marks."""
    warnings = []
    if scenario.transport.congestion_control is CongestionControl.DCQCN and not scenario.qos.ecn.enabled:
        warnings.append(
            "transport.congestion_control dcqcn acts on marks, and qos.ecn is not enabled: it never slows down"
        )
    short = [port for port, one in thresholds.items() if one.headroom_bytes < one.needed_headroom_bytes]
    if short:
        worst = max(short, key=lambda port: thresholds[port].needed_headroom_bytes)
        one = thresholds[worst]
        warnings.append(
            f"qos.pfc.headroom {one.headroom_bytes} is below the {one.needed_headroom_bytes} bytes that "
            f"{topology.port_name(worst)} needs ({one.delay_ns:.0f} ns of delays and this machine's reaction time): "
            "the lossless priority can drop"
        )
    for node in topology.nodes:
        if node.kind is NodeKind.HOST or not thresholds:
            continue
        static = [thresholds[port] for port in node.ports if thresholds[port].xoff_bytes is not None]
        most = sum(((one.xoff_bytes or 0) + one.headroom_bytes) * len(one.priorities) for one in static)
        buffer = switch_of(scenario, node).buffer_bytes
        if most > buffer:
            warnings.append(
                f"{node.name}: {len(static)} ports may hold {most} bytes before they pause (xoff and headroom), its buffer is "
                f"{buffer}: the lossless priority can drop"
            )
            break
    for port_id, marks in marking.items():
        pause = thresholds.get(port_id)
        if pause is None:
            continue
        node = topology.nodes[topology.port(port_id).node]
        free = shared_bytes(switch_of(scenario, node), node, thresholds)
        xoff = pause.xoff_bytes if pause.xoff_bytes is not None else float(free * pause.alpha / (1 + pause.alpha))
        if xoff < marks.kmin_bytes:
            warnings.append(
                f"{topology.port_name(port_id)} pauses at {xoff:.0f} bytes, before it marks at {marks.kmin_bytes}: "
                "congestion control hears of congestion only through pauses"
            )
            break
    return warnings
