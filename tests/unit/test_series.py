"""Time series: what is sampled, what becomes of it in the file, and what is left of a file that was cut short."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.carriers.recording import series_job
from testbed.carriers.series_process import SeriesJob, write_series
from testbed.cli.plot import SUFFIXES
from testbed.engine.recorder import TickRecorder
from testbed.errors import TestbedError
from testbed.kernel import layout
from testbed.measure.sample_ring import QP_FIELDS, QUEUE_FIELDS, RingShape, SampleRing
from testbed.measure.sample_rows import RATE_STATE, QpLabels, SampleRows
from testbed.plan.compile import compile_plan
from testbed.results.series import (
    QP_COLUMNS,
    QPS_FILE,
    QUEUE_COLUMNS,
    QUEUES_FILE,
    RATE_COLUMN,
    opened_series,
    read_header,
    read_series,
)
from testbed.results.series_html import render_html
from testbed.results.series_image import IMAGE_SUFFIXES, save_image
from testbed.results.series_plot import build_plot
from testbed.roce.congestion import make
from testbed.scenario import load_scenario

PRIORITY = 3
SCENARIO = """
name: series-test
fabric: {kind: star, hosts_per_leaf: 3, host_link: {rate: 400 Gbit/s, delay: 600 ns}}
qos: {pfc: {enabled: true}, ecn: {enabled: true}}
transport: {congestion_control: dcqcn}
workload: [{pattern: incast, fan_in: 2, size: 64 KiB, iters: 1, warmup_iters: 0}]
time_dilation: 1000
"""

# --- the file ----------------------------------------------------------------------------------------------------------


def rows_of(count: int, first: int = 0) -> dict[str, npt.NDArray[Any]]:
    """Return rows of the QPs' table that differ from one another."""
    return {column.name: np.arange(first, first + count) for column in QP_COLUMNS} | {
        "warmup": np.arange(count) % 2 == 0
    }


def write_blocks(path: Path, blocks: int, rows: int) -> list[int]:
    """Write blocks of QP rows; return the size of the file after each."""
    sizes = []
    with opened_series(path, QP_COLUMNS, {"scenario_name": "x", "seed": 7}, {}) as series:
        for block in range(blocks):
            series.write(rows_of(rows, block * rows))
            sizes.append(path.stat().st_size)
    return sizes


def test_what_is_written_is_read_with_its_header(tmp_path: Path) -> None:
    write_blocks(tmp_path / "a.arrow", 3, 10)
    table = read_series(tmp_path / "a.arrow")
    assert table["sent_packets"].to_pylist() == list(range(30))
    assert read_header(table.schema) == {"series_version": 1, "scenario_name": "x", "seed": 7}


def test_any_reader_of_arrow_reads_it(tmp_path: Path) -> None:
    write_blocks(tmp_path / "a.arrow", 2, 5)
    with pa.ipc.open_stream(str(tmp_path / "a.arrow")) as reader:
        assert reader.read_all()["time_ns"].to_pylist() == list(range(10))


@pytest.mark.parametrize("columns", [QUEUE_COLUMNS, (*QP_COLUMNS, RATE_COLUMN)])
def test_every_column_has_its_unit_in_the_header(tmp_path: Path, columns: Any) -> None:
    names = {"port": ["p"]} if columns is QUEUE_COLUMNS else {}
    with opened_series(tmp_path / "a.arrow", columns, {}, names) as series:
        series.write(
            {
                column.name: np.zeros(1)
                if column.kind == "float64"
                else np.zeros(1, int) != 0
                if column.kind == "bool"
                else np.zeros(1, int)
                for column in columns
            }
        )
    suffixes = {"_bytes": "bytes", "_packets": "packets", "_frames": "packets", "_ns": "ns", "_bytes_per_s": "bytes/s"}
    for field in read_series(tmp_path / "a.arrow").schema:
        metadata = {key.decode(): value.decode() for key, value in field.metadata.items()}
        assert metadata["meaning"]
        expected = [unit for suffix, unit in suffixes.items() if field.name.endswith(suffix)]
        assert metadata["unit"] == (expected[0] if expected else "1"), field.name


