"""Congestion control as the scenario writes it: the algorithms, and a section of parameters for each.

The section of an algorithm has its name; its fields are those of the ``Parameters`` in `testbed.roce.congestion` (a test
compares them), whose presets fill in what is left out.
"""

from __future__ import annotations

from enum import StrEnum
from fractions import Fraction
from typing import Annotated, Any

from testbed.scenario import kinds
from testbed.scenario.section import Section, key


class CongestionControl(StrEnum):
    """What slows a sender down."""

    NONE = "none"
    DCQCN = "dcqcn"
    TIMELY = "timely"


class DcqcnMachine(StrEnum):
    """Which state machine of DCQCN reacts."""

    PAPER = "paper"
    FIRMWARE = "firmware"


_TIME = kinds.time(1, 10**9)
_SIZE = kinds.size(1, 2**40)
_RATE = kinds.rate(1, 1_600 * 10**9)
_FRACTION = kinds.fraction(Fraction(1))
_COUNT = kinds.integer(1, 1_000_000)


class Dcqcn(Section):
    """DCQCN's parameters. What is left out is the preset's of the machine, for the line rate at hand."""

    machine: Annotated[DcqcnMachine, kinds.choice(DcqcnMachine)] = key(
        "machine",
        "State machine of the sender, and whose preset holds: the SIGCOMM 2015 paper's or the Mellanox firmware's.",
        default="paper",
    )
    g: Annotated[Fraction | None, _FRACTION] = key(
        "g", "Gain of alpha's moving average. Preset: 1/256 (paper), 1/204.8 (firmware).", default=None
    )
    cnp_interval_ns: Annotated[int | None, _TIME] = key(
        "cnp_interval",
        "N: a receiver sends at most one CNP per QP in it. Preset: 50 us (paper), 4 us (firmware).",
        default=None,
    )
    alpha_timer_ns: Annotated[int | None, _TIME] = key(
        "alpha_timer",
        "K: alpha decays once in it without a CNP (paper) or is updated once in it (firmware). Preset: 55 us, 1 us.",
        default=None,
    )
    rate_timer_ns: Annotated[int | None, _TIME] = key(
        "rate_timer", "T: the rate grows once in it. Preset: 55 us (paper), 300 us (firmware).", default=None
    )
    byte_counter_bytes: Annotated[int | None, _SIZE] = key(
        "byte_counter",
        "B: the rate also grows once in so many bytes. Preset: 10 MB per 40 Gbit/s (paper); the firmware's machine counts "
        "no bytes.",
        default=None,
    )
    fast_recovery: Annotated[int | None, _COUNT] = key(
        "fast_recovery", "F: increases before additive increase begins. Preset: 5 (paper), 1 (firmware).", default=None
    )
    rai_bits_per_s: Annotated[int | None, _RATE] = key(
        "rai", "R_AI: step of additive increase. Preset per 40 Gbit/s: 40 Mbit/s (paper), 5 Mbit/s.", default=None
    )
    rhai_bits_per_s: Annotated[int | None, _RATE] = key(
        "rhai", "R_HAI: step of hyper increase. Preset per 40 Gbit/s: 200 Mbit/s (paper), 50 Mbit/s.", default=None
    )
    rmin_bits_per_s: Annotated[int | None, _RATE] = key(
        "rmin", "R_min: no cut goes below it. Preset per 40 Gbit/s: 1 Mbit/s.", default=None
    )
    scale: Annotated[float | None, kinds.auto_or(kinds.number(0.001, 1000))] = key(
        "scale",
        "What the preset's rai, rhai, rmin and byte_counter are multiplied by; auto is the NIC's rate over 40 Gbit/s, 1 "
        "keeps the constants for 40 Gbit/s. Keys that are given are taken as they are.",
        default="auto",
    )


class Timely(Section):
    """TIMELY's parameters."""

    t_low_ns: Annotated[int, _TIME] = key(
        "t_low", "Round-trip time below which the rate always grows.", default="50 us"
    )
    t_high_ns: Annotated[int, _TIME] = key(
        "t_high", "Round-trip time above which the rate is always cut.", default="500 us"
    )
    min_rtt_ns: Annotated[int, _TIME] = key(
        "min_rtt",
        "What differences of round-trip times are compared with; also the time between two steps.",
        default="20 us",
    )
    ewma: Annotated[Fraction, _FRACTION] = key(
        "ewma", "Weight of a new difference in its moving average.", default="7/8"
    )
    delta_bits_per_s: Annotated[int | None, _RATE] = key(
        "delta", "Step by which the rate grows. Default: 10 Mbit/s for every 10 Gbit/s of the NIC's rate.", default=None
    )
    beta: Annotated[Fraction, _FRACTION] = key("beta", "How sharply the rate is cut.", default="0.8")
    hai: Annotated[int, _COUNT] = key(
        "hai", "From so many growths in a row without growing delay, the step is so many times as large.", default=5
    )


def congestion_parameters(section: Section | None) -> dict[str, Any]:
    """Return the parameters of a section by field name, without those that are absent; nothing for no section."""
    if section is None:
        return {}
    values = {name: getattr(section, name) for name in type(section).model_fields}
    plain = {name: float(value) if isinstance(value, Fraction) else value for name, value in values.items()}
    return {name: value for name, value in plain.items() if value is not None}
