"""What a carrier is to the rest of the testbed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from testbed.engine.faults import Sighting
from testbed.measure.samples import AdmissionSamples, MachineSamples


@dataclass(frozen=True, eq=False)
class WorkloadSamples:
    """Raw figures of one workload.

    Attributes:
        cct_ns: Completion time of each measured iteration, emulated.
        wall_cct_ns: Wall time of each measured iteration until a tick saw its last arrival; empty where no packet was sent.
        retransmitted_packets: In the measured iterations.
        machine: What was noted about the machine in each measured iteration.
        wall_paused_ns: Time each port was paused in the measured iterations, shape ``(ports + 1,)``.
        end_ns: When each connection's last byte arrived, emulated, median of the iterations, shape ``(connections,)``.
        together_bytes_per_s: What each connection delivered until the first of them ended, median, the same shape.
        nvlink_bytes: Payload that the model of the links inside hosts carried in each measured iteration.
        admission: What was noted about grants in each measured iteration; empty where there are none.
        job_cct_ns: Completion time of each measured iteration of each of the workload's jobs, from its start, emulated.
        wrong_elements: Elements that were wrong at their receivers in the measured iterations; None where no carrier moved any.
        predicted_cct_ratio: What the load prediction gives for the paths that the carrier took; None where they are the plan's.
        warmup_cct_ns: Completion time of each warm-up iteration, emulated: nothing breaks in those.
        faults: What came of each fault in each measured iteration, in the order of `testbed.plan.victims.find_victims`; empty
            where nothing breaks on the way.
        timeouts: Retransmission timers that ran out in the measured iterations; None where the carrier does not tell.
    """

    cct_ns: tuple[float, ...]
    wall_cct_ns: tuple[int, ...]
    retransmitted_packets: int
    machine: tuple[MachineSamples, ...]
    wall_paused_ns: npt.NDArray[np.float64]
    end_ns: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    together_bytes_per_s: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    nvlink_bytes: tuple[int, ...] = ()
    admission: tuple[AdmissionSamples, ...] = ()
    job_cct_ns: tuple[tuple[float, ...], ...] = ()
    wrong_elements: int | None = None
    predicted_cct_ratio: float | None = None
    warmup_cct_ns: tuple[float, ...] = ()
    faults: tuple[tuple[Sighting, ...], ...] = ()
    timeouts: int | None = None


@dataclass(frozen=True)
class CommandSample:
    """One command of an application in one measured iteration.

    Attributes:
        host: Number of its host.
        command: Its command line, filled in.
        exit_code: Of a service, which is ended by us, None.
        wall_duration_ns: How long it ran, to a tick.
        output: File with its standard output; its standard error is beside it.
    """

    host: int
    command: str
    exit_code: int | None
    wall_duration_ns: int
    output: Path


@dataclass(frozen=True, eq=False)
class ApplicationSamples:
    """Raw figures of one application.

    Attributes:
        wall_duration_ns: Of each measured iteration, from the first command's begin to the last one's end.
        machine: What was noted about the machine in each measured iteration.
        wall_paused_ns: Time each port was paused in the measured iterations, shape ``(ports + 1,)``.
        commands: The commands of each measured iteration.
        figures: What each measured iteration printed of each figure, None where nothing matched; by the figure's name.
    """

    wall_duration_ns: tuple[int, ...]
    machine: tuple[MachineSamples, ...]
    wall_paused_ns: npt.NDArray[np.float64]
    commands: tuple[tuple[CommandSample, ...], ...]
    figures: Mapping[str, tuple[float | None, ...]]


class ProgressListener(Protocol):
    """Told what a run is doing; must be quick."""

    def iteration(self, number: int, of: int, *, warmup: bool) -> None:
        """An iteration begins."""


class Carrier(Protocol):
    """Runs a planned workload over a fabric."""

    def run(self, workload: int, listener: ProgressListener) -> WorkloadSamples:
        """Run all iterations of the workload of that index and return its raw figures."""

    def warnings(self) -> list[str]:
        """Return what a reader of the figures should know."""