def test_a_cut_file_keeps_all_whole_blocks(tmp_path: Path) -> None:
    whole, cut = tmp_path / "a.arrow", tmp_path / "cut.arrow"
    sizes = write_blocks(whole, 4, 8)
    data = whole.read_bytes()
    header = sizes[0] - (sizes[1] - sizes[0])
    for length in (*range(header, len(data), 37), *(size + off for size in sizes for off in (-1, 0, 1))):
        cut.write_bytes(data[:length])
        blocks = sum(size <= length for size in sizes)
        assert read_series(cut)["time_ns"].to_pylist() == list(range(8 * blocks)), length


@pytest.mark.parametrize("content", [b"", b"x", b"no arrow at all, but text"])
def test_what_is_no_series_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.arrow").write_bytes(content)
    with pytest.raises(TestbedError, match=r"a\.arrow"):
        read_series(tmp_path / "a.arrow")
    with pytest.raises(TestbedError, match="No such file"):
        read_series(tmp_path / "b.arrow")


def test_a_series_without_rows_leaves_no_file(tmp_path: Path) -> None:
    with opened_series(tmp_path / "a.arrow", QP_COLUMNS, {}, {}):
        assert (tmp_path / "a.arrow").exists()
    assert not (tmp_path / "a.arrow").exists()


# --- from samples to rows ----------------------------------------------------------------------------------------------

PORTS, QPS = 3, 2
LABELS = [QpLabels(np.array([256, 258], np.int32), np.array([1, 2], np.int16), np.array([0, 0], np.int16))]


@st.composite
def sampled(draw: st.DrawFn) -> npt.NDArray[Any]:
    """Samples of some iterations, of counters that only grow."""
    count = draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    samples = np.zeros(count, RingShape(PORTS, QPS, 1).sample)
    samples["now_ns"] = np.cumsum(rng.integers(1, 1000, count))
    samples["queues"] = np.cumsum(rng.integers(0, 2, (count, len(QUEUE_FIELDS), PORTS)), axis=0)
    samples["qps"] = np.cumsum(rng.integers(0, 2, (count, len(QP_FIELDS), QPS)), axis=0)
    samples["states"] = rng.integers(1, 3, (count, 1, QPS))
    samples["first"] = rng.random(count) < 0.3
    samples["first"][0] = 1
    samples["iteration"] = np.cumsum(samples["first"]) - 1
    return samples


def split_all(samples: npt.NDArray[Any], chunks: Sequence[int]) -> list[dict[str, npt.NDArray[Any]]]:
    """Return all rows of both tables, the samples handed over in pieces."""
    rows = SampleRows(time_dilation=2.0, priorities=[PRIORITY], labels=LABELS, states=[RATE_STATE])
    found = [pair for piece in np.split(samples, chunks) for pair in rows.split(piece)]
    tables = []
    for table in (0, 1):
        names = found[0][table] if found else {}
        tables.append({name: np.concatenate([pair[table][name] for pair in found]) for name in names})
    return tables


@given(sampled(), st.lists(st.integers(0, 12), max_size=4))
@settings(deadline=None)
def test_rows_do_not_depend_on_how_samples_come(samples: npt.NDArray[Any], chunks: list[int]) -> None:
    for whole, pieces in zip(split_all(samples, []), split_all(samples, sorted(chunks)), strict=True):
        assert {name: column.tolist() for name, column in whole.items()} == {
            name: column.tolist() for name, column in pieces.items()
        }


