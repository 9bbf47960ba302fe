"""Lines of ``expect:``: a metric of the result, a comparison, a number.

::

    <metric> <operator> <number with optional unit>

    drops_packets == 0
    cct_ratio <= 1.05
    cct_ns < 3 ms
    busbw_bytes_per_s >= 40 GB/s
    job.trainer.cct_ratio <= 1.1
    figure.bandwidth >= 90
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction

from testbed.units import UnitError, parse_byte_rate, parse_fraction, parse_number, parse_size, parse_time


class Verdict(StrEnum):
    """What a check came to."""

    PASS = "pass"
    FAIL = "fail"
    NOT_JUDGED = "not_judged"


class ExpectationError(ValueError):
    """A line of ``expect:`` cannot be read; carries the rule it breaks and a hint."""

    def __init__(self, rule: str, hint: str = "") -> None:
        super().__init__(rule)
        self.rule = rule
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Expectation:
    """One readable line of ``expect:``.

    Attributes:
        metric: Key of the result, such as ``cct_ratio``; its name ends in its unit. Of one job: ``job.NAME.cct_ratio``.
        operator: ``==``, ``!=``, ``<=``, ``<``, ``>=`` or ``>``.
        value: The number to compare with, in the metric's unit.
        text: The line as it was written.
    """

    metric: str
    operator: str
    value: float
    text: str


def _parse_time_value(text: str) -> Fraction:
    """Return nanoseconds; a bare number is in the metric's own unit."""
    try:
        return parse_number(text)
    except UnitError:
        return Fraction(parse_time(text))


def _parse_size_value(text: str) -> Fraction:
    """Return bytes; a bare number is in the metric's own unit."""
    try:
        return parse_number(text)
    except UnitError:
        return Fraction(parse_size(text))


METRICS: dict[str, Callable[[str], Fraction]] = {
    "cct_ratio": parse_fraction,
    "predicted_cct_ratio": parse_fraction,
    "cct_ns": _parse_time_value,
    "algbw_bytes_per_s": parse_byte_rate,
    "busbw_bytes_per_s": parse_byte_rate,
    "drops_packets": parse_number,
    "headroom_drops_packets": parse_number,
    "lost_packets": parse_number,
    "out_of_order_packets": parse_number,
    "retransmitted_packets": parse_number,
    "nak_packets": parse_number,
    "duplicate_packets": parse_number,
    "timeouts": parse_number,
    "ecn_marked_packets": parse_number,
    "cnp_packets": parse_number,
    "pause_frames": parse_number,
    "paused_fraction_max": parse_fraction,
    "jain_fraction": parse_fraction,
    "leaf_down_peak_bytes": _parse_size_value,
    "cts_frames": parse_number,
    "cts_repeated_frames": parse_number,
    "cts_delay_p50_ns": _parse_time_value,
    "cts_delay_p99_ns": _parse_time_value,
    "slowdown": parse_fraction,
    "wrong_elements": parse_number,
    "fault_cost_ratio": parse_fraction,
    "recovery_ns": _parse_time_value,
    "retransmitted_bytes": parse_number,
}
"""Every metric that may be named, and how its number is read."""

FLOW_METRIC = re.compile(r"flow_([0-9]{1,4})_bytes_per_s", re.ASCII)
"""What a flow of a pattern delivered per second while all flows ran; the number is its place in the file, from 0."""

JOB_METRIC = re.compile(r"job\.([A-Za-z][A-Za-z0-9_-]*)\.([a-z0-9_]+)", re.ASCII)
"""A metric of one job: its name, and the metric."""

FIGURE_METRIC = re.compile(r"figure\.([a-z][a-z0-9_]*)", re.ASCII)
"""A figure of an application, by its name; its number is read as it stands."""

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
}

_LINE = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_.-]*)\s*([=!<>]{1,2})\s*(.+?)\s*", re.ASCII)
_MAX_LINE = 200


def parse_expectation(text: str) -> Expectation:
    """Return the expectation that a line of ``expect:`` states.

    Args:
        text: The line, such as ``"cct_ratio <= 1.05"``.

    Raises:
        ExpectationError: If the line, its metric, its operator or its number cannot be read.
    """
    match = _LINE.fullmatch(text) if len(text) <= _MAX_LINE else None
    if match is None:
        raise ExpectationError('must be a line such as "cct_ratio <= 1.05"', "write: metric, comparison, number")
    metric, symbol, number = match[1], match[2], match[3]
    job = JOB_METRIC.fullmatch(metric)
    figure = job[2] if job else metric
    if FIGURE_METRIC.fullmatch(figure):
        read: Callable[[str], Fraction] = parse_number
    elif FLOW_METRIC.fullmatch(figure):
        read = parse_byte_rate
    elif figure in METRICS:
        read = METRICS[figure]
    else:
        near = difflib.get_close_matches(figure, METRICS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"metrics: {', '.join(METRICS)}"
        raise ExpectationError("names no metric of the result", hint)
    if symbol not in OPERATORS:
        raise ExpectationError(f"must compare with one of {' '.join(OPERATORS)}")
    try:
        value = read(number)
    except UnitError as error:
        raise ExpectationError(f"the number {error}") from None
    return Expectation(metric, symbol, float(value), text.strip())


def evaluate(expectation: Expectation, observed: float | None, trusted: bool) -> Verdict:
    """Judge an expectation.

    Args:
        expectation: What was expected.
        observed: The measured figure, in the metric's unit; ``None`` when nothing measured it.
        trusted: Whether the run's figures may be judged at all; false when its fidelity verdict is ``invalid``.

    Returns:
        ``not_judged`` where there is no figure, or none to be trusted.
    """
    if observed is None or not trusted or math.isnan(observed):
        return Verdict.NOT_JUDGED
    holds = OPERATORS[expectation.operator](observed, expectation.value)
    return Verdict.PASS if holds else Verdict.FAIL
