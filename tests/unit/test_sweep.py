"""Size sweeps: which sizes, one fabric and one dilation for all, the command line's options and table."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from testbed.cli.main import app
from testbed.cli.run import load_with_options, render_result
from testbed.plan.compile import compile_plan
from testbed.plan.report import describe_paths, describe_plan
from testbed.results import CollectiveResult, FabricCounts, FabricResult, Fidelity, FidelityVerdict, Result
from testbed.results.model import Check
from testbed.scenario import Scenario, expand_sizes, load_scenario
from testbed.scenario.sweep import count_sizes, sweep_sizes

MIB = 1 << 20
TEXT = """
name: small
fabric: {kind: clos, leaves: 2, spines: 2, hosts_per_leaf: 2, host_link: {rate: 400 Gbit/s, delay: 1 us}}
workload: [{collective: all_reduce, size: 1 MiB}, {pattern: incast, fan_in: 3, size: 2 MiB}]
"""
FLOWS = "workload[2]={pattern: flows, flows: [{src: 0, dst: 1, size: 1 MiB}]}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(TEXT)
    return path


def load(file: Path, *overrides: str, iters: int | None = None, **sweep: Any) -> Scenario:
    return load_with_options(file, list(overrides), seed=None, iters=iters, sweep=sweep)


@pytest.mark.parametrize(
    ("first", "last", "factor", "step", "sizes"),
    [
        (1, 8, 2, None, (1, 2, 4, 8)),
        (3, 100, 4, None, (3, 12, 48)),
        (5, 5, 2, None, (5,)),
        (10, 31, None, 10, (10, 20, 30)),
        (10, 30, None, 10, (10, 20, 30)),
        (6, 5, 2, None, ()),
        (6, 5, None, 1, ()),
    ],
)
def test_sizes_go_from_the_first_to_the_last_that_is_not_above_the_end(
    first: int, last: int, factor: int | None, step: int | None, sizes: tuple[int, ...]
) -> None:
    assert sweep_sizes(first, last, factor=factor, step_bytes=step) == sizes


@pytest.mark.parametrize(("factor", "step"), [(1, None), (0, None), (None, 0), (None, None), (2, 1)])
def test_sweep_that_does_not_grow_is_refused(factor: int | None, step: int | None) -> None:
    with pytest.raises(ValueError, match="sweep"):
        sweep_sizes(1, 10, factor=factor, step_bytes=step)


@given(st.integers(1, 1000), st.integers(1, 1000), st.integers(2, 9), st.booleans())
def test_sizes_are_counted_without_making_them(first: int, last: int, growth: int, by_factor: bool) -> None:
    factor, step = (growth, None) if by_factor else (None, growth)
    sizes = sweep_sizes(first, last, factor=factor, step_bytes=step)
    assert count_sizes(first, last, factor=factor, step_bytes=step) == len(sizes)
    assert all(small < large for small, large in itertools.pairwise(sizes))


def test_item_without_a_sweep_is_itself() -> None:
    for item in load_scenario(TEXT, [FLOWS]).workload:
        assert expand_sizes(item) == (item,)


def test_sizes_double_unless_the_scenario_says_how_they_grow() -> None:
    doubled = load_scenario(TEXT, ["workload[0].max_size=4 MiB"])
    assert [item.size_bytes for item in expand_sizes(doubled.collectives[0])] == [MIB, 2 * MIB, 4 * MIB]
    assert doubled.resolved()["workload"][0]["size_factor"] == 2
    stepped = load_scenario(TEXT, ["workload[0].max_size=4 MiB", "workload[0].size_step=1 MiB"])
    assert [item.size_bytes for item in expand_sizes(stepped.collectives[0])] == [n * MIB for n in (1, 2, 3, 4)]
    assert "size_factor" not in stepped.resolved()["workload"][0]


def test_one_size_of_a_sweep_is_planned_as_if_it_were_alone() -> None:
    swept = compile_plan(load_scenario(TEXT, ["workload[0].max_size=4 MiB"]), capacity_packets_per_s=50_000)
    assert [(one.item, one.size_bytes) for one in swept.workloads] == [
        (0, MIB),
        (0, 2 * MIB),
        (0, 4 * MIB),
        (1, 2 * MIB),
    ]
    alone = compile_plan(load_scenario(TEXT, ["workload[0].size=2 MiB"]), capacity_packets_per_s=50_000)
    middle, same = swept.workloads[1], alone.workloads[0]
    assert middle.workload == same.workload
    assert middle.ideal_cct_ns == same.ideal_cct_ns
    assert middle.resolution_error_fraction == same.resolution_error_fraction
    assert middle.paths == same.paths
    assert swept.dilation == alone.dilation
    # A tick is longer beside a short collective: what makes the verdict of a row.
    coarse = [one.resolution_error_fraction for one in swept.workloads[:3]]
    assert coarse == sorted(coarse, reverse=True)
    assert coarse[0] > 2 * coarse[2]


def test_plan_has_a_row_per_size_and_paths_stand_once_per_item() -> None:
    overrides = ["workload[0].max_size=4 MiB", "fabric.switch.buffer=1 MiB"]
    swept = compile_plan(load_scenario(TEXT, overrides), capacity_packets_per_s=None)
    alone = compile_plan(
        load_scenario(TEXT, ["workload[0].size=4 MiB", "fabric.switch.buffer=1 MiB"]), capacity_packets_per_s=None
    )
    assert [one["size_bytes"] for one in describe_plan(swept)["workloads"]] == [MIB, 2 * MIB, 4 * MIB, 2 * MIB]
    assert describe_paths(swept) == describe_paths(alone)
    assert swept.warnings == alone.warnings
    assert len(swept.warnings) == 2  # the largest size of the ring, and the incast


@pytest.mark.parametrize(
    ("collective", "count"), [("all_reduce", MIB), ("broadcast", MIB), ("all_gather", MIB // 4), ("scatter", MIB // 4)]
)
def test_count_is_what_the_call_takes_as_in_nccl_tests(collective: str, count: int) -> None:
    plan = compile_plan(load_scenario(TEXT, [f"workload[0].collective={collective}"]), capacity_packets_per_s=None)
    assert plan.workloads[0].count == count


class TestOptions:
    def test_every_item_is_swept(self, file: Path) -> None:
        scenario = load(file, size="4MiB", max_size="64MiB", size_factor=4, iters=2)
        for item in scenario.workload:
            sizes = [one.size_bytes for one in expand_sizes(item)]  # type: ignore[union-attr]
            assert sizes == [4 * MIB, 16 * MIB, 64 * MIB]
            assert item.iters == 2

    def test_end_alone_begins_with_the_size_of_each_item(self, file: Path) -> None:
        scenario = load(file, max_size="8 MiB")
        assert [len(expand_sizes(item)) for item in scenario.workload] == [4, 3]

    def test_begin_alone_is_one_size(self, file: Path) -> None:
        scenario = load(file, size="3 MiB")
        assert [item.size_bytes for item in scenario.collectives] == [3 * MIB]
        assert scenario.collectives[0].max_size_bytes is None

    def test_options_win_over_set(self, file: Path) -> None:
        scenario = load(file, "workload[0].size=9 MiB", "workload[0].max_size=10 MiB", size="4 MiB", max_size="5 MiB")
        assert (scenario.collectives[0].size_bytes, scenario.collectives[0].max_size_bytes) == (4 * MIB, 5 * MIB)

    def test_growth_given_replaces_the_other_way_to_grow(self, file: Path) -> None:
        steps = ["workload[0].max_size=3 MiB", "workload[0].size_step=1 MiB"]
        by_factor = load(file, *steps, max_size="4 MiB", size_factor=2)
        assert [item.size_bytes for item in expand_sizes(by_factor.collectives[0])] == [MIB, 2 * MIB, 4 * MIB]
        factor = ["workload[0].max_size=4 MiB", "workload[0].size_factor=4"]
        by_step = load(file, *factor, max_size="3 MiB", size_step="1 MiB")
        assert [item.size_bytes for item in expand_sizes(by_step.collectives[0])] == [MIB, 2 * MIB, 3 * MIB]

    @pytest.mark.parametrize(
        ("arguments", "option", "words"),
        [
            (["-b", "64MiB", "-e", "1MiB"], "-e/--maxbytes", "must be at least `size`, 64 MiB"),
            (["-b", "64MiB", "-e", "128MiB", "-f", "1"], "-f/--stepfactor", "must be an integer from 2 to 1024, got 1"),
            (["-e", "64MiB", "-f", "2", "-i", "1MiB"], "-i/--stepbytes", "must not stand beside size_factor"),
            (["-e", "64MiB", "-i", "1"], "-i/--stepbytes", "must give at most 100 sizes, not 66060289"),
            (["-e", "64MiB", "-i", "0"], "-i/--stepbytes", "must be from 1 B to 16 GiB, got 0"),
            (["-f", "2"], "-f/--stepfactor", "needs `max_size`"),
            (["-b", "3", "-e", "1MiB"], "-b/--minbytes", "at least one byte for each of the 4 ranks, got 3"),
            (["-b", "8", "-e", "1M"], "-e/--maxbytes", "(nccl-tests' 1M is 1MiB)"),
            (["-e", "1KiB"], "-e/--maxbytes", "workload[0].max_size: must be at least `size`, 1 MiB"),
            (["-b", "64MiB", "--set", "workload[0].max_size=2MiB"], "-b/--minbytes", "must be at least `size`, 64 MiB"),
            (["-e", "2MiB", "--set", FLOWS], "-e/--maxbytes", "workload[2] lists flows"),
        ],
    )
    def test_a_wrong_option_is_named_and_nothing_runs(
        self, file: Path, arguments: list[str], option: str, words: str
    ) -> None:
        result = CliRunner().invoke(app, ["run", str(file), *arguments])
        assert result.exit_code == 2
        message = " ".join(result.output.split())
        assert f"Invalid value for {option}: " in message
        assert words in message
        assert "--set" not in message
        assert sorted(path.name for path in file.parent.iterdir()) == [file.name]

    def test_mistake_of_the_file_is_not_blamed_on_an_option(self, file: Path) -> None:
        result = CliRunner().invoke(app, ["run", str(file), "-e", "4MiB", "--set", "fabric.spines=none"])
        assert result.exit_code == 1
        assert "fabric.spines" in str(result.exception)

    def test_mistake_of_another_option_keeps_its_name(self, file: Path) -> None:
        with pytest.raises(Exception, match=r"workload\[0\]\.iters") as caught:
            load(file, iters=20_000, max_size="4 MiB")
        assert not isinstance(caught.value, typer.BadParameter)


def swept_result() -> Result:
    """Return a result of three sizes, made by hand, whose verdicts differ."""
    reason = "the machine's share in the completion time may be {}"
    verdicts = (
        Fidelity(FidelityVerdict.INVALID, (reason.format("8.0%"),)),
        Fidelity(FidelityVerdict.DEGRADED, (reason.format("2.0%"),)),
        Fidelity(FidelityVerdict.TRUSTED),
    )
    rows = tuple(
        CollectiveResult.from_samples(
            collective="all_gather",
            algorithm="ring",
            size_bytes=size,
            nranks=4,
            cct_ns=[round(1.01 * ideal)] * 2,
            cct_ideal_ns=ideal,
            traffic_factor=0.75,
            count=size // 4,
            fabric=FabricCounts(drops_packets=drops),
            fidelity=fidelity,
        )
        for size, ideal, drops, fidelity in zip(
            (MIB, 4 * MIB, 16 * MIB), (20e3, 70e3, 270e3), (0, 0, 1234567), verdicts, strict=True
        )
    )
    return Result(
        scenario={"name": "swept"},
        seed=1,
        time_dilation=2000,
        host={"cpu_model": "A CPU", "cpus_available": 2, "kernel": "6.1"},
        results=rows,
        fabric=FabricResult(drops_packets=1234567, out_of_order_packets=0, nak_packets=0, retransmitted_packets=0),
        fidelity=verdicts[0],
        checks=(
            Check("drops_packets == 0", "drops_packets", 0, 1234567, "fail", row=2),
            Check("pause_frames == 0", "pause_frames", 0, None, "not_judged"),
        ),
    )


def test_table_has_a_row_and_a_verdict_per_size(update_golden: bool) -> None:
    golden = Path(__file__).parents[1] / "golden" / "table" / "sweep.txt"
    shown = render_result(swept_result())
    if update_golden:
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(shown)
    assert shown == golden.read_text()


def test_output_says_what_loss_recovery_did_where_it_did_something() -> None:
    quiet = swept_result()
    assert "loss recovery" not in render_result(quiet)
    recovered = dataclasses.replace(
        quiet, fabric=dataclasses.replace(quiet.fabric, retransmitted_packets=9, duplicate_packets=4, timeouts=2)
    )
    assert "# loss recovery: 2 timeouts, 4 duplicates (packets)\n" in render_result(recovered)
    untold = dataclasses.replace(quiet, fabric=dataclasses.replace(quiet.fabric, retransmitted_packets=9))
    assert "# loss recovery: - timeouts, - duplicates (packets)\n" in render_result(untold)


def test_json_has_a_row_and_a_verdict_per_size() -> None:
    result = swept_result()
    fields = json.loads(json.dumps(result.to_json_dict()))
    assert [row["fidelity"]["verdict"] for row in fields["results"]] == ["invalid", "degraded", "trusted"]
    assert [row["fabric"]["drops_packets"] for row in fields["results"]] == [0, 0, 1234567]
    assert [check["row"] for check in fields["checks"]] == [2, None]
    assert Result.from_json_dict(fields) == result


def test_reasons_of_a_single_row_need_no_name() -> None:
    result = swept_result()
    one = dataclasses.replace(result, results=result.results[:1], checks=())
    assert "#   the machine's share in the completion time may be 8.0%\n" in render_result(one)