@given(sampled())
@settings(deadline=None)
def test_increments_add_up_and_nothing_that_happened_is_left_out(samples: npt.NDArray[Any]) -> None:
    queues, qps = split_all(samples, [])
    seen: dict[tuple[str, str, int], int] = {}
    for before, after in pairwise(samples):
        if after["first"]:
            continue
        for table, fields in (("queues", QUEUE_FIELDS), ("qps", QP_FIELDS)):
            for index, name in enumerate(fields):
                for place, moved in enumerate((after[table][index] - before[table][index]).tolist()):
                    seen[table, name, place] = seen.get((table, name, place), 0) + moved
    for (table, name, place), total in seen.items():
        rows, key = (queues, queues["port"] == place) if table == "queues" else (qps, qps["qpn"] == 256 + 2 * place)
        assert rows[name][key].sum() == total


# --- the recorder and the process that writes --------------------------------------------------------------------------


class Host:
    """A fabric's arrays without a fabric, and a recorder that looks at them."""

    def __init__(self, *, limit_bytes: int = 1 << 30, control: bool = False) -> None:
        self.queues = np.zeros((PORTS + 1, 8), layout.QUEUE)
        self.ingress = np.zeros((PORTS + 1, 8), layout.INGRESS)
        self.qps = np.zeros(2 * QPS, layout.QP)
        self.closed = np.zeros((PORTS + 1, 8), bool)
        self.control = make("dcqcn", {}, np.full(QPS, 5e10)) if control else None
        states = 1 + len(self.control.state()) if self.control else 0
        self.shape = RingShape(PORTS, QPS, states)
        self.ring = SampleRing(bytearray(self.shape.ring.itemsize), self.shape)
        self.recorder = TickRecorder(
            self.ring,
            [(port, PRIORITY) for port in range(1, PORTS + 1)],
            queues=self.queues,
            ingress=self.ingress,
            qps=self.qps,
            limit_bytes=limit_bytes,
        )
        self.recorder.begin_workload(0, QPS, self.closed, self.control)
        self.recorder.begin_iteration(0, warmup=False)
        self.sent = np.zeros(QPS, np.int64)

    def tick(self, number: int) -> None:
        self.queues["enq_bytes"][1, PRIORITY] += 100
        self.queues["deq_bytes"][1, PRIORITY] += 60
        self.sent[0] += 2
        self.recorder.sample(number * 1000, self.sent)


def test_a_sample_is_what_the_arrays_held() -> None:
    host = Host(control=True)
    host.queues["marked_packets"][2, PRIORITY] = 5  # before the run: not counted
    host.queues["enq_bytes"][2, 0] = 77  # another priority: not looked at
    host.recorder.start(0)
    host.queues["marked_packets"][2, PRIORITY] += 3
    host.ingress["used_bytes"][3, PRIORITY], host.ingress["xoff"][3, PRIORITY] = 4096, 1
    host.qps["cnps_packets"][2], host.qps["cnps_packets"][1] = 4, 9  # requester of QP 1; a responder
    host.closed[1, PRIORITY] = True
    host.tick(1)
    host.tick(2)
    rows = SampleRows(
        time_dilation=1.0, priorities=[PRIORITY], labels=LABELS, states=["rate_limit_bytes_per_s", "a", "t"]
    )
    ((queues, qps),) = rows.split(host.ring.take(99))
    shown = {
        name: list(zip(queues["time_ns"].tolist(), queues["port"].tolist(), queues[name].tolist(), strict=True))
        for name in queues
    }
    assert [one for one in shown["depth_bytes"] if one[2]] == [(1000, 0, 40), (2000, 0, 80)]
    assert [one for one in shown["marked_packets"] if one[2]] == [(1000, 1, 3)]
    assert [one for one in shown["ingress_used_bytes"] if one[2]] == [(1000, 2, 4096), (2000, 2, 4096)]
    assert [one for one in shown["ingress_xoff"] if one[2]] == [(1000, 2, True), (2000, 2, True)]
    # The gate moves after the sample is taken, so it was closed in the second interval.
    assert [one for one in shown["paused"] if one[2]] == [(2000, 0, True)]
    assert queues["enq_bytes"].sum() == 200
    assert qps["cnps_packets"][qps["qpn"] == 258].tolist() == [4]
    assert qps["sent_packets"][qps["qpn"] == 256].tolist() == [2, 2]
    assert set(qps["rate_limit_bytes_per_s"].tolist()) == {5e10}


