"""The scenario as a value: every key of the file format, its meaning, its default, its limits.

Frozen pydantic models. The alias of a field is its key in the file; the attribute's name ends in the unit of its
integer, so ``fabric.host_link.rate: 400 Gbit/s`` becomes ``scenario.fabric.host_link.rate_bits_per_s``. Defaults are
written here as a user would write them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import model_validator

from testbed.scenario import kinds
from testbed.scenario.application import ApplicationWorkload
from testbed.scenario.expect import Expectation
from testbed.scenario.fabric import Fabric
from testbed.scenario.faults import Fault
from testbed.scenario.jobs import Job, MeasuredJobs
from testbed.scenario.qos import Qos
from testbed.scenario.ranges import UINT32
from testbed.scenario.routing import Routing
from testbed.scenario.section import Section, key, list_key
from testbed.scenario.transport import Transport
from testbed.scenario.workload import ONE_WORKLOAD, CollectiveWorkload, Workload, WorkloadItem

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


class Scenario(Section):
    """One experiment: a fabric, how it is run, what runs across it, what is expected."""

    name: Annotated[
        str,
        kinds.text(
            63, r"[A-Za-z0-9][A-Za-z0-9._-]*", "must be a name of letters, digits, dots, dashes, at most 63 long"
        ),
    ] = key("name", "Name of the scenario; results are filed under it.", example="ai-zone")
    description: Annotated[str, kinds.text(2000)] = key("description", "What the scenario shows.", default="")
    fabric: Fabric = key(
        "fabric",
        "Switches, hosts and links.",
        example={"kind": "star", "hosts_per_leaf": 2, "host_link": {"rate": "400 Gbit/s"}},
    )
    qos: Qos = key("qos", "Priorities, marking and pausing.", default={})
    routing: Routing = key("routing", "How switches choose among equal paths.", default={})
    transport: Transport = key("transport", "RoCEv2 as NICs and library set it up.", default={})
    items: tuple[WorkloadItem, ...] = list_key(
        "workload",
        "What runs, one item after the other; at least one, unless there are `jobs`. Applications stand there alone.",
        required=True,
        example=[ONE_WORKLOAD],
    )
    jobs: tuple[Job, ...] = list_key(
        "jobs",
        "Several workloads at once, each on its own hosts; instead of `workload`. All begin every iteration together, or at "
        "their `start`, and the next begins when all have ended.",
        example=[{"name": "a", "workload": [ONE_WORKLOAD]}],
    )
    measure_jobs: Annotated[MeasuredJobs, kinds.choice(MeasuredJobs)] = key(
        "measure_jobs",
        "What is run of several jobs: together all at once; alone also each job by itself, over the same queue pairs and "
        "paths, so that its `slowdown` is known; pairs also each two of them, so that it is known which job costs which how "
        "much.",
        default="together",
    )
    faults: tuple[Fault, ...] = list_key(
        "faults",
        "What breaks, and when. Warm-up iterations run without, but for what is broken from the beginning to the end.",
        example=[{"at": "2 ms", "link_down": "leaf0:spine1", "for": "1 ms"}],
    )
    expect: tuple[Annotated[Expectation, kinds.expectation()], ...] = list_key(
        "expect",
        "What must hold for the run to pass: metric, comparison, number.",
        example=["drops_packets == 0", "cct_ratio <= 1.05"],
    )
    time_dilation: Annotated[float | None, kinds.auto_or(kinds.number(1, 1_000_000))] = key(
        "time_dilation",
        "Wall time per emulated time; auto takes the smallest that this machine carries.",
        default="auto",
    )
    seed: Annotated[int, UINT32] = key("seed", "Seed of all that is random.", default=1)

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
