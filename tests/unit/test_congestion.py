"""Congestion control: every algorithm against a scalar reference written from its source, step by step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.roce.congestion import CongestionControl, Feedback, cnp_interval_ns, find_algorithms, make
from testbed.roce.congestion.dcqcn_parameters import PRESETS, Machine, Parameters, resolve
from testbed.scenario import congestion as scenario_congestion
from testbed.scenario import model as scenario_model

GBIT = 1e9 / 8
LINE_RATE = 400 * GBIT


class Step(NamedTuple):
    """What one QP sees in one call: how long it covers, and what happened in it."""

    length_ns: int
    cnps: int
    sent_bytes: int
    rtt_ns: float | None = None


# --- Scalar references: one QP, one event at a time, no arrays, no closed forms. Rates in bytes per second. ---


class ScalarPaper:
    """The paper's machine, from facts.md section 4."""

    def __init__(
        self, line_rate: float, g: float, k: float, t: float, b: float, f: int, rai: float, rhai: float, rmin: float
    ):
        self.line, self.g, self.k, self.t, self.b, self.f = line_rate, g, k, t, b, f
        self.rai, self.rhai, self.rmin = rai, rhai, rmin
        self.rate = self.target = line_rate
        self.alpha = 1.0
        self.alpha_due = self.timer_due = math.inf
        self.bytes_left = math.inf
        self.timers = self.counters = 0
        self.now = 0.0

    def increase(self) -> None:
        if max(self.timers, self.counters) < self.f:
            pass
        elif min(self.timers, self.counters) > self.f:
            self.target += self.rhai
        else:
            self.target += self.rai
        self.target = min(self.target, self.line)
        self.rate = (self.target + self.rate) / 2

    def step(self, step: Step) -> None:
        start, end = self.now, self.now + step.length_ns
        cnp_times = [start + step.length_ns * index / step.cnps for index in range(step.cnps)]
        byte_rate = step.sent_bytes / step.length_ns
        while True:
            byte_due = math.inf
            if self.bytes_left < byte_rate * (end - self.now) - 1e-6:
                byte_due = self.now + self.bytes_left / byte_rate
            # In the order in which they come at the same instant.
            cnp_due = cnp_times[0] if cnp_times else math.inf
            events = [(cnp_due, 0), (self.alpha_due, 1), (self.timer_due, 2), (byte_due, 3)]
            at, kind = min(events)
            if at >= end:
                break
            self.bytes_left -= byte_rate * (at - self.now)
            self.now = at
            if kind == 0:
                cnp_times.pop(0)
                self.target = self.rate
                self.rate = max(self.rate * (1 - self.alpha / 2), self.rmin)
                self.alpha = (1 - self.g) * self.alpha + self.g
                self.timers = self.counters = 0
                self.alpha_due, self.timer_due, self.bytes_left = at + self.k, at + self.t, self.b
            elif kind == 1:
                self.alpha = (1 - self.g) * self.alpha
                self.alpha_due += self.k
            elif kind == 2:
                self.timers += 1
                self.timer_due += self.t
                self.increase()
            else:
                self.counters += 1
                self.bytes_left = self.b
                self.increase()
        self.bytes_left -= byte_rate * (end - self.now)
        self.now = end


