"""The scenario as a value: every key of the file format, its meaning, its default, its limits.

Frozen pydantic models. The alias of a field is its key in the file; the attribute's name ends in the unit of its
integer, so ``fabric.host_link.rate: 400 Gbit/s`` becomes ``scenario.fabric.host_link.rate_bits_per_s``. Defaults are
written here as a user would write them.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from enum import StrEnum
from fractions import Fraction
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, Discriminator, Tag, model_validator

from testbed.routing import ROUTING_SCHEMES, HashFunction
from testbed.scenario import kinds
from testbed.scenario.application import ApplicationWorkload
from testbed.scenario.congestion import CongestionControl, Dcqcn, Timely, congestion_parameters
from testbed.scenario.expect import Expectation
from testbed.scenario.faults import Fault
from testbed.scenario.loss import LinkLoss as LinkLoss
from testbed.scenario.loss import LostFrames as LostFrames
from testbed.scenario.nvlink import Nvlink as Nvlink
from testbed.scenario.qos import Qos
from testbed.scenario.section import Section as _Section
from testbed.scenario.section import derived_key as _derived_key
from testbed.scenario.section import key as _key
from testbed.scenario.section import list_key as _list_key
from testbed.scenario.switch import Switch as Switch

MAX_HOSTS = 32_768
"""Hosts, and ranks, of the largest fabric that can be described; what can be emulated says `testbed.plan.limits`."""

MAX_SWITCHES = 4096
"""Switches of each tier, likewise."""

GIB = 2**30

_RATE = kinds.rate(10**6, 1_600 * 10**9)
_DELAY = kinds.time(0, 10**9)
_TIME = kinds.time(0, 3600 * 10**9)
_TIMEOUT = kinds.auto_or(kinds.time(1, 10 * 10**9))
_SIZE = kinds.size(1, 16 * GIB)
_FRACTION = kinds.fraction(Fraction(1))
_FLAG = kinds.flag()
_UINT32 = kinds.integer(0, 2**32 - 1)
_PRIORITY = kinds.integer(0, 7)
_RANK = kinds.integer(0, MAX_HOSTS - 1)


class FabricKind(StrEnum):
    """Shape of the fabric."""

    STAR = "star"
    CLOS = "clos"
    ZONES = "zones"


class SprayOrder(StrEnum):
    """Which uplink a sprayed packet takes."""

    ROUND_ROBIN = "round_robin"
    RANDOM = "random"


class AdaptiveScope(StrEnum):
    """What adaptive routing goes by."""

    LOCAL = "local"
    CAPACITY = "capacity"


class Carrier(StrEnum):
    """What carries the bytes."""

    ENGINE = "engine"
    RXE = "rxe"
    TCP = "tcp"


class LinkDelay(StrEnum):
    """What delays the bytes by the propagation of their links."""

    AUTO = "auto"
    CARRIER = "carrier"
    NETEM = "netem"


class QpStrategy(StrEnum):
    """How a message is spread over the QPs of its connection."""

    SPLIT = "split"
    ROUND_ROBIN = "round_robin"
    DYNAMIC = "dynamic"


class UdpSourcePort(StrEnum):
    """What gets a UDP source port, and so path entropy, of its own."""

    PER_PAIR = "per_pair"
    PER_QP = "per_qp"


class LossRecovery(StrEnum):
    """What a NIC resends after a loss."""

    GO_BACK_N = "go_back_n"
    SELECTIVE = "selective"


class AdmissionScheme(StrEnum):
    """What a sender must be granted before it sends."""

    NONE = "none"
    CTS = "cts"


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


class Placement(StrEnum):
    """Which hosts a job gets."""

    PACKED = "packed"
    FRAGMENTED = "fragmented"
    RANDOM = "random"


class MeasuredJobs(StrEnum):
    """Which sets of jobs are run."""

    TOGETHER = "together"
    ALONE = "alone"
    PAIRS = "pairs"


class Pattern(StrEnum):
    """Traffic patterns beside collectives."""

    INCAST = "incast"
    PERMUTATION = "permutation"
    FLOWS = "flows"


_FABRIC_KIND = kinds.choice(FabricKind)
_PATTERN = kinds.choice(Pattern)
_ORDER = kinds.integers_or(
    kinds.choice(RankOrder),
    0,
    MAX_HOSTS - 1,
    MAX_HOSTS,
    'must be rails, min_cut, packed, random or a list of ranks such as "[0, 2, 1, 3]"',
)
_PLACEMENT = kinds.integers_or(
    kinds.choice(Placement), 0, MAX_HOSTS - 1, MAX_HOSTS, "must be packed, fragmented, random or a list of host numbers"
)
_HOSTS_PER_LEAF = kinds.integers_or(
    kinds.integer(1, MAX_HOSTS),
    1,
    MAX_HOSTS,
    MAX_SWITCHES,
    f"must be an integer from 1 to {MAX_HOSTS}, or a list of one such integer per leaf",
)


class Link(_Section):
    """One class of links, alike in both directions."""

    rate_bits_per_s: Annotated[int, _RATE] = _key("rate", "Rate of each direction.", example="400 Gbit/s")
    delay_ns: Annotated[int, _DELAY] = _key("delay", "One-way propagation delay.", default="600 ns")
    loss_fraction: Annotated[Fraction, _FRACTION] = _key(
        "loss", "Share of the frames that each of these links loses at random, in either direction.", default="0"
    )


class Uplink(Link):
    """The links between leaves and spines; rate and delay are as on the host links where they are not given."""

    rate_bits_per_s: Annotated[int, _RATE] = _derived_key("rate", "Rate of each direction. Default: the host links'.")
    delay_ns: Annotated[int, _DELAY] = _derived_key("delay", "One-way propagation delay. Default: the host links'.")


class _Fabric(_Section):
    """What every shape of fabric has."""

    host_link: Link = _key("host_link", "The link between a host's NIC and its leaf.", example={"rate": "400 Gbit/s"})
    switch: Switch = _key("switch", "The switches.", default={})
    spine_switch: Switch = _derived_key("spine_switch", "The spines, where they differ. Default: as `switch`.")
    lossy_links: tuple[LinkLoss, ...] = _list_key(
        "lossy_links",
        "Links that lose another share of their frames than their kind does, in either direction.",
        example=[{"link": "leaf0:spine1", "fraction": "1/1000"}],
    )
    lost_frames: Annotated[LostFrames, kinds.choice(LostFrames)] = _key(
        "lost_frames",
        "What lossy links lose: all frames, as a bad cable does, or data alone (no ACK, NAK or CNP).",
        default="all",
    )
    nics_per_host: Annotated[int, kinds.integer(1, 16)] = _key(
        "nics_per_host", "NICs, hence rails, of one host, each with a link to the host's leaf.", default=1
    )
    gpus_per_host: Annotated[int, kinds.integer(1, 16)] = _key(
        "gpus_per_host",
        "GPUs, hence ranks, of one host: a multiple of nics_per_host. Ranks are numbered host by host, and share their "
        "host's NICs evenly and in order. Those of one host talk over NVLink.",
        default=1,
    )
    nvlink: Nvlink = _key("nvlink", "What joins the GPUs of a host: a model, no packets.", default={})

    @property
    def host_counts(self) -> tuple[int, ...]:
        """Hosts under each leaf."""
        raise NotImplementedError

    @property
    def nhosts(self) -> int:
        """Hosts of the whole fabric."""
        return sum(self.host_counts)

    @property
    def nranks(self) -> int:
        """Ranks of the whole fabric."""
        return self.nhosts * self.gpus_per_host

    @property
    def rank_counts(self) -> tuple[int, ...]:
        """Ranks under each leaf."""
        return tuple(hosts * self.gpus_per_host for hosts in self.host_counts)

    @model_validator(mode="before")
    @classmethod
    def _fill_spine_switch(cls, data: Any) -> Any:
        """Let spines be as the other switches unless they are given."""
        return _with_spine_switch(data)


def _with_spine_switch(data: Any) -> Any:
    return {"spine_switch": data.get("switch", {}), **data} if isinstance(data, Mapping) else data


def _with_uplink(data: Any) -> Any:
    if not isinstance(data, Mapping):
        return data
    host_link, uplink = data.get("host_link"), data.get("uplink", {})
    if not isinstance(host_link, Mapping) or not isinstance(uplink, Mapping):
        return data
    default_delay = Link.model_fields["delay_ns"].default
    inherited = {"rate": host_link.get("rate"), "delay": host_link.get("delay", default_delay)}
    return {**data, "uplink": {**inherited, **uplink}}


class StarFabric(_Fabric):
    """Hosts on one switch, which is named ``switch0``."""

    kind: Annotated[FabricKind, kinds.only(_FABRIC_KIND, "star")] = _key(
        "kind", "Shape of the fabric: star.", example="star"
    )
    hosts_per_leaf: Annotated[int, kinds.integer(1, MAX_HOSTS)] = _key(
        "hosts_per_leaf", "Hosts on the one switch.", example=2
    )

    @property
    def host_counts(self) -> tuple[int, ...]:
        """Hosts under each leaf."""
        return (self.hosts_per_leaf,)


class ClosFabric(_Fabric):
    """Leaves, each joined to every spine by one uplink."""

    kind: Annotated[FabricKind, kinds.only(_FABRIC_KIND, "clos")] = _key(
        "kind", "Shape of the fabric: clos.", example="clos"
    )
    leaves: Annotated[int, kinds.integer(1, MAX_SWITCHES)] = _key("leaves", "Number of leaf switches.", example=2)
    spines: Annotated[int, kinds.integer(0, MAX_SWITCHES)] = _key(
        "spines", "Number of spine switches; 0 only with a single leaf.", example=1
    )
    hosts_per_leaf: Annotated[int | tuple[int, ...], _HOSTS_PER_LEAF] = _key(
        "hosts_per_leaf", "Hosts under every leaf, or a list with the number under each.", example=1
    )
    uplink: Uplink = _derived_key("uplink", "The link between a leaf and a spine. Default: as the host links.")

    @model_validator(mode="before")
    @classmethod
    def _fill_uplink(cls, data: Any) -> Any:
        """Fill in what the uplink takes over from the host link."""
        return _with_uplink(data)

    @property
    def host_counts(self) -> tuple[int, ...]:
        """Hosts under each leaf."""
        if isinstance(self.hosts_per_leaf, tuple):
            return self.hosts_per_leaf
        return (self.hosts_per_leaf,) * self.leaves


class ZonesFabric(ClosFabric):
    """Zones, each with leaves and spines of its own, whose spines are joined by superspines."""

    kind: Annotated[FabricKind, kinds.only(_FABRIC_KIND, "zones")] = _key(
        "kind", "Shape of the fabric: zones.", example="zones"
    )
    zones: Annotated[int, kinds.integer(1, MAX_SWITCHES)] = _key("zones", "Number of zones.", example=2)
    leaves: Annotated[int, kinds.integer(1, MAX_SWITCHES)] = _key("leaves", "Leaf switches of each zone.", example=2)
    spines: Annotated[int, kinds.integer(1, MAX_SWITCHES)] = _key("spines", "Spine switches of each zone.", example=1)
    superspines: Annotated[int, kinds.integer(1, MAX_SWITCHES)] = _key(
        "superspines", "Superspines, which join the zones.", example=1
    )
    hosts_per_leaf: Annotated[int | tuple[int, ...], _HOSTS_PER_LEAF] = _key(
        "hosts_per_leaf", "Hosts under every leaf, or a list with the number under each, zone by zone.", example=1
    )
    superspine_link: Uplink = _derived_key(
        "superspine_link",
        "The link between a spine and a superspine. Zones are oversubscribed by leaves x uplink rate to superspines x this rate: "
        "what a spine can get from its leaves to what it can send to other zones. Default: as `uplink`.",
    )
    superspine_switch: Switch = _derived_key(
        "superspine_switch", "The superspines, where they differ. Default: as `spine_switch`."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_superspines(cls, data: Any) -> Any:
        """Let superspines and their links be as spines and uplinks unless they are given."""
        if not isinstance(data, Mapping):
            return data
        filled = _with_uplink(_with_spine_switch(data))
        filled = {"superspine_switch": filled.get("spine_switch"), **filled}
        uplink, given = filled.get("uplink"), filled.get("superspine_link", {})
        if isinstance(uplink, Mapping) and isinstance(given, Mapping):
            inherited = {key: uplink[key] for key in ("rate", "delay") if uplink.get(key) is not None}
            filled["superspine_link"] = {**inherited, **given}
        return filled

    @property
    def oversubscription(self) -> Fraction:
        """What a spine can get from its leaves over what it can send to other zones."""
        return Fraction(
            self.leaves * self.uplink.rate_bits_per_s, self.superspines * self.superspine_link.rate_bits_per_s
        )

    @property
    def host_counts(self) -> tuple[int, ...]:
        """Hosts under each leaf, zone by zone."""
        if isinstance(self.hosts_per_leaf, tuple):
            return self.hosts_per_leaf
        return (self.hosts_per_leaf,) * (self.zones * self.leaves)


def _select_fabric(data: Any) -> str:
    kind = data.get("kind") if isinstance(data, Mapping) else getattr(data, "kind", None)
    return f"<{kind}>" if kind in ("star", "zones") else "<clos>"


Fabric: TypeAlias = Annotated[
    Annotated[ClosFabric, Tag("<clos>")]
    | Annotated[StarFabric, Tag("<star>")]
    | Annotated[ZonesFabric, Tag("<zones>")],
    Discriminator(_select_fabric),
]


class Routing(_Section):
    """How switches choose among equal paths."""

    scheme: Annotated[str, kinds.name(tuple(ROUTING_SCHEMES))] = _key(
        "scheme",
        f"Routing scheme: {', '.join(f'{name} {scheme.summary}' for name, scheme in ROUTING_SCHEMES.items())}.",
        default="ecmp",
    )
    hash_seed: Annotated[int, _UINT32] = _derived_key(
        "hash_seed", "Seed of the switches' hash. Default: the scenario's seed."
    )
    hash_seed_per_tier: Annotated[bool, _FLAG] = _key(
        "hash_seed_per_tier",
        "Whether leaves, spines and superspines hash with seeds of their own, all from `hash_seed`. With one seed for all a "
        "spine sees only flows of like hashes and sends them all to the same superspine: polarisation.",
        default=True,
    )
    hash_function: Annotated[HashFunction, kinds.choice(HashFunction)] = _key(
        "hash_function",
        "What switches hash with. The CRCs are linear, as in many switches: another seed XORs the same constant to all hashes, "
        "which does not cure polarisation where the number of ways is a power of two; another function does.",
        default="murmur3",
    )
    spine_hash_function: Annotated[HashFunction, kinds.choice(HashFunction)] = _derived_key(
        "spine_hash_function", "What spines hash with. Default: `hash_function`."
    )
    superspine_hash_function: Annotated[HashFunction, kinds.choice(HashFunction)] = _derived_key(
        "superspine_hash_function", "What superspines hash with. Default: `hash_function`."
    )
    resilient_hashing: Annotated[bool, _FLAG] = _key(
        "resilient_hashing",
        "Whether switches that hash move only the flows of dead links to others; without, all flows are hashed anew over what is "
        "left.",
        default=False,
    )
    flowlet_gap_ns: Annotated[int | None, _TIME] = _key(
        "flowlet_gap", "Idle time after which a flow may change its path; scheme flowlet needs it.", default=None
    )
    spray_order: Annotated[SprayOrder, kinds.choice(SprayOrder)] = _key(
        "spray_order", "Which uplink a packet takes under scheme spray.", default="round_robin"
    )
    adaptive_scope: Annotated[AdaptiveScope, kinds.choice(AdaptiveScope)] = _key(
        "adaptive_scope",
        "What scheme adaptive compares: local the queues of the switch's own ports, capacity these queues over what the "
        "paths behind them can carry.",
        default="local",
    )
    detection_time_ns: Annotated[int, _TIME] = _key(
        "detection_time",
        "From a link's failure or repair until the switches at its ends route by it; adaptive passes over a dead port at once. "
        "The default is the shortest of what RFC 7938 section 7.1 calls milliseconds.",
        default="1 ms",
    )
    convergence_time_ns: Annotated[int, _TIME] = _key(
        "convergence_time",
        "From a link's failure or repair until all switches route by it. The default is a guess for one hop of BGP with fast "
        "fallover; what a fabric takes depends on its switches' software.",
        default="5 ms",
    )
    te_loop_time_ns: Annotated[int, _TIME] = _key(
        "te_loop_time",
        "From a link's failure, repair or change of rate until the entries that the controller of scheme te, or the weights "
        "of adaptive_scope capacity, follow it; until then flows whose entry leads nowhere fall back to ECMP. The default is a "
        "guess: controllers of wide-area fabrics take seconds.",
        default="1 s",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_hash_functions(cls, data: Any) -> Any:
        """Let spines and superspines hash as the leaves do where they have no function of their own."""
        if not isinstance(data, Mapping):
            return data
        function = data.get("hash_function", cls.model_fields["hash_function"].default)
        return {"spine_hash_function": function, "superspine_hash_function": function, **data}


class Admission(_Section):
    """Receiver-driven admission."""

    scheme: Annotated[AdmissionScheme, kinds.choice(AdmissionScheme)] = _key(
        "scheme",
        "Admission scheme: none, or cts: a sender writes only what clear-to-send frames of its receiver have granted. The "
        "other keys are cts's.",
        default="none",
    )
    channels: Annotated[int, kinds.integer(1, 64)] = _key(
        "channels", "Channels between two ranks: their buffers together are the window W.", default=1
    )
    channel_buffer_bytes: Annotated[int, _SIZE] = _key(
        "channel_buffer", "Receive buffer of one channel; NCCL's is 4 MiB.", default="4 MiB"
    )
    grants: Annotated[int, kinds.integer(1, 1024)] = _key(
        "grants",
        "Pieces in which the window W is granted, of a full packet or more each; a piece is granted anew when what it "
        "covered has arrived. NCCL has 8.",
        default=8,
    )
    priority: Annotated[int | None, _PRIORITY] = _key(
        "priority",
        "Priority of CTS frames: 6 and 7 have the control queue, all others wait in the data's. Default: the data's "
        "priority, as in a network without a class for them.",
        default=None,
    )

    @property
    def window_bytes(self) -> int:
        """Payload that a connection may have sent and not arrived."""
        return self.channels * self.channel_buffer_bytes


class Transport(_Section):
    """RoCEv2 as NICs and the collective library set it up."""

    carrier: Annotated[Carrier, kinds.choice(Carrier)] = _key("carrier", "What carries the bytes.", default="engine")
    link_delay: Annotated[LinkDelay, kinds.choice(LinkDelay)] = _key(
        "link_delay",
        "What delays by the propagation of links: netem, the qdisc, every frame at every port, for carriers rxe and tcp; "
        "carrier, whoever sends, and then an acknowledgement of the kernel's comes back without it. auto: netem with those "
        "carriers where this kernel has it and a link has a delay.",
        default="auto",
    )
    mtu_bytes: Annotated[int, kinds.one_of((256, 512, 1024, 2048, 4096))] = _key(
        "mtu", "RDMA payload of a full frame, in bytes.", default=4096
    )
    qps_per_connection: Annotated[int, kinds.integer(1, 32)] = _key(
        "qps_per_connection", "Queue pairs between two ranks.", default=1
    )
    qp_strategy: Annotated[QpStrategy, kinds.choice(QpStrategy)] = _key(
        "qp_strategy", "How a message is spread over the queue pairs.", default="split"
    )
    udp_source_port: Annotated[UdpSourcePort, kinds.choice(UdpSourcePort)] = _key(
        "udp_source_port", "What has a UDP source port of its own.", default="per_qp"
    )
    loss_recovery: Annotated[LossRecovery, kinds.choice(LossRecovery)] = _key(
        "loss_recovery",
        "What is resent after a loss: go_back_n everything from the first missing packet on; selective what is missing alone, "
        "to a receiver that takes packets out of order.",
        default="go_back_n",
    )
    reorder_time_ns: Annotated[int | None, _TIMEOUT] = _key(
        "reorder_time",
        "Under selective: how long after a later packet's SACK a packet may still come before it counts as lost; auto: the "
        "round trip of the idle path, four where packets are spread over several, and four of the engine's ticks.",
        default="auto",
    )
    retransmit_timeout_ns: Annotated[int | None, _TIMEOUT] = _key(
        "retransmit_timeout",
        "Time without an ACK after which all is resent; auto follows from path and rate.",
        default="auto",
    )
    congestion_control: Annotated[CongestionControl, kinds.choice(CongestionControl)] = _key(
        "congestion_control", "What slows senders down.", default="none"
    )
    dcqcn: Dcqcn | None = _key("dcqcn", "Parameters of dcqcn.", default=None)
    timely: Timely | None = _key("timely", "Parameters of timely.", default=None)
    admission: Admission = _key("admission", "What senders must be granted.", default={})

    @property
    def congestion_parameters(self) -> dict[str, Any]:
        """What `testbed.roce.congestion.make` takes as parameters of the congestion control that is chosen."""
        return congestion_parameters(getattr(self, str(self.congestion_control), None))


_ITEM_PRIORITY = kinds.integer(0, 5)


class _Iterated(_Section):
    """What every item of a workload has."""

    priority: Annotated[int | None, _ITEM_PRIORITY] = _key(
        "priority", "Priority of its data: one of qos.priorities. Default: qos.lossless_priority.", default=None
    )

    iters: Annotated[int, kinds.integer(1, 10_000)] = _key("iters", "Measured iterations.", default=3)
    warmup_iters: Annotated[int, kinds.integer(0, 10_000)] = _key(
        "warmup_iters", "Iterations before, which are not measured.", default=1
    )


class _Sized(_Iterated):
    """What every item with one size has: the item may be run at several, as nccl-tests does."""

    max_size_bytes: Annotated[int | None, _SIZE] = _key(
        "max_size",
        "Makes the item a sweep: it is run at `size` and at each following size up to this one, and each has a row in "
        "the table.",
        default=None,
    )
    size_factor: Annotated[int | None, kinds.integer(2, 1024)] = _key(
        "size_factor",
        "Each size of a sweep over the one before. Default: 2, unless there is a `size_step`.",
        default=None,
    )
    size_step_bytes: Annotated[int | None, _SIZE] = _key(
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

    collective: Annotated[Collective, kinds.choice(Collective)] = _key(
        "collective",
        "The collective operation; send_recv sends to the successor in the order. Rooted ones (broadcast, reduce, gather, "
        "scatter) have the first rank of the order as their root.",
        example="all_reduce",
    )
    algorithm: Annotated[Algorithm, kinds.choice(Algorithm)] = _derived_key(
        "algorithm",
        "Its schedule. all_reduce: ring, halving_doubling, double_binary_tree, hierarchical (NVLink inside the hosts, a ring "
        "per GPU between them); broadcast and reduce: ring, binary_tree; all_to_all: direct (all at once), pairwise; "
        "reduce_scatter and all_gather: ring; gather, scatter and send_recv: direct. Default: the first of these.",
    )
    order: Annotated[RankOrder | tuple[int, ...], _ORDER] = _key(
        "order",
        "Order in which the algorithm visits the ranks: rails changes the leaf at every hop, min_cut does so within a zone and "
        "visits zone after zone, packed stays in a host and under a leaf as long as it can, random is drawn from the scenario's "
        "seed, alike for all items; or a list of all ranks.",
        default="rails",
    )
    size_bytes: Annotated[int, _SIZE] = _key(
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

    pattern: Annotated[Pattern, kinds.only(_PATTERN, "incast")] = _key(
        "pattern", "The pattern: incast; ranks 1 to fan_in send to rank 0 at once.", example="incast"
    )
    fan_in: Annotated[int, kinds.integer(1, MAX_HOSTS)] = _key("fan_in", "Number of senders.", example=1)
    size_bytes: Annotated[int, _SIZE] = _key("size", "What each sender sends.", example="1 MiB")


class PermutationWorkload(_Sized):
    """Every rank sends to one other, and receives from one other."""

    pattern: Annotated[Pattern, kinds.only(_PATTERN, "permutation")] = _key(
        "pattern",
        "The pattern: permutation; who sends to whom is drawn from the scenario's seed, alike for all items.",
        example="permutation",
    )
    size_bytes: Annotated[int, _SIZE] = _key("size", "What each rank sends.", example="1 MiB")


class Flow(_Section):
    """One flow between two ranks; with one GPU per host, ranks are hosts."""

    src: Annotated[int, _RANK] = _key("src", "The sending rank.", example=0)
    dst: Annotated[int, _RANK] = _key("dst", "The receiving rank.", example=1)
    size_bytes: Annotated[int, _SIZE] = _key("size", "What it sends.", example="1 MiB")
    start_ns: Annotated[int, _TIME] = _key(
        "start", "When it starts, from the beginning of an iteration.", default="0 ns"
    )
    priority: Annotated[int | None, _ITEM_PRIORITY] = _key(
        "priority", "Priority of its data, where it is another than the item's.", default=None
    )


_ONE_FLOW = {"src": 0, "dst": 1, "size": "1 MiB"}


class FlowsWorkload(_Iterated):
    """Flows as listed; two between the same ranks have a connection each."""

    pattern: Annotated[Pattern, kinds.only(_PATTERN, "flows")] = _key("pattern", "The pattern: flows.", example="flows")
    flows: tuple[Flow, ...] = _list_key("flows", "The flows.", required=True, example=[_ONE_FLOW])


def _select_workload(data: Any) -> str:
    if isinstance(data, _Section):
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
UNION_TAGS = frozenset(
    {
        "<clos>",
        "<star>",
        "<zones>",
        "<application>",
        "<message>",
        "<collective>",
        "<incast>",
        "<permutation>",
        "<flows>",
    }
)
"""What pydantic inserts into the location of a mistake, behind the place of the fabric or of a workload's item."""

