"""Commands that look at a scenario and build nothing: validate, plan, paths, predict, schema. None needs root."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from testbed.cli.options import Format, OutputFormat, ScenarioFile, Set, read_overrides

if TYPE_CHECKING:
    from testbed.plan.model import Plan
    from testbed.plan.prediction import Prediction, RatioSpread
    from testbed.plan.report import FlowPath, PathComparison

_NOT_PREDICTED = "applications open their flows themselves: neither paths nor completion times are predicted"


def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Scenarios.", show_default=False)],
    overrides: Set = None,
) -> None:
    """Report every mistake in scenarios, with file, line, key, rule and value."""
    from testbed import api
    from testbed.cli.text import print_error
    from testbed.errors import ScenarioError

    failed = False
    for file in files:
        try:
            api.load(file, read_overrides(overrides))
        except ScenarioError as error:
            failed = True
            print_error(error)
        else:
            print(f"{file}: ok")
    if failed:
        raise typer.Exit(1)


def plan(
    file: ScenarioFile,
    overrides: Set = None,
    output_format: Format = OutputFormat.TABLE,
    operations: Annotated[
        bool, typer.Option("--operations", envvar="TESTBED_OPERATIONS", help="Show every command that would be done.")
    ] = False,
) -> None:
    """Show what would be built and expected: nodes, links, rates, dilation, ideal completion time, warnings."""
    from testbed import api
    from testbed.cli.text import render_json
    from testbed.plan.report import describe_plan

    built = api.build_plan(api.load(file, read_overrides(overrides)))
    report = describe_plan(built, operations=operations, back_ends=api.find_back_ends(built))
    if output_format is OutputFormat.JSON:
        print(render_json(report))
    else:
        print(_render_plan(built, report), end="")


def paths(
    file: ScenarioFile,
    overrides: Set = None,
    output_format: Format = OutputFormat.TABLE,
    lab: Annotated[
        str | None,
        typer.Option(
            "--lab",
            metavar="LAB",
            envvar="TESTBED_LAB",
            help="A deployed lab: the paths that the scenario's flows would take there now, around what is broken.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show each flow's path, the load of each link, collisions and the slowdown they predict.

    For the folder of a run's results, or its result.json: what was predicted beside what was measured.
    """
    from testbed import api
    from testbed.cli.text import render_columns, render_json

    if file.is_dir() or file.suffix == ".json":
        _print_comparison(api.compare_paths(file), output_format)
        return

    report = api.paths(api.load(file, read_overrides(overrides)), lab)
    if output_format is OutputFormat.JSON:
        print(render_json(report))
        return
    if report.predicted_cct_ratio is None:
        print(_NOT_PREDICTED)
        return
    flows = [(flow.name, flow.udp_source_port, _render_path(flow)) for flow in report.flows]
    links = [
        (load.name, load.flows, f"{load.load_fraction:.2f}")
        for load in sorted(report.links, key=lambda load: -load.load_fraction)
    ]
    print(render_columns(("flow", "sport", "path"), flows, right=("sport",)))
    print(render_columns(("link", "flows", "load"), links, right=("flows", "load")))
    for collision in report.collisions:
        print(f"collision at {collision.port}: {', '.join(collision.flows)}")
    print(f"predicted completion time over ideal: {report.predicted_cct_ratio:.3f}")


def _print_comparison(compared: PathComparison, output_format: OutputFormat) -> None:
    from testbed.cli.text import render_columns, render_json

    if output_format is OutputFormat.JSON:
        print(render_json(compared))
        return

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    if all(link.predicted_bytes is None for link in compared.links) and not compared.rows:
        print(_NOT_PREDICTED)
        measured = [(link.name, link.measured_bytes) for link in compared.links]
        print(render_columns(("link", "measured (B)"), measured, right=("measured (B)",)), end="")
        return
    rows = [(row.title, number(row.predicted_cct_ratio), number(row.measured_cct_ratio)) for row in compared.rows]
    print(
        render_columns(("row", "predicted ratio", "measured ratio"), rows, right=("predicted ratio", "measured ratio"))
    )
    links = [
        (
            link.name,
            link.predicted_bytes,
            link.measured_bytes,
            f"{link.measured_bytes / link.predicted_bytes:.4f}" if link.predicted_bytes else "",
        )
        for link in compared.links
    ]
    columns = ("predicted (B)", "measured (B)", "measured/predicted")
    print(render_columns(("link", *columns), links, right=columns), end="")


