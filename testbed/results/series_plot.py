"""A run's time series as a picture: what is drawn, as values; `series_html` and `series_image` draw it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from testbed.errors import TestbedError
from testbed.results.series import read_header
from testbed.units import format_size

if TYPE_CHECKING:
    import pyarrow as pa

Floats = npt.NDArray[np.float64]
_MOST_PORTS, _MOST_FLOWS = 8, 16
# FCS, preamble and gap: on the wire, but not in what queues count.
_WIRE_OVERHEAD_BYTES = 24
LIMIT_SUFFIX = ", limit"
# A rate is a mean over at least so many frames of the fastest link: fewer show the frames, not the rate.
_RATE_FRAMES = 32
# Nor is it the on and off of single pauses: there are at most so many steps of a rate.
_MOST_RATES = 100
_LEAST_RECEIVED = 0.01
# More KiB than that are shown as MiB.
_MOST_KIB = 4096
_EVENTS = {
    "ECN marks": ("queues", "marked_packets"),
    "CNPs received": ("qps", "cnps_packets"),
    "CTS frames received": ("qps", "cts_packets"),
    "PFC frames received": ("queues", "pause_frames"),
    "drops": ("queues", "drop_packets"),
    "lost on links": ("queues", "lost_packets"),
    "NAKs received": ("qps", "naks_packets"),
}


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """A line of steps.

    Attributes:
        name: In the legend.
        end_us: Where each step ends, emulated µs, ascending; it begins where the one before ends.
        values: Of each step, in the panel's unit; nan where there is none.
        colour: Index of its colour.
        dashed: Whether it is a limit and no measurement.
    """

    name: str
    end_us: Floats
    values: Floats
    colour: int
    dashed: bool = False

    def points(self, begin_us: float) -> tuple[Floats, Floats]:
        """Return the ends and values of all steps behind a point at the beginning of the first, without which it is not drawn."""
        return np.append(begin_us, self.end_us), np.append(self.values[:1], self.values)


@dataclass(frozen=True, slots=True)
class Threshold:
    """A horizontal line, in the panel's unit."""

    name: str
    value: float


@dataclass(frozen=True, slots=True, eq=False)
class Bars:
    """Stretches of time of one thing: beginnings and lengths, emulated µs."""

    name: str
    begin_us: Floats
    length_us: Floats


@dataclass(frozen=True, slots=True)
class Panel:
    """One of several diagrams over the same time: lines over a unit, or rows of bars.

    Attributes:
        title: What it shows.
        unit: Of its values; empty for bars.
        lines: Its lines.
        thresholds: Its horizontal lines.
        bars: Its rows of bars.
    """

    title: str
    unit: str
    lines: tuple[Line, ...] = ()
    thresholds: tuple[Threshold, ...] = ()
    bars: tuple[Bars, ...] = ()


@dataclass(frozen=True, slots=True)
class SeriesPlot:
    """Diagrams one above the other, from ``begin_us`` to ``end_us``."""

    title: str
    begin_us: float
    end_us: float
    panels: tuple[Panel, ...]


def build_plot(
    queues: pa.Table, qps: pa.Table, *, row: int | None = None, iteration: int | None = None, steps: int
) -> SeriesPlot:
    """Return what to draw of a run.

    Args:
        queues: Series of the ports.
        qps: Series of the QPs.
        row: Row of the results; the last one that was run by default.
        iteration: Measured iteration; all of them by default, or the warm-ups where nothing was measured.
        steps: Most steps of a line.

    Raises:
        TestbedError: There are no samples of that row and iteration.
    """
    header = read_header(queues.schema)
    shown_queues, shown_qps = _columns_of(queues), _columns_of(qps)
    row = int(shown_queues["row"].max(initial=0)) if row is None else row
    for table in (shown_queues, shown_qps):
        _keep(table, table["row"] == row)
    if not shown_queues["warmup"].all():
        for table in (shown_queues, shown_qps):
            _keep(table, ~table["warmup"])
    if iteration is not None:
        for table in (shown_queues, shown_qps):
            _keep(table, table["iteration"] == iteration)
    if not len(shown_queues["time_ns"]):
        rows, iterations = len(header["rows"]), f", iteration {iteration}" if iteration is not None else ""
        raise TestbedError(f"the series has no samples of row {row}{iterations}", hint=f"rows go from 0 to {rows - 1}")
    grid = _Grid(shown_queues, shown_qps, steps)
    fastest = max(port["rate_bits_per_s"] for port in header["ports"])
    frames_ns = _RATE_FRAMES * header["frame_wire_bytes"] * 8e9 / fastest
    rates = grid.coarsened(max(frames_ns, 1e3 * (grid.edges_us[-1] - grid.edges_us[0]) / _MOST_RATES))
    received = _received_panel(shown_queues, rates, header["ports"])
    ports = _name_queues(shown_queues, [port for port in header["ports"] if not port["is_host"]])
    panels = [
        _depth_panel(shown_queues, grid, ports),
        _ingress_panel(shown_queues, grid, ports),
        _sent_panel(shown_qps, rates, header),
        received,
        _pause_panel(shown_queues),
        _event_panel(shown_queues, shown_qps, rates),
        _fault_panel(shown_queues, header.get("faults", [])),
    ]
    what = header["rows"][row]
    title = (
        f"{header['scenario_name']}: {what['collective']} of {format_size(what['size_bytes'])}, {what['nranks']} ranks, "
        f"time dilation {header['time_dilation']:g}, seed {header['seed']}"
    )
    return SeriesPlot(title, grid.edges_us[0], grid.edges_us[-1], tuple(panel for panel in panels if panel is not None))