def test_a_full_ring_skips_samples_and_loses_no_count() -> None:
    host = Host()
    size = len(host.ring.samples)
    host.recorder.start(0)
    for number in range(1, size + 50):
        host.tick(number)
    assert host.ring.waiting() == size
    assert host.recorder.skipped_samples == 50
    rows = SampleRows(time_dilation=1.0, priorities=[PRIORITY], labels=LABELS, states=[])
    found = list(rows.split(host.ring.take(size)))
    host.tick(size + 50)
    found += rows.split(host.ring.take(size))
    assert sum(int(queues["enq_bytes"].sum()) for queues, _ in found) == 100 * (size + 50)
    assert found[-1][0]["interval_ns"].max() == 51_000


def test_memory_is_bounded_whatever_the_fabric() -> None:
    for ports, qps, states in ((2, 1, 0), (64, 16, 3), (4096, 16384, 3)):
        shape = RingShape(ports, qps, states)
        assert shape.ring.itemsize <= max(33 << 20, 65 * shape.sample.itemsize)


def test_a_large_series_is_thinned_out_and_ends_at_its_limit() -> None:
    host = Host(limit_bytes=100_000)
    host.recorder.start(0)
    written = 0
    strides = []
    for number in range(1, 8_000):
        host.tick(number)
        written += 200 * len(host.ring.take(99))  # bytes that a sample has in the file
        host.ring.note_written(written)
        strides.append(host.recorder.sample_ticks)
    assert written <= 100_000 + 200
    assert strides[0] == 1
    assert sorted(set(strides))[:4] == [1, 2, 4, 8]
    assert strides == sorted(strides)
    # It takes about as long to write each half of what is left, so a run a hundred times as long is seen to its end.
    assert strides.index(8) > 1.3 * strides.index(4) > 1.3 * strides.index(2)


def job_in(folder: Path) -> SeriesJob:
    plan = compile_plan(load_scenario(SCENARIO), capacity_packets_per_s=None)
    return series_job(plan, [1, 2, 3], folder, [RATE_STATE, "alpha", "target_rate_bytes_per_s"], -1)


def record(folder: Path, ticks: int) -> None:
    """Let the writer write what a recorder has seen, as its process does, until its input ends."""
    host = Host(control=True)
    job = SeriesJob.from_json(job_in(folder).to_json())
    assert job.shape == host.shape
    reading, writing = os.pipe()
    writer = threading.Thread(target=write_series, args=(job, host.ring, reading))
    writer.start()
    host.recorder.start(0)
    for number in range(1, ticks + 1):
        host.closed[1, PRIORITY] = number % 10 < 3
        host.queues["marked_packets"][1, PRIORITY] += number % 7 == 0
        host.qps["cnps_packets"][0] += number % 9 == 0
        host.ingress["used_bytes"][2, PRIORITY] = 50 * number
        host.tick(number)
    os.close(writing)
    writer.join()
    os.close(reading)


