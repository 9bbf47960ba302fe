"""``workload``: collectives and patterns, each at one size or at several."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, TypeAlias

from pydantic import Discriminator, Tag, model_validator

from testbed.scenario import kinds
from testbed.scenario.application import ApplicationWorkload
from testbed.scenario.ranges import MAX_HOSTS, SIZE, TIME
from testbed.scenario.section import Section, derived_key, key, list_key

_RANK = kinds.integer(0, MAX_HOSTS - 1)


class Collective(StrEnum):
    """Collective operations."""

    ALL_REDUCE = "all_reduce"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_GATHER = "all_gather"
    ALL_TO_ALL = "all_to_all"
    BROADCAST = "broadcast"
    REDUCE = "reduce"
    GATHER = "gather"
    SCATTER = "scatter"
    SEND_RECV = "send_recv"


class Algorithm(StrEnum):
    """Schedules of collectives."""

    RING = "ring"
    DIRECT = "direct"
    HALVING_DOUBLING = "halving_doubling"
    BINARY_TREE = "binary_tree"
    DOUBLE_BINARY_TREE = "double_binary_tree"
    PAIRWISE = "pairwise"
    HIERARCHICAL = "hierarchical"


class RankOrder(StrEnum):
    """Order in which a collective visits the ranks."""

    RAILS = "rails"
    MIN_CUT = "min_cut"
    PACKED = "packed"
    RANDOM = "random"


class Pattern(StrEnum):
    """Traffic patterns beside collectives."""

    INCAST = "incast"
    PERMUTATION = "permutation"
    FLOWS = "flows"


_PATTERN = kinds.choice(Pattern)
_ORDER = kinds.integers_or(
    kinds.choice(RankOrder),
    0,
    MAX_HOSTS - 1,
    MAX_HOSTS,
    'must be rails, min_cut, packed, random or a list of ranks such as "[0, 2, 1, 3]"',
)
_ITEM_PRIORITY = kinds.integer(0, 5)


class _Iterated(Section):
    """What every item of a workload has."""

    priority: Annotated[int | None, _ITEM_PRIORITY] = key(
        "priority", "Priority of its data: one of qos.priorities. Default: qos.lossless_priority.", default=None
    )

    iters: Annotated[int, kinds.integer(1, 10_000)] = key("iters", "Measured iterations.", default=3)
    warmup_iters: Annotated[int, kinds.integer(0, 10_000)] = key(
        "warmup_iters", "Iterations before, which are not measured.", default=1
    )


class _Sized(_Iterated):
    """What every item with one size has: the item may be run at several, as nccl-tests does."""

    max_size_bytes: Annotated[int | None, SIZE] = key(
        "max_size",
        "Makes the item a sweep: it is run at `size` and at each following size up to this one, and each has a row in "
        "the table.",
        default=None,
    )
    size_factor: Annotated[int | None, kinds.integer(2, 1024)] = key(
        "size_factor",
        "Each size of a sweep over the one before. Default: 2, unless there is a `size_step`.",
        default=None,
    )
    size_step_bytes: Annotated[int | None, SIZE] = key(
        "size_step", "Each size of a sweep less the one before, instead of `size_factor`.", default=None
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_size_factor(cls, data: Any) -> Any:
        """Let the sizes of a sweep double unless it says how they grow; null takes a key of the sweep away again."""
        if not isinstance(data, Mapping):
            return data
        keys = ("max_size", "size_factor", "size_step")
        data = {key: value for key, value in data.items() if value is not None or key not in keys}
        if "max_size" not in data or "size_factor" in data or "size_step" in data:
            return data
        return {**data, "size_factor": 2}


_DIRECT = (Collective.ALL_TO_ALL, Collective.GATHER, Collective.SCATTER, Collective.SEND_RECV)


class CollectiveWorkload(_Sized):
    """A collective over all ranks of the fabric."""

    collective: Annotated[Collective, kinds.choice(Collective)] = key(
        "collective",
        "The collective operation; send_recv sends to the successor in the order. Rooted ones (broadcast, reduce, gather, "
        "scatter) have the first rank of the order as their root.",
        example="all_reduce",
    )
    algorithm: Annotated[Algorithm, kinds.choice(Algorithm)] = derived_key(
        "algorithm",
        "Its schedule. all_reduce: ring, halving_doubling, double_binary_tree, hierarchical (NVLink inside the hosts, a ring "
        "per GPU between them); broadcast and reduce: ring, binary_tree; all_to_all: direct (all at once), pairwise; "
        "reduce_scatter and all_gather: ring; gather, scatter and send_recv: direct. Default: the first of these.",
    )
    order: Annotated[RankOrder | tuple[int, ...], _ORDER] = key(
        "order",
        "Order in which the algorithm visits the ranks: rails changes the leaf at every hop, min_cut does so within a zone and "
        "visits zone after zone, packed stays in a host and under a leaf as long as it can, random is drawn from the scenario's "
        "seed, alike for all items; or a list of all ranks.",
        default="rails",
    )
    size_bytes: Annotated[int, SIZE] = key(
        "size", "Buffer of each rank: the larger one where what is sent and what is received differ.", example="64 MiB"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_algorithm(cls, data: Any) -> Any:
        """Fill in the usual schedule of the collective."""
        if not isinstance(data, Mapping):
            return data
        return {"algorithm": str(usual_algorithm(data.get("collective"))), **data}


def usual_algorithm(collective: object) -> Algorithm:
    """Return the algorithm that a collective has unless another is given."""
    return Algorithm.DIRECT if collective in [str(one) for one in _DIRECT] else Algorithm.RING


class IncastWorkload(_Sized):
    """Ranks 1 to fan_in send to rank 0, all at once."""

    pattern: Annotated[Pattern, kinds.only(_PATTERN, "incast")] = key(
        "pattern", "The pattern: incast; ranks 1 to fan_in send to rank 0 at once.", example="incast"
    )
    fan_in: Annotated[int, kinds.integer(1, MAX_HOSTS)] = key("fan_in", "Number of senders.", example=1)
    size_bytes: Annotated[int, SIZE] = key("size", "What each sender sends.", example="1 MiB")


class PermutationWorkload(_Sized):
    """Every rank sends to one other, and receives from one other."""

    pattern: Annotated[Pattern, kinds.only(_PATTERN, "permutation")] = key(
        "pattern",
        "The pattern: permutation; who sends to whom is drawn from the scenario's seed, alike for all items.",
        example="permutation",
    )
    size_bytes: Annotated[int, SIZE] = key("size", "What each rank sends.", example="1 MiB")


class Flow(Section):
    """One flow between two ranks; with one GPU per host, ranks are hosts."""

    src: Annotated[int, _RANK] = key("src", "The sending rank.", example=0)
    dst: Annotated[int, _RANK] = key("dst", "The receiving rank.", example=1)
    size_bytes: Annotated[int, SIZE] = key("size", "What it sends.", example="1 MiB")
    start_ns: Annotated[int, TIME] = key("start", "When it starts, from the beginning of an iteration.", default="0 ns")
    priority: Annotated[int | None, _ITEM_PRIORITY] = key(
        "priority", "Priority of its data, where it is another than the item's.", default=None
    )


_ONE_FLOW = {"src": 0, "dst": 1, "size": "1 MiB"}


class FlowsWorkload(_Iterated):
    """Flows as listed; two between the same ranks have a connection each."""

    pattern: Annotated[Pattern, kinds.only(_PATTERN, "flows")] = key("pattern", "The pattern: flows.", example="flows")
    flows: tuple[Flow, ...] = list_key("flows", "The flows.", required=True, example=[_ONE_FLOW])


def _select_workload(data: Any) -> str:
    if isinstance(data, Section):
        data = {"pattern": getattr(data, "pattern", None)}
    pattern = data.get("pattern") if isinstance(data, Mapping) else None
    if pattern is None:
        return "<collective>"
    return f"<{pattern}>" if pattern in ("incast", "flows") else "<permutation>"


Workload: TypeAlias = Annotated[
    Annotated[CollectiveWorkload, Tag("<collective>")]
    | Annotated[IncastWorkload, Tag("<incast>")]
    | Annotated[PermutationWorkload, Tag("<permutation>")]
    | Annotated[FlowsWorkload, Tag("<flows>")],
    Discriminator(_select_workload),
]


def _select_item(data: Any) -> str:
    named = "application" in data if isinstance(data, Mapping) else isinstance(data, ApplicationWorkload)
    return "<application>" if named else "<message>"


WorkloadItem: TypeAlias = Annotated[
    Annotated[ApplicationWorkload, Tag("<application>")] | Annotated[Workload, Tag("<message>")],
    Discriminator(_select_item),
]
ONE_WORKLOAD = {"collective": "all_reduce", "size": "64 MiB"}
