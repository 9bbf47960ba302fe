"""Size sweeps, as nccl-tests does them: one workload item stands for the same traffic at several sizes."""

from __future__ import annotations

from testbed.scenario.workload import FlowsWorkload, Workload

MAX_SIZES = 100
"""More make no curve any clearer, and each is planned and run."""


def count_sizes(first_bytes: int, last_bytes: int, *, factor: int | None, step_bytes: int | None) -> int:
    """Return how many sizes a sweep has, in time that does not grow with their number; see `sweep_sizes`."""
    if step_bytes is not None:
        return max(0, (last_bytes - first_bytes) // step_bytes + 1)
    return len(sweep_sizes(first_bytes, last_bytes, factor=factor, step_bytes=None))


def sweep_sizes(first_bytes: int, last_bytes: int, *, factor: int | None, step_bytes: int | None) -> tuple[int, ...]:
    """Return the sizes of a sweep, ascending: from the first on, those that are not above the last.

    Args:
        first_bytes: Smallest size, at least 1; always among them unless it is above the last.
        last_bytes: No size is larger.
        factor: Each size over the one before, at least 2.
        step_bytes: Each size less the one before, at least 1. Exactly one of the two is given.

    Raises:
        ValueError: If the sizes would not grow, or not both ways at once.

    Source:
        nccl-tests, src/common.cu (TimeTest: ``-b``, ``-e``, ``-f``, ``-i``).
    """
    if (factor is None) == (step_bytes is None):
        raise ValueError("a sweep has a factor or a step")
    if (factor is not None and factor < 2) or (step_bytes is not None and step_bytes < 1) or first_bytes < 1:
        raise ValueError("the sizes of a sweep must grow")
    if step_bytes is not None:
        return tuple(range(first_bytes, last_bytes + 1, step_bytes))
    sizes = []
    size = first_bytes
    while size <= last_bytes:
        sizes.append(size)
        size *= factor or 1
    return tuple(sizes)


def expand_sizes(item: Workload) -> tuple[Workload, ...]:
    """Return a workload item once per size, each without a sweep; an item without a sweep is returned as it is."""
    if isinstance(item, FlowsWorkload) or item.max_size_bytes is None:
        return (item,)
    sizes = sweep_sizes(item.size_bytes, item.max_size_bytes, factor=item.size_factor, step_bytes=item.size_step_bytes)
    alone = {"max_size_bytes": None, "size_factor": None, "size_step_bytes": None}
    return tuple(item.model_copy(update={"size_bytes": size, **alone}) for size in sizes)
