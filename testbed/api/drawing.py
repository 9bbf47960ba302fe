"""A fabric as a graph, a run as curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.api.files import read_result
from testbed.errors import MachineError, TestbedError

if TYPE_CHECKING:
    from testbed.results import LinkDirection
    from testbed.results.graph import Graph
    from testbed.scenario import Scenario

# Steps of a plotted line: more than a picture has pixels; on a page that can be zoomed, as many as a browser draws at ease.
_IMAGE_STEPS, _PAGE_STEPS = 1200, 4000


def describe_graph(scenario: Scenario) -> Graph:
    """Return the fabric of a scenario, ready to be drawn by :mod:`testbed.results.graph`; nothing is built.

    Raises:
        PlanError: No fabric can be planned from it.
    """
    return _graph_of(scenario, {})


def describe_result_graph(file: Path) -> Graph:
    """Return the fabric of a run with the figures of its links, from its ``result.json``.

    Args:
        file: The file, or the folder that holds it.

    Raises:
        TestbedError: The file cannot be read, or is no result.
    """
    result, scenario = read_result(file)
    measured = {way.src: way for link in result.fabric.links for way in link.directions}
    return _graph_of(scenario, measured)


def plot_series(folder: Path, output: Path, *, row: int | None = None, iteration: int | None = None) -> None:
    """Draw the time series of a run.

    Args:
        folder: Its results; it may have been interrupted.
        output: The file to write: ``.html``, or ``.svg``, ``.png``, ``.pdf``.
        row: Row of the results table; by default the last that was run.
        iteration: A single measured iteration; by default all.

    Raises:
        TestbedError: There is no series, no such row or iteration, or the file cannot be written.
        MachineError: What draws is not installed.
    """
    from testbed.results.series import QPS_FILE, QUEUES_FILE, read_series
    from testbed.results.series_html import render_html
    from testbed.results.series_image import IMAGE_SUFFIXES, save_image
    from testbed.results.series_plot import build_plot

    is_image = output.suffix.lower() in IMAGE_SUFFIXES
    drawn = build_plot(
        read_series(folder / QUEUES_FILE),
        read_series(folder / QPS_FILE),
        row=row,
        iteration=iteration,
        steps=_IMAGE_STEPS if is_image else _PAGE_STEPS,
    )
    try:
        if is_image:
            save_image(drawn, output)
        else:
            output.write_text(render_html(drawn), encoding="utf-8")
    except ImportError as error:
        raise MachineError(f"{error.name} is not installed", hint="pip install 'testbed[plot]'") from None
    except OSError as error:
        raise TestbedError(f"{output} cannot be written: {error.strerror}", hint="use --output") from None


def _graph_of(scenario: Scenario, measured: Mapping[str, LinkDirection]) -> Graph:
    """Return a scenario's fabric as a graph, with the figures of a run by the port that sends."""
    from testbed.plan.fabric import build_topology
    from testbed.results import LinkDirection
    from testbed.results.graph import Graph, GraphLink, GraphNode

    topology = build_topology(scenario)

    def way(port_id: int) -> LinkDirection:
        src, dst = topology.port_name(port_id), topology.port_name(topology.port(port_id).peer)
        return measured.get(src) or LinkDirection(src, dst)

    def node_name(port_id: int) -> str:
        return topology.nodes[topology.port(port_id).node].name

    return Graph(
        name=scenario.name,
        nodes=tuple(
            GraphNode(node.name, str(node.kind), tuple(topology.port(port).ifname for port in node.ports))
            for node in topology.nodes
        ),
        links=tuple(
            GraphLink(
                node_name(link.a), node_name(link.b), link.rate_bits_per_s, link.delay_ns, way(link.a), way(link.b)
            )
            for link in topology.links
        ),
        measured=bool(measured),
    )
