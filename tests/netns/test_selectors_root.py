"""The switch program's selectors beside their Python twins, header by header, by BPF_PROG_TEST_RUN."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from testbed.fabric import Fabric
from testbed.fabric import fabric as fabric_module
from testbed.fabric.apply import IFINDEX_BASE, ifindex_of
from testbed.fabric.tables import HASH_FUNCTION_NUMBERS, SELECTOR_NUMBERS, pack_members
from testbed.kernel import bpf, layout
from testbed.roce.queue_pairs import QPN_BASE
from testbed.routing import FlowKey, Group, HashField, HashFunction, OverrideKey, Selector
from testbed.routing.hashing import hash_flow
from testbed.routing.selectors import Flowlet, SelectorState, flowlet_row, select_port
from testbed.topology import HOST_NETWORK
from tests.netns.labs import in_node, ip_frame, small_fabric

pytestmark = pytest.mark.root

HEADERS = 30_000
GAP_NS = 40_000  # of the order of the time between two packets of the test
ALL_FIELDS = HashField(63)
_BPF_PROG_TEST_RUN = 10
_TC_ACT_REDIRECT = 7
_IFINDEX_OFFSET = 40  # of ifindex in struct __sk_buff


class Switch:
    """leaf0's program with maps of its own, given one frame after the other."""

    def __init__(self, fabric: Fabric, group: Group, overrides: dict[OverrideKey, int]) -> None:
        plan = fabric.plan
        topology = plan.topology
        entries = fabric_module._map_entries(plan, any_failure=False) | {
            "tb_members": 256,
            "tb_flowlets": layout.FLOWLETS,
            "tb_overrides": 1000,
        }
        config = layout.pack_config(
            ifindex_base=IFINDEX_BASE,
            ports=len(topology.ports) + 1,
            slots=topology.slots,
            host_network=HOST_NETWORK,
            qpn_base=QPN_BASE,
            qps=1,
            control_priorities=fabric_module.CONTROL_PRIORITIES,
            data_classes=0,
        )
        initial = {".rodata.config": config, ".rodata.crc": layout.pack_crc_table()}
        self._loaded = bpf.load_object(map_entries=entries, initial_values=initial, programs=("switch_ingress",))
        self.arrays = layout.MappedArrays(self._loaded.maps, entries)
        fabric_module._fill_ports(plan, self.arrays, fabric.back_ends)
        self.arrays.fib[:] = plan.tables.fib.reshape(-1)
        leaf = topology.leaves[0]
        remote = [slot for slot in range(topology.slots) if topology.slot_leaf(slot) is not leaf]
        self.group_index = int(plan.tables.fib[leaf.index, remote[0]])
        members = pack_members(group)
        first = 100
        self.arrays.members[first : first + len(members)] = members
        selector, function = SELECTOR_NUMBERS[group.selector], HASH_FUNCTION_NUMBERS[group.hash_function]
        fields = int(group.hash_fields)
        row = (first, len(members), fields, group.seed, selector, bool(overrides), function, group.gap_ns)
        self.arrays.groups[self.group_index] = row
        self.arrays.nodes["limit_bytes"] = 1 << 62
        layout.write_overrides(self._loaded.maps[layout.OVERRIDES], overrides.items())
        self._context = ctypes.create_string_buffer(192)
        struct.pack_into("=I", self._context, _IFINDEX_OFFSET, ifindex_of(topology.down_ports(leaf)[0].id))
        self._out = ctypes.create_string_buffer(256)

    def forward(self, frame: bytes) -> int:
        """Return the port id that a frame leaves by."""
        assert self.takes(frame)
        return int.from_bytes(self._out.raw[8:10])  # 02:00:<egress>:<ingress>

    def takes(self, frame: bytes) -> bool:
        """Forward a frame, and return whether it is taken in."""
        data = ctypes.create_string_buffer(frame, len(frame))
        attributes = struct.pack(
            "=IIIIQQIIIIQQIIQ",
            *(self._loaded.programs["switch_ingress"], 0, len(frame), len(self._out)),
            *(ctypes.addressof(data), ctypes.addressof(self._out), 1, 0, len(self._context), 0),
            *(ctypes.addressof(self._context), 0, 0, 0, 0),
        )
        result, block = bpf._bpf(_BPF_PROG_TEST_RUN, attributes)
        assert result == 0, os.strerror(ctypes.get_errno())
        (verdict,) = struct.unpack_from("=I", block, 4)
        return bool(verdict == _TC_ACT_REDIRECT)

    def close(self) -> None:
        self._loaded.close()


@pytest.fixture(scope="module")
def fabric() -> Iterator[Fabric]:
    with small_fabric("fabric.spines=5", name="select") as built:
        yield built


@contextmanager
def switch_of(fabric: Fabric, group: Group, overrides: dict[OverrideKey, int] | None = None) -> Iterator[Switch]:
    with in_node(fabric, "leaf0"):
        switch = Switch(fabric, group, overrides or {})
        try:
            yield switch
        finally:
            switch.close()


