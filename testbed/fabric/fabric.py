"""A running fabric: built from a plan or found again by name, read, and removed."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from testbed.errors import LabError
from testbed.fabric.apply import IFINDEX_BASE, apply_operations, egress_of
from testbed.fabric.back_ends import choose_back_ends
from testbed.fabric.rxe_devices import (
    check_free,
    create_devices,
    create_lab_devices,
    delete_devices,
    forget_attachments,
)
from testbed.fabric.signals import HeldSignals, signals_held
from testbed.fabric.tables import TableWriter, count_rows
from testbed.kernel import bpf, layout, registry
from testbed.kernel.links import mac_bytes
from testbed.kernel.namespaces import entered, open_namespace
from testbed.kernel.netlink import RouteSocket, require_root
from testbed.kernel.packet_socket import open_packet_socket
from testbed.kernel.qp_shaper import MOST_WALL_DEBT_S, QpPort, QpShaper
from testbed.kernel.red import read_marks
from testbed.kernel.scheduling import choose_cpus
from testbed.plan.loss import lost_priorities
from testbed.plan.model import Plan
from testbed.plan.operations import BackEnds, ShapePort
from testbed.plan.qos import switch_of
from testbed.roce.queue_pairs import QPN_BASE
from testbed.roce.wire import CONTROL_PRIORITIES
from testbed.routing import NO_GROUP
from testbed.scenario import Carrier, LinkDelay, LossRecovery
from testbed.topology import HOST_NETWORK, NodeKind, Port

# Rows of the QP table: enough for 8 QPs between all pairs of 32 hosts, or a ring of 1024 with 4.
_QP_ROWS = 16384
# A frame of 4 KiB leaves a 400 Gbit/s port every 0.1 s at the greatest dilation (10^6): a queue that stands for longer is stuck.
_STUCK_S = 1.0
# What a killed run leaves behind drains in less.
_BUSY_S = 30.0
_DRAIN_LOOK_S = 0.01


def require_same_fabric(plan: Plan, state: registry.LabState) -> None:
    """Check that a lab is finished and is what a plan would build.

    Raises:
        LabError: It is not.
    """
    if not state.ready:
        raise LabError(f"lab {state.name!r} was never finished", hint="`testbed gc` removes it")
    resolved = plan.scenario.resolved()
    hint = f"`testbed destroy {state.name}` and deploy this scenario, or run it without --name"
    for section in ("fabric", "qos", "routing"):
        if resolved.get(section) != state.scenario.get(section):
            raise LabError(f"lab {state.name!r} was deployed with another `{section}`", hint=hint)
    for key in ("mtu", "loss_recovery"):
        if resolved["transport"][key] != state.scenario["transport"][key]:
            raise LabError(f"lab {state.name!r} was deployed with another `transport.{key}`", hint=hint)
    if plan.dilation.value != state.details["time_dilation"]:
        raise LabError(
            f"lab {state.name!r} runs at time_dilation {state.details['time_dilation']:g}, "
            f"the plan at {plan.dilation.value:g}",
            hint="leave `time_dilation` at auto: the lab's is then taken",
        )
    delay = BackEnds(**state.details.get("back_ends", {})).link_delay
    wanted = plan.scenario.transport.link_delay
    if plan.scenario.transport.carrier is Carrier.ENGINE and delay != LinkDelay.CARRIER:
        raise LabError(
            f"lab {state.name!r} delays on the wire ({delay}), which carrier engine does by itself",
            hint=f"`testbed destroy {state.name}` and deploy this scenario, or run it without --name",
        )
    if wanted not in (LinkDelay.AUTO, delay):
        raise LabError(f"lab {state.name!r} was deployed with link delay by {delay}, not {wanted}", hint=hint)


class Fabric:
    """The namespaces, links, qdiscs, programs and maps of one lab.

    Use :meth:`build` for a lab that goes with the ``with`` block, :meth:`deploy` for one that stays, :meth:`attach` for a
    deployed one.

    Attributes:
        plan: What it was built from.
        state: Its record.
        arrays: The eBPF maps.
        any_workload: Whether it was built for other traffic than the plan's.
        back_ends: Which of the kernel's means it uses.
    """

    def __init__(
        self, plan: Plan, state: registry.LabState, lock: registry.LabLock, arrays: layout.MappedArrays
    ) -> None:
        self.plan = plan
        self.state = state
        self.arrays = arrays
        self.any_workload = bool(state.details.get("any_workload", True))
        self.back_ends = BackEnds(**state.details.get("back_ends", {}))
        self._lock = lock

    @classmethod
    def deploy(cls, plan: Plan, name: str) -> Fabric:
        """Build a lab that stays until it is destroyed; the caller closes the Fabric.

        Raises:
            LabError: The name is taken.
            KernelError: The kernel refused something; nothing is left behind.
        """
        with signals_held() as signals:
            with cls._created(plan, name, signals, ephemeral=False, any_workload=True) as fabric:
                pass
            try:
                signals.release()
                return fabric
            except BaseException:  # ended by a signal as the lab was ready: the caller does not hear of it
                signals.hold()
                fabric.destroy()
                raise

    @classmethod
    @contextlib.contextmanager
    def build(cls, plan: Plan, name: str, *, any_workload: bool = False) -> Iterator[Fabric]:
        """Build a lab for the block and remove it after.

        Args:
            plan: What to build.
            name: Its name.
            any_workload: Other traffic than the plan's will cross it: every switch port keeps its exact rate.

        Raises:
            LabError: The name is taken.
            KernelError: The kernel refused something; nothing is left behind.
        """
        created = cls._created
        with (
            signals_held() as signals,
            created(plan, name, signals, ephemeral=True, any_workload=any_workload) as fabric,
        ):
            yield fabric

    @classmethod
    @contextlib.contextmanager
    def _created(
        cls, plan: Plan, name: str, signals: HeldSignals, *, ephemeral: bool, any_workload: bool
    ) -> Iterator[Fabric]:
        """Record and build a lab; keep it only if it is not ephemeral and the block ends well.

        Signals are held on entry and after: none comes between the lab's record and the block that undoes it, nor while it
        is undone.
        """
        require_root()
        nodes = [node.name for node in plan.topology.nodes]
        state, lock = registry.create_lab(name, nodes, ephemeral=ephemeral, scenario=plan.scenario.resolved())
        kept = False
        try:
            signals.release()
            arrays = cls._build(plan, state, any_workload)
            if not ephemeral:  # a run's own carrier makes those that it needs
                create_lab_devices(plan, state, arrays)
            state.ready = True
            registry.write_state(state)
            yield cls(plan, state, lock, arrays)
            signals.hold()
            kept = not ephemeral
        finally:
            try:
                signals.hold()
            finally:
                if not kept:
                    registry.delete_lab(state)
                    lock.close()

    @staticmethod
    def _build(plan: Plan, state: registry.LabState, any_workload: bool) -> layout.MappedArrays:
        """Load the programs, fill the maps and build everything."""
        entries = _map_entries(plan, any_failure=any_workload)
        loaded = bpf.load_object(
            map_entries=entries,
            initial_values={
                ".rodata.config": layout.pack_config(
                    ifindex_base=IFINDEX_BASE,
                    ports=len(plan.topology.ports) + 1,
                    slots=plan.topology.slots,
                    host_network=HOST_NETWORK,
                    qpn_base=QPN_BASE,
                    qps=_QP_ROWS,
                    control_priorities=CONTROL_PRIORITIES,
                    data_classes=layout.pack_data_classes(
                        [one.priority for one in plan.queue_classes], plan.rest_priority
                    ),
                ),
                ".rodata.crc": layout.pack_crc_table(),
            },
            programs=layout.FABRIC_PROGRAMS,
        )
        try:
            arrays = layout.MappedArrays(loaded.maps, entries)
            back_ends = choose_back_ends(plan)
            _fill_ports(plan, arrays, back_ends)
            arrays.fib[:] = NO_GROUP
            overrides = loaded.maps[layout.OVERRIDES]
            TableWriter(plan.topology, arrays, overrides, time_dilation=plan.dilation.value).write(plan.tables)
            _, port_cpus = choose_cpus()
            state.details = {
                "maps": {name: bpf.read_id(fd) for name, fd in loaded.maps.items()},
                "entries": entries,
                "time_dilation": plan.dilation.value,
                "any_workload": any_workload,
                "port_cpus": list(port_cpus),
                "back_ends": asdict(back_ends),
            }
            apply_operations(
                plan.operations(list(state.namespaces.values()), any_workload=any_workload, back_ends=back_ends),
                mark=state.mark,
                cpu_of_node=lambda node: port_cpus[node % len(port_cpus)],
                programs=loaded.programs,
            )
        finally:
            loaded.close()
        return arrays

    @classmethod
    def attach(cls, plan: Plan, name: str) -> Fabric:
        """Take a deployed lab for this process.

        Args:
            plan: The plan of the scenario to run; its fabric, routing and dilation must be the lab's.
            name: The lab.

        Raises:
            LabError: No such lab, in use, unfinished, or built from another fabric.
        """
        require_root()
        lock = registry.lock_lab(name)
        try:
            state = registry.read_state(name)
            require_same_fabric(plan, state)
            arrays = open_arrays(state)
            registry.delete_leftovers(state)
            forget_attachments(state, arrays, [port.id for port in plan.topology.nics])
            fabric = cls(plan, state, lock, arrays)
            flags = arrays.ports["flags"]
            # A killed run leaves its queue pairs' last rates, at which a frame may take minutes.
            shaped = [port.id for port in plan.topology.nics if flags[port.id] & layout.PORT_KERNEL_QPS]
            with fabric.qp_shaper(dict.fromkeys(shaped, ())) as shaper:
                shaper.lift()
                _wait_until_drained(name, arrays, MOST_WALL_DEBT_S if shaped else _STUCK_S)
                shaper.delete()
            layout.forget_kernel_qps(arrays)
        except BaseException:
            lock.close()
            raise
        return fabric

    def __enter__(self) -> Fabric:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def name(self) -> str:
        """The lab's name."""
        return self.state.name

    @property
    def rxe_devices(self) -> dict[int, str]:
        """The lab's own soft-RoCE devices, by the id of the port that each stands on."""
        return {int(port_id): name for port_id, name in self.state.rxe_devices.items()}

    @contextlib.contextmanager
    def run_devices(self, nics: Iterable[Port]) -> Iterator[dict[int, str]]:
        """Have soft-RoCE devices for the block: the lab's own, else some that are recorded before they are made.

        Args:
            nics: The NICs; an interface bears one device.

        Yields:
            Name of the device of each, by port id.

        Raises:
            LabError: A device of such a name exists.
            MachineError: The kernel or a program for it is missing, or this machine's namespace cannot have them.
            KernelError: The kernel refused one.
        """
        own = self.rxe_devices
        # Names are the machine's: the lab's mark is in those of a run. UCX cuts them after 15 characters.
        mark = self.state.mark.rpartition(":")[2][:8]
        wanted = {f"tb{mark}p{nic.id}": nic for nic in nics if nic.id not in own}
        check_free(wanted)
        self.state.run_devices += wanted
        registry.write_state(self.state)
        try:
            create_devices(self.plan, self.state, self.arrays, wanted)
            self.back_ends = replace(self.back_ends, rxe="attachment" if self.state.attachments else "namespace")
            yield {**own, **{nic.id: name for name, nic in wanted.items()}}
        finally:
            delete_devices(self.state, self.arrays, wanted)
            self.state.run_devices = [name for name in self.state.run_devices if name not in wanted]
            registry.write_state(self.state)

    @contextlib.contextmanager
    def qp_shaper(self, connections: Mapping[int, Sequence[int]]) -> Iterator[QpShaper]:
        """Open for the block what gives queue pairs of the kernel's rates; it changes nothing by itself.

        Args:
            connections: Numbers of those that send from a NIC, by the NIC's port id.

        Raises:
            LabError: The fabric was deployed with gates that leave no place for classes.
        """
        nodes = self.plan.topology.nodes
        with contextlib.ExitStack() as stack:
            ports = []
            operations = (
                self.plan.operations([""] * len(nodes), any_workload=self.any_workload, back_ends=self.back_ends)
                if connections
                else ()
            )
            for operation in operations:
                if not isinstance(operation, ShapePort) or operation.port not in connections:
                    continue
                if operation.gate == "plug":
                    raise LabError(
                        f"lab {self.name!r} holds queues back with plugs, below which no queue pair can have a rate",
                        hint=f"`testbed destroy {self.name}` and deploy this scenario, or run it without --name",
                    )
                netns = open_namespace(self.namespace_of(nodes[operation.node].name))
                stack.callback(os.close, netns)
                ports.append(QpPort(netns, egress_of(operation), connections[operation.port]))
            shaper = QpShaper(ports)
            stack.callback(shaper.close)
            yield shaper

    @property
    def probe_cpu(self) -> int:
        """The CPU of most ports: where the fidelity probe goes."""
        return int(self.state.details["port_cpus"][0])

    def close(self) -> None:
        """Let go of the lab without removing it."""
        self._lock.close()

    def destroy(self) -> list[str]:
        """Remove the lab; return namespaces left alone because they are not its own."""
        with signals_held():
            foreign = registry.delete_lab(self.state)
            self.close()
        return foreign

    def set_loss(self, port: int, fraction: Fraction | float) -> None:
        """Let the link behind a port lose frames at random from now on, in that direction; 0 ends it.

        Which frames is the scenario's ``fabric.lost_frames``. The loss is drawn anew for every frame and does not follow the
        scenario's seed.

        Args:
            port: Port id of the sending end.
            fraction: Share of the frames that is lost, from 0 to 1.
        """
        set_loss(self.arrays, port, fraction, lost_priorities(self.plan.scenario))

    def namespace_of(self, node: str) -> str:
        """Return the namespace of a node.

        Raises:
            LabError: The lab has no such node.
        """
        return registry.namespace_of(self.state, node)

    def read_kernel_marks(self) -> None:
        """Note in the queues' counters what qdiscs have marked; where the eBPF program marks, it counts by itself."""
        if self.back_ends.marker != "red":
            return
        for node in self.plan.topology.nodes:
            descriptor = open_namespace(self.namespace_of(node.name))
            try:
                with entered(descriptor), RouteSocket() as route:
                    for (index, priority), marked in read_marks(route).items():
                        self.arrays.queues["marked_packets"][index - IFINDEX_BASE, priority] = marked
            finally:
                os.close(descriptor)

    @contextlib.contextmanager
    def packet_sockets(self) -> Iterator[list[socket.socket]]:
        """Open a sending socket on every NIC for the block, host by host."""
        opened: list[socket.socket] = []
        try:
            for port in self.plan.topology.nics:
                node = self.plan.topology.nodes[port.node]
                descriptor = open_namespace(self.namespace_of(node.name))
                try:
                    with entered(descriptor):
                        opened.append(open_packet_socket(port.ifname))
                finally:
                    os.close(descriptor)
            yield opened
        finally:
            for one in opened:
                one.close()


