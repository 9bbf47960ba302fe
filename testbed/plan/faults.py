"""Faults as a timeline: what state the fabric is in at every moment of an iteration, and what routing has made of it.

A fault is a stretch of time in which something about some ports differs. The state at a moment follows from the faults that
last then, so faults may overlap. Routing follows the state late: the switches at a link first, then all, then a controller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from testbed.errors import PlanError
from testbed.routing import ForwardingTables, Knowledge, LinkState, dead_ports_of
from testbed.scenario import Fault, FaultKind, Scenario
from testbed.topology import NodeKind, Topology
from testbed.units import format_fraction, format_rate, format_time


@dataclass(frozen=True, slots=True)
class FabricState:
    """What is wrong with a fabric at one moment.

    Attributes:
        dead_ports: Both ends of every link that is down.
        rates_bits_per_s: Ports that send at another rate than their own, ascending.
        losses: Ports with the share of their frames that is lost behind them, ascending.
    """

    dead_ports: frozenset[int] = frozenset()
    rates_bits_per_s: tuple[tuple[int, int], ...] = ()
    losses: tuple[tuple[int, Fraction], ...] = ()

    @property
    def links(self) -> LinkState:
        """Return what routing may notice of it."""
        return LinkState(self.dead_ports, self.rates_bits_per_s)


@dataclass(frozen=True, slots=True)
class Incident:
    """A fault as it happens.

    Attributes:
        text: What happens, for people: ``link_down leaf0:spine1``.
        fault: Its place in the scenario's list.
        begin_ns: When, from the release of the iteration.
        end_ns: When it is over; None: it lasts.
        ports: Both ends of the links that it touches.
        mends: Whether it only ends others.
    """

    text: str
    fault: int
    begin_ns: int
    end_ns: int | None
    ports: frozenset[int]
    mends: bool = False


@dataclass(frozen=True, eq=False)
class FaultStep:
    """From when on the fabric is in a state and forwards by some tables.

    Attributes:
        at_ns: From the release of the iteration.
        state: What is wrong.
        tables: What the switches forward by.
    """

    at_ns: int
    state: FabricState
    tables: ForwardingTables


@dataclass(frozen=True, eq=False)
class FaultPlan:
    """All that goes wrong in an iteration.

    Attributes:
        steps: In order of time; the first is how the iteration begins.
        tables_for: The tables of the scenario's scheme, given what has been noticed of the links.
        incidents: The faults behind the steps, in order of time.
    """

    steps: tuple[FaultStep, ...]
    tables_for: Callable[[Knowledge], ForwardingTables]
    incidents: tuple[Incident, ...] = ()

    @property
    def is_eventful(self) -> bool:
        """Whether anything changes during an iteration."""
        return len(self.steps) > 1


_Change = tuple[int, FabricState]


@dataclass
class _Window:
    """A stretch of time in which a fault lasts."""

    fault: int
    begin_ns: int
    end_ns: int | None

    def covers(self, at_ns: int) -> bool:
        return self.begin_ns <= at_ns and (self.end_ns is None or at_ns < self.end_ns)


@dataclass
class _Gathered:
    """A state while faults are added to it."""

    dead: set[int] = field(default_factory=set)
    rates: dict[int, int] = field(default_factory=dict)
    losses: dict[int, Fraction] = field(default_factory=dict)

    def state(self) -> FabricState:
        return FabricState(
            frozenset(self.dead),
            tuple(sorted(self.rates.items())),
            tuple(sorted(self.losses.items())),
        )


def _add_dead(fault: Fault, ports: frozenset[int], to: _Gathered) -> None:
    to.dead |= ports


def _add_loss(fault: Fault, ports: frozenset[int], to: _Gathered) -> None:
    assert fault.loss is not None
    for port in ports:  # two losses on one link: what the first spares, the second may take
        kept = (1 - to.losses.get(port, Fraction(0))) * (1 - fault.loss.fraction)
        to.losses[port] = 1 - kept


def _add_rate(fault: Fault, ports: frozenset[int], to: _Gathered) -> None:
    assert fault.rate is not None
    for port in ports:
        to.rates[port] = min(fault.rate.rate_bits_per_s, to.rates.get(port, fault.rate.rate_bits_per_s))


def _add_receiver(fault: Fault, ports: frozenset[int], to: _Gathered) -> None:
    """A NIC that takes less keeps the leaf's port before it paused for as much of the time: the port has the NIC's rate."""
    assert fault.slow_receiver is not None
    for port in ports:
        rate = fault.slow_receiver.rate_bits_per_s
        to.rates[port] = min(rate, to.rates.get(port, rate))


_EFFECTS: dict[FaultKind, Callable[[Fault, frozenset[int], _Gathered], None]] = {
    FaultKind.LINK_DOWN: _add_dead,
    FaultKind.SWITCH_DOWN: _add_dead,
    FaultKind.FLAP: _add_dead,
    FaultKind.LOSS: _add_loss,
    FaultKind.RATE: _add_rate,
    FaultKind.SLOW_RECEIVER: _add_receiver,
}
"""What each kind of fault adds to the state while it lasts; a new kind is a line here and its section in the scenario."""


def build_changes(scenario: Scenario, topology: Topology) -> tuple[tuple[_Change, ...], tuple[Incident, ...]]:
    """Return the states of an iteration, each with when it begins, and the faults behind them.

    The first state begins at 0. It holds what stands from the beginning to the end (``at: 0`` without ``for``); whatever else
    happens at 0 is a change of its own behind it.

    Raises:
        PlanError: A fault names something that the fabric lacks.
    """
    ports = [_ports_of(fault, index, topology) for index, fault in enumerate(scenario.faults)]
    windows = _windows(scenario.faults)
    standing = [window for window in windows if _stands(scenario.faults[window.fault], window)]

    def state_of(active: Sequence[_Window]) -> FabricState:
        gathered = _Gathered()
        for window in active:
            fault = scenario.faults[window.fault]
            _EFFECTS[fault.kinds[0]](fault, ports[window.fault], gathered)
        return gathered.state()

    changes: list[_Change] = [(0, state_of(standing))]
    times = {window.begin_ns for window in windows} | {window.end_ns for window in windows if window.end_ns is not None}
    for at_ns in sorted(times):
        state = state_of([window for window in windows if window.covers(at_ns)])
        if state != changes[-1][1]:
            changes.append((at_ns, state))
    incidents = [
        Incident(
            describe_fault(scenario.faults[window.fault]),
            window.fault,
            window.begin_ns,
            window.end_ns,
            ports[window.fault],
        )
        for window in windows
    ]
    incidents += [
        Incident(describe_fault(fault), index, fault.at_ns, None, ports[index], mends=True)
        for index, fault in enumerate(scenario.faults)
        if fault.heal is not None
    ]
    return tuple(changes), tuple(sorted(incidents, key=lambda one: (one.begin_ns, one.fault)))


def build_steps(
    changes: Sequence[_Change], scenario: Scenario, tables_for: Callable[[Knowledge], ForwardingTables]
) -> tuple[FaultStep, ...]:
    """Return what the fabric is and forwards by at every moment of an iteration.

    Args:
        changes: Its states.
        scenario: Says how late routing follows.
        tables_for: The tables of the scenario's scheme, given what has been noticed.
    """
    known: dict[Knowledge, ForwardingTables] = {}
    steps: list[FaultStep] = []
    for at_ns, state, knowledge in find_knowledge(changes, scenario):
        if knowledge not in known:
            tables = tables_for(knowledge)
            known[knowledge] = next((one for one in known.values() if one == tables), tables)
        step = FaultStep(at_ns, state, known[knowledge])
        if not steps or step.state != steps[-1].state or step.tables is not steps[-1].tables:
            steps.append(step)
    return tuple(steps)


def find_knowledge(changes: Sequence[_Change], scenario: Scenario) -> tuple[tuple[int, FabricState, Knowledge], ...]:
    """Return the moments at which the fabric changes, or somebody has noticed: when, its state, and what is known of it.

    Args:
        changes: The fabric's states.
        scenario: Says how late routing follows.
    """
    routing = scenario.routing
    delays = (routing.detection_time_ns, routing.convergence_time_ns, routing.te_loop_time_ns)
    times = {at_ns for at_ns, _ in changes[1:]}
    times |= {at_ns + delay_ns for at_ns in times for delay_ns in delays}
    moments: list[tuple[int, FabricState, Knowledge]] = []
    for at_ns in (-1, *sorted(times)):  # -1: before anything happens, also at 0
        knowledge = Knowledge(*(_state_at(changes, at_ns - delay_ns).links for delay_ns in delays))
        # Losses are not noticed at all, and rates by nobody but a controller.
        knowledge = Knowledge(
            LinkState(knowledge.adjacent.dead_ports), LinkState(knowledge.fabric.dead_ports), knowledge.controller
        )
        moments.append((max(0, at_ns), _state_at(changes, at_ns), knowledge))
    return tuple(moments)


def broken_at(incidents: Sequence[Incident], at_ns: int) -> list[str]:
    """Return what is broken at a moment of the iteration, in words, and since when."""
    return [
        one.text + (f" since {format_time(one.begin_ns)}" if one.begin_ns else "")
        for one in incidents
        if not one.mends and one.begin_ns <= at_ns and (one.end_ns is None or at_ns < one.end_ns)
    ]


def describe_fault(fault: Fault) -> str:
    """Return a fault in words, such as ``link_down leaf0:spine1`` or ``loss leaf0:spine1 1/100``."""
    kind = fault.kinds[0]
    text = f"{kind} {fault.target}"
    if fault.loss is not None:
        return f"{text} {format_fraction(fault.loss.fraction)}"
    if fault.rate is not None:
        return f"{text} {format_rate(fault.rate.rate_bits_per_s)}"
    if fault.slow_receiver is not None:
        return f"{text} {format_rate(fault.slow_receiver.rate_bits_per_s)}"
    return text


def _state_at(changes: Sequence[_Change], at_ns: int) -> FabricState:
    state = changes[0][1]
    for begin_ns, changed in changes[1:]:
        if begin_ns <= at_ns:
            state = changed
    return state


def _stands(fault: Fault, window: _Window) -> bool:
    return window.begin_ns == 0 and window.end_ns is None and fault.for_ns is None


def _windows(faults: Sequence[Fault]) -> list[_Window]:
    """Return when each fault lasts; what is healed ends there."""
    windows: list[_Window] = []
    for index, fault in enumerate(faults):
        end_ns = None if fault.for_ns is None else fault.at_ns + fault.for_ns
        if fault.flap is not None and end_ns is not None:
            period_ns = fault.flap.down_ns + fault.flap.up_ns
            windows += [
                _Window(index, begin_ns, min(end_ns, begin_ns + fault.flap.down_ns))
                for begin_ns in range(fault.at_ns, end_ns, period_ns)
            ]
        elif fault.heal is None:
            windows.append(_Window(index, fault.at_ns, end_ns))
    for healing in faults:
        for window in windows if healing.heal is not None else ():
            lasts = window.begin_ns <= healing.at_ns and (window.end_ns is None or window.end_ns > healing.at_ns)
            if faults[window.fault].target == healing.heal and lasts:
                window.end_ns = healing.at_ns
        # A link that flaps does not go down again.
        windows = [
            window
            for window in windows
            if not (
                healing.heal is not None
                and faults[window.fault].target == healing.heal
                and faults[window.fault].at_ns <= healing.at_ns < window.begin_ns
            )
        ]
    return [window for window in windows if window.end_ns is None or window.end_ns > window.begin_ns]


def _ports_of(fault: Fault, index: int, topology: Topology) -> frozenset[int]:
    """Return the ports that a fault is about: both ends of links, all of a switch, the leaf's ports before a slow host.

    Raises:
        PlanError: The fabric has no such link or node.
    """
    kind, name = fault.kinds[0], fault.target
    at = f"faults[{index}].{kind}" + ("" if isinstance(getattr(fault, str(kind)), str) else ".link")
    links = f'links are named by their two nodes from the bottom up, such as "{topology.links[-1].name}"'
    if kind in (FaultKind.SWITCH_DOWN, FaultKind.SLOW_RECEIVER):
        wanted = "a host" if kind is FaultKind.SLOW_RECEIVER else "a switch"
        try:
            node = topology.node(name)
        except KeyError:
            node = None
        if node is None or (node.kind is NodeKind.HOST) != (kind is FaultKind.SLOW_RECEIVER):
            at = at.replace(".link", ".host")
            raise PlanError(
                f'{at}: must be {wanted} of the fabric, got "{name}"', hint="`testbed plan` lists the nodes"
            )
        if kind is FaultKind.SLOW_RECEIVER:
            return frozenset(topology.port(port).peer for port in node.ports)
        return dead_ports_of(topology, [name])
    try:
        if kind is not FaultKind.HEAL:
            topology.link(name)
        return dead_ports_of(topology, [name])
    except KeyError:
        what = "a link" if kind is not FaultKind.HEAL else "a link or node"
        raise PlanError(f'{at}: must be {what} of the fabric, got "{name}"', hint=links) from None
