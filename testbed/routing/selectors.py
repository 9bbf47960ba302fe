"""The selectors of a group, twins of those in ``bpf/selectors.h``: equal to the bit, given the same state.

What a selector remembers between packets is a value here, so that a test can hand both the same, and a model can run them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from testbed.routing.hashing import FlowKey, hash_flow, mix
from testbed.routing.tables import Group, Selector

FLOWLET_ROWS = 65536
"""Rows of a fabric's flowlet table; flows that meet in a row are one flow to it."""

_WORD = 0xFFFF_FFFF
_SEED_OFFSET = 0x9E37_79B9


@dataclass
class Flowlet:
    """A row of the flowlet table.

    Attributes:
        last_ns: When its last packet came; 0 if none did.
        number: Pauses longer than the gap so far.
    """

    last_ns: int = 0
    number: int = 0


@dataclass
class SelectorState:
    """What the selectors of one group remember.

    Attributes:
        turn: Packets that took turns so far.
        flowlets: Rows of the flowlet table that were used, by number.
    """

    turn: int = 0
    flowlets: dict[int, Flowlet] = field(default_factory=dict)


def select_port(
    group: Group,
    flow: FlowKey,
    state: SelectorState,
    *,
    group_index: int = 0,
    now_ns: int = 0,
    gap_ns: int | None = None,
    depth_bytes: Callable[[int], int] = lambda port: 0,
    is_live: Callable[[int], bool] = lambda port: True,
) -> int:
    """Return the port that a packet leaves by, and note in the state that it did.

    Args:
        group: The group.
        flow: Header fields of the packet.
        state: The group's state.
        group_index: Place of the group in its tables; flows of two groups use different rows of the flowlet table.
        now_ns: When the packet comes, on the same clock as the state.
        gap_ns: The flowlet gap on that clock; None for the group's own.
        depth_bytes: Tells the depth of a port's queue.
        is_live: Tells whether a port's link is up.
    """
    members = group.members
    if len(members) == 1:
        return members[0]
    if group.selector is Selector.ROUND_ROBIN:
        return members[_take_turn(state) % len(members)]
    if group.selector is Selector.RANDOM:
        word = mix(mix(_take_turn(state) & _WORD) ^ mix((group.seed + _SEED_OFFSET) & _WORD))
        return members[word * len(members) >> 32]
    if group.selector is Selector.LEAST_DEPTH:
        return _select_least_depth(group, state, depth_bytes, is_live)
    h = hash_flow(flow, hash_fields=group.hash_fields, seed=group.seed, function=group.hash_function)
    if group.selector is Selector.FLOWLET:
        h = _flowlet_hash(h, state, group_index, now_ns, group.gap_ns if gap_ns is None else gap_ns)
    return members[h * len(members) >> 32]


def flowlet_row(flow_hash: int, group_index: int) -> int:
    """Return the row of the flowlet table that a flow uses."""
    return mix(flow_hash ^ group_index) & (FLOWLET_ROWS - 1)


def _take_turn(state: SelectorState) -> int:
    state.turn += 1
    return state.turn - 1


def _select_least_depth(
    group: Group, state: SelectorState, depth_bytes: Callable[[int], int], is_live: Callable[[int], bool]
) -> int:
    weights = group.choices()
    if len(weights) == 1:
        return weights[0][0]
    first = _take_turn(state) % len(weights)
    best, best_depth, best_weight = weights[first][0], 0, 0
    for port, weight in weights[first:] + weights[:first]:
        if not is_live(port):
            continue
        depth = max(0, depth_bytes(port))
        if not best_weight or depth * best_weight < best_depth * weight:
            best, best_depth, best_weight = port, depth, weight
    return best


def _flowlet_hash(h: int, state: SelectorState, group_index: int, now_ns: int, gap_ns: int) -> int:
    flowlet = state.flowlets.setdefault(flowlet_row(h, group_index), Flowlet())
    if flowlet.last_ns and now_ns - flowlet.last_ns > gap_ns:
        flowlet.number += 1
    flowlet.last_ns = now_ns
    return mix(h ^ mix(flowlet.number & _WORD)) if flowlet.number else h