def predict(
    file: ScenarioFile,
    overrides: Set = None,
    output_format: Format = OutputFormat.TABLE,
    seeds: Annotated[
        int,
        typer.Option(
            "--seeds", metavar="N", min=1, envvar="TESTBED_SEEDS", help="Hash seeds, from the scenario's own on."
        ),
    ] = 200,
    links_down: Annotated[
        list[str] | None,
        typer.Option(
            "--down",
            metavar="LINK|SWITCH",
            envvar="TESTBED_DOWN",
            help="A link such as leaf0:spine1, or a switch, that is down; may be repeated.",
            show_default=False,
        ),
    ] = None,
    per_seed: Annotated[
        bool, typer.Option("--per-seed", envvar="TESTBED_PER_SEED", help="Show the ratio under each hash seed too.")
    ] = False,
) -> None:
    """Predict completion time over ideal for many hash seeds, by max-min fair shares; no kernel, any size."""
    from testbed import api
    from testbed.cli.text import render_json

    prediction = api.predict(
        api.load(file, read_overrides(overrides)), seeds=seeds, links_down=links_down or (), per_seed=per_seed
    )
    if output_format is OutputFormat.JSON:
        print(render_json(_without_levels(prediction)))
    else:
        print(_render_prediction(prediction), end="")


def _without_levels(prediction: Prediction) -> dict[str, Any]:
    """Return a prediction as plain data, the figures of its ratios beside its other fields."""
    import dataclasses

    data = dataclasses.asdict(prediction)
    items, phases = data.pop("items"), data.pop("phases")
    for one in (data, *items, *phases):
        one |= one.pop("ratios") or {}
        if one.get("cct_ratios") is None:
            one.pop("cct_ratios", None)
    return {**data, "items": items, "phases": phases}


_RATIOS = ("mean", "p5", "p95", "min", "max")


def _ratio_cells(ratios: RatioSpread) -> tuple[str, ...]:
    values = (
        ratios.cct_ratio_mean,
        ratios.cct_ratio_p5,
        ratios.cct_ratio_p95,
        ratios.cct_ratio_min,
        ratios.cct_ratio_max,
    )
    return tuple(f"{value:.3f}" for value in values)


def _render_prediction(prediction: Prediction) -> str:
    from testbed.cli.text import render_columns
    from testbed.units import format_size, format_time

    what = f"{prediction.nodes} nodes, {prediction.links} links"
    if prediction.links_down:
        what += f", down: {', '.join(prediction.links_down)}"
    last = prediction.hash_seed + prediction.seeds - 1
    lines = [
        f"# {prediction.name}: {prediction.scheme}, hash seeds {prediction.hash_seed} to {last}; {what}\n",
        "# completion time over ideal, by max-min fair shares: no latencies, no queues, no pauses\n",
        *(f"# left out: {one}\n" for one in prediction.left_out),
    ]
    header: tuple[str, ...]
    header = ("workload", "algorithm", "size", "nranks", "flows", *_RATIOS)
    rows: list[tuple[object, ...]] = [
        (
            item.collective,
            item.algorithm,
            format_size(item.size_bytes),
            item.nranks,
            item.flows,
            *_ratio_cells(item.ratios),
        )
        for item in prediction.items
    ]
    if any(item.job for item in prediction.items):
        header = ("job", *header, "alone")
        rows = [
            (item.job, *row, "" if item.cct_ratio_alone_mean is None else f"{item.cct_ratio_alone_mean:.3f}")
            for item, row in zip(prediction.items, rows, strict=True)
        ]
    lines.append(render_columns(header, rows, right=header[2:]))
    if prediction.phases:
        lines.append("\n")
        phases = [
            (
                format_time(phase.at_ns),
                *(_ratio_cells(phase.ratios) if phase.ratios else ("cut off", "", "", "", "")),
                phase.cut_off or ", ".join(phase.broken) or "nothing broken",
            )
            for phase in prediction.phases
        ]
        lines.append(render_columns(("from", *_RATIOS, "state"), phases, right=("from", *_RATIOS)))
    ratios = prediction.ratios.cct_ratios
    if ratios is not None:
        seeds = ((prediction.hash_seed + number, f"{ratio:.3f}") for number, ratio in enumerate(ratios))
        lines.append("\n" + render_columns(("hash seed", "ratio"), seeds, right=("hash seed", "ratio")))
    return "".join(lines)


_MAX_NAMES = 4


def _render_path(flow: FlowPath) -> str:
    hops = (hop if hop.count("|") < _MAX_NAMES else f"{hop.count('|') + 1} nodes" for hop in flow.path)
    path = " > ".join(hops)
    if flow.spread > 1:
        return f"{path} (each packet over one of {flow.spread} paths)"
    return f"{path} (until it pauses)" if flow.may_change else path


def schema() -> None:
    """Print the JSON schema of scenarios, for editors."""
    from testbed.scenario import render_json_schema

    sys.stdout.write(render_json_schema())