def set_loss(arrays: layout.MappedArrays, port: int, fraction: Fraction | float, priorities: Iterable[int]) -> None:
    """Let the link behind a port lose some priorities' frames at random; see :meth:`Fabric.set_loss`."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be from 0 to 1, got {fraction}")
    threshold = min(layout.PROBABILITY_ONE - 1, round(fraction * layout.PROBABILITY_ONE))
    arrays.queues["loss_threshold"][port, list(priorities)] = threshold


def open_arrays(state: registry.LabState) -> layout.MappedArrays:
    """Map the eBPF arrays of a deployed lab.

    Raises:
        KernelError: They are gone (ENOENT), or may not be read (EPERM).
    """
    descriptors: dict[str, int] = {}
    try:
        for map_name, map_id in state.details["maps"].items():
            descriptors[map_name] = bpf.open_map(map_id)
        return layout.MappedArrays(descriptors, state.details["entries"])
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _wait_until_drained(name: str, arrays: layout.MappedArrays, stuck_s: float) -> None:
    """Wait until no frame of an earlier run is under way: it would be taken for one of the next.

    Args:
        name: The lab.
        arrays: Its maps.
        stuck_s: Queues that stand for longer never move again.

    Raises:
        LabError: Frames stay in the queues, or keep coming.
    """
    begin = moved_at = time.monotonic()
    moved = -1
    while True:
        left = int(arrays.queues["deq_bytes"].sum())  # before what entered
        standing = int(arrays.queues["enq_bytes"].sum()) - left
        if standing <= 0:
            return
        now = time.monotonic()
        if left != moved:
            moved, moved_at = left, now
        if now - moved_at > stuck_s:
            raise LabError(
                f"{standing} bytes stand in the queues of lab {name!r} and do not move",
                hint=f"`testbed destroy {name}` and deploy it again",
            )
        if now - begin > _BUSY_S + stuck_s:
            raise LabError(f"something else sends through lab {name!r}", hint="end it, then run again")
        time.sleep(_DRAIN_LOOK_S)


def _map_entries(plan: Plan, *, any_failure: bool) -> dict[str, int]:
    topology = plan.topology
    # The first step has the plan's own tables.
    steps = [step.tables for step in plan.faults.steps] or [plan.tables]
    groups, members, overrides = count_rows(
        topology, steps, any_failure=any_failure, resilient=plan.scenario.routing.resilient_hashing
    )
    ports = len(topology.ports) + 1
    return {
        "tb_ports": ports,
        "tb_queues": ports * layout.PRIORITIES,
        "tb_ingress": ports * layout.PRIORITIES,
        "tb_nodes": len(topology.nodes),
        "tb_fib": len(topology.nodes) * topology.slots,
        "tb_groups": groups,
        "tb_group_states": groups,
        "tb_flowlets": layout.FLOWLETS if any(group.gap_ns for group in plan.tables.groups) else 1,
        "tb_members": members,
        layout.OVERRIDES: overrides,
        "tb_qps": _QP_ROWS,
        layout.KERNEL_QPS: 2 * _QP_ROWS,  # known by what arrives for them and by what leaves for their peers
        "tb_windows": _QP_ROWS if plan.scenario.transport.loss_recovery is LossRecovery.SELECTIVE else 1,
    }


def _fill_ports(plan: Plan, arrays: layout.MappedArrays, back_ends: BackEnds) -> None:
    """Write ports and buffers into the maps."""
    topology = plan.topology
    for port in topology.ports:
        node = topology.nodes[port.node]
        peer = topology.port(port.peer)
        peer_node = topology.nodes[peer.node]
        row: npt.NDArray[Any] = arrays.ports[port.id : port.id + 1]
        row["peer"], row["node"], row["peer_node"] = peer.id, node.index, peer_node.index
        row["flags"] = (layout.PORT_HOST if node.kind is NodeKind.HOST else 0) | (
            layout.PORT_PEER_HOST if peer_node.kind is NodeKind.HOST else 0
        )
        row["peer_mac"] = np.frombuffer(mac_bytes(peer.mac), np.uint8)
    for node in topology.nodes:
        if node.kind is not NodeKind.HOST:
            arrays.nodes["limit_bytes"][node.index] = plan.buffer_bytes(node.index)
            arrays.nodes["shared_bytes"][node.index] = plan.shared_bytes(node.index)
    _fill_qos(plan, arrays, back_ends)
    for port_id, fraction in plan.losses.items():
        set_loss(arrays, port_id, fraction, lost_priorities(plan.scenario))


def _fill_qos(plan: Plan, arrays: layout.MappedArrays, back_ends: BackEnds) -> None:
    """Write what each port marks, pauses and limits."""
    for port_id, marks in plan.marking.items() if back_ends.marker == "bpf" else ():
        rows = arrays.queues[port_id]
        rows["kmin_bytes"], rows["kmax_bytes"] = marks.kmin_bytes, max(1, marks.kmax_bytes)
        rows["mark_slope"] = round(marks.pmax * layout.SLOPE_ONE / max(1, marks.kmax_bytes - marks.kmin_bytes))
    for port_id, pause in plan.pausing.items():
        for priority in pause.priorities:
            row = arrays.ingress[port_id, priority : priority + 1]
            row["xoff_bytes"] = pause.xoff_bytes or 0
            row["alpha"] = round(pause.alpha * layout.ALPHA_ONE)
            row["hysteresis_bytes"], row["headroom_bytes"] = pause.hysteresis_bytes, pause.headroom_bytes
            row["lossless"] = 1
    for node in plan.topology.nodes:
        split = node.kind is not NodeKind.HOST and switch_of(plan.scenario, node).port_buffer_bytes
        for port_id in node.ports if split else ():
            arrays.queues["limit_bytes"][port_id] = split