_ONE_WORKLOAD = {"collective": "all_reduce", "size": "64 MiB"}


class Job(_Section):
    """Ranks on some of the hosts, with a workload of their own.

    Ranks count from 0 within the job, GPU by GPU over its hosts: ascending, or as `placement` lists them.
    """

    name: Annotated[
        str, kinds.text(40, r"[A-Za-z][A-Za-z0-9_-]*", "must be a name of letters, digits, dashes, at most 40 long")
    ] = _key("name", "Name of the job, by which `expect` calls its figures: `job.NAME.cct_ratio`.", example="job")
    placement: Annotated[Placement | tuple[int, ...], _PLACEMENT] = _key(
        "placement",
        "Which hosts it runs on, of those that the jobs before it and all lists leave free: packed fills rack after rack, "
        "random draws from the scenario's seed, fragmented takes halves of racks, such that the two jobs of a rack send to the "
        "same half of the next racks, the worst that a scheduler can leave to pinning; or a list of host numbers.",
        default="packed",
    )
    hosts: Annotated[int | None, kinds.integer(1, MAX_HOSTS)] = _key(
        "hosts",
        "On how many hosts it runs. Default: as many as a list names, else an equal share of the fabric's hosts.",
        default=None,
    )
    start_ns: Annotated[int, _TIME] = _key(
        "start",
        "When it starts, from the beginning of an iteration; its completion time counts from there.",
        default="0 ns",
    )
    workload: tuple[Workload, ...] = _list_key(
        "workload",
        "What it runs: as `workload`, with its own ranks. The items of all jobs run in rounds: the first of each, then the "
        "second of each. A job with a single item runs it in every round.",
        required=True,
        example=[_ONE_WORKLOAD],
    )