def _switch_lines(switches: list[dict[str, Any]]) -> list[str]:
    """Return memory, marking and pausing, a line for each kind of switch port."""
    from testbed.units import format_size, format_time

    lines = []
    for row in switches:
        few = row["ports"][0] + (f" and {len(row['ports']) - 1} alike" if len(row["ports"]) > 1 else "")
        text = f"{few}: buffer {format_size(row['buffer_bytes'])}"
        if row["kmax_bytes"] is not None:
            kmin, kmax = format_size(row["kmin_bytes"]), format_size(row["kmax_bytes"])
            text += f"; ECN kmin {kmin}, kmax {kmax}, pmax {row['pmax_fraction']:g}"
        if row["headroom_bytes"] is not None:
            xoff = format_size(row["xoff_bytes"]) if row["xoff_bytes"] else f"alpha {row['alpha_fraction']:g}"
            text += f"; PFC xoff {xoff}, headroom {format_size(row['headroom_bytes'])}"
            text += f" of {format_size(row['needed_headroom_bytes'])} needed"
            text += f" ({format_time(round(row['pause_delay_ns']), significant=4)} to pause)"
        lines.append(text + "\n")
    return lines


def _weight_of(priority: dict[str, Any]) -> str:
    return "strict" if priority["weight"] is None else f"weight {priority['weight']}"


def _priority_lines(report: dict[str, Any]) -> list[str]:
    """Return the data priorities where there are several, and what of the headroom is this machine's reaction time."""
    from testbed.units import format_time

    lines = []
    if len(report["data_priorities"]) > 1:
        shown = ", ".join(
            f"{one['priority']} ({'lossless' if one['lossless'] else 'lossy'}, {_weight_of(one)})"
            for one in report["data_priorities"]
        )
        lines.append(f"data priorities     {shown}; a queue each at every port\n")
    allowance_ns, late_ns = report["wall_gate_allowance_ns"], report["wall_tick_lateness_ns"]
    if allowance_ns is not None:
        late = (
            "assumed, not measured yet"
            if late_ns is None
            else f"of which ticks are {format_time(late_ns)} late, measured"
        )
        emulated = format_time(round(allowance_ns / report["time_dilation"]), significant=4)
        lines.append(
            f"reaction to pauses  {emulated} in the headroom: {format_time(allowance_ns, significant=4)} of wall time, {late}\n"
        )
    return lines


def _back_end_lines(back_ends: dict[str, str | None] | None) -> list[str]:
    """Return which of this kernel's means would do the work."""
    if back_ends is None:
        return ["back ends           chosen by trying this kernel, which needs root\n"]
    used = ", ".join(f"{what} {name}" for what, name in back_ends.items() if name is not None)
    return [f"back ends           {used}\n"]


_MOST_FAULTS = 8


def _render_plan(plan: Plan, report: dict[str, Any]) -> str:
    """Return a plan as text for people; the report is `describe_plan`'s of it."""
    from testbed.cli.text import render_columns
    from testbed.units import format_byte_rate, format_rate, format_size, format_time

    lines = [f"{plan.scenario.name}: {plan.scenario.description}".rstrip(": ") + "\n\n"]
    nodes = [(node["name"], node["kind"], " ".join(node["ports"])) for node in report["nodes"]]
    lines.append(render_columns(("node", "kind", "ports"), nodes) + "\n")
    links = [
        (
            link["name"],
            " ".join(link["ends"]),
            format_rate(link["rate_bits_per_s"]),
            format_byte_rate(round(link["wall_rate_bytes_per_s"]), significant=4),
            format_time(link["delay_ns"]),
        )
        for link in report["links"]
    ]
    lines.append(
        render_columns(("link", "ends", "rate", "wall rate", "delay"), links, right=("rate", "wall rate")) + "\n"
    )
    if report["oversubscription"] is not None:
        lines.append(f"zones oversubscribed 1:{report['oversubscription']:.3g}\n\n")
    lines += _switch_lines(report["switches"])
    lines += _priority_lines(report)
    lines += _back_end_lines(report["back_ends"])
    lines += [f"retransmit timeout  {format_time(plan.retransmit_timeout_ns, significant=4)}\n"]
    lines += _fault_lines(report)
    lines += _dilation_lines(report["dilation"])
    items: list[tuple[object, ...]] = [
        (
            item["collective"],
            item["algorithm"],
            format_size(item["size_bytes"]),
            item["nranks"],
            f"{item['warmup_iters']}+{item['iters']}",
            format_time(round(item["cct_ideal_ns"]), significant=5),
            f"{item['predicted_cct_ratio']:.3f}",
            format_time(round(item["wall_duration_ns"]), significant=3),
        )
        for item in report["workloads"]
    ]
    header: tuple[str, ...] = (
        "workload",
        "algorithm",
        "size",
        "nranks",
        "iters",
        "ideal",
        "predicted ratio",
        "wall time",
    )
    right = header[2:]
    if plan.scenario.jobs:
        header = ("job", "hosts", "beside", *header)
        items = [
            (row["job"], _render_numbers(row["hosts"]), ",".join(row["beside"]), *item)
            for row, item in zip(report["workloads"], items, strict=True)
        ]
    if plan.applications:
        lines.append("\n" + _render_applications(report["applications"]))
    else:
        lines.append("\n" + render_columns(header, items, right=right))
    lines += _admission_lines(report["workloads"])
    lines += [f"warning: {warning}\n" for warning in plan.warnings]
    if "operations" in report:
        lines.append(
            "\n" + render_columns(("node", "command"), [(o["node"], o["command"]) for o in report["operations"]])
        )
    return "".join(lines)


