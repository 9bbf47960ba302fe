"""``routing``: how switches choose among equal paths, and how soon they know of what is broken."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

from pydantic import model_validator

from testbed.routing import ROUTING_SCHEMES, HashFunction
from testbed.scenario import kinds
from testbed.scenario.ranges import FLAG, TIME, UINT32
from testbed.scenario.section import Section, derived_key, key


class SprayOrder(StrEnum):
    """Which uplink a sprayed packet takes."""

    ROUND_ROBIN = "round_robin"
    RANDOM = "random"


class AdaptiveScope(StrEnum):
    """What adaptive routing goes by."""

    LOCAL = "local"
    CAPACITY = "capacity"


class Routing(Section):
    """How switches choose among equal paths."""

    scheme: Annotated[str, kinds.name(tuple(ROUTING_SCHEMES))] = key(
        "scheme",
        f"Routing scheme: {', '.join(f'{name} {scheme.summary}' for name, scheme in ROUTING_SCHEMES.items())}.",
        default="ecmp",
    )
    hash_seed: Annotated[int, UINT32] = derived_key(
        "hash_seed", "Seed of the switches' hash. Default: the scenario's seed."
    )
    hash_seed_per_tier: Annotated[bool, FLAG] = key(
        "hash_seed_per_tier",
        "Whether leaves, spines and superspines hash with seeds of their own, all from `hash_seed`. With one seed for all a "
        "spine sees only flows of like hashes and sends them all to the same superspine: polarisation.",
        default=True,
    )
    hash_function: Annotated[HashFunction, kinds.choice(HashFunction)] = key(
        "hash_function",
        "What switches hash with. The CRCs are linear, as in many switches: another seed XORs the same constant to all hashes, "
        "which does not cure polarisation where the number of ways is a power of two; another function does.",
        default="murmur3",
    )
    spine_hash_function: Annotated[HashFunction, kinds.choice(HashFunction)] = derived_key(
        "spine_hash_function", "What spines hash with. Default: `hash_function`."
    )
    superspine_hash_function: Annotated[HashFunction, kinds.choice(HashFunction)] = derived_key(
        "superspine_hash_function", "What superspines hash with. Default: `hash_function`."
    )
    resilient_hashing: Annotated[bool, FLAG] = key(
        "resilient_hashing",
        "Whether switches that hash move only the flows of dead links to others; without, all flows are hashed anew over what is "
        "left.",
        default=False,
    )
    flowlet_gap_ns: Annotated[int | None, TIME] = key(
        "flowlet_gap", "Idle time after which a flow may change its path; scheme flowlet needs it.", default=None
    )
    spray_order: Annotated[SprayOrder, kinds.choice(SprayOrder)] = key(
        "spray_order", "Which uplink a packet takes under scheme spray.", default="round_robin"
    )
    adaptive_scope: Annotated[AdaptiveScope, kinds.choice(AdaptiveScope)] = key(
        "adaptive_scope",
        "What scheme adaptive compares: local the queues of the switch's own ports, capacity these queues over what the "
        "paths behind them can carry.",
        default="local",
    )
    detection_time_ns: Annotated[int, TIME] = key(
        "detection_time",
        "From a link's failure or repair until the switches at its ends route by it; adaptive passes over a dead port at once. "
        "The default is the shortest of what RFC 7938 section 7.1 calls milliseconds.",
        default="1 ms",
    )
    convergence_time_ns: Annotated[int, TIME] = key(
        "convergence_time",
        "From a link's failure or repair until all switches route by it. The default is a guess for one hop of BGP with fast "
        "fallover; what a fabric takes depends on its switches' software.",
        default="5 ms",
    )
    te_loop_time_ns: Annotated[int, TIME] = key(
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
