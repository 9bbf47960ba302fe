"""The process that writes a run's time series: ``python -m testbed.carriers.series_process``, see `recording`.

A process of its own, so that the engine never waits for it: it empties the ring of samples into both files. Its job comes as
JSON in the first line of its standard input. It ends when that closes, whatever becomes of the other end, and writes all that
is in the ring before: also what a killed run has seen is kept.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import signal
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from testbed.errors import TestbedError
from testbed.measure.sample_ring import RingShape, SampleRing
from testbed.measure.sample_rows import RATE_STATE, QpLabels, SampleRows
from testbed.results.series import (
    QP_COLUMNS,
    QPS_FILE,
    QUEUE_COLUMNS,
    QUEUES_FILE,
    RATE_COLUMN,
    opened_series,
    state_column,
)

READY = "ready"
# How often it looks, and how long it lets samples gather: what a crash of the whole machine may cost.
_LOOK_S = 0.1
_LOOKS = 5
# Ports and QPs times samples that become one block.
_BLOCK_ROWS = 65536


@dataclass(frozen=True, slots=True)
class SeriesJob:
    """What the process shall do.

    Attributes:
        descriptor: Of the ring's memory, inherited.
        ports: Ports of a sample.
        qps: QPs of a sample.
        folder: Where the files go.
        header: Of both files.
        port_details: Added to the header of the queues' file.
        port_names: Names of the ports.
        qpn: Queue pair numbers of every row of the results.
        src_rank: Who sends on them.
        dst_rank: Who receives.
        states: Names of the states of congestion control, the rate first; empty without one.
        time_dilation: Wall time per emulated time.
        priorities: The data priorities: a sample has a queue for each of them at each port, port by port.
    """

    descriptor: int
    ports: int
    qps: int
    folder: str
    header: dict[str, Any]
    port_details: list[dict[str, Any]]
    port_names: list[str]
    qpn: list[list[int]]
    src_rank: list[list[int]]
    dst_rank: list[list[int]]
    states: list[str]
    time_dilation: float
    priorities: list[int]

    @property
    def shape(self) -> RingShape:
        """Return the shape of the ring."""
        return RingShape(self.ports * len(self.priorities), self.qps, len(self.states))

    def to_json(self) -> str:
        """Return it as the process's first line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the job of a line."""
        data = json.loads(text)
        return cls(**{field.name: data[field.name] for field in fields(cls)})


def write_series(job: SeriesJob, ring: SampleRing, control: int) -> None:
    """Write what comes until ``control`` closes.

    Raises:
        TestbedError: A file cannot be written.
    """
    labels = [
        QpLabels(np.array(qpn, np.int32), np.array(src, np.int16), np.array(dst, np.int16))
        for qpn, src, dst in zip(job.qpn, job.src_rank, job.dst_rank, strict=True)
    ]
    rows = SampleRows(time_dilation=job.time_dilation, priorities=job.priorities, labels=labels, states=job.states)
    states = [RATE_COLUMN if name == RATE_STATE else state_column(name) for name in job.states]
    folder = Path(job.folder)
    most = max(1, _BLOCK_ROWS // max(1, job.shape.ports + job.qps))
    with (
        opened_series(
            folder / QUEUES_FILE, QUEUE_COLUMNS, {**job.header, "ports": job.port_details}, {"port": job.port_names}
        ) as queues,
        opened_series(folder / QPS_FILE, [*QP_COLUMNS, *states], job.header, {}) as qps,
    ):
        print(READY, flush=True)
        ended, looks = False, 0
        while not ended:
            ended = bool(select.select([control], [], [], _LOOK_S)[0])
            looks += 1
            if not ended and looks < _LOOKS and ring.waiting() < most:
                continue
            looks = 0
            while ring.waiting():
                for queue_rows, qp_rows in rows.split(ring.take(most)):
                    if len(queue_rows["time_ns"]):
                        queues.write(queue_rows)
                    if len(qp_rows["time_ns"]):
                        qps.write(qp_rows)
                ring.note_written(queues.written_bytes + qps.written_bytes)


def main() -> int:
    """Do the job on standard input; say on standard error why not."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # those are meant for the run, whose end ends this
    with contextlib.suppress(OSError):
        os.nice(19)
    job = SeriesJob.from_json(sys.stdin.readline())
    memory = mmap.mmap(job.descriptor, job.shape.ring.itemsize)
    try:
        write_series(job, SampleRing(memory, job.shape), sys.stdin.fileno())
    except TestbedError as error:
        print(error.message, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
