"""Pictures of small fabrics, with and without the heat of a run: ``graph/<name>.{mmd,dot,svg}``."""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from testbed import api
from testbed.results import LinkDirection
from testbed.results.graph import Graph, render_dot, render_mermaid
from testbed.results.graph_svg import render_svg

GOLDEN = Path(__file__).parent / "graph"
SCENARIOS = Path(__file__).parents[2] / "scenarios"
RENDERERS = {"mmd": render_mermaid, "dot": render_dot, "svg": render_svg}
SMALL = ("fabric.leaves=2", "fabric.spines=2", "fabric.hosts_per_leaf=2")


def clos(*overrides: str) -> Graph:
    return api.describe_graph(api.load(SCENARIOS / "ai-zone.yaml", [*SMALL, *overrides]))


def heated(graph: Graph) -> Graph:
    """Give each direction a load of its own, from idle to full; one queue drops."""
    figures = iter(range(1000))
    total = 2 * len(graph.links) - 1

    def heat(way: LinkDirection) -> LinkDirection:
        number = next(figures)
        return dataclasses.replace(
            way,
            bytes=1000 * number,
            packets=number,
            utilisation_fraction=number / total,
            peak_depth_bytes=number * number << 12,
            drops_packets=7 if number == 3 else 0,
        )

    links = tuple(dataclasses.replace(link, up=heat(link.up), down=heat(link.down)) for link in graph.links)
    return dataclasses.replace(graph, links=links, measured=True)


GRAPHS = {
    "star": lambda: api.describe_graph(api.load(SCENARIOS / "star.yaml", [])),
    "clos-2x2x2": clos,
    "clos-2x2x2-heat": lambda: heated(clos()),
}


@pytest.mark.parametrize("kind", sorted(RENDERERS))
@pytest.mark.parametrize("name", sorted(GRAPHS))
def test_picture_is_as_recorded(name: str, kind: str, update_golden: bool) -> None:
    found = RENDERERS[kind](GRAPHS[name]())
    file = GOLDEN / f"{name}.{kind}"
    if update_golden:
        file.write_text(found, encoding="utf-8")
    assert found == file.read_text(encoding="utf-8")


def test_every_recording_has_its_graph() -> None:
    assert {file.name for file in GOLDEN.iterdir()} == {f"{name}.{kind}" for name in GRAPHS for kind in RENDERERS}


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*.svg")), ids=lambda path: path.stem)
def test_recorded_svg_is_well_formed(file: Path) -> None:
    assert ElementTree.fromstring(file.read_text(encoding="utf-8")).tag == "{http://www.w3.org/2000/svg}svg"
