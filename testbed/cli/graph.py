"""``testbed graph``: a fabric as a picture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from testbed.cli.options import Set, read_overrides

if TYPE_CHECKING:
    from testbed.results.graph import Graph

# Values of testbed.results.graph.GraphFormat, which is not imported for the help text; a test compares them.
FORMATS = ("mermaid", "dot", "svg")


def graph(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Scenario, a YAML file.", show_default=False)
    ] = None,
    overrides: Set = None,
    result: Annotated[
        Path | None,
        typer.Option(
            "--result",
            metavar="RESULT",
            envvar="TESTBED_RESULT",
            help="Draw the fabric of this run instead, with the heat of its links: its folder or result.json.",
            show_default=False,
        ),
    ] = None,
    picture_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="|".join(FORMATS),
            envvar="TESTBED_GRAPH_FORMAT",
            help="What to write. [default: by the name of the output, else mermaid]",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            envvar="TESTBED_GRAPH_OUTPUT",
            help="File to write. [default: stdout]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Draw a fabric as mermaid, graphviz or SVG text; after a run with the heat of its links. Needs no other program.

    Colour and width of a link are its utilisation. In SVG and graphviz each half of a link shows what the node at that end sends,
    in mermaid the whole link shows the busier direction.
    """
    from testbed import api
    from testbed.errors import TestbedError
    from testbed.results.graph import GraphFormat

    if (file is None) == (result is None):
        raise typer.BadParameter("give either a scenario or --result")
    if result is not None and overrides:
        raise typer.BadParameter("--set changes a scenario; a result is what it is")
    try:
        chosen = GraphFormat(picture_format or _format_of(output))
    except ValueError:
        raise typer.BadParameter(f"--format is one of {', '.join(FORMATS)}") from None
    if result is not None:
        drawn = api.describe_result_graph(result)
    else:
        assert file is not None
        drawn = api.describe_graph(api.load(file, read_overrides(overrides)))
    text = _render(drawn, chosen)
    if output is None:
        sys.stdout.write(text)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TestbedError(f"{output} cannot be written: {error.strerror}", hint="use --output") from None


def _format_of(output: Path | None) -> str:
    suffix = "" if output is None else output.suffix.lower()
    return {".svg": "svg", ".dot": "dot", ".gv": "dot"}.get(suffix, "mermaid")


def _render(drawn: Graph, chosen: str) -> str:
    from testbed.results.graph import GraphFormat, render_dot, render_mermaid
    from testbed.results.graph_svg import render_svg

    return {GraphFormat.MERMAID: render_mermaid, GraphFormat.DOT: render_dot, GraphFormat.SVG: render_svg}[
        GraphFormat(chosen)
    ](drawn)
