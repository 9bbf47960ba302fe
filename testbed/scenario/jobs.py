"""``jobs``: several workloads at once; how many hosts each job has, and which of their items run together."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated

from testbed.scenario import kinds
from testbed.scenario.ranges import MAX_HOSTS, TIME
from testbed.scenario.section import Section, key, list_key
from testbed.scenario.sweep import expand_sizes
from testbed.scenario.workload import ONE_WORKLOAD, Workload


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


_PLACEMENT = kinds.integers_or(
    kinds.choice(Placement), 0, MAX_HOSTS - 1, MAX_HOSTS, "must be packed, fragmented, random or a list of host numbers"
)


class Job(Section):
    """Ranks on some of the hosts, with a workload of their own.

    Ranks count from 0 within the job, GPU by GPU over its hosts: ascending, or as `placement` lists them.
    """

    name: Annotated[
        str, kinds.text(40, r"[A-Za-z][A-Za-z0-9_-]*", "must be a name of letters, digits, dashes, at most 40 long")
    ] = key("name", "Name of the job, by which `expect` calls its figures: `job.NAME.cct_ratio`.", example="job")
    placement: Annotated[Placement | tuple[int, ...], _PLACEMENT] = key(
        "placement",
        "Which hosts it runs on, of those that the jobs before it and all lists leave free: packed fills rack after rack, "
        "random draws from the scenario's seed, fragmented takes halves of racks, such that the two jobs of a rack send to the "
        "same half of the next racks, the worst that a scheduler can leave to pinning; or a list of host numbers.",
        default="packed",
    )
    hosts: Annotated[int | None, kinds.integer(1, MAX_HOSTS)] = key(
        "hosts",
        "On how many hosts it runs. Default: as many as a list names, else an equal share of the fabric's hosts.",
        default=None,
    )
    start_ns: Annotated[int, TIME] = key(
        "start",
        "When it starts, from the beginning of an iteration; its completion time counts from there.",
        default="0 ns",
    )
    workload: tuple[Workload, ...] = list_key(
        "workload",
        "What it runs: as `workload`, with its own ranks. The items of all jobs run in rounds: the first of each, then the "
        "second of each. A job with a single item runs it in every round.",
        required=True,
        example=[ONE_WORKLOAD],
    )


def job_host_counts(jobs: Sequence[Job], nhosts: int) -> tuple[int, ...]:
    """Return on how many hosts each job runs: as listed, as given, or an equal share of the fabric's ``nhosts``."""
    share = nhosts // max(1, len(jobs))
    return tuple(_count_hosts(job, share) for job in jobs)


def _count_hosts(job: Job, share: int) -> int:
    if isinstance(job.placement, tuple):
        return len(job.placement)
    return share if job.hosts is None else job.hosts


def job_rounds(jobs: Sequence[Job]) -> list[tuple[int, tuple[Workload, ...]]]:
    """Return what the jobs run at the same time, round after round: an item of one size for each of them.

    The items of a job, each at each of its sizes, follow one another. A job with a single one runs it in every round.

    Returns:
        A number and the jobs' items for each round; rounds that differ in sizes of a sweep alone share the number.

    Raises:
        ValueError: If two jobs have different numbers of them, none of which is one.
    """
    items = [
        [(index, one_size) for index, item in enumerate(job.workload) for one_size in expand_sizes(item)]
        for job in jobs
    ]
    rounds = max(map(len, items), default=0)
    if any(len(one) not in (1, rounds) for one in items):
        raise ValueError("must have as many items and sizes each, or one")
    numbers: dict[tuple[int, ...], int] = {}
    result = []
    for place in range(rounds):
        at_once = [one[place % len(one)] for one in items]
        number = numbers.setdefault(tuple(index for index, _ in at_once), len(numbers))
        result.append((number, tuple(item for _, item in at_once)))
    return result