class ScalarFirmware:
    """The firmware's machine, from facts.md section 4."""

    def __init__(
        self, line_rate: float, g: float, k: float, t: float, b: float, f: int, rai: float, rhai: float, rmin: float
    ):
        self.line, self.g, self.k, self.t, self.f = line_rate, g, k, t, f
        self.rai, self.rhai, self.rmin = rai, rhai, rmin
        self.rate = self.target = line_rate
        self.alpha = 1.0
        self.cnp_for_alpha = self.cnp_for_cut = False
        self.alpha_due = self.cut_due = self.timer_due = math.inf
        self.stage = 0
        self.now = 0.0

    def step(self, step: Step) -> None:
        start, end = self.now, self.now + step.length_ns
        cnp_times = [start + step.length_ns * index / step.cnps for index in range(step.cnps)]
        while True:
            cnp_due = cnp_times[0] if cnp_times else math.inf
            events = [(cnp_due, 0), (self.alpha_due, 1), (self.cut_due, 2), (self.timer_due, 3)]
            at, kind = min(events)
            if at >= end:
                break
            if kind == 0:
                cnp_times.pop(0)
                self.cnp_for_cut = True
                if self.alpha_due == math.inf:
                    self.alpha_due, self.cut_due = at + self.k, at + 4000.0
                else:
                    self.cnp_for_alpha = True
            elif kind == 1:
                self.alpha = (1 - self.g) * self.alpha + (self.g if self.cnp_for_alpha else 0.0)
                self.cnp_for_alpha = False
                self.alpha_due += self.k
            elif kind == 2:
                if self.cnp_for_cut:
                    if self.stage > 0:
                        self.target = self.rate
                    self.rate = max(self.rate * (1 - self.alpha / 2), self.rmin)
                    self.cnp_for_cut = False
                    self.stage = 0
                    self.timer_due = at + self.t
                self.cut_due += 4000.0
            else:
                if self.stage == self.f:
                    self.target = min(self.target + self.rai, self.line)
                elif self.stage > self.f:
                    self.target = min(self.target + self.rhai, self.line)
                self.rate = (self.rate + self.target) / 2
                self.stage += 1
                self.timer_due += self.t
        self.now = end


class ScalarTimely:
    """Algorithm 1 of the TIMELY paper, at most once per minimum RTT."""

    def __init__(self, line_rate: float, delta: float):
        self.line, self.delta = line_rate, delta
        self.rate = line_rate
        self.rtt: float | None = None
        self.rtt_diff = 0.0
        self.now, self.last = 0.0, -math.inf
        self.falling = 0

    def step(self, step: Step) -> None:
        self.now += step.length_ns
        if step.rtt_ns is None or self.now - self.last < 20_000:
            return
        before, self.rtt, self.last = self.rtt, step.rtt_ns, self.now
        if before is None:
            return
        self.rtt_diff = (1 - 0.875) * self.rtt_diff + 0.875 * (self.rtt - before)
        gradient = self.rtt_diff / 20_000
        if self.rtt < 50_000:
            self.rate += self.delta
            self.falling = 0
        elif self.rtt > 500_000:
            self.rate *= 1 - 0.8 * (1 - 500_000 / self.rtt)
            self.falling = 0
        elif gradient <= 0:
            self.falling += 1
            self.rate += self.delta * (5 if self.falling >= 5 else 1)
        else:
            self.rate *= 1 - 0.8 * gradient
            self.falling = 0
        self.rate = min(max(self.rate, self.delta), self.line)


# Written out, not taken from the code under test: the table of facts.md section 4, rates and B for 40 Gbit/s.
PAPER = {"g": 1 / 256, "k": 55e3, "t": 55e3, "b": 10e6, "f": 5, "rai": 40e6 / 8, "rhai": 200e6 / 8, "rmin": 1e6 / 8}
FIRMWARE = {
    "g": 1 / 204.8, "k": 1e3, "t": 300e3, "b": 32767 * 64.0, "f": 1, "rai": 5e6 / 8, "rhai": 50e6 / 8, "rmin": 1e6 / 8
}  # fmt: skip


def scaled(constants: dict[str, Any], scale: float) -> dict[str, Any]:
    return constants | {name: constants[name] * scale for name in ("b", "rai", "rhai", "rmin")}


def paper(**changed: Any) -> ScalarPaper:
    return ScalarPaper(LINE_RATE, **(scaled(PAPER, 10) | changed))


def firmware(**changed: Any) -> ScalarFirmware:
    return ScalarFirmware(LINE_RATE, **(scaled(FIRMWARE, 10) | changed))


def timely(delta: float = 400e6 / 8) -> ScalarTimely:
    return ScalarTimely(LINE_RATE, delta)


def feedback(row: list[Step]) -> Feedback:
    """Return one call's feedback for several QPs."""
    return Feedback(
        np.array([step.cnps for step in row], np.int64),
        np.array([step.sent_bytes for step in row], np.int64),
        np.array([step.sent_bytes for step in row], np.int64),
        np.array([math.nan if step.rtt_ns is None else step.rtt_ns for step in row]),
        np.ones(len(row), bool),
    )