Columns = dict[str, npt.NDArray[Any]]


def _columns_of(table: pa.Table) -> Columns:
    def values(column: Any) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = column.combine_chunks().to_numpy(zero_copy_only=False)
        return found

    return {name: values(table[name]) for name in table.column_names}


def _name_queues(queues: Columns, ports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Let every queue be a port of its own where ports have several, such as ``leaf0/up1 p4``; return the ports."""
    priorities = np.unique(queues["priority"]).tolist()
    if len(priorities) == 1:
        return ports
    names, places = np.unique(queues["port"].astype(str), return_inverse=True)
    numbers = np.array([[f"{name} p{priority}" for priority in priorities] for name in names.tolist()], object)
    queues["port"] = numbers[places, np.searchsorted(priorities, queues["priority"])]
    return [{**port, "name": f"{port['name']} p{priority}"} for port in ports for priority in priorities]


def _keep(table: Columns, which: npt.NDArray[np.bool_]) -> None:
    for name in table:
        table[name] = table[name][which]


class _Grid:
    """Steps of time that each take some samples together."""

    def __init__(self, queues: Columns, qps: Columns, steps: int) -> None:
        ends = [table["time_ns"] for table in (queues, qps)]
        begins = [table["time_ns"] - table["interval_ns"] for table in (queues, qps)]
        self._ticks = np.unique(np.concatenate([*ends, *begins]))
        self._take(np.append(self._ticks[: -1 : -(-(len(self._ticks) - 1) // steps)], self._ticks[-1]))

    def _take(self, edges_ns: npt.NDArray[Any]) -> None:
        self._edges = edges_ns
        self.edges_us = self._edges / 1e3
        self.end_us = self.edges_us[1:]
        self.length_ns = np.diff(self._edges).astype(np.float64)

    def coarsened(self, shortest_ns: float) -> _Grid:
        """Return a grid of steps that are about equal, and of that length at least where time allows.

        Steps hold whole samples, except where none was written because nothing happened.
        """
        grid = object.__new__(_Grid)
        ticks, grid._ticks = self._ticks, self._ticks
        tick_ns, span_ns = float(np.median(np.diff(ticks))), float(ticks[-1] - ticks[0])
        step_ns = max(float(np.median(self.length_ns)), shortest_ns)
        edges = ticks[0] + np.linspace(0.0, span_ns, max(1, int(span_ns / step_ns + 0.1)) + 1)
        behind = np.clip(np.searchsorted(ticks, edges), 1, len(ticks) - 1)
        nearest = np.where(edges - ticks[behind - 1] < ticks[behind] - edges, ticks[behind - 1], ticks[behind])
        grid._take(np.unique(np.where(np.abs(nearest - edges) <= tick_ns / 2, nearest, edges)))
        return grid

    def _places(self, table: Columns) -> npt.NDArray[np.intp]:
        return np.searchsorted(self._edges, table["time_ns"]) - 1

    def sums(self, table: Columns, name: str) -> Floats:
        """Return the sum of a column in every step."""
        return np.bincount(self._places(table), weights=table[name], minlength=len(self.end_us)).astype(np.float64)

    def most(self, table: Columns, name: str) -> Floats:
        """Return the greatest value of a column in every step, 0 where it has none."""
        found = np.zeros(len(self.end_us))
        np.maximum.at(found, self._places(table), table[name])
        return found

    def last(self, table: Columns, name: str) -> Floats:
        """Return the last value of a column up to the end of every step, nan before the first."""
        order = np.searchsorted(table["time_ns"], self._edges[1:], side="right") - 1
        return np.where(order >= 0, np.append(table[name], np.nan)[order], np.nan)


def _groups(table: Columns, name: str) -> Iterator[tuple[Any, Columns]]:
    """Yield the rows of each value of a column."""
    for value in np.unique(table[name]):
        which = table[name] == value
        yield value, {key: column[which] for key, column in table.items()}


def _port_lines(queues: Columns, grid: _Grid, ports: list[dict[str, Any]], name: str) -> tuple[tuple[Line, ...], str]:
    """Return the lines of the ports with the greatest values of a column of bytes, in KiB, and what the title says of them."""
    names = [port["name"] for port in ports]
    peaks = {port: int(rows[name].max()) for port, rows in _groups(queues, "port") if port in names}
    found = sorted((port for port in peaks if peaks[port]), key=lambda port: -peaks[port])
    drawn = [port for port in names if port in found[:_MOST_PORTS]]
    rows_of = dict(_groups(queues, "port"))
    lines = [Line(port, grid.end_us, grid.most(rows_of[port], name) / 1024, index) for index, port in enumerate(drawn)]
    return tuple(lines), _of_most(len(drawn), len(found))


def _thresholds(ports: list[dict[str, Any]], lines: tuple[Line, ...], keys: dict[str, str]) -> tuple[Threshold, ...]:
    """Return the thresholds of the ports that are drawn, each value once, in KiB."""
    drawn = {line.name for line in lines}
    found = {
        (title, port[key]): None
        for port in ports
        if port["name"] in drawn
        for title, key in keys.items()
        if port[key] is not None
    }
    return tuple(Threshold(title, value / 1024) for title, value in found)


def _bytes_panel(title: str, lines: tuple[Line, ...], limits: tuple[Threshold, ...]) -> Panel:
    """Return a panel of lines in KiB, or in MiB where that leaves fewer digits."""
    if max((float(np.nanmax(line.values, initial=0.0)) for line in lines), default=0.0) < _MOST_KIB:
        return Panel(title, "KiB", lines, limits)
    return Panel(
        title,
        "MiB",
        tuple(replace(line, values=line.values / 1024) for line in lines),
        tuple(replace(limit, value=limit.value / 1024) for limit in limits),
    )


def _depth_panel(queues: Columns, grid: _Grid, ports: list[dict[str, Any]]) -> Panel:
    lines, which = _port_lines(queues, grid, ports, "depth_bytes")
    limits = _thresholds(ports, lines, {"Kmin": "kmin_bytes", "Kmax": "kmax_bytes"})
    return _bytes_panel("Depth of egress queues" + which, lines, limits)


def _ingress_panel(queues: Columns, grid: _Grid, ports: list[dict[str, Any]]) -> Panel | None:
    lines, which = _port_lines(queues, grid, ports, "ingress_used_bytes")
    if not lines:
        return None
    limits = _thresholds(ports, lines, {"XOFF": "xoff_bytes"})
    return _bytes_panel("Held for ingress ports" + which, lines, limits)


@dataclass(frozen=True, slots=True, eq=False)
class _Flow:
    """A QP, or where there are too many to draw all QPs from one rank to another."""

    name: str
    qps: tuple[Columns, ...]

    @property
    def sent_packets(self) -> int:
        return sum(int(rows["sent_packets"].sum()) for rows in self.qps)


def _flows_of(qps: Columns) -> list[_Flow]:
    pairs: dict[tuple[int, int], list[tuple[int, Columns]]] = {}
    for qpn, rows in _groups(qps, "qpn"):
        pairs.setdefault((int(rows["src_rank"][0]), int(rows["dst_rank"][0])), []).append((int(qpn), rows))
    several = max(map(len, pairs.values()), default=1) > 1
    if sum(map(len, pairs.values())) > _MOST_FLOWS and several:
        return [
            _Flow(
                f"{src} to {dst}" + (f", {len(found)} QPs" if len(found) > 1 else ""), tuple(rows for _, rows in found)
            )
            for (src, dst), found in pairs.items()
        ]
    return [
        _Flow(f"{src} to {dst}" + (f", QP {qpn:#x}" if len(found) > 1 else ""), (rows,))
        for (src, dst), found in pairs.items()
        for qpn, rows in found
    ]


def _means(grid: _Grid) -> str:
    return f", means of {float(np.median(grid.length_ns)) / 1e3:.3g} µs"


def _sent_panel(qps: Columns, grid: _Grid, header: dict[str, Any]) -> Panel:
    """Return what NICs sent to each rank, with the limits that congestion control set."""
    wire_bits = 8 * header["frame_wire_bytes"]
    flows = _flows_of(qps)
    largest = sorted(flows, key=lambda flow: -flow.sent_packets)[:_MOST_FLOWS]
    drawn = [flow for flow in flows if flow in largest]
    lines = []
    for index, flow in enumerate(drawn):
        packets: Floats = np.sum([grid.sums(rows, "sent_packets") for rows in flow.qps], axis=0)
        lines.append(Line(flow.name, grid.end_us, packets * wire_bits / grid.length_ns, index))
        if all("rate_limit_bytes_per_s" in rows for rows in flow.qps):
            limits = [grid.last(rows, "rate_limit_bytes_per_s") for rows in flow.qps]
            limit = np.sum(limits, axis=0) * 8 / 1e9
            lines.append(Line(flow.name + LIMIT_SUFFIX, grid.end_us, limit, index, dashed=True))
    title = "Sent, rank to rank" + _means(grid) + _of_most(len(drawn), len(flows))
    return Panel(title, "Gbit/s", tuple(lines))


def _received_panel(queues: Columns, grid: _Grid, ports: list[dict[str, Any]]) -> Panel | None:
    """Return what reached each NIC: where queues grow, that is less than what was sent to it."""
    nic_of = {port["name"]: port["peer"] for port in ports if re.match(r"host\d+/", port["peer"])}
    found = []
    for port, rows in _groups(queues, "port"):
        if port in nic_of and rows["deq_bytes"].any():
            wire_bytes = grid.sums(rows, "deq_bytes") + _WIRE_OVERHEAD_BYTES * grid.sums(rows, "deq_packets")
            found.append((nic_of[port], 8 * wire_bytes / grid.length_ns, int(rows["deq_bytes"].sum())))
    if not found:
        return None
    # Grants that share the data's queue are no data: what receives next to nothing is left out.
    found = [one for one in found if one[2] >= _LEAST_RECEIVED * max(nbytes for _, _, nbytes in found)]
    largest = sorted(found, key=lambda one: -one[2])[:_MOST_FLOWS]
    drawn = sorted(largest, key=lambda one: _natural(one[0]))
    lines = tuple(Line(name, grid.end_us, rates, index) for index, (name, rates, _) in enumerate(drawn))
    return Panel("Received by NICs" + _means(grid) + _of_most(len(drawn), len(found)), "Gbit/s", lines)


def _of_most(drawn: int, there_are: int) -> str:
    return f", the {drawn} largest of {there_are}" if drawn < there_are else ""


def _pause_panel(queues: Columns) -> Panel | None:
    bars = []
    for port, rows in _groups(queues, "port"):
        paused = rows["paused"]
        if paused.any():
            end, begin = rows["time_ns"][paused], (rows["time_ns"] - rows["interval_ns"])[paused]
            starts = np.append(True, begin[1:] != end[:-1])
            first, last = begin[starts], end[np.append(starts[1:], True)]
            bars.append(Bars(port, first / 1e3, (last - first) / 1e3))
    if not bars:
        return None
    longest = sorted(bars, key=lambda bar: -float(bar.length_us.sum()))[:_MOST_FLOWS]
    drawn = tuple(sorted((bar for bar in bars if bar in longest), key=lambda bar: _natural(bar.name)))
    return Panel("Paused by PFC" + _of_most(len(drawn), len(bars)), "", bars=drawn)


def _natural(name: str) -> list[tuple[str, int]]:
    """Return what puts host2 before host10."""
    return [(word, int(number or 0)) for word, number in re.findall(r"(\D+)(\d*)", name)]


def _event_panel(queues: Columns, qps: Columns, grid: _Grid) -> Panel | None:
    tables = {"queues": queues, "qps": qps}
    lines = [
        Line(title, grid.end_us, grid.sums(tables[table], column) * 1e3 / grid.length_ns, index)
        for index, (title, (table, column)) in enumerate(_EVENTS.items())
        if column in tables[table] and tables[table][column].any()  # a file may be older than a column
    ]
    return Panel("Marks, CNPs, CTS, PFC, losses: whole fabric", "packets/µs", tuple(lines)) if lines else None


def _fault_panel(queues: Columns, faults: list[dict[str, Any]]) -> Panel | None:
    """Return when each fault lasted, in every iteration that is drawn but warm-ups, which have none."""
    spans: dict[str, list[tuple[float, float]]] = {}
    for _, rows in _groups(queues, "iteration"):
        if not rows["warmup"].all():
            begin_ns, end_ns = int((rows["time_ns"] - rows["interval_ns"]).min()), int(rows["time_ns"].max())
            for fault in faults:
                first_ns = begin_ns + fault["at_ns"]
                last_ns = end_ns if fault["until_ns"] is None else min(end_ns, begin_ns + fault["until_ns"])
                if first_ns < last_ns:
                    spans.setdefault(fault["text"], []).append((first_ns / 1e3, (last_ns - first_ns) / 1e3))
    if not spans:
        return None
    bars = [Bars(text, *np.array(found).T) for text, found in spans.items()]
    return Panel("Faults" + _of_most(len(bars[:_MOST_FLOWS]), len(bars)), "", bars=tuple(bars[:_MOST_FLOWS]))
