"""DCQCN: congestion control by marks, in the paper's or in the firmware's state machine."""

from __future__ import annotations

from testbed.roce.congestion.dcqcn_firmware import FirmwareReactionPoint
from testbed.roce.congestion.dcqcn_paper import PaperReactionPoint
from testbed.roce.congestion.dcqcn_parameters import Machine, Parameters, cnp_interval_ns, resolve
from testbed.roce.congestion.protocol import CongestionControl, Floats

NAME = "dcqcn"


def Algorithm(parameters: Parameters, line_rate_bytes_per_s: Floats) -> CongestionControl:  # noqa: N802
    """Return the reaction points of the machine that the parameters name."""
    machine = FirmwareReactionPoint if parameters.machine == Machine.FIRMWARE else PaperReactionPoint
    return machine(resolve(parameters, line_rate_bytes_per_s), line_rate_bytes_per_s)


__all__ = ["NAME", "Algorithm", "Parameters", "cnp_interval_ns"]