def first_difference(control: CongestionControl, references: list[Any], rows: list[list[Step]]) -> str:
    """Return the first step at which a QP differs from its reference, or ""."""
    now = 0.0
    for index, row in enumerate(rows):
        now += row[0].length_ns
        control.advance(now, feedback(row))
        state = control.state()
        for qp, (reference, step) in enumerate(zip(references, row, strict=True)):
            reference.step(step)
            pairs = {"rate": (control.rate_bytes_per_s[qp], reference.rate)}
            if "alpha" in state:
                pairs["alpha"] = (state["alpha"][qp], reference.alpha)
                pairs["target"] = (state["target_rate_bytes_per_s"][qp], reference.target)
            for name, (got, expected) in pairs.items():
                if not math.isclose(got, expected, rel_tol=1e-9):
                    return f"step {index}, QP {qp}: {name} {got!r}, expected {expected!r}"
    return ""


# Lengths and numbers whose quotients are exact, so that both sides see the same instants and the same order of events.
LENGTHS_NS = st.sampled_from([250, 1_000, 4_000, 7_000, 20_000, 55_000, 64_000, 128_000, 400_000, 1_000_000])
CNPS = st.sampled_from([0, 0, 0, 0, 1, 1, 2, 4, 5])
RTTS_NS = st.one_of(st.none(), st.floats(4_000, 2e6))
QPS = 3


@st.composite
def histories(draw: st.DrawFn) -> list[list[Step]]:
    """Draw what three QPs see in up to 30 calls of the same lengths."""
    rows = []
    for _ in range(draw(st.integers(1, 30))):
        length_ns = draw(LENGTHS_NS)
        quiet = draw(st.booleans())
        row = []
        for _ in range(QPS):
            sent_bytes = draw(st.integers(0, int(length_ns * LINE_RATE / 1e9)))
            row.append(Step(length_ns, 0 if quiet else draw(CNPS), sent_bytes, draw(RTTS_NS)))
        rows.append(row)
    return rows


CASES = {
    "paper": ("dcqcn", {"machine": "paper"}, paper),
    "paper, few bytes": ("dcqcn", {"machine": "paper", "byte_counter_bytes": 300_007}, lambda: paper(b=300_007.0)),
    "firmware": ("dcqcn", {"machine": "firmware"}, firmware),
    "firmware, fast timer": ("dcqcn", {"machine": "firmware", "rate_timer_ns": 9_000}, lambda: firmware(t=9e3)),
    "timely": ("timely", {}, timely),
}


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=40, deadline=None)
@given(rows=histories())
def test_every_machine_follows_its_scalar_reference(case: str, rows: list[list[Step]]) -> None:
    name, parameters, reference = CASES[case]
    control = make(name, parameters, np.full(QPS, LINE_RATE))
    assert first_difference(control, [reference() for _ in range(QPS)], rows) == ""


def long_history() -> list[list[Step]]:
    """Return 40 ms in which every part of the machines moves: CNPs, then a pause long enough for hyper increase."""
    rng = np.random.default_rng(7)
    rows = []
    for index in range(400):
        busy = index % 40 < 20 if index < 100 else False
        row = []
        for _ in range(QPS):
            cnps = int(busy and rng.random() < 0.5)
            row.append(Step(100_000, cnps, int(rng.integers(4_000_000, 5_000_000)), float(rng.uniform(3e4, 7e5))))
        rows.append(row)
    return rows


MUTATIONS = [
    *(("paper", paper, name) for name in ("g", "k", "t", "b", "f", "rai", "rhai")),
    *(("firmware", firmware, name) for name in ("g", "k", "t", "f", "rai", "rhai")),
]


@pytest.mark.parametrize(("machine", "reference", "name"), MUTATIONS)
def test_a_constant_that_is_one_percent_off_is_seen(machine: str, reference: Callable[..., Any], name: str) -> None:
    constants = scaled(PAPER if machine == "paper" else FIRMWARE, 10)
    wrong = constants[name] + 1 if name == "f" else constants[name] * 1.01
    rows = long_history()
    control = make("dcqcn", {"machine": machine}, np.full(QPS, LINE_RATE))
    assert first_difference(control, [reference() for _ in range(QPS)], rows) == ""
    control.restart(0.0)
    assert first_difference(control, [reference(**{name: wrong}) for _ in range(QPS)], rows) != ""