def group_of(fabric: Fabric, selector: Selector, weights: tuple[int, ...] = (1, 1, 1, 1, 1)) -> Group:
    uplinks = fabric.plan.topology.uplinks(fabric.plan.topology.leaves[0])
    members = tuple(port.id for port, weight in zip(uplinks, weights, strict=True) for _ in range(weight))
    return Group(selector, ALL_FIELDS, 0xC0FFEE, members, GAP_NS if selector is Selector.FLOWLET else 0)


def headers(fabric: Fabric, count: int, seed: int) -> Iterator[tuple[bytes, FlowKey, int]]:
    """Yield frames to hosts of the other rack, what a switch reads of them, and their priority."""
    topology = fabric.plan.topology
    rng = np.random.default_rng(seed)
    source = topology.host_port(0)
    targets = [topology.host_port(rank).address for rank in (2, 3)]
    base = bytearray(ip_frame(fabric, 0, targets[0], bytes(20)))
    columns = zip(
        rng.integers(0, 1 << 32, count).tolist(),
        rng.choice(targets, count).tolist(),
        rng.integers(0, 1 << 16, count).tolist(),
        rng.choice([4791, 4791, 7, 65535], count).tolist(),
        rng.choice([17, 17, 17, 6, 1], count).tolist(),
        rng.integers(0, 1 << 24, count).tolist(),
        rng.integers(0, 64, count).tolist(),
        rng.choice([0, 0, 0, 0, 0x2000, 0x0010, 0x4000], count).tolist(),
        strict=True,
    )
    for src, dst, sport, dport, protocol, qp, dscp, fragment in columns:
        frame = base.copy()
        frame[15] = dscp << 2
        struct.pack_into("!H", frame, 20, fragment)
        frame[23] = protocol
        struct.pack_into("!II", frame, 26, src, dst)
        struct.pack_into("!HH", frame, 34, sport, dport)
        struct.pack_into("!I", frame, 46, 0xAB << 24 | qp)  # the top byte is not part of the QP
        has_ports = protocol in (socket.IPPROTO_UDP, socket.IPPROTO_TCP) and not fragment & 0x3FFF
        is_roce = has_ports and protocol == socket.IPPROTO_UDP and dport == 4791
        key = FlowKey(src, dst, sport if has_ports else 0, dport if has_ports else 0, protocol, qp if is_roce else 0)
        yield bytes(frame), key, dscp >> 3
    assert source.address


def agreements(
    switch: Switch, fabric: Fabric, expect: Callable[[FlowKey, int], int], count: int = HEADERS
) -> list[int]:
    """Forward headers and compare; return the ports taken."""
    taken = []
    for number, (frame, flow, priority) in enumerate(headers(fabric, count, 5)):
        port = switch.forward(frame)
        wanted = expect(flow, priority)
        assert port == wanted, (number, flow)
        taken.append(port)
    return taken


@pytest.mark.parametrize(("dscp", "taken"), [(48, True), (0, False)], ids=["control", "lossy data"])
def test_a_ports_part_of_the_memory_binds_data_and_no_control_frames(fabric: Fabric, dscp: int, taken: bool) -> None:
    frame, _, _ = next(headers(fabric, 1, 5))
    frame = frame[:15] + bytes([dscp << 2]) + frame[16:]
    with switch_of(fabric, group_of(fabric, Selector.HASH)) as switch:
        switch.arrays.nodes["shared_bytes"] = 1 << 62
        assert switch.takes(frame)  # precondition: without a limit either is
        switch.arrays.queues["limit_bytes"] = len(frame) - 1  # of each priority of each port
        assert switch.takes(frame) == taken
        switch.arrays.nodes["limit_bytes"] = 1
        assert not switch.takes(frame)


@pytest.mark.parametrize("weights", [(1, 1, 1, 1, 1), (3, 1, 2, 1, 1)], ids=["equal", "weighted"])
@pytest.mark.parametrize("selector", [Selector.HASH, Selector.ROUND_ROBIN, Selector.RANDOM])
def test_selector_equals_its_twin(fabric: Fabric, selector: Selector, weights: tuple[int, ...]) -> None:
    group, state = group_of(fabric, selector, weights), SelectorState()
    with switch_of(fabric, group) as switch:
        taken = agreements(switch, fabric, lambda flow, _: select_port(group, flow, state))
        if selector is not Selector.HASH:
            assert int(switch.arrays.group_states["turn"][switch.group_index]) == HEADERS == state.turn
    shares = np.array([taken.count(port) for port in dict.fromkeys(group.members)]) / HEADERS
    np.testing.assert_allclose(shares, np.array(weights) / sum(weights), atol=0.01)


