"""Commands on labs: deploy, inspect, exec, destroy, gc. All need root."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from testbed.cli.options import Format, LabName, OutputFormat, ScenarioFile, Set, read_overrides
from testbed.cli.signals import ignore_signals

if TYPE_CHECKING:
    from testbed.fabric import Lab


def deploy(file: ScenarioFile, overrides: Set = None, name: LabName = None) -> None:
    """Build a lab that stays, for runs with --name and for working in it by hand."""
    from testbed import api
    from testbed.cli.run import StderrListener

    fabric = api.deploy(api.load(file, read_overrides(overrides)), name, listener=StderrListener())
    try:
        print(f"lab {fabric.name}: {len(fabric.plan.topology.nodes)} nodes, {len(fabric.plan.topology.links)} links")
        sys.stdout.flush()
        ignore_signals()
    except BaseException:  # whoever ended it now has seen no success
        fabric.destroy()
        raise
    fabric.close()


def inspect(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[LAB]", envvar="TESTBED_LAB", help="The lab; else the only one, or a list.", show_default=False
        ),
    ] = None,
    output_format: Format = OutputFormat.TABLE,
) -> None:
    """Show a lab: nodes and their namespaces, links, queue depths and counters; or list the labs."""
    from testbed import api
    from testbed.cli.text import render_json

    known = api.labs()
    if name is None and len(known) != 1:
        _print_labs(known, output_format)
        return
    lab = api.inspect(name)
    print(render_json(lab) if output_format is OutputFormat.JSON else _render_lab(lab))


def break_(
    lab: Annotated[str, typer.Argument(metavar="LAB", help="The lab.", show_default=False)],
    what: Annotated[
        str, typer.Argument(metavar="WHAT", help="A link such as leaf0:spine1, or a switch.", show_default=False)
    ],
    loss: Annotated[
        str | None,
        typer.Option("--loss", metavar="FRACTION", help="Let the link lose that share of its frames instead."),
    ] = None,
    rate: Annotated[
        str | None, typer.Option("--rate", metavar="RATE", help='Let the link have another rate, such as "100 Gbit/s".')
    ] = None,
) -> None:
    """Break a link or a switch of a deployed lab until it is healed; its switches route around what is down."""
    from testbed import api

    print("\n".join(f"broken: {one}" for one in api.break_lab(lab, what, loss=loss, rate=rate)))


def heal(
    lab: Annotated[str, typer.Argument(metavar="LAB", help="The lab.", show_default=False)],
    what: Annotated[
        str | None, typer.Argument(metavar="[WHAT]", help="The link or switch; else all.", show_default=False)
    ] = None,
) -> None:
    """Heal a link or a switch of a deployed lab, or all that is broken."""
    from testbed import api

    print("\n".join(f"broken: {one}" for one in api.heal_lab(lab, what)) or "nothing is broken")


def execute(
    node: Annotated[str, typer.Argument(metavar="NODE", help="Such as host0 or leaf1.", show_default=False)],
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND...", help="Program and arguments.", show_default=False)
    ],
    lab: Annotated[
        str | None,
        typer.Option(
            "--lab", metavar="LAB", envvar="TESTBED_LAB", help="The lab, where there are several.", show_default=False
        ),
    ] = None,
) -> None:
    """Execute a command in a node's network namespace and return its exit code."""
    from testbed import api

    raise typer.Exit(api.execute(lab, node, command))


def destroy(
    name: Annotated[str | None, typer.Argument(metavar="LAB", help="The lab.", show_default=False)] = None,
    everything: Annotated[
        bool, typer.Option("--all", envvar="TESTBED_ALL", help="Every lab that nobody uses.")
    ] = False,
) -> None:
    """Remove a lab, and what still runs in it."""
    from testbed import api
    from testbed.errors import LabError

    if everything == (name is not None):
        raise typer.BadParameter("give either the name of a lab or --all")
    failure: LabError | None = None
    for lab in api.labs() if name is None else [name]:
        try:
            foreign = api.destroy(lab)
        except LabError as error:  # with --all, one that is in use must not keep the others
            failure = error
            continue
        print(f"removed {lab}")
        _report_foreign(foreign)
    if failure is not None:
        raise failure


def collect_garbage() -> None:
    """Remove what killed processes left behind; deployed labs and labs in use stay."""
    from testbed import api

    removed, foreign = api.collect_garbage()
    for lab in removed:
        print(f"removed {lab}")
    if not removed:
        print("nothing to remove")
    _report_foreign(foreign)


def _report_foreign(namespaces: list[str]) -> None:
    for namespace in namespaces:
        print(f"left alone: the network namespace {namespace} is not ours", file=sys.stderr)


def _print_labs(known: list[str], output_format: OutputFormat) -> None:
    """Print the list of labs."""
    from testbed import api
    from testbed.cli.text import render_columns, render_json
    from testbed.errors import TestbedError

    labs = []
    for name in known:
        try:
            labs.append(api.inspect(name))
        except TestbedError as error:  # removed meanwhile, or half made by a killed process
            print(f"{name}: {error.message}", file=sys.stderr)
    if output_format is OutputFormat.JSON:
        fields = ("name", "scenario", "ephemeral", "ready", "pid", "time_dilation")
        print(render_json({"labs": [{field: getattr(lab, field) for field in fields} for lab in labs]}))
        return
    rows = [(lab.name, lab.scenario, _state(lab), len(lab.nodes), len(lab.links)) for lab in labs]
    print(render_columns(("lab", "scenario", "state", "nodes", "links"), rows, right=("nodes", "links")), end="")


def _state(lab: Lab) -> str:
    if not lab.ready:
        return "unfinished"
    return "of a run" if lab.ephemeral else "deployed"


def _render_lab(lab: Lab) -> str:
    """Return a lab as text for people."""
    from testbed.cli.text import render_columns
    from testbed.units import format_byte_rate, format_rate

    dilation = "-" if lab.time_dilation is None else f"{lab.time_dilation:g}"
    text = f"lab {lab.name} (scenario {lab.scenario}, {_state(lab)}), time dilation {dilation}\n"
    text += "".join(f"broken: {what}\n" for what in lab.broken) + "\n"
    text += render_columns(
        ("node", "kind", "namespace"), [(node.name, node.kind, node.namespace) for node in lab.nodes]
    )
    rows = []
    for link in lab.links:
        wall = link.wall_rate_bytes_per_s
        for end, way in zip(link.ends, link.directions, strict=True):
            figures = [way.depth_bytes, way.peak_depth_bytes, way.packets, way.bytes, way.drops_packets]
            rows.append(
                [
                    f"{way.src} > {way.dst}",
                    end.address,
                    format_rate(link.rate_bits_per_s),
                    "-" if wall is None else format_byte_rate(round(wall), significant=4),
                    *("-" if figure is None else figure for figure in figures),
                ]
            )
    header = ("link", "address", "rate", "wall rate", "depth (B)", "peak (B)", "packets", "bytes", "drops")
    return text + "\n" + render_columns(header, rows, right=header[2:]).rstrip("\n")