def _render_applications(rows: Sequence[dict[str, Any]]) -> str:
    from testbed.cli.text import render_columns
    from testbed.units import format_time

    header = ("application", "hosts", "commands", "iters", "wall timeout", "predicted ratio")
    cells = [
        (
            row["application"],
            _render_numbers(row["hosts"]),
            row["commands"],
            f"{row['warmup_iters']}+{row['iters']}",
            format_time(row["wall_timeout_ns"]),
            "none: it opens its flows itself",
        )
        for row in rows
    ]
    return render_columns(header, cells, right=("commands", "iters", "wall timeout"))


def _fault_lines(report: dict[str, Any]) -> list[str]:
    """Return what breaks and when tables follow; of many flaps the first."""
    from testbed.units import format_time

    lines = []
    faults = report.get("faults", [])
    for fault in faults[:_MOST_FAULTS]:
        until = "" if fault["until_ns"] is None else f" to {format_time(fault['until_ns'])}"
        lines.append(f"fault               {fault['text']} at {format_time(fault['at_ns'])}{until}\n")
    if len(faults) > _MOST_FAULTS:
        lines.append(f"                    and {len(faults) - _MOST_FAULTS} more\n")
    times = report.get("table_changes_ns", [])
    if times:
        more = f" and {len(times) - _MOST_FAULTS} times more" if len(times) > _MOST_FAULTS else ""
        lines.append(f"tables change       at {', '.join(map(format_time, times[:_MOST_FAULTS]))}{more}\n")
    return lines


def _admission_lines(items: list[dict[str, Any]]) -> list[str]:
    """Return what receiver-driven admission should lead to, a line for each workload item that has it."""
    from testbed.units import format_size, format_time

    lines = []
    for item in items:
        found = item["admission"]
        if found:
            queue = "the data's queue" if found["shares_queue"] else "the control queue"
            lines.append(
                f"admission of {item['collective']}: window {format_size(found['window_bytes'])} in {found['grants']} grants, "
                f"CTS frames at priority {found['priority']} in {queue}; {found['senders']} to one NIC, "
                f"loop {format_time(found['loop_ns'], significant=4)}, BDP {format_size(found['bdp_bytes'])}: "
                f"throughput {found['together_throughput_fraction']:.1%} (windows together) to "
                f"{found['throughput_fraction']:.1%} (in turn), queue at most {format_size(found['peak_bound_bytes'])}\n"
            )
    return lines


def _render_numbers(numbers: Sequence[int]) -> str:
    """Return numbers with runs of three and more drawn together, such as ``0-3,8,9``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)


def _dilation_lines(dilation: dict[str, Any]) -> list[str]:
    """Return the dilation, both its bounds and which of them binds."""
    from testbed.units import format_time

    capacity = dilation["capacity_value"]
    measured = dilation["capacity_packets_per_s"]
    if capacity is None:
        capacity_text = "not known: this machine's capacity was not measured yet, the first run does"
    else:
        offered = dilation["offered_packets_per_s"]
        capacity_text = f"{capacity:.0f} (offers {offered:.4g} packets/s, this machine carries {measured:,.0f})"
    smallest = dilation["smallest_time_ns"]
    fidelity_text = f"{dilation['fidelity_value']:.0f}"
    if smallest:
        tick = format_time(dilation["wall_tick_ns"])
        fidelity_text += f" (tick of {tick} against a {dilation['smallest_time_name']} of {format_time(smallest)})"
    return [
        f"time dilation       {dilation['value']:g}, set by: {dilation['bound']}\n",
        f"  capacity bound    {capacity_text}\n",
        f"  fidelity bound    {fidelity_text}\n",
    ]