@pytest.mark.parametrize("function", [HashFunction.CRC32, HashFunction.CRC16])
def test_hash_function_equals_its_twin(fabric: Fabric, function: HashFunction) -> None:
    members = group_of(fabric, Selector.HASH).members * 13  # 65 slots of the hash's range: more of its bits decide
    group = Group(Selector.HASH, ALL_FIELDS, 0xC0FFEE, members, hash_function=function)
    state, murmur = SelectorState(), replace(group, hash_function=HashFunction.MURMUR3)
    differing = 0
    with switch_of(fabric, group) as switch:

        def expect(flow: FlowKey, _: int) -> int:
            nonlocal differing
            port = select_port(group, flow, state)
            differing += port != select_port(murmur, flow, state)
            return port

        taken = agreements(switch, fabric, expect)
    assert differing > HEADERS / 2  # the negative control: another function's twin would be caught
    shares = np.array([taken.count(port) for port in dict.fromkeys(members)]) / HEADERS
    np.testing.assert_allclose(shares, 1 / 5, atol=0.01)


@pytest.mark.parametrize("weights", [(1, 1, 1, 1, 1), (3, 1, 2, 1, 1)], ids=["equal", "weighted"])
def test_least_depth_equals_its_twin(fabric: Fabric, weights: tuple[int, ...]) -> None:
    group, state = group_of(fabric, Selector.LEAST_DEPTH, weights), SelectorState()
    ports = list(group.weights())
    rng = np.random.default_rng(3)
    with switch_of(fabric, group) as switch:
        queues, flags = switch.arrays.queues, switch.arrays.ports["flags"]
        depth: dict[tuple[int, int], int] = {}
        down: set[int] = set()

        def expect(flow: FlowKey, priority: int) -> int:
            port = select_port(
                group,
                flow,
                state,
                depth_bytes=lambda port: depth.get((port, priority), 0),
                is_live=lambda port: port not in down,
            )
            # Nothing leaves here but what the test takes away: the frame just forwarded is in its queue.
            depth[port, priority] = depth.get((port, priority), 0) + 54
            if rng.random() < 0.2:
                drained = ports[rng.integers(len(ports))]
                queues["deq_bytes"][drained, priority] = queues["enq_bytes"][drained, priority]
                depth[drained, priority] = 0
            if rng.random() < 0.01:
                changed = ports[rng.integers(len(ports))]
                down.symmetric_difference_update({changed})
                flags[changed] ^= 256
            return port

        taken = agreements(switch, fabric, expect)
    assert len(set(taken)) == len(ports)


def test_flowlet_equals_its_twin(fabric: Fabric) -> None:
    group, state = group_of(fabric, Selector.FLOWLET), SelectorState()
    flows = [flow for _, flow, _ in headers(fabric, 64, 5)]
    frames = [frame for frame, _, _ in headers(fabric, 64, 5)]
    rng = np.random.default_rng(9)
    pauses = 0
    with switch_of(fabric, group) as switch:
        table = switch.arrays.flowlets
        rows = [
            flowlet_row(hash_flow(f, hash_fields=group.hash_fields, seed=group.seed), switch.group_index) for f in flows
        ]
        taken: dict[int, set[int]] = {}
        for number in range(HEADERS):
            # Flows of very different paces, so that some pause and some do not.
            one = min(int(rng.exponential(4)), 63)
            port = switch.forward(frames[one])
            now_ns = int(table["last_ns"][rows[one]])  # the twin is given the program's time
            wanted = select_port(group, flows[one], state, group_index=switch.group_index, now_ns=now_ns, gap_ns=GAP_NS)
            assert port == wanted, number
            taken.setdefault(one, set()).add(port)
        pauses = sum(flowlet.number for flowlet in state.flowlets.values())
        for row, flowlet in state.flowlets.items():
            assert flowlet == Flowlet(int(table["last_ns"][row]), int(table["number"][row]))
    assert 100 < pauses < HEADERS - 100  # precondition: packets on both sides of the gap
    assert max(len(ports) for ports in taken.values()) == 5


def test_exact_match_entry_goes_before_the_group_and_all_else_falls_back(fabric: Fabric) -> None:
    group, state = group_of(fabric, Selector.HASH), SelectorState()
    leaf = fabric.plan.topology.leaves[0]
    rng = np.random.default_rng(2)
    flows = [flow for _, flow, _ in headers(fabric, 400, 5)]
    chosen = {
        OverrideKey(leaf.index, flow.src_address, flow.dst_address, flow.dst_qp or flow.src_port): int(port)
        for flow, port in zip(flows[:200], rng.choice(group.members, 200), strict=True)
    }
    # Entries of another switch must not count.
    others = {
        key._replace(node=leaf.index + 1, src_address=flow.src_address): 1
        for key, flow in zip(chosen, flows[200:], strict=False)
    }
    differing = 0
    with switch_of(fabric, group, chosen | others) as switch:

        def expect(flow: FlowKey, _: int) -> int:
            nonlocal differing
            by_hash = select_port(group, flow, state)
            key = OverrideKey(leaf.index, flow.src_address, flow.dst_address, flow.dst_qp or flow.src_port)
            differing += chosen.get(key, by_hash) != by_hash
            return chosen.get(key, by_hash)

        agreements(switch, fabric, expect, count=400)
    assert differing > 100
