"""DCQCN's parameters, their presets with provenance, and how they scale with the line rate.

===========  =============================  =====================================================
Parameter    ``paper``                      ``firmware``
===========  =============================  =====================================================
g            1/256                          1/204.8 (``DCE_TCP_G`` = 1019, (1024 - 1019)/1024)
N            50 us                          4 us (recent NICs)
K            55 us                          1 us
T            55 us                          300 us
B            10 MB                          none: the firmware's machine counts no bytes
F            5                              1
R_AI         40 Mbit/s                      5 Mbit/s
R_HAI        200 Mbit/s                     50 Mbit/s
R_min        1 Mbit/s (the paper has none)  1 Mbit/s
===========  =============================  =====================================================

All are for 40 Gbit/s. R_AI, R_HAI, R_min and B grow with the line rate over 40 Gbit/s, or by ``scale``; g, N, K, T and F
are the same at every rate. A value that is given is taken as it is.

Source:
    ``paper``: Zhu et al., "Congestion Control for Large-Scale RDMA Deployments", SIGCOMM 2015. ``firmware``: defaults of
    Mellanox' RoCE congestion control, and their use in alibaba-edu/High-Precision-Congestion-Control (rdma-hw.cc, run.py).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

import numpy as np

from testbed.roce.congestion.protocol import Floats

REFERENCE_RATE_BITS_PER_S = 40_000_000_000
"""The line rate for which the presets are."""


class Machine(StrEnum):
    """Which state machine reacts; each has its own preset."""

    PAPER = "paper"
    FIRMWARE = "firmware"


@dataclass(frozen=True, slots=True)
class Parameters:
    """DCQCN's parameters; ``None`` is the machine's preset.

    Attributes:
        machine: State machine, and whose preset fills in the rest.
        g: Gain of alpha's moving average, 0 to 1.
        cnp_interval_ns: N; the responder sends at most one CNP per QP in it. The reaction point does not use it.
        alpha_timer_ns: K; alpha decays once in it without CNP (``paper``), or is updated once in it (``firmware``).
        rate_timer_ns: T; the rate grows once in it.
        byte_counter_bytes: B; the rate also grows once in so many bytes (``paper`` only).
        fast_recovery: F; increases before additive increase begins.
        rai_bits_per_s: R_AI, the step of additive increase.
        rhai_bits_per_s: R_HAI, the step of hyper increase.
        rmin_bits_per_s: R_min, below which no cut goes.
        scale: What the preset's rates and bytes are multiplied by; ``None``: the QP's line rate over 40 Gbit/s.
    """

    machine: Machine = Machine.PAPER
    g: float | None = None
    cnp_interval_ns: int | None = None
    alpha_timer_ns: int | None = None
    rate_timer_ns: int | None = None
    byte_counter_bytes: int | None = None
    fast_recovery: int | None = None
    rai_bits_per_s: int | None = None
    rhai_bits_per_s: int | None = None
    rmin_bits_per_s: int | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.machine not in set(Machine):
            raise ValueError(f"dcqcn's machine must be one of {', '.join(Machine)}, got {self.machine!r}")
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if field.name == "g":
                if value is not None and not 0 <= value <= 1:
                    raise ValueError(f"dcqcn's g must be from 0 to 1, got {value!r}")
            elif value is not None and not value > 0:
                raise ValueError(f"dcqcn's {field.name} must be above 0, got {value!r}")


PRESETS = {
    Machine.PAPER: Parameters(
        machine=Machine.PAPER,
        g=1 / 256,
        cnp_interval_ns=50_000,
        alpha_timer_ns=55_000,
        rate_timer_ns=55_000,
        byte_counter_bytes=10_000_000,
        fast_recovery=5,
        rai_bits_per_s=40_000_000,
        rhai_bits_per_s=200_000_000,
        rmin_bits_per_s=1_000_000,
    ),
    Machine.FIRMWARE: Parameters(
        machine=Machine.FIRMWARE,
        g=5 / 1024,
        cnp_interval_ns=4_000,
        alpha_timer_ns=1_000,
        rate_timer_ns=300_000,
        byte_counter_bytes=32_767 * 64,
        fast_recovery=1,
        rai_bits_per_s=5_000_000,
        rhai_bits_per_s=50_000_000,
        rmin_bits_per_s=1_000_000,
    ),
}
"""What `Parameters` leaves out, by machine; for 40 Gbit/s."""

_SCALED = ("byte_counter_bytes", "rai_bits_per_s", "rhai_bits_per_s", "rmin_bits_per_s")


@dataclass(frozen=True, slots=True)
class Constants:
    """What a machine runs with; arrays have shape ``(qps,)``, rates are in bytes per second."""

    g: float
    alpha_timer_ns: float
    rate_timer_ns: float
    fast_recovery: int
    byte_counter_bytes: Floats
    rai: Floats
    rhai: Floats
    rmin: Floats


def cnp_interval_ns(parameters: Parameters) -> int:
    """Return N, at most one CNP per QP in which is what the responder has to keep."""
    given = parameters.cnp_interval_ns or PRESETS[Machine(parameters.machine)].cnp_interval_ns
    assert given is not None, "presets are whole"
    return given


def resolve(parameters: Parameters, line_rate_bytes_per_s: Floats) -> Constants:
    """Return the constants of every QP: the preset of the machine, scaled, under what is given."""
    preset = PRESETS[Machine(parameters.machine)]
    if parameters.scale is None:
        scale = line_rate_bytes_per_s * 8 / REFERENCE_RATE_BITS_PER_S
    else:
        scale = np.full(len(line_rate_bytes_per_s), float(parameters.scale))

    def pick(name: str) -> Any:
        given = getattr(parameters, name)
        if given is None:
            given = getattr(preset, name) * (scale if name in _SCALED else 1)
        return given if name not in _SCALED else np.broadcast_to(np.asarray(given, np.float64), scale.shape)

    return Constants(
        g=float(pick("g")),
        alpha_timer_ns=float(pick("alpha_timer_ns")),
        rate_timer_ns=float(pick("rate_timer_ns")),
        fast_recovery=pick("fast_recovery"),
        byte_counter_bytes=pick("byte_counter_bytes"),
        rai=pick("rai_bits_per_s") / 8,
        rhai=pick("rhai_bits_per_s") / 8,
        rmin=np.minimum(pick("rmin_bits_per_s") / 8, line_rate_bytes_per_s),
    )
