from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from testbed.results import (
    Check,
    CollectiveResult,
    FabricCounts,
    FabricResult,
    Fidelity,
    FidelityVerdict,
    LinkDirection,
    LinkResult,
    Result,
    render_json,
    render_table,
)

ROW = CollectiveResult.from_samples(
    collective="all_reduce",
    algorithm="ring",
    size_bytes=64 << 20,
    nranks=16,
    cct_ns=[2_600_000, 2_580_000, 2_700_000],
    cct_ideal_ns=2_590_000.5,
    traffic_factor=1.875,
    count=64 << 20,
    fabric=FabricCounts(drops_packets=12),
    fidelity=Fidelity(FidelityVerdict.DEGRADED, ("ticks were late",), 10_000),
)


def full_result() -> Result:
    ways = (
        LinkDirection("leaf0/up1", "spine1/down0", 10**9, 250_000, 0.5, 65536, 0),
        LinkDirection("spine1/down0", "leaf0/up1"),
    )
    return Result(
        scenario={"name": "ai-zone", "fabric": {"leaves": 4}, "workload": [{"size": 1}]},
        seed=7,
        time_dilation=1500.5,
        host={"kernel": "6.1", "cpus": 2},
        results=(ROW,),
        fabric=FabricResult(drops_packets=0, links=(LinkResult("leaf0:spine1", ways),)),
        fidelity=Fidelity(FidelityVerdict.DEGRADED, ("ticks were late",), 10_000, 40_000, 0.6, 0.001),
        checks=(Check("cct_ratio <= 1.05", "cct_ratio", 1.05, 1.0038, "pass"),),
        warnings=("two hosts share a CPU",),
    )


def test_summary_follows_from_the_samples() -> None:
    assert ROW.cct_ratio == pytest.approx(2_600_000 / 2_590_000.5)
    assert ROW.algbw_bytes_per_s == pytest.approx((64 << 20) / 2.6e-3)
    assert ROW.busbw_bytes_per_s == pytest.approx((64 << 20) / 2.6e-3 * 1.875)


def test_nothing_measured_is_none_everywhere() -> None:
    row = CollectiveResult.from_samples(
        collective="all_reduce",
        algorithm="ring",
        size_bytes=8,
        nranks=2,
        cct_ns=[],
        cct_ideal_ns=100.0,
        traffic_factor=1.0,
    )
    assert (row.cct_ratio, row.algbw_bytes_per_s, row.busbw_bytes_per_s) == (None, None, None)
    fabric = Result({}, 1, 1.0, {}).to_json_dict()["fabric"]
    assert fabric.pop("links") == []
    assert set(fabric.values()) == {None}


def test_json_has_the_keys_that_scripts_rely_on() -> None:
    fields = json.loads(render_json(full_result()))
    assert list(fields) == [
        "schema_version",
        "scenario",
        "seed",
        "time_dilation",
        "host",
        "results",
        "fabric",
        "fidelity",
        "checks",
        "warnings",
        "back_ends",
        "applications",
    ]
    assert fields["schema_version"] == 1
    assert {
        "collective",
        "algorithm",
        "size_bytes",
        "nranks",
        "cct_ns",
        "cct_ideal_ns",
        "cct_ratio",
        "algbw_bytes_per_s",
        "busbw_bytes_per_s",
        "count",
        "datatype",
        "fabric",
        "fidelity",
    } <= fields["results"][0].keys()
    assert fields["results"][0]["fabric"]["drops_packets"] == 12
    assert "links" not in fields["results"][0]["fabric"]
    assert fields["results"][0]["fidelity"]["verdict"] == "degraded"
    assert {
        "drops_packets",
        "out_of_order_packets",
        "retransmitted_packets",
        "nak_packets",
        "duplicate_packets",
        "timeouts",
        "ecn_marked_packets",
        "cnp_packets",
        "pause_frames",
        "links",
    } <= fields["fabric"].keys()
    assert {"bytes", "packets", "utilisation_fraction", "peak_depth_bytes"} <= fields["fabric"]["links"][0][
        "directions"
    ][0].keys()
    assert fields["fabric"]["nak_packets"] is None
    assert fields["fidelity"]["verdict"] == "degraded"
    assert {"expect", "observed", "verdict"} <= fields["checks"][0].keys()


def test_result_survives_its_json() -> None:
    result = full_result()
    assert Result.from_json_dict(json.loads(render_json(result))) == result
    older = result.to_json_dict()  # of before rows had counts and verdicts of their own
    for row in older["results"]:
        del row["fabric"], row["fidelity"], row["count"], row["datatype"]
    assert Result.from_json_dict(older).results[0].cct_ratio == ROW.cct_ratio
    bare = Result({}, 1, 1.0, {})
    assert Result.from_json_dict(json.loads(render_json(bare))) == bare


def test_numpy_numbers_become_plain_ones() -> None:
    row = replace(ROW, cct_ns=tuple(np.array([5, 6])), cct_ratio=np.float64(1.5))
    fields = json.loads(render_json(replace(full_result(), results=(row,), host={"cpus": np.arange(2)})))
    assert fields["results"][0]["cct_ns"] == [5, 6]
    assert fields["results"][0]["cct_ratio"] == 1.5
    assert fields["host"]["cpus"] == [0, 1]


def test_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        render_json(replace(full_result(), time_dilation=float("nan")))


def test_foreign_json_is_refused_and_unknown_keys_are_skipped() -> None:
    fields = full_result().to_json_dict()
    with pytest.raises(ValueError, match="schema version 2, expected 1"):
        Result.from_json_dict({**fields, "schema_version": 2})
    with pytest.raises(ValueError, match="no result of a run"):
        Result.from_json_dict({"schema_version": 1})
    fields["added_later"] = 1
    fields["fabric"]["added_later"] = 1
    assert Result.from_json_dict(fields) == full_result()


def test_table_reads_like_nccl_tests() -> None:
    unmeasured = CollectiveResult("send_recv", "ring", 8, 2)
    lines = render_table([ROW, unmeasured], ["scenario ai-zone", ""]).split("\n")
    assert lines[:2] == ["# scenario ai-zone", "#"]
    assert lines[2].split()[1:6] == ["size", "count", "type", "nranks", "collective"]
    assert lines[3].split()[1:5] == ["(B)", "(elements)", "(count)", "(count)"]
    assert lines[4].split()[:7] == ["67108864", "67108864", "uint8", "16", "all_reduce", "ring", "3"]
    assert [float(cell) for cell in lines[4].split()[7:15]] == [2600, 2580, 2700, 25.81, 48.40, 2590, 1.0039, 12]
    assert lines[4].split()[15:] == ["degraded"]
    assert lines[5].split() == ["8", "-", "uint8", "2", "send_recv", "ring", "0", *["-"] * 9]
    assert lines[6] == ""
    assert lines[2].index("time") + 4 == lines[3].index("(us)") + 4 == lines[4].index("2600.00") + 7


def test_table_without_rows_is_its_header() -> None:
    assert len(render_table([]).splitlines()) == 2