def test_all_that_was_sampled_is_written_when_the_input_ends(tmp_path: Path) -> None:
    record(tmp_path, 300)
    queues, qps = read_series(tmp_path / QUEUES_FILE), read_series(tmp_path / QPS_FILE)
    assert sum(queues["deq_bytes"].to_pylist()) == 300 * 60
    assert sum(qps["sent_packets"].to_pylist()) == 600
    assert set(qps["src_rank"].to_pylist()) == {1}
    assert queues["time_ns"].to_pylist() == sorted(queues["time_ns"].to_pylist())
    header = read_header(queues.schema)
    assert (header["scenario_name"], header["time_dilation"], header["tick_ns"]) == ("series-test", 1000.0, 1000.0)
    assert header["scenario"]["fabric"]["kind"] == "star"
    names = [port["name"] for port in header["ports"]]
    assert set(queues["port"].to_pylist()) <= set(names)
    assert all(port["kmin_bytes"] is None for port in header["ports"] if port["is_host"])
    assert any(port["kmin_bytes"] for port in header["ports"])


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    job = job_in(tmp_path / "none")
    with pytest.raises(TestbedError, match="none"):
        write_series(job, SampleRing(bytearray(job.shape.ring.itemsize), job.shape), 0)


# --- the plot ----------------------------------------------------------------------------------------------------------


def test_the_plot_shows_what_the_series_holds(tmp_path: Path) -> None:
    record(tmp_path, 300)
    tables = read_series(tmp_path / QUEUES_FILE), read_series(tmp_path / QPS_FILE)
    plot = build_plot(*tables, steps=100)
    panels = {panel.title.split(",")[0].split(":")[0]: panel for panel in plot.panels}
    assert {"Held for ingress ports", "Sent", "Paused by PFC", "Marks"} < set(panels)
    flow, limit = panels["Sent"].lines
    sent_bits = (flow.values * np.diff(flow.end_us, prepend=plot.begin_us)).sum() * 1e3
    frame_bytes = read_header(tables[0].schema)["frame_wire_bytes"]
    assert sent_bits == pytest.approx(600 * frame_bytes * 8)
    assert set(limit.values) == {400.0}
    ends_us, values = flow.points(plot.begin_us)
    assert (ends_us[0], values[0]) == (plot.begin_us, flow.values[0])  # the first step is a line too
    assert len(ends_us) == len(values) == len(flow.values) + 1
    (paused,) = panels["Paused by PFC"].bars
    assert paused.length_us.sum() == pytest.approx(90 * 1e-3, abs=2e-3)
    assert len(paused.length_us) == 30
    (held,) = panels["Held for ingress ports"].lines
    assert held.values.max() == 300 * 50 / 1024
    assert len(held.values) <= 100
    events = {line.name: line for line in panels["Marks"].lines}
    assert set(events) == {"ECN marks", "CNPs received"}
    total = (events["CNPs received"].values * np.diff(events["CNPs received"].end_us, prepend=plot.begin_us)).sum()
    assert total == pytest.approx(33)


def tables_of(folder: Path, ends: list[tuple[int, int]], steps: int) -> tuple[Any, Any]:
    """Write series in which each QP sends a packet per µs from and to the ranks given, and what is sent to rank 0 arrives."""
    ports = [
        {"name": f"switch0/down{host}", "peer": f"host{host}/eth0", "is_host": False, "rate_bits_per_s": 4e11}
        | dict.fromkeys(("kmin_bytes", "kmax_bytes", "xoff_bytes"))
        for host in range(2)
    ]
    header = {
        "scenario_name": "x",
        "seed": 1,
        "time_dilation": 1.0,
        "frame_wire_bytes": 4178,
        "ports": ports,
        "rows": [{"collective": "flows", "size_bytes": 1, "nranks": 4}],
    }
    names = {"port": [port["name"] for port in ports]}
    for columns, count, file in ((QUEUE_COLUMNS, 2, QUEUES_FILE), (QP_COLUMNS, len(ends), QPS_FILE)):
        rows = {column.name: np.zeros(steps * count, np.int64) for column in columns}
        rows["time_ns"] = np.repeat(np.arange(1, steps + 1) * 1000, count)
        rows["interval_ns"] += 1000
        place = np.tile(np.arange(count), steps)
        if columns is QUEUE_COLUMNS:
            rows["port"] = place
            rows["deq_packets"] = np.where(place == 0, len(ends), 0)
            rows["deq_bytes"] = rows["deq_packets"] * (4178 - 24)
        else:
            rows["qpn"] = 256 + 2 * place
            rows["src_rank"], rows["dst_rank"] = np.array(ends)[place].T
            rows["sent_packets"] += 1
        flags = {column.name for column in columns if column.kind == "bool"}
        with opened_series(folder / file, columns, header, names if columns is QUEUE_COLUMNS else {}) as series:
            series.write({name: column.astype(bool) if name in flags else column for name, column in rows.items()})
    return read_series(folder / QUEUES_FILE), read_series(folder / QPS_FILE)


