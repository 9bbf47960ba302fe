"""Hierarchical all-reduce: NVLink inside the hosts, one ring per GPU between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from testbed.collectives.ring import RingAllReduce
from testbed.collectives.schedule import (
    SLICES_PER_CHUNK,
    Collective,
    CollectiveAlgorithm,
    Schedule,
    ScheduleBuilder,
    SteadyTraffic,
    TransferOp,
    check_arguments,
    slice_borders,
)

_Slot = tuple[int, int, int]


class HierarchicalAllReduce(CollectiveAlgorithm):
    """All-reduce of ``N`` hosts with ``g`` GPUs each: ``2 * (g - 1)`` steps inside hosts, ``2 * (N - 1)`` between them.

    The buffer is cut into a shard per GPU. Inside each host a ring reduce-scatter leaves shard ``p``, summed over the host,
    on GPU ``p``. The GPUs ``p`` of all hosts then all-reduce it around a ring of their own, and inside each host a ring
    all-gather passes the sums on. A GPU sends ``2 * (N - 1) / N * S / g`` bytes to other hosts, where a flat ring sends
    ``2 * (n - 1) / n * S``.

    The three follow each other slice by slice, not one after the other: a slice (of a chunk of the ring between the hosts)
    leaves its host when it is summed there, and is passed on inside a host when its sum over all hosts is there. Each step
    inside a host has connections of its own, so that no slice waits behind one that is not there yet, and slices stand in
    the schedule in the order in which the ring between the hosts uses them.

    With one GPU per host, it is the ring all-reduce; with one host, a reduce-scatter and an all-gather.

    Args:
        gpus_per_host: ``g``; ranks are numbered host by host.

    Source:
        facts.md section 6; NVIDIA/nccl, src/graph/connect.cc (rings per NIC over hosts whose GPUs NVLink joins).
    """

    name = "hierarchical"
    collective = Collective.ALL_REDUCE

    def __init__(self, gpus_per_host: int = 1) -> None:
        self._gpus = gpus_per_host

    def on_hosts(self, gpus_per_host: int) -> CollectiveAlgorithm:
        """Return the algorithm for hosts of ``gpus_per_host`` GPUs."""
        return HierarchicalAllReduce(gpus_per_host)

    def build_schedule(self, order: Sequence[int], size_bytes: int, slices: int = SLICES_PER_CHUNK) -> Schedule:
        """Return the schedule; see `CollectiveAlgorithm.build_schedule`.

        Of the order, the hosts' alone counts: each as its first rank stands. The GPUs of a host go by their numbers.

        Raises:
            ValueError: Also if the ranks do not fill whole hosts.
        """
        check_arguments(order, size_bytes, slices)
        if self._gpus < 1 or len(order) % self._gpus:
            raise ValueError(f"{len(order)} ranks do not fill hosts of {self._gpus} GPUs")
        if self._gpus == 1:
            return RingAllReduce().build_schedule(order, size_bytes, slices)
        return _Builder(order, self._gpus, size_bytes, slices).build()

    def steady_traffic(self, order: Sequence[int], size_bytes: int) -> SteadyTraffic:
        """Return the rings between hosts and those inside them; see `CollectiveAlgorithm.steady_traffic`."""
        hosts = np.array(list(dict.fromkeys(rank // self._gpus for rank in order)), np.int64)
        gpus, count = np.arange(self._gpus), len(hosts)
        here = hosts[:, None] * self._gpus + gpus
        between = SteadyTraffic(
            here.reshape(-1),
            np.roll(here, -1, axis=0).reshape(-1),
            np.full(here.size, 2 * (count - 1) / count * size_bytes / self._gpus),
        )
        if self._gpus == 1:
            return between
        inside = SteadyTraffic(
            here.reshape(-1),
            np.roll(here, -1, axis=1).reshape(-1),
            np.full(here.size, 2 * (self._gpus - 1) / self._gpus * size_bytes),
        )
        return SteadyTraffic(*(np.concatenate(pair) for pair in zip(between, inside, strict=True)))

    def traffic_factor(self, nranks: int) -> float:
        """Return ``2 * (n - 1) / n``; see `CollectiveAlgorithm.traffic_factor`."""
        return 2 * (nranks - 1) / nranks


class _Builder:
    """Builds the schedule; positions ``h`` are those of hosts in their ring, ``p`` is a GPU and the shard that it reduces.

    A slot ``(p, chunk, number)`` is a slice of shard ``p``: the ``number``-th of a chunk of the ring between the hosts.
    """

    def __init__(self, order: Sequence[int], gpus: int, size_bytes: int, slices: int) -> None:
        self._hosts = list(dict.fromkeys(rank // gpus for rank in order))
        self._gpus = gpus
        self._slices = slices
        self._schedule = ScheduleBuilder(len(order), size_bytes)
        self._pieces: dict[_Slot, tuple[int, int]] = {}  # first byte and size of each slot that is not empty
        count = len(self._hosts)
        for p in range(gpus):
            begin, end = (edge * size_bytes // gpus for edge in (p, p + 1))
            for chunk in range(count):
                first, last = (begin + edge * (end - begin) // count for edge in (chunk, chunk + 1))
                for number, piece in enumerate(slice_borders(first, last - first, slices)):
                    self._pieces[p, chunk, number] = piece

    def build(self) -> Schedule:
        """Return the schedule."""
        count = len(self._hosts)
        reduced = [self._reduce_scatter(h) for h in range(count)]
        complete = self._all_reduce(reduced)
        for h in range(count):
            self._all_gather(h, complete[h])
        return self._schedule.build()

    def _rank(self, h: int, p: int) -> int:
        return self._hosts[h] * self._gpus + p % self._gpus

    def _slots(self, first_chunk: int) -> Iterator[_Slot]:
        """Yield the slots of a host: chunks downwards from ``first_chunk``, all shards at the same pace.

        A host sends chunks to the next host downwards from its own; theirs are complete downwards from the next.
        """
        count = len(self._hosts)
        for step in range(count):
            for number in range(self._slices):
                for p in range(self._gpus):
                    slot = p, (first_chunk - step) % count, number
                    if slot in self._pieces:
                        yield slot

    def _reduce_scatter(self, h: int) -> dict[_Slot, list[int]]:
        """Send every shard around host ``h``, its own GPU last; return the last handle of each slot."""
        arrived: dict[_Slot, list[int]] = {}
        for slot in self._slots(h):
            after: list[int] = []
            for step in range(self._gpus - 1):
                src = slot[0] + 1 + step
                after = [self._send(slot, self._rank(h, src), self._rank(h, src + 1), TransferOp.REDUCE, after, step)]
            arrived[slot] = after
        return arrived

    def _all_reduce(self, reduced: list[dict[_Slot, list[int]]]) -> list[dict[_Slot, list[int]]]:
        """All-reduce every shard between the hosts; return what each host's slots wait for until they are complete."""
        count = len(self._hosts)
        complete = [dict(own) for own in reduced]
        arrived: list[dict[_Slot, int]] = [{} for _ in range(count)]
        for step in range(2 * (count - 1)):
            reducing = step < count - 1
            op = TransferOp.REDUCE if reducing else TransferOp.COPY
            arriving: list[dict[_Slot, int]] = [{} for _ in range(count)]
            for h in range(count):
                successor, chunk = (h + 1) % count, (h - step) % count
                for p in range(self._gpus):
                    for number in range(self._slices):
                        slot = p, chunk, number
                        if slot not in self._pieces:
                            continue
                        # Up to the first step of the second half, the sum lacks this host's own share until that is there.
                        after = [*reduced[h][slot]] if step < count else []
                        if step:
                            after.append(arrived[h][slot])
                        handle = self._send(slot, self._rank(h, p), self._rank(successor, p), op, after)
                        arriving[successor][slot] = handle
                        complete[successor][slot] = [handle, *(reduced[successor][slot] if reducing else ())]
            arrived = arriving
        return complete

    def _all_gather(self, h: int, complete: dict[_Slot, list[int]]) -> None:
        """Send every shard around host ``h``, from its own GPU on."""
        for slot in self._slots(h + 1):
            after = complete[slot]
            for step in range(self._gpus - 1):
                src = slot[0] + step
                after = [self._send(slot, self._rank(h, src), self._rank(h, src + 1), TransferOp.COPY, after, step)]

    def _send(self, slot: _Slot, src: int, dst: int, op: TransferOp, after: Sequence[int], channel: int = 0) -> int:
        offset, nbytes = self._pieces[slot]
        return self._schedule.add(src, dst, offset_bytes=offset, nbytes=nbytes, op=op, after=after, channel=channel)