class Scenario(_Section):
    """One experiment: a fabric, how it is run, what runs across it, what is expected."""

    name: Annotated[
        str,
        kinds.text(
            63, r"[A-Za-z0-9][A-Za-z0-9._-]*", "must be a name of letters, digits, dots, dashes, at most 63 long"
        ),
    ] = _key("name", "Name of the scenario; results are filed under it.", example="ai-zone")
    description: Annotated[str, kinds.text(2000)] = _key("description", "What the scenario shows.", default="")
    fabric: Fabric = _key(
        "fabric",
        "Switches, hosts and links.",
        example={"kind": "star", "hosts_per_leaf": 2, "host_link": {"rate": "400 Gbit/s"}},
    )
    qos: Qos = _key("qos", "Priorities, marking and pausing.", default={})
    routing: Routing = _key("routing", "How switches choose among equal paths.", default={})
    transport: Transport = _key("transport", "RoCEv2 as NICs and library set it up.", default={})
    items: tuple[WorkloadItem, ...] = _list_key(
        "workload",
        "What runs, one item after the other; at least one, unless there are `jobs`. Applications stand there alone.",
        required=True,
        example=[_ONE_WORKLOAD],
    )
    jobs: tuple[Job, ...] = _list_key(
        "jobs",
        "Several workloads at once, each on its own hosts; instead of `workload`. All begin every iteration together, or at "
        "their `start`, and the next begins when all have ended.",
        example=[{"name": "a", "workload": [_ONE_WORKLOAD]}],
    )
    measure_jobs: Annotated[MeasuredJobs, kinds.choice(MeasuredJobs)] = _key(
        "measure_jobs",
        "What is run of several jobs: together all at once; alone also each job by itself, over the same queue pairs and "
        "paths, so that its `slowdown` is known; pairs also each two of them, so that it is known which job costs which how "
        "much.",
        default="together",
    )
    faults: tuple[Fault, ...] = _list_key(
        "faults",
        "What breaks, and when. Warm-up iterations run without, but for what is broken from the beginning to the end.",
        example=[{"at": "2 ms", "link_down": "leaf0:spine1", "for": "1 ms"}],
    )
    expect: tuple[Annotated[Expectation, kinds.expectation()], ...] = _list_key(
        "expect",
        "What must hold for the run to pass: metric, comparison, number.",
        example=["drops_packets == 0", "cct_ratio <= 1.05"],
    )
    time_dilation: Annotated[float | None, kinds.auto_or(kinds.number(1, 1_000_000))] = _key(
        "time_dilation",
        "Wall time per emulated time; auto takes the smallest that this machine carries.",
        default="auto",
    )
    seed: Annotated[int, _UINT32] = _key("seed", "Seed of all that is random.", default=1)

    @model_validator(mode="before")
    @classmethod
    def _fill_hash_seed(cls, data: Any) -> Any:
        """Let the switches' hash follow the scenario's seed where it has none of its own."""
        if not isinstance(data, Mapping) or not isinstance(data.get("routing", {}), Mapping):
            return data
        seed = data.get("seed", cls.model_fields["seed"].default)
        return {**data, "routing": {"hash_seed": seed, **data.get("routing", {})}}

    @model_validator(mode="before")
    @classmethod
    def _fill_workload(cls, data: Any) -> Any:
        """Let jobs stand for the workload."""
        return {"workload": [], **data} if isinstance(data, Mapping) and data.get("jobs") else data

    @property
    def workload(self) -> tuple[Workload, ...]:
        """The items of the workload that are collectives and patterns: what is sent when is known."""
        return tuple(item for item in self.items if not isinstance(item, ApplicationWorkload))

    @property
    def applications(self) -> tuple[ApplicationWorkload, ...]:
        """The items of the workload that run programs."""
        return tuple(item for item in self.items if isinstance(item, ApplicationWorkload))

    @property
    def collectives(self) -> tuple[CollectiveWorkload, ...]:
        """The items of the workload that are collectives, not patterns."""
        return tuple(item for item in self.workload if isinstance(item, CollectiveWorkload))

    def resolved(self) -> dict[str, Any]:
        """Return the scenario as plain data with every default filled in.

        Keys and units are those of the file; loading the result gives an equal scenario.
        """
        dumped: dict[str, Any] = _without_none(self.model_dump(by_alias=True))
        return dumped


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value


def find_keys(model: type[BaseModel]) -> dict[str, Any]:
    """Return the pydantic fields of a section by their keys in the file."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def find_sections(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that a field may hold, itself or as list items."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return find_sections(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType, tuple):
        return [section for part in typing.get_args(annotation) for section in find_sections(part)]
    return []


def render_json_schema() -> str:
    """Return the JSON schema of the file format, as shipped in ``schema.json``."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "testbed scenario",
        **Scenario.model_json_schema(by_alias=True),
    }
    return json.dumps(_readable(schema), indent=2, ensure_ascii=False) + "\n"


def _readable(schema: Any) -> Any:
    """Drop generated titles and absent defaults from a JSON schema."""
    if isinstance(schema, list):
        return [_readable(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for key, value in schema.items():
        is_generated_title = key == "title" and isinstance(value, str) and value != "testbed scenario"
        is_absent_default = key == "default" and value is None
        if not is_generated_title and not is_absent_default:
            kept[key] = _readable(value)
    return kept
