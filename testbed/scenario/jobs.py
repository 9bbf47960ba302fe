"""What follows from ``jobs:`` alone: how many hosts each has, and which of their items run together."""

from __future__ import annotations

from collections.abc import Sequence

from testbed.scenario.model import Job, Scenario, Workload
from testbed.scenario.sweep import expand_sizes


def job_host_counts(scenario: Scenario) -> tuple[int, ...]:
    """Return on how many hosts each job runs: as listed, as given, or an equal share of the fabric's."""
    share = scenario.fabric.nhosts // max(1, len(scenario.jobs))
    return tuple(_count_hosts(job, share) for job in scenario.jobs)


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