def test_the_machines_are_not_each_other() -> None:
    control = make("dcqcn", {"machine": "paper"}, np.full(QPS, LINE_RATE))
    assert first_difference(control, [firmware() for _ in range(QPS)], long_history()) != ""


@pytest.mark.parametrize("machine", list(Machine))
@settings(max_examples=15, deadline=None)
@given(rows=histories(), parts=st.sampled_from([2, 5, 10]))
def test_without_cnps_the_length_of_a_tick_changes_nothing(machine: str, rows: list[list[Step]], parts: int) -> None:
    once = make("dcqcn", {"machine": machine}, np.full(QPS, LINE_RATE))
    often = make("dcqcn", {"machine": machine}, np.full(QPS, LINE_RATE))
    start = [Step(50_000, 1, 0)] * QPS
    for control in (once, often):
        control.advance(50_000.0, feedback(start))
    now = 50_000.0
    for row in rows:
        piece = [Step(step.length_ns // parts, 0, step.sent_bytes // parts) for step in row]
        whole = [Step(step.length_ns * parts, 0, step.sent_bytes * parts) for step in piece]
        for index in range(parts):
            often.advance(now + piece[0].length_ns * (index + 1), feedback(piece))
        now += whole[0].length_ns
        once.advance(now, feedback(whole))
        assert once.rate_bytes_per_s == pytest.approx(often.rate_bytes_per_s, rel=1e-12)
        assert once.state()["alpha"] == pytest.approx(often.state()["alpha"], rel=1e-9)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=15, deadline=None)
@given(rows=histories())
def test_rates_stay_between_the_floor_and_line_rate(case: str, rows: list[list[Step]]) -> None:
    name, parameters, _ = CASES[case]
    control = make(name, parameters, np.array([100, 200, 400]) * GBIT)
    now = 0.0
    for row in rows:
        now += row[0].length_ns
        control.advance(now, feedback(row))
        assert (control.rate_bytes_per_s > 0).all()
        assert (control.rate_bytes_per_s <= np.array([100, 200, 400]) * GBIT).all()


@pytest.mark.parametrize("name", ["none", "dcqcn", "timely"])
def test_all_begin_and_restart_at_line_rate(name: str) -> None:
    line_rate = np.array([100, 200, 400]) * GBIT
    control = make(name, {}, line_rate)
    assert (control.rate_bytes_per_s == line_rate).all()
    for index in range(1, 20):
        control.advance(index * 50_000.0, feedback([Step(50_000, 1, 10**6, index * 40_000.0)] * 3))
    assert name == "none" or (control.rate_bytes_per_s < line_rate).all()
    control.restart(2e6)
    assert (control.rate_bytes_per_s == line_rate).all()
    fresh = make(name, {}, line_rate)
    for index in range(1, 10):
        step = [Step(50_000, 1, 10**6, index * 40_000.0)] * 3
        control.advance(2e6 + index * 50_000.0, feedback(step))
        fresh.advance(index * 50_000.0, feedback(step))
    assert control.rate_bytes_per_s == pytest.approx(fresh.rate_bytes_per_s)
    for key, value in fresh.state().items():
        assert control.state()[key] == pytest.approx(value), key


@pytest.mark.parametrize("name", ["dcqcn", "timely"])
def test_time_does_not_run_backwards(name: str) -> None:
    control = make(name, {}, np.full(1, LINE_RATE))
    control.advance(1000.0, feedback([Step(1000, 0, 0)]))
    with pytest.raises(ValueError, match="backwards"):
        control.advance(999.0, feedback([Step(1000, 0, 0)]))


def test_presets_grow_with_the_line_rate_but_for_what_is_given() -> None:
    line_rate = np.array([40, 400]) * GBIT
    auto = resolve(Parameters(), line_rate)
    assert (auto.rai * 8).tolist() == [40e6, 400e6]
    assert (auto.rhai * 8).tolist() == [200e6, 2e9]
    assert auto.byte_counter_bytes.tolist() == [10e6, 100e6]
    fixed = resolve(Parameters(scale=1, rhai_bits_per_s=7_000_000), line_rate)
    assert (fixed.rai * 8).tolist() == [40e6, 40e6]
    assert (fixed.rhai * 8).tolist() == [7e6, 7e6]
    assert resolve(Parameters(rhai_bits_per_s=7_000_000), line_rate).rhai.tolist() == [7e6 / 8, 7e6 / 8]


def test_presets_are_whole() -> None:
    for preset in PRESETS.values():
        assert all(
            getattr(preset, field.name) is not None for field in dataclasses.fields(preset) if field.name != "scale"
        )


def test_every_algorithm_is_found_by_itself_and_says_what_it_needs() -> None:
    assert list(find_algorithms()) == ["dcqcn", "none", "timely"]
    needs = {name: make(name, {}, np.full(1, LINE_RATE)) for name in find_algorithms()}
    assert [name for name, control in needs.items() if control.needs_rtt] == ["timely"]
    assert [name for name, control in needs.items() if control.marks_cnp] == ["dcqcn"]


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("swift", {}, "must be one of dcqcn, none, timely, got 'swift'"),
        ("none", {"g": 1}, "none has no parameter 'g'; it has none"),
        ("dcqcn", {"gg": 1}, "dcqcn has no parameter 'gg'; it has machine, g"),
        ("dcqcn", {"machine": "vax"}, "machine must be one of paper, firmware, got 'vax'"),
        ("dcqcn", {"rate_timer_ns": 0}, "rate_timer_ns must be above 0, got 0"),
        ("dcqcn", {"g": 1.5}, "g must be from 0 to 1, got 1.5"),
        ("timely", {"beta": -1}, "beta must be from 0 to 1, got -1"),
        ("timely", {"t_low_ns": 2, "t_high_ns": 1}, "t_low_ns must be at most t_high_ns, got 2 and 1"),
    ],
)
def test_wrong_parameters_are_refused_by_name(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^.*" + message):
        make(name, parameters, np.full(1, LINE_RATE))


@pytest.mark.parametrize("name", [str(one) for one in scenario_congestion.CongestionControl if one != "none"])
def test_the_scenario_has_the_parameters_of_every_algorithm(name: str) -> None:
    section = scenario_model.Transport.model_validate({"congestion_control": name, name: {}})
    fields = {field.name for field in dataclasses.fields(find_algorithms()[name].Parameters)}
    assert set(type(getattr(section, name)).model_fields) == fields
    left_out = scenario_model.Transport.model_validate({"congestion_control": name})
    assert left_out.congestion_parameters == {}
    line_rate = np.full(1, LINE_RATE)
    history = long_history()[:60]
    controls = [make(name, one.congestion_parameters, line_rate) for one in (section, left_out)]
    now = 0.0
    for row in history:
        now += row[0].length_ns
        for control in controls:
            control.advance(now, feedback(row[:1]))
        assert controls[0].rate_bytes_per_s.tolist() == controls[1].rate_bytes_per_s.tolist()


def test_the_scenario_knows_every_algorithm() -> None:
    assert sorted(scenario_congestion.CongestionControl) == list(find_algorithms())
    assert sorted(scenario_congestion.DcqcnMachine) == sorted(Machine)


def test_what_the_scenario_says_reaches_the_algorithm() -> None:
    text = {"machine": "firmware", "g": "1/16", "cnp_interval": "8 us", "rai": "7 Mbit/s", "scale": 2}
    transport = scenario_model.Transport.model_validate({"congestion_control": "dcqcn", "dcqcn": text})
    parameters = Parameters(**transport.congestion_parameters)
    constants = resolve(parameters, np.full(1, LINE_RATE))
    assert (constants.g, constants.rai[0] * 8, constants.rhai[0] * 8) == (1 / 16, 7e6, 100e6)
    assert cnp_interval_ns("dcqcn", transport.congestion_parameters) == 8000


def test_a_responder_is_asked_for_cnps_only_by_what_acts_on_them() -> None:
    assert cnp_interval_ns("dcqcn", {}) == 50_000
    assert cnp_interval_ns("dcqcn", {"machine": "firmware"}) == 4_000
    for name in find_algorithms():
        assert (cnp_interval_ns(name, {}) > 0) == make(name, {}, np.full(1, LINE_RATE)).marks_cnp