@pytest.mark.parametrize(("qps", "names"), [(1, ["1 to 0", "2 to 0"]), (12, ["1 to 0, 12 QPs", "2 to 0, 12 QPs"])])
def test_more_queue_pairs_than_can_be_told_apart_are_drawn_together(tmp_path: Path, qps: int, names: list[str]) -> None:
    plot = build_plot(*tables_of(tmp_path, [(1, 0)] * qps + [(2, 0)] * qps, 64), steps=64)
    panels = {panel.title.split(",")[0]: panel for panel in plot.panels}
    assert [line.name for line in panels["Sent"].lines] == names
    gbits = qps * 4178 * 8 / 1000
    assert all(line.values == pytest.approx(gbits) for line in panels["Sent"].lines)
    # What arrives does so at one host.
    (received,) = panels["Received by NICs"].lines
    assert received.name == "host0/eth0"
    assert received.values == pytest.approx(2 * gbits)


def test_few_queue_pairs_are_drawn_one_by_one(tmp_path: Path) -> None:
    plot = build_plot(*tables_of(tmp_path, [(1, 0)] * 3 + [(2, 0)], 64), steps=64)
    (sent,) = (panel for panel in plot.panels if panel.title.startswith("Sent"))
    assert [line.name for line in sent.lines] == [*(f"1 to 0, QP {qpn:#x}" for qpn in (256, 258, 260)), "2 to 0"]


@pytest.mark.parametrize(("ticks", "steps"), [(64, 16), (81, 2), (129, 64), (100, 7)])
def test_no_step_is_much_shorter_than_the_others(tmp_path: Path, ticks: int, steps: int) -> None:
    plot = build_plot(*tables_of(tmp_path, [(1, 0)], ticks), steps=steps)
    (sent,) = (panel for panel in plot.panels if panel.title.startswith("Sent"))
    lengths_us = np.diff(sent.lines[0].end_us, prepend=plot.begin_us)
    assert lengths_us.sum() == ticks
    assert lengths_us.min() * 2 >= lengths_us.max()


@pytest.mark.parametrize(("row", "iteration"), [(1, None), (None, 3)])
def test_samples_that_are_not_there_are_named(tmp_path: Path, row: int | None, iteration: int | None) -> None:
    record(tmp_path, 20)
    tables = read_series(tmp_path / QUEUES_FILE), read_series(tmp_path / QPS_FILE)
    with pytest.raises(TestbedError, match="no samples"):
        build_plot(*tables, row=row, iteration=iteration, steps=100)


def test_pages_need_no_network_and_pictures_are_pictures(tmp_path: Path) -> None:
    record(tmp_path, 50)
    plot = build_plot(read_series(tmp_path / QUEUES_FILE), read_series(tmp_path / QPS_FILE), steps=100)
    page = render_html(plot)
    assert 'src="http' not in page
    assert "Paused by PFC" in page
    for suffix, magic in zip(IMAGE_SUFFIXES, (b"<?xml", b"\x89PNG", b"%PDF"), strict=True):
        save_image(plot, tmp_path / f"plot{suffix}")
        assert (tmp_path / f"plot{suffix}").read_bytes().startswith(magic)
    assert set(SUFFIXES) == {".html", *IMAGE_SUFFIXES}
